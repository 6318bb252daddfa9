"""Return a cluster to an earlier revision after a release that failed."""

from prefect_rollout.release.progress import ROLL_BACK
from prefect_rollout.release.replicas import replicas_words
from prefect_rollout.release.workload import Change, Published, Workload
from prefect_rollout.runs.step import say, step
from prefect_rollout.tasks.publish_deployment import delete_blocking, publish
from prefect_rollout.text import one_line


@step(ROLL_BACK, "roll back {workload.name} to template {change.revision} in {cluster}")
async def roll_back_deployment(
    workload: Workload,
    change: Change,
    cluster: str,
    replicas: int | None,
    *,
    over: int | str | None,
    key: str,
    unblock: bool = False,
    target: str,
) -> Published:
    """Publish an earlier revision again; see `publish_deployment`.

    Args:
        workload: from step 1.
        change: the way back to the earlier revision.
        cluster: the cluster.
        replicas: desired replicas of the cluster before the release; `None` to leave them unchanged.
        over: the revision of the release that failed.
        key: idempotency key of the write.
        unblock: delete pods of other revisions that keep the platform from replacing them.
        target: block of the platform, as type-slug/name.

    Raises:
        ConflictError: another write is running, or another release was published since.
    """
    to = f"to template {one_line(change.base, 40)}, {replicas_words(replicas)}"
    say(ROLL_BACK, f"{one_line(cluster, 80)} {to}")
    done = await publish(workload, change, cluster, replicas, over=over, key=key, target=target)
    if unblock:
        await delete_blocking(workload, cluster, done.applied.revision, target)
    return done
