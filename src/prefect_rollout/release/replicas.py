"""The number of pods of a cluster, and a note on it. Pure.

A release writes the configured number, which may differ from the number that the platform was last asked for.
If the platform does not report the latter, the note says which number is used instead.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from prefect_rollout.verdict.status import ENDING

_UNREPORTED = "the platform does not report its desired replicas"


class Replicas(NamedTuple):
    """A number of pods.

    Attributes:
        number: the number.
        note: a note for people, as a clause; may be empty.
        assumed: the number replaces one that the platform does not report.
    """

    number: int
    note: str = ""
    assumed: bool = False


def lasting(states: Iterable[str | None]) -> int:
    """Return the number of states of pods that are neither finished nor terminating."""
    return sum(state not in ENDING for state in states)


def kept(desired: int | None, pods: Mapping[str, str | None] | None, configured: int) -> Replicas:
    """Return the replicas of a cluster after a restart.

    Args:
        desired: replicas that the platform was last asked for, if it reports them.
        pods: `{pod: state}` as listed; `None` if unknown.
        configured: the configured replicas.
    """
    if desired is not None:
        note = f"replicas stay at {desired} (configured: {configured})" if desired != configured else ""
        return Replicas(desired, note)
    if listed := lasting((pods or {}).values()):
        return Replicas(listed, f"{_UNREPORTED}: {listed} assumed, as so many pods are listed", assumed=True)
    return now(desired, configured)


def released(desired: int | None, pods: Mapping[str, str | None] | None, configured: int) -> Replicas:
    """Return the replicas of a cluster after a release or a rollback: the configured ones.

    Args:
        desired: replicas that the platform was last asked for, if it reports them.
        pods: `{pod: state}` as listed; `None` if unknown.
        configured: the configured replicas.
    """
    if desired is not None:
        changed = desired != configured
        return Replicas(configured, f"replicas {desired} → {configured}, as configured" if changed else "")
    listed = None if pods is None else lasting(pods.values())
    if listed in {None, configured}:
        return Replicas(configured)
    return Replicas(configured, f"pods {listed} → {configured}, as configured; {_UNREPORTED}")


def now(desired: int | None, configured: int) -> Replicas:
    """Return the replicas of a cluster at present.

    Args:
        desired: replicas that the platform was last asked for, if it reports them.
        configured: the configured replicas.
    """
    if desired is None:
        return Replicas(configured, f"{_UNREPORTED}: {configured} assumed, as configured", assumed=True)
    note = f"configured replicas: {configured}, restored by the next release" if desired != configured else ""
    return Replicas(desired, note)
