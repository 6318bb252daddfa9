"""The number of pods that a cluster has to have, and a note on it. Pure.

The platform's own desired number is what counts for what runs; the metaData's is what a release writes.
If the platform does not report its own, the note says what replaces it.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from prefect_rollout.models import FINISHED

_ENDING = FINISHED | {"Terminating"}
_UNREPORTED = "the cloud does not report how many pods it was asked for"


class Replicas(NamedTuple):
    """A number of pods.

    Attributes:
        number: the number.
        note: what a person has to know of it, as a clause; empty where nothing is special.
        assumed: whether the number replaces one that the platform does not report.
    """

    number: int
    note: str = ""
    assumed: bool = False


def lasting(states: Iterable[str | None]) -> int:
    """Return how many pods in these states neither have finished nor are about to end."""
    return sum(state not in _ENDING for state in states)


def kept(desired: int | None, pods: Mapping[str, str | None] | None, meta: int) -> Replicas:
    """Return how many pods a cluster keeps that is restarted.

    Args:
        desired: the number that the platform was last asked for, where it reports that.
        pods: `{pod: state}` as listed; `None` where they are unknown.
        meta: the metaData's number.
    """
    if desired is not None:
        return Replicas(desired, "" if desired == meta else f"{desired} pods stay, the metaData says {meta}")
    if listed := lasting((pods or {}).values()):
        return Replicas(listed, f"{_UNREPORTED}: {listed} are assumed, as so many are listed", assumed=True)
    return now(desired, meta)


def released(desired: int | None, pods: Mapping[str, str | None] | None, meta: int) -> Replicas:
    """Return how many pods a cluster gets by a release or a rollback: as many as the metaData says.

    Args:
        desired: the number that the platform was last asked for, where it reports that.
        pods: `{pod: state}` as listed; `None` where they are unknown.
        meta: the metaData's number.
    """
    if desired is not None:
        note = f"replicas {desired} → {meta}: the metaData says {meta}" if desired != meta else ""
        return Replicas(meta, note)
    listed = None if pods is None else lasting(pods.values())
    if listed in {None, meta}:
        return Replicas(meta)
    return Replicas(meta, f"pods {listed} → {meta}: the metaData says {meta}; {_UNREPORTED}")


def now(desired: int | None, meta: int) -> Replicas:
    """Return how many pods a cluster is asked to have now, for a look at it.

    Args:
        desired: the number that the platform was last asked for, where it reports that.
        meta: the metaData's number.
    """
    if desired is None:
        return Replicas(meta, f"{_UNREPORTED}: {meta} are assumed, as the metaData says", assumed=True)
    note = f"the metaData says {meta}: the next release changes it back" if desired != meta else ""
    return Replicas(desired, note)
