"""The writes of a run: one move per cluster, in stages. Pure."""

from collections.abc import Sequence
from typing import NamedTuple

from pydantic import BaseModel

from prefect_rollout.ids import Id
from prefect_rollout.release.request import Request
from prefect_rollout.release.workload import Applied, Baseline
from prefect_rollout.verdict.expected import Expected

Pods = dict[str, str | None]
"""`{pod: state}`."""


class Move(BaseModel):
    """The change of one cluster to its target state.

    Attributes:
        cluster: the cluster.
        replicas: its replicas after the write.
        revision: id of the revision that it runs after the write.
        before: the state before the write.
        changed: the pods change.
        in_place: the platform updates pods in place.
        restarted: the same revision runs in new pods after the write.
    """

    cluster: str
    replicas: int
    revision: Id
    before: Baseline
    changed: bool = True
    in_place: bool = False
    restarted: bool = False

    def expected(self, applied: Applied, baseline: Pods | None) -> Expected:
        """Return the state that the cluster has to reach; `baseline` lists the pods before the write."""
        return Expected(
            cluster=self.cluster,
            revision=applied.revision,
            replicas=self.replicas,
            baseline=baseline,
            generation_before=self.before.generation,
            changed=self.changed,
            in_place=self.in_place,
            restarted=self.restarted,
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
