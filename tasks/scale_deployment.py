"""Changes how many pods a cluster runs."""

from prefect_rollout import guard
from prefect_rollout.blocks import open_target
from prefect_rollout.models import Deployment
from prefect_rollout.tasks.step import may_have_run_before, run_logger, say, step
from prefect_rollout.text import one_line


@step("scale deployment", "scale {deployment.name} in {cluster} to {replicas}")
async def scale_deployment(
    deployment: Deployment, cluster: str, replicas: int, *, release_id: str, target: str
) -> None:
    """Asks for that many pods. Returns when the write is accepted: step 7 watches the pods.

    A second try sends nothing where the cluster wants that many already.

    Args:
        deployment: as step 1 found it.
        cluster: the cluster.
        replicas: pods, 1 to 32 (contract).
        release_id: names this release.
        target: the block document `type-slug/name` of the platform.
    """
    say("scale deployment", f"{one_line(cluster, 80)}, replicas {replicas}")
    async with open_target(target) as platform:
        if may_have_run_before():
            now = (await platform.status(deployment, [cluster])).get(cluster)
            counted = now.deployment.pod_state if now and now.deployment else None
            if counted and counted.desired == replicas:
                run_logger().info("%s wants %d already: not asked again", one_line(cluster), replicas)
                return
        await guard.write(platform.scale(deployment, cluster, replicas, key=f"{release_id}:scale:{cluster}"))
