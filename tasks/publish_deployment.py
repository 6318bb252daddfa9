"""Step 6: publish a change to one cluster."""

from prefect_rollout.blocks import open_target
from prefect_rollout.ids import Id, same_id, same_or_none
from prefect_rollout.platforms.port import Platform
from prefect_rollout.release.replicas import replicas_words
from prefect_rollout.release.workload import Applied, Change, Published, Workload
from prefect_rollout.runs import guard
from prefect_rollout.runs.moves import published_between
from prefect_rollout.runs.step import may_have_run_before, run_logger, say, step
from prefect_rollout.text import one_line


@step("publish deployment", "publish {workload.name} template {change.revision} to {cluster}")
async def publish_deployment(
    workload: Workload,
    change: Change,
    cluster: str,
    replicas: int | None,
    *,
    over: int | str | None,
    release_id: str,
    unblock: bool = False,
    target: str,
) -> Published:
    """Publish the change to a cluster. Return when the platform has accepted the write: step 7 watches it.

    It first reads what is online, and writes nothing if an earlier attempt took effect (contract,
    Idempotency) or if somebody else has published since.

    Args:
        workload: from step 1.
        change: from step 5, or the way back to an earlier revision.
        cluster: the cluster.
        replicas: desired replicas; `None` to leave them unchanged.
        over: the revision that was online when the release was planned; `None` if there was none.
        release_id: identifies the release; a repeat with the same id publishes nothing new.
        unblock: delete pods of other revisions that keep the platform from replacing them.
        target: block of the platform, as type-slug/name.

    Raises:
        QuotaExceededError: the quota of the namespace does not suffice.
        ConflictError: another write is running, or another release was published since.
    """
    say("publish deployment", f"{one_line(cluster, 80)}, {replicas_words(replicas)}")
    key = f"{release_id}:publish:{cluster}"
    done = await publish(workload, change, cluster, replicas, over=over, key=key, target=target)
    if unblock:
        await delete_blocking(workload, cluster, done.applied.revision, target)
    return done


async def delete_blocking(workload: Workload, cluster: str, revision: Id, target: str) -> None:
    """Delete pods that keep the platform from replacing them by those of `revision`."""
    async with open_target(target) as platform:
        deleted = await guard.write(platform.unblock(workload, cluster, revision=revision))
    if deleted:
        listed = ", ".join(one_line(pod, 120) for pod in deleted)
        run_logger().warning("Deleted in %s because they were not ready: %s", one_line(cluster, 80), listed)


async def publish(
    workload: Workload,
    change: Change,
    cluster: str,
    replicas: int | None,
    *,
    over: Id | None,
    key: str,
    target: str,
) -> Published:
    """Publish as `publish_deployment` does; `key` is the idempotency key of the write."""
    async with open_target(target) as platform:
        if done := await _took_effect(platform, workload, change, cluster, over):
            run_logger().info("%s already runs this release: not published again", one_line(cluster))
            return Published(applied=done)
        status = (await platform.status(workload, [cluster])).get(cluster)
        writing = platform.apply(workload, cluster, change, replicas=replicas, over=over, key=key)
        applied = await guard.write(writing)
    return Published(applied=applied, pods=status.pod_states if status else None)


async def _took_effect(
    platform: Platform, workload: Workload, change: Change, cluster: str, over: Id | None
) -> Applied | None:
    """Return the state that an earlier attempt requested; raise if somebody else has published since."""
    online = (await platform.online(workload)).get(cluster)
    ours = online is not None and change.revision is not None and same_id(online, change.revision)
    if ours and online is not None and (may_have_run_before() or not same_or_none(over, change.revision)):
        return Applied(revision=online)
    if not same_or_none(online, over):
        raise published_between(cluster, online, over)
    return None
