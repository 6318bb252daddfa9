"""The writes of a run, one move per cluster, and conflicts with writes of others without the lock."""

from collections.abc import Sequence
from typing import NamedTuple

from pydantic import BaseModel

from prefect_rollout.errors import ConflictError
from prefect_rollout.ids import Id, same_id, same_or_none, template_name
from prefect_rollout.platforms.port import Platform
from prefect_rollout.release.request import Request
from prefect_rollout.release.workload import Applied, Baseline, Workload
from prefect_rollout.text import one_line
from prefect_rollout.verdict.expected import Expected


class Move(BaseModel):
    """The change of one cluster to its target state.

    Attributes:
        cluster: the cluster.
        replicas: its replicas after the write; `None` if the write does not set them.
        revision: id of the revision that it runs after the write.
        before: the state before the write.
        changed: the pods change.
        in_place: the platform updates pods in place.
        restarted: the same revision runs in new pods after the write.
    """

    cluster: str
    replicas: int | None
    revision: Id
    before: Baseline
    changed: bool = True
    in_place: bool = False
    restarted: bool = False

    def expected(self, applied: Applied, baseline: dict[str, str | None] | None) -> Expected:
        """Return the state that the cluster has to reach; `baseline` lists the pods before the write."""
        return Expected(
            cluster=self.cluster,
            revision=applied.revision,
            replicas=self.replicas,
            baseline=baseline,
            generation_before=self.before.generation,
            changed=self.changed,
            in_place=self.in_place,
            # A restart that makes a revision tells its pods apart by that: a StatefulSet keeps their names.
            restarted=self.restarted and same_or_none(applied.revision, self.before.online),
        )


class Stage(NamedTuple):
    """Clusters that are written to before the next observation.

    Attributes:
        moves: the moves of the clusters.
        after: the cluster that was released before this stage; empty for the first.
    """

    moves: list[Move]
    after: str = ""


def stages_of(moves: Sequence[Move], request: Request) -> list[Stage]:
    """Return the moves in stages: all at once, or one by one, the canary first."""
    canary = [move for move in moves if move.cluster == request.canary]
    rest = [move for move in moves if move.cluster != request.canary]
    if request.order == "one-by-one":
        parts = [[move] for move in canary + rest]
    else:
        parts = [part for part in (canary, rest) if part]
    after = ["", *(part[-1].cluster for part in parts)]
    return [Stage(part, before) for part, before in zip(parts, after, strict=False)]


def published_between(cluster: str, now: Id | None, before: Id | None) -> ConflictError:
    """Return the error for a cluster to which another release was published."""
    return ConflictError(
        f"another release was published to {one_line(cluster, 80)} after this one was prepared: "
        f"{template_name(now)} is online there, and {template_name(before)} was",
        advice="Look at what is online there, and start a new release if it should change.",
        cluster=cluster,
    )


def restart_key(release_id: str, cluster: str) -> str:
    """Return the idempotency key of a restart."""
    return f"{release_id}:restart:{cluster}"


async def nothing_between(
    platform: Platform, workload: Workload, moves: Sequence[Move], release_id: str
) -> None:
    """Check that each cluster has the revision from before the run, or the one that the run publishes.

    Raises:
        ConflictError: another release was published to one of them.
    """
    online = await platform.online(workload)
    for move in moves:
        now, before = online.get(move.cluster), move.before.online
        ours = same_or_none(now, before) or same_or_none(now, move.revision)
        if move.restarted and not ours:  # on some platforms a restart makes a revision
            key = restart_key(release_id, move.cluster)
            done = await platform.restarted(workload, move.cluster, move.before, key=key)
            ours = done is not None and same_or_none(now, done.revision)
        if not ours:
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
