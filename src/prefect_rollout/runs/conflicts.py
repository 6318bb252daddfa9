"""Conflicts with releases that were published without the lock."""

from collections.abc import Sequence

from prefect_rollout.errors import ConflictError
from prefect_rollout.ids import Id, same_id, same_or_none, template_name
from prefect_rollout.platforms.port import Platform
from prefect_rollout.release.workload import Workload
from prefect_rollout.runs.moves import Move
from prefect_rollout.text import one_line
from prefect_rollout.verdict.expected import Expected


def published_between(cluster: str, now: Id | None, before: Id | None) -> ConflictError:
    """Return the error for a cluster to which another release was published."""
    return ConflictError(
        f"another release was published to {one_line(cluster, 80)} after this one was prepared: "
        f"{template_name(now)} is online there, and {template_name(before)} was",
        advice="Look at what is online there, and start a new release if it should change.",
        cluster=cluster,
    )


async def nothing_between(platform: Platform, workload: Workload, moves: Sequence[Move]) -> None:
    """Check that each cluster has the revision from before the run, or the one that the run publishes.

    Raises:
        ConflictError: another release was published to one of them.
    """
    online = await platform.online(workload)
    for move in moves:
        now, before = online.get(move.cluster), move.before.online
        if not same_or_none(now, before) and not same_or_none(now, move.revision):
            raise published_between(move.cluster, now, before)


async def still_online(platform: Platform, workload: Workload, expected: Sequence[Expected]) -> None:
    """Check that the revision that an earlier attempt published is still online in each cluster.

    Raises:
        ConflictError: another release, or a rollback, was published to a cluster since.
    """
    online = await platform.online(workload) if expected else {}
    for each in expected:
        now = online.get(each.cluster)
        if now is not None and not same_id(now, each.revision):
            raise ConflictError(
                f"template {one_line(each.revision, 40)} is no longer online in "
                f"{one_line(each.cluster, 80)}, template {one_line(now, 40)} is: it "
                "was rolled back, or another release followed",
                advice="Start a new release if it should go out again.",
                cluster=each.cluster,
            )
