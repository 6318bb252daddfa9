"""Step 6: publish a template to one cluster."""

from prefect_rollout.blocks import open_target
from prefect_rollout.models import Deployment, same_id
from prefect_rollout.tasks.step import may_have_run_before, run_logger, say, step
from prefect_rollout.text import one_line


@step("publish deployment", "publish {deployment.name} to {cluster}")
async def publish_deployment(
    deployment: Deployment,
    template_id: int | str,
    cluster: str,
    replicas: int,
    *,
    release_id: str,
    target: str,
) -> None:
    """Has a cluster run `replicas` pods of the template.

    Returns when the write is accepted, which says nothing of the rollout: step 7 watches that. A
    second try first looks at what is online, and sends nothing where it is this template already
    (contract, Idempotency).

    Args:
        deployment: as step 1 found it.
        template_id: the template that step 5 created.
        cluster: the cluster.
        replicas: the cluster's replicas, by step 2.
        release_id: names this release; a repeat with the same id publishes nothing new.
        target: the block document `type-slug/name` of the platform.

    Raises:
        QuotaExceededError: the namespace's quota does not suffice.
        ConflictError: another publish of this deployment and cluster is running.
    """
    say("publish deployment", f"{one_line(cluster, 80)}, replicas {replicas}")
    async with open_target(target) as platform:
        if may_have_run_before():
            for online in await platform.online(deployment):
                if online.cluster == cluster and same_id(online.template_id, template_id):
                    run_logger().info("%s has template %s: not published again", cluster, template_id)
                    return
        await platform.publish(
            deployment, template_id, cluster, replicas, key=f"{release_id}:publish:{cluster}"
        )
