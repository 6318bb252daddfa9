"""Restart a cluster: replace its pods with new ones of the same revision."""

from prefect_rollout.blocks import open_target
from prefect_rollout.ids import Id
from prefect_rollout.release.workload import Applied, Baseline, Published, Workload
from prefect_rollout.runs import guard
from prefect_rollout.runs.step import may_have_run_before, run_logger, say, step
from prefect_rollout.text import one_line
from prefect_rollout.verdict.status import Status


@step("restart deployment", "restart {workload.name} in {cluster}")
async def restart_deployment(
    workload: Workload, cluster: str, online: Id, *, before: Baseline, release_id: str, target: str
) -> Published:
    """Request the restart. Return when the platform has accepted the write: step 7 watches the pods.

    A second attempt writes nothing if the first one took effect: the generation is newer, or there is a pod
    that the baseline does not have. If a platform reports neither and has no idempotency keys, a restart
    whose answer was lost may be sent twice. The revision that is `online` stays.
    """
    say("restart deployment", one_line(cluster, 80))
    async with open_target(target) as platform:
        if may_have_run_before():
            now = (await platform.status(workload, [cluster])).get(cluster)
            if now is not None and _restarted(now, before):
                run_logger().info("%s is already restarted: not restarted again", one_line(cluster))
                return Published(applied=Applied(revision=online))
        key = f"{release_id}:restart:{cluster}"
        applied = await guard.write(platform.restart(workload, cluster, online=online, key=key))
    return Published(applied=applied)


def _restarted(now: Status, before: Baseline) -> bool:
    if now.generation is not None and before.generation is not None and now.generation > before.generation:
        return True
    return before.pods is not None and not set(now.pod_states or {}) <= set(before.pods)
