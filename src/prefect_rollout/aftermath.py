"""Words for what a stopped run leaves in the cloud, which continues by itself. Pure: result in, words out."""

from collections.abc import Sequence
from typing import NamedTuple

from prefect_rollout.batch import BatchResult, Row, Stage
from prefect_rollout.models import Action, ClusterResult, ReleaseResult, same_or_none, template_name
from prefect_rollout.text import one_line

_MOST = 5


class Aftermath(NamedTuple):
    """The state that a stopped run leaves.

    Attributes:
        left: what the cloud has, and does with it, as a clause.
        undo: how to undo it, as a sentence.
    """

    left: str
    undo: str


_UNDO = {
    Action.DEPLOY: "Roll back to undo it.",
    Action.ROLLBACK: "Roll back again to undo it.",
    Action.RESTART: "A restart cannot be undone.",
    Action.SCALE: "Scale again to undo it.",
}
_NOTHING_TO_UNDO = "There is nothing to undo."
_UNDO_A_BATCH = "Roll those deployments back to undo it."

UNDOING = frozenset({*_UNDO.values(), _NOTHING_TO_UNDO, _UNDO_A_BATCH})
"""All that is ever said of how to undo what is left."""


def aftermath(result: ReleaseResult, *, done: bool = False) -> Aftermath:
    """Return what a release leaves that was stopped, or was `done` when somebody asked it to stop."""
    written = [cluster for cluster in result.clusters if cluster.published is not False]
    if not written:
        if result.tries > 1 and not (result.clusters or result.dry_run):
            return Aftermath(
                "nothing more was written; what an earlier try wrote is not known", _UNDO[result.action]
            )
        made = result.template_id if result.action is Action.DEPLOY else None
        left = "nothing was written"
        if made is not None and not result.dry_run:
            left = f"nothing was published; {template_name(made)} was created"
        return Aftermath(left, _NOTHING_TO_UNDO)
    goes_on = "and it stays" if done else "and the cloud continues with it"
    groups: dict[str, list[str]] = {}
    for cluster in written:
        groups.setdefault(_written(result.action, cluster), []).append(one_line(cluster.cluster, 60))
    left = "; ".join(f"{what} {_listed(names)}" for what, names in groups.items())
    return Aftermath(f"{left}, {goes_on}", _UNDO[result.action])


def _written(action: Action, cluster: ClusterResult) -> str:
    """Return the write to a cluster in words, without the cluster's name."""
    if action is Action.RESTART:
        return _surely("the restart was asked for in", cluster)
    if action is Action.SCALE:
        return _surely(f"{cluster.replicas} pods were asked for in", cluster)
    if cluster.template is None:
        return "it is not known what an earlier try published to"
    back = cluster.online_known and not same_or_none(cluster.online, cluster.template)
    if cluster.published and back and same_or_none(cluster.online, cluster.template_before):
        return f"{template_name(cluster.online)} was put back in"
    return _surely(f"{template_name(cluster.template)} was published to", cluster)


def _surely(what: str, cluster: ClusterResult) -> str:
    return what if cluster.published else f"it is not known whether {what}"


def aftermath_of_batch(result: BatchResult) -> Aftermath:
    """Return what a batch leaves that was stopped."""
    released = [row.name for row in result.releases if row.stage is Stage.RELEASED and row.flow_run_id]
    others = [
        row.name for row in result.releases if row.stage is not Stage.RELEASED and _may_have_written(row)
    ]
    parts = [
        f"what was released stays ({len(released)})" if released else "",
        f"the cloud continues with what was published of {_listed(others)}" if others else "",
    ]
    left = "; ".join(part for part in parts if part)
    if not left:
        return Aftermath("nothing was written", _NOTHING_TO_UNDO)
    return Aftermath(left, _UNDO_A_BATCH)


def _may_have_written(row: Row) -> bool:
    begun = row.flow_run_id is not None and row.stage is not Stage.PLANNED
    return begun if row.written is None else row.written


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(one_line(name, 120) for name in names[:_MOST])
    return shown if len(names) <= _MOST else f"{shown} and {len(names) - _MOST} more"
