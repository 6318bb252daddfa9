"""Step 5: upgrade the deployment, that is, prepare the change to publish."""

from collections.abc import Mapping, Sequence

from prefect_rollout.blocks import open_target
from prefect_rollout.release.workload import Change, Revision, Workload
from prefect_rollout.runs import guard
from prefect_rollout.runs.step import may_have_run_before, run_logger, say, step
from prefect_rollout.text import one_line


@step("upgrade deployment", "upgrade {workload.name} from template {template.id}")
async def upgrade_deployment(
    workload: Workload,
    template: Revision,
    clusters: Sequence[str],
    images: Mapping[str, str],
    *,
    release_id: str,
    reason: str = "",
    requested_by: str = "",
    target: str,
) -> Change:
    """Prepare one change for all clusters. A second attempt uses the change of the first, if there is one.

    Args:
        workload: from step 1.
        template: the revision to start from.
        clusters: the clusters to publish to.
        images: `{container: image}` of the new revision.
        release_id: identifies the release; a repeat with the same id creates nothing new.
        reason: the reason, for the revision's description.
        requested_by: the person who requested the release, for the same.
        target: block of the platform, as type-slug/name.

    Raises:
        UpgradeError: the platform did not prepare exactly one change. Nothing is published.
    """
    async with open_target(target) as platform:
        change = await platform.prepared(workload, release_id) if may_have_run_before() else None
        if change is not None:
            run_logger().info("The change of this release exists: not created again")
        else:
            change = await guard.write(
                platform.prepare(
                    workload,
                    template,
                    images,
                    clusters=clusters,
                    release_id=release_id,
                    note=reason,
                    requested_by=requested_by,
                    key=f"{release_id}:upgrade",
                )
            )
    new = "" if change.revision is None else f"template {one_line(change.revision, 80)}"
    say("upgrade deployment", new or "the change is ready")
    return change
