"""The number of pods of a cluster, and a note on it. Pure.

A release writes the configured number, which may differ from the number that the platform was last asked for.
If the platform does not report the latter, the note says which number is used instead.

`desired` is the number that the platform was last asked for, if it reports it; `pods` is `{pod: state}` as
listed, `None` if unknown; `configured` is the configured number, `None` if a release does not set it.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from prefect_rollout.verdict.status import ENDING

NOT_CHANGED = "replicas not changed"
_UNREPORTED = "the platform does not report its desired replicas"


def replicas_words(number: int | None) -> str:
    """Return a number of replicas to write, such as `replicas 3`."""
    return NOT_CHANGED if number is None else f"replicas {number}"


class Replicas(NamedTuple):
    """A number of pods.

    Attributes:
        number: the number; `None` if a release does not set it.
        note: a note for people, as a clause; may be empty.
        assumed: the number replaces one that the platform does not report.
    """

    number: int | None
    note: str = ""
    assumed: bool = False


def lasting(states: Iterable[str | None]) -> int:
    """Return the number of states of pods that are neither finished nor terminating."""
    return sum(state not in ENDING for state in states)


def kept(desired: int | None, pods: Mapping[str, str | None] | None, configured: int | None) -> Replicas:
    """Return the replicas of a cluster after a restart."""
    if configured is None:
        return Replicas(None)
    if desired is not None:
        note = f"replicas stay at {desired} (configured: {configured})" if desired != configured else ""
        return Replicas(desired, note)
    if listed := lasting((pods or {}).values()):
        return Replicas(listed, f"{_UNREPORTED}: {listed} assumed, as so many pods are listed", assumed=True)
    return now(desired, configured)


def released(desired: int | None, pods: Mapping[str, str | None] | None, configured: int | None) -> Replicas:
    """Return the replicas of a cluster after a release or a rollback: the configured ones."""
    if configured is None:
        return Replicas(None)
    if desired is not None:
        changed = desired != configured
        return Replicas(configured, f"replicas {desired} → {configured}, as configured" if changed else "")
    listed = None if pods is None else lasting(pods.values())
    if listed in {None, configured}:
        return Replicas(configured)
    return Replicas(configured, f"pods {listed} → {configured}, as configured; {_UNREPORTED}")


def now(desired: int | None, configured: int | None) -> Replicas:
    """Return the replicas of a cluster at present."""
    if configured is None:
        return Replicas(desired)
    if desired is None:
        return Replicas(configured, f"{_UNREPORTED}: {configured} assumed, as configured", assumed=True)
    note = f"configured replicas: {configured}, restored by the next release" if desired != configured else ""
    return Replicas(desired, note)
