"""Puts a cluster back to what was online before a release that failed, and watches that."""

from collections.abc import Sequence

from prefect.cache_policies import NO_CACHE

from prefect_rollout.models import Deployment
from prefect_rollout.progress import ROLL_BACK, WAIT_FOR_ROLLBACK
from prefect_rollout.tasks.publish_deployment import publish
from prefect_rollout.tasks.step import say, step
from prefect_rollout.tasks.wait_for_pods import watch
from prefect_rollout.text import one_line
from prefect_rollout.verdict import Expected, Grace, Verdict


@step(ROLL_BACK, "roll back {deployment.name} to template {template_id} in {cluster}")
async def roll_back_deployment(
    deployment: Deployment,
    template_id: int | str,
    cluster: str,
    replicas: int,
    *,
    over: int | str | None,
    key: str,
    target: str,
) -> dict[str, str | None] | None:
    """Publish the template that was online before; see `publish_deployment`.

    Returns:
        `{pod: state}` as listed right before the write was sent; `None` where that is unknown.

    Args:
        deployment: as step 1 found it.
        template_id: the template to go back to.
        cluster: the cluster.
        replicas: as many pods as the cluster was asked for before.
        over: the template of the release that failed.
        key: idempotency key of the write.
        target: the block document `type-slug/name` of the platform.

    Raises:
        ConflictError: another publish is running, or another release followed.
    """
    where = f"{one_line(cluster, 80)} to template {one_line(template_id, 40)}, replicas {replicas}"
    say(ROLL_BACK, where)
    return await publish(deployment, template_id, cluster, replicas, over=over, key=key, target=target)


@step(WAIT_FOR_ROLLBACK, "wait for rollback of {deployment.name}", cache_policy=NO_CACHE)
async def wait_for_rollback(
    deployment: Deployment,
    expected: Sequence[Expected],
    *,
    poll_seconds: float,
    poll_attempts: int,
    grace_seconds: float,
    target: str,
) -> Verdict:
    """Poll the clusters until the rollback has an ending; see `wait_for_pods` for arguments and errors."""
    return await watch(
        WAIT_FOR_ROLLBACK,
        deployment,
        expected,
        poll_seconds=poll_seconds,
        poll_attempts=poll_attempts,
        grace=Grace(seconds=grace_seconds),
        target=target,
    )
