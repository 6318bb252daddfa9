"""The status of a workload in a cluster, as a platform reports it: the input of the verdict.

A platform omits values that it does not know, and the verdict does not assume any.
"""

from collections.abc import Iterable
from typing import Literal, NamedTuple

from pydantic import BaseModel, Field

from prefect_rollout.ids import CamelCase, Count, Id, Lenient
from prefect_rollout.text import one_line
from prefect_rollout.verdict.diagnosis import Category

RUNNING = "Running"
"""The one state that means ready (contract: phase Running and Ready)."""

FINISHED = frozenset({"Succeeded", "Failed"})
"""States of finished pods. Kubernetes may list such pods long after they were replaced."""

ENDING = FINISHED | {"Terminating"}
"""States of pods that are finished or about to finish."""


class ContainerStatus(CamelCase):
    """A container's restarts, the Kubernetes reasons why it waits or ended, and its last lines of output.

    `log_lines` can be long: only those of the container that a diagnosis names persist.
    """

    name: Lenient[str] = None
    restart_count: Lenient[Count] = None
    reason: Lenient[str] = None
    message: Lenient[str] = None
    log_lines: Lenient[list[str]] = Field(default=None, exclude=True, repr=False)


class Pod(CamelCase):
    """A pod. `state` is `Running` only if it is also ready; an unknown word means not ready.

    `reason` and `message` explain the state in Kubernetes' words, if the platform reports them.
    `template_id` is the revision that the pod is labelled with.
    """

    name: str
    state: str | None = None
    reason: Lenient[str] = None
    message: Lenient[str] = None
    namespace: Lenient[str] = None
    pod_ip: Lenient[str] = None
    node_name: Lenient[str] = None
    start_time: Lenient[str] = None
    container_status: Lenient[list[Lenient[ContainerStatus]]] = None
    template_id: Id | None = None


class Event(BaseModel, frozen=True):
    """An event of the cluster; `name` is its pod, or else the object that created the pods."""

    name: str | None = None
    reason: str = ""
    message: str = ""
    count: int = 1

    def __str__(self) -> str:
        times = f" ×{self.count}" if self.count > 1 else ""
        return one_line(f"{self.reason or 'Event'}{times}: {self.message}")


class StatusCondition(BaseModel, frozen=True):
    """A reason why the platform itself does not call the workload released, in addition to its pods.

    Attributes:
        category: the kind of problem.
        text: the problem as a clause.
        reported: the platform's own text.
        ends: when it ends the release.
    """

    category: Category
    text: str
    reported: str | None = None
    ends: Literal["never", "after-grace", "at-once"] = "never"


class Status(BaseModel):
    """A workload's status in one cluster.

    Attributes:
        pods: all pods of the workload; `None` if the platform does not list them.
        desired: replicas that the platform was last asked for.
        events: warnings of the workload and its pods, oldest first; `None` if they are not reported.
        revision: the revision that the platform was last asked for.
        revision_object: the platform's own object that holds `revision`, such as `ReplicaSet web-5d8f9c`.
        current: `revision` is never older than the last write, so that another one replaced it.
        changed_by: who changed the revision last, and when, as a clause.
        conditions: reasons why the platform itself does not call the workload released.
        generation: the workload's generation.
        observed_generation: the generation that the platform has acted on.
        updated_replicas: pods of the revision that was last asked for.
    """

    pods: list[Pod] | None = None
    desired: Count | None = None
    events: list[Event] | None = None
    revision: Id | None = None
    revision_object: str = ""
    current: bool = False
    changed_by: str = ""
    conditions: list[StatusCondition] = []
    generation: Count | None = None
    observed_generation: Count | None = None
    updated_replicas: Count | None = None

    @property
    def pod_states(self) -> dict[str, str | None] | None:
        """Return `{pod: state}`; `None` if the platform does not list the pods."""
        return None if self.pods is None else {pod.name: pod.state for pod in self.pods}


class Observation(NamedTuple):
    """One observation of a workload.

    Attributes:
        at: time of the answer in seconds, on a monotonic clock.
        clusters: the status of each cluster that the platform reports; `None` if it did not answer.
        error: the reason why it did not answer.
    """

    at: float
    clusters: dict[str, Status] | None = None
    error: Exception | None = None


def running(pods: Iterable[Pod]) -> int:
    """Return the number of pods that are running and ready, of any revision."""
    return sum(pod.state == RUNNING for pod in pods)


def state_of(pod: Pod) -> str:
    """Return the pod's state, safe for a log."""
    return one_line(pod.state or "no state", 40)
