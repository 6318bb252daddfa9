"""Scale a cluster."""

from prefect_rollout.blocks import open_target
from prefect_rollout.ids import Id
from prefect_rollout.release.workload import Applied, Published, Workload
from prefect_rollout.runs import guard
from prefect_rollout.runs.step import may_have_run_before, run_logger, say, step
from prefect_rollout.text import one_line


@step("scale deployment", "scale {workload.name} in {cluster} to {replicas}")
async def scale_deployment(
    workload: Workload, cluster: str, replicas: int, online: Id, *, release_id: str, target: str
) -> Published:
    """Request the replicas. Return when the platform has accepted the write: step 7 watches the pods.

    A second attempt writes nothing if the cluster already has these desired replicas: 1 to 32 (contract).
    The revision that is `online` stays.
    """
    say("scale deployment", f"{one_line(cluster, 80)}, replicas {replicas}")
    async with open_target(target) as platform:
        if may_have_run_before():
            now = (await platform.status(workload, [cluster])).get(cluster)
            if now is not None and now.desired == replicas:
                run_logger().info("%s has %d replicas already: not scaled again", one_line(cluster), replicas)
                return Published(applied=Applied(revision=online))
        key = f"{release_id}:scale:{cluster}"
        applied = await guard.write(platform.scale(workload, cluster, replicas, online=online, key=key))
    return Published(applied=applied)
