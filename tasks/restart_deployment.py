"""Has a cluster replace its pods by new ones of the same template."""

from prefect_rollout import guard
from prefect_rollout.blocks import open_target
from prefect_rollout.models import Deployment
from prefect_rollout.tasks.before import Before, pods_of
from prefect_rollout.tasks.step import may_have_run_before, run_logger, say, step
from prefect_rollout.text import one_line


@step("restart deployment", "restart {deployment.name} in {cluster}")
async def restart_deployment(
    deployment: Deployment, cluster: str, *, before: Before, release_id: str, target: str
) -> None:
    """Asks for the restart. Returns when the write is accepted: step 7 watches the pods.

    A second try looks first whether an earlier one took effect: a newer generation, or a pod that did
    not stand there before. Where a cloud reports neither and knows no idempotency keys, a restart whose
    answer was lost may be sent twice.

    Args:
        deployment: as step 1 found it.
        cluster: the cluster.
        before: what stood there before.
        release_id: names this release.
        target: the block document `type-slug/name` of the platform.
    """
    say("restart deployment", one_line(cluster, 80))
    async with open_target(target) as platform:
        if may_have_run_before():
            now = (await platform.status(deployment, [cluster])).get(cluster)
            newer = now and None not in (now.generation, before.generation)
            moved = newer and now and (now.generation or 0) > (before.generation or 0)
            known = before.pods is not None
            if moved or (known and set(pods_of(now) or {}) - set(before.pods or {})):
                run_logger().info("%s has restarted already: not asked again", one_line(cluster))
                return
        await guard.write(platform.restart(deployment, cluster, key=f"{release_id}:restart:{cluster}"))
