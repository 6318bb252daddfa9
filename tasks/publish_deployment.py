"""Step 6: publish a template to one cluster."""

from prefect_rollout.blocks import open_target
from prefect_rollout.errors import ConflictError
from prefect_rollout.models import Deployment, Id, same_id
from prefect_rollout.platforms.port import Platform
from prefect_rollout.tasks.step import may_have_run_before, run_logger, say, step
from prefect_rollout.text import one_line

# The newest publishes of a deployment among which an earlier try of this step has to stand.
HISTORY_LOOKED_AT = 200


@step("publish deployment", "publish {deployment.name} to {cluster}")
async def publish_deployment(
    deployment: Deployment,
    template_id: int | str,
    cluster: str,
    replicas: int,
    *,
    release_id: str,
    target: str,
) -> dict[str, str | None] | None:
    """Has a cluster run `replicas` pods of the template.

    Returns when the write is accepted, which says nothing of the rollout: step 7 watches that. A
    second try first looks at what is online, and sends nothing where it is this template already
    (contract, Idempotency), or was, before another release followed.

    Returns:
        `{pod: state}` as listed right before the write was sent; `None` where that is unknown.

    Args:
        deployment: as step 1 found it.
        template_id: the template that step 5 created.
        cluster: the cluster.
        replicas: the cluster's replicas, by step 2.
        release_id: names this release; a repeat with the same id publishes nothing new.
        target: the block document `type-slug/name` of the platform.

    Raises:
        QuotaExceededError: the namespace's quota does not suffice.
        ConflictError: another publish of this deployment and cluster is running, or another release
            was published over this one.
    """
    say("publish deployment", f"{one_line(cluster, 80)}, replicas {replicas}")
    async with open_target(target) as platform:
        if may_have_run_before() and await _took_effect(platform, deployment, template_id, cluster):
            run_logger().info("%s has this release's template: not published again", one_line(cluster))
            return None
        status = (await platform.status(deployment, [cluster])).get(cluster)
        pods = None if status is None or status.pods is None else status.pods
        await platform.publish(
            deployment, template_id, cluster, replicas, key=f"{release_id}:publish:{cluster}"
        )
    return None if pods is None else {pod.name: pod.state for pod in pods}


async def _took_effect(platform: Platform, deployment: Deployment, template_id: Id, cluster: str) -> bool:
    """Whether an earlier try published; raises where another release was published over it since."""
    for online in await platform.online(deployment):
        if online.cluster == cluster and same_id(online.template_id, template_id):
            return True
    seen = 0
    async for publication in platform.history(deployment):
        if (
            publication.cluster == cluster
            and publication.status == 1
            and same_id(publication.template_id, template_id)
        ):
            raise ConflictError(
                f"another release was published to {one_line(cluster, 80)} after this one",
                advice="Look at what is online there, and start a new release if it should change.",
                cluster=cluster,
            )
        seen += 1
        if seen >= HISTORY_LOOKED_AT:
            break
    return False
