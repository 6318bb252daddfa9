"""Step 6: publish a template to one cluster."""

from prefect_rollout import guard
from prefect_rollout.blocks import open_target
from prefect_rollout.errors import ConflictError
from prefect_rollout.models import Deployment, Id, same_id, same_or_none, template_name
from prefect_rollout.platforms.port import Platform
from prefect_rollout.tasks.before import pods_of
from prefect_rollout.tasks.step import may_have_run_before, run_logger, say, step
from prefect_rollout.text import one_line


@step("publish deployment", "publish {deployment.name} template {template_id} to {cluster}")
async def publish_deployment(
    deployment: Deployment,
    template_id: int | str,
    cluster: str,
    replicas: int,
    *,
    over: int | str | None,
    release_id: str,
    target: str,
) -> dict[str, str | None] | None:
    """Has a cluster run `replicas` pods of the template.

    Returns when the write is accepted, which says nothing of the rollout: step 7 watches that. Before
    it writes it looks at what is online there: nothing is sent where an earlier try took effect
    (contract, Idempotency), nor where somebody else has published in the meantime.

    Returns:
        `{pod: state}` as listed right before the write was sent; `None` where that is unknown.

    Args:
        deployment: as step 1 found it.
        template_id: the template to publish.
        cluster: the cluster.
        replicas: the cluster's replicas, by step 2.
        over: the template that was online when the release was prepared; `None` if none was or it is
            unknown.
        release_id: names this release; a repeat with the same id publishes nothing new.
        target: the block document `type-slug/name` of the platform.

    Raises:
        QuotaExceededError: the namespace's quota does not suffice.
        ConflictError: another publish of this deployment and cluster is running, or another release
            was published since this one was prepared.
    """
    say("publish deployment", f"{one_line(cluster, 80)}, replicas {replicas}")
    key = f"{release_id}:publish:{cluster}"
    return await publish(deployment, template_id, cluster, replicas, over=over, key=key, target=target)


async def publish(
    deployment: Deployment,
    template_id: Id,
    cluster: str,
    replicas: int,
    *,
    over: Id | None,
    key: str,
    target: str,
) -> dict[str, str | None] | None:
    """Do what `publish_deployment` says; `key` is the write's idempotency key."""
    async with open_target(target) as platform:
        if await _took_effect(platform, deployment, template_id, cluster, over):
            run_logger().info("%s has this release's template: not published again", one_line(cluster))
            return None
        status = (await platform.status(deployment, [cluster])).get(cluster)
        await guard.write(platform.publish(deployment, template_id, cluster, replicas, key=key))
    return pods_of(status)


async def _took_effect(
    platform: Platform, deployment: Deployment, template_id: Id, cluster: str, over: Id | None
) -> bool:
    """Whether an earlier try published; raises where somebody else has since."""
    online = {entry.cluster: entry.template_id for entry in await platform.online(deployment)}.get(cluster)
    again = may_have_run_before()
    ours = online is not None and same_id(online, template_id)
    if ours and (again or not same_or_none(over, template_id)):
        return True
    if not same_or_none(online, over):
        raise ConflictError(
            f"another release was published to {one_line(cluster, 80)} since this one was prepared: "
            f"{template_name(online)} is online there, and {template_name(over)} was",
            advice="Look at what is online there, and start a new release if it should change.",
            cluster=cluster,
        )
    return False
