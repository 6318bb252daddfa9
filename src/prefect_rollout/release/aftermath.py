"""The state that a stopped run leaves in the cloud, as text. Pure."""

from collections.abc import Sequence
from typing import NamedTuple

from prefect_rollout.ids import same_or_none, template_name
from prefect_rollout.release.request import Action
from prefect_rollout.release.result import ClusterResult, ReleaseResult
from prefect_rollout.text import one_line

_MOST = 5


class Aftermath(NamedTuple):
    """The state that a stopped run leaves, and how to undo it."""

    left: str  # a clause
    undo: str  # a sentence


_UNDO = {
    Action.DEPLOY: "Roll back to undo it.",
    Action.ROLLBACK: "Roll back again to undo it.",
    Action.RESTART: "A restart cannot be undone.",
    Action.SCALE: "Scale again to undo it.",
}
NOTHING_TO_UNDO = "There is nothing to undo."
UNDO_BATCH = "Roll those deployments back to undo it."

UNDOING = frozenset({*_UNDO.values(), NOTHING_TO_UNDO, UNDO_BATCH})
"""All values of `Aftermath.undo`."""


def aftermath_of_release(result: ReleaseResult, *, done: bool = False) -> Aftermath:
    """Return the state that a stopped release leaves; `done` if it finished before it was cancelled."""
    written = [cluster for cluster in result.clusters if cluster.published is not False]
    if not written:
        if result.tries > 1 and not (result.clusters or result.dry_run):
            return Aftermath(
                "nothing more was written; what an earlier attempt wrote is unknown", _UNDO[result.action]
            )
        made = result.template_id if result.action is Action.DEPLOY else None
        left = "nothing was written"
        if made is not None and not result.dry_run:
            left = f"nothing was published; {template_name(made)} was created"
        return Aftermath(left, NOTHING_TO_UNDO)
    goes_on = "and it stays" if done else "and the cloud continues with it"
    groups: dict[str, list[str]] = {}
    for cluster in written:
        groups.setdefault(_written(result.action, cluster), []).append(one_line(cluster.cluster, 60))
    left = "; ".join(f"{what} {listed(names)}" for what, names in groups.items())
    return Aftermath(f"{left}, {goes_on}", _UNDO[result.action])


def _written(action: Action, cluster: ClusterResult) -> str:
    """Return the write to a cluster as a clause, without the name of the cluster."""
    if action is Action.RESTART:
        return _surely("the restart was asked for in", cluster)
    if action is Action.SCALE:
        return _surely(f"{cluster.replicas} pods were asked for in", cluster)
    if cluster.template is None:
        return "an earlier attempt may have published to"
    back = cluster.online_known and not same_or_none(cluster.online, cluster.template)
    if cluster.published and back and same_or_none(cluster.online, cluster.template_before):
        return f"{template_name(cluster.online)} was restored in"
    return _surely(f"{template_name(cluster.template)} was published to", cluster)


def _surely(what: str, cluster: ClusterResult) -> str:
    return what if cluster.published else f"it is not known whether {what}"


def listed(names: Sequence[str]) -> str:
    """Return the first names, and the number of the others."""
    shown = ", ".join(one_line(name, 120) for name in names[:_MOST])
    return shown if len(names) <= _MOST else f"{shown} and {len(names) - _MOST} more"
