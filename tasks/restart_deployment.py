"""Restart a cluster: replace its pods with new ones of the same revision."""

from prefect_rollout.blocks import open_target
from prefect_rollout.ids import Id
from prefect_rollout.release.workload import Baseline, Published, Workload
from prefect_rollout.runs import guard
from prefect_rollout.runs.moves import restart_key
from prefect_rollout.runs.step import may_have_run_before, run_logger, say, step
from prefect_rollout.text import one_line


@step("restart deployment", "restart {workload.name} in {cluster}")
async def restart_deployment(
    workload: Workload, cluster: str, online: Id, *, before: Baseline, release_id: str, target: str
) -> Published:
    """Request the restart. Return when the platform has accepted the write: step 7 watches the pods.

    A second attempt writes nothing if the first one took effect, as far as the platform can tell. If it
    reports neither keys, generations nor new pods, a restart whose answer was lost may be sent twice. The
    images that are `online` stay.
    """
    say("restart deployment", one_line(cluster, 80))
    key = restart_key(release_id, cluster)
    async with open_target(target) as platform:
        if may_have_run_before() and (done := await platform.restarted(workload, cluster, before, key=key)):
            run_logger().info("%s is already restarted: not restarted again", one_line(cluster))
            return Published(applied=done)
        applied = await guard.write(platform.restart(workload, cluster, online=online, key=key))
    return Published(applied=applied)
