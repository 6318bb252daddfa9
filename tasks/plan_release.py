"""Plans a release or a rollback: what it would change, and the hash to hold it to. Writes nothing."""

from collections.abc import Mapping, Sequence

from prefect.cache_policies import NO_CACHE
from pydantic import BaseModel

from prefect_rollout.blocks import open_target, opened_as
from prefect_rollout.blocks.target import Chosen
from prefect_rollout.difference import Found, hold_to, release_plan, summary
from prefect_rollout.errors import NotFoundError, TemplateError
from prefect_rollout.models import Action, Deployment, Id, Procedure, ReleasePlan, Template, Version
from prefect_rollout.platforms.port import Platform
from prefect_rollout.replicas import Replicas, kept, released
from prefect_rollout.revisions import capped
from prefect_rollout.tasks.before import online_everywhere, pods_of, seen
from prefect_rollout.tasks.build_image_list import choose_images
from prefect_rollout.tasks.choose_rollback import find_previous
from prefect_rollout.tasks.get_template import Selected, find_template
from prefect_rollout.tasks.parse_metadata import scope_of
from prefect_rollout.tasks.step import run_logger, say, step


class Asked(BaseModel):
    """What is to be planned.

    Attributes:
        action: what is to be done.
        app_id: the app's id.
        deployment: the deployment's name.
        clusters: only these; all of them if none are named.
        template_id: what to release from, or to go back to; empty for the newest, or the previous ones.
        images: the images that a deploy puts in place of the template's.
        replicas: pods wanted in each cluster; `None` for as many as the metaData says.
        procedure: in which order it writes, and what follows a failure.
        release_id: names the run; a template that it created itself is no base for it.
    """

    action: Action
    app_id: Id
    deployment: str
    clusters: Sequence[str] | None = None
    template_id: Id | None = None
    images: Mapping[str, str] | None = None
    replicas: int | None = None
    procedure: Procedure = Procedure()
    release_id: str | None = None


# Never from an earlier try: a plan says what would be done now.
@step("plan release", "plan {asked.action.value} of {asked.deployment}", cache_policy=NO_CACHE)
async def plan_release(asked: Asked, *, target: str) -> ReleasePlan:
    """Reads all anew that decides what the release does, and says what it would change.

    What it returns holds no text of a template, whose environment values may be secrets.

    Args:
        asked: what is to be planned.
        target: the block document `type-slug/name` of the platform.

    Raises:
        RolloutError: what the steps that it stands for would raise.
    """
    async with open_target(target) as platform:
        plan = await _plan(platform, await opened_as(target), asked)
    say("plan release", f"plan {plan.plan_hash}: {summary(plan)}")
    return plan


@step("check plan", "check plan {expected} of {asked.deployment}")
async def check_plan(asked: Asked, expected: str, *, target: str) -> ReleasePlan:
    """Plans as `plan_release` does, and compares, before the first write of a run.

    What it found stands for the whole flow run: a retry finds the world changed by its own writes.

    Args:
        asked: what is about to be done.
        expected: the hash of the plan.
        target: the block document `type-slug/name` of the platform.

    Raises:
        PlanChangedError: the plan is another by now.
        RolloutError: what the steps that it stands for would raise.
    """
    async with open_target(target) as platform:
        plan = await _plan(platform, await opened_as(target), asked)
    hold_to(plan, expected)
    say("check plan", f"plan {plan.plan_hash} holds")
    return plan


async def _plan(platform: Platform, chosen: Chosen, asked: Asked) -> ReleasePlan:
    deployment = await platform.deployment(asked.app_id, asked.deployment)
    scope = scope_of(deployment, asked.clusters)
    listed = {each.cluster: each.template_id for each in await platform.online(deployment)}
    online = {cluster: listed.get(cluster) for cluster in scope.replicas}
    base: Id | None = None
    after: dict[str, Template]
    selected: list[Selected] = []
    if asked.action is Action.DEPLOY:
        newest = await find_template(platform, deployment, asked.template_id, asked.release_id)
        selected, base = [newest], newest.template.id
        after = dict.fromkeys(online, newest.template)
        images = dict.fromkeys(online, choose_images(newest.template.version, asked.images))
    else:
        if asked.action is Action.ROLLBACK:
            previous = await find_previous(platform, deployment, online, asked.template_id)
            selected = list(previous.values())
            after = {cluster: each.template for cluster, each in previous.items()}
        else:
            after = await _kept(platform, deployment, online)
        images = {cluster: template.version.images for cluster, template in after.items()}
    before = await _texts(platform, deployment, online, {str(each.id): each for each in after.values()})
    live = [cluster for cluster, template_id in online.items() if template_id is not None]
    status = await seen(platform, deployment, list(online), live)
    found = []
    for cluster, template_id in online.items():
        now = status.get(cluster)
        pods, desired = pods_of(now), now.desired if now else None
        if asked.replicas is not None:
            wanted = Replicas(asked.replicas)
        elif asked.action is Action.RESTART:
            wanted = kept(desired, pods, scope.replicas[cluster])
        else:
            wanted = released(desired, pods, scope.replicas[cluster])
        found.append(
            Found(
                cluster=cluster,
                online=template_id,
                before=before[str(template_id)],
                after=after[cluster],
                images=images[cluster],
                pods=None if pods is None else len(pods),
                replicas=wanted.number,
                desired=desired,
                assumed=wanted.assumed,
                note=wanted.note,
            )
        )
    return release_plan(
        asked.action,
        found,
        platform=platform.identity,
        cloud=chosen.block.address,
        target=chosen.name,
        app_id=asked.app_id,
        deployment_id=deployment.id,
        deployment=deployment.name,
        base=base,
        strategy=scope.strategy,
        in_place=scope.in_place,
        procedure=asked.procedure,
        notes=[note for each in selected for note in capped(each.notes)],
        unknown=list({str(each.template.id): each.template.id for each in selected if each.unknown}.values()),
    )


async def _kept(
    platform: Platform, deployment: Deployment, online: Mapping[str, Id | None]
) -> dict[str, Template]:
    """The templates that are online and stay so."""
    found: dict[str, Template] = {}
    for template_id in {str(each): each for each in online_everywhere(deployment, online).values()}.values():
        found[str(template_id)] = await platform.template(deployment, template_id)
    return {cluster: found[str(template_id)] for cluster, template_id in online.items()}


async def _texts(
    platform: Platform,
    deployment: Deployment,
    online: Mapping[str, Id | None],
    known: Mapping[str, Template],
) -> dict[str, Template | None]:
    """The templates that are online by their id, `None` for nothing and for what cannot be read."""
    found: dict[str, Template | None] = {**known, str(None): None}
    for template_id in online.values():
        if template_id is None or str(template_id) in found:
            continue
        try:
            template = await platform.template(deployment, template_id)
            _: Version = template.version  # raises where it is no Deployment
            found[str(template_id)] = template
        except (NotFoundError, TemplateError) as error:
            # Deleted or spoilt since it was published. It only serves to tell what changes.
            run_logger().warning("What is online cannot be read: %s", error)
            found[str(template_id)] = None
    return found
