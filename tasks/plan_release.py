"""Show a plan: compare the pod templates of the revisions that it replaces."""

from typing import Any

from prefect.cache_policies import NO_CACHE

from prefect_rollout.blocks import open_target
from prefect_rollout.errors import NotFoundError, TemplateError
from prefect_rollout.ids import Id
from prefect_rollout.platforms.port import Platform
from prefect_rollout.release.plan import ReleasePlan, with_changes
from prefect_rollout.release.plan_words import summary
from prefect_rollout.release.pod_diff import differences
from prefect_rollout.release.workload import Workload
from prefect_rollout.runs.step import run_logger, say, step


@step("plan release", "plan {plan.plan_hash} of {workload.name}", cache_policy=NO_CACHE)
async def plan_release(workload: Workload, plan: ReleasePlan, *, target: str) -> ReleasePlan:
    """Return the plan with the changes of pod templates. No value that might be a secret is kept."""
    templates: dict[str, dict[str, Any] | None] = {}
    changes = {}
    async with open_target(target) as platform:
        for each in plan.clusters:
            base = plan.base_template_id if each.base_template_id is None else each.base_template_id
            after = base if each.template is None else each.template
            if each.changes is not None or each.template_before is None or after is None:
                continue
            for revision in (each.template_before, after):
                if str(revision) not in templates:
                    templates[str(revision)] = await _pod_template(platform, workload, revision)
            old, new = templates[str(each.template_before)], templates[str(after)]
            if old is not None and new is not None:
                changes[each.cluster] = differences(old, new)
    shown = with_changes(plan, changes)
    say("plan release", f"plan {shown.plan_hash}: {summary(shown)}")
    return shown


async def _pod_template(platform: Platform, workload: Workload, revision: Id) -> dict[str, Any] | None:
    try:
        return await platform.pod_template(workload, revision)
    except (NotFoundError, TemplateError) as error:  # deleted, or unreadable, since it was published
        run_logger().warning("The changes of the pod template are not known: %s", error)
        return None
