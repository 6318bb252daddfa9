"""What a status says is wrong: reason words and events, read leniently. Pure.

The words are the kubelet's waiting reasons (kubernetes, `pkg/kubelet/images/types.go`,
`pkg/kubelet/container/sync_result.go`) and event reasons (`pkg/kubelet/events/event.go`). The container
cloud reports events only, as Wayne does: in `deployment.podState.warnings`.
"""

from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Any

from pydantic import BaseModel

from prefect_rollout.diagnosis import Category
from prefect_rollout.models import ClusterStatus, Pod
from prefect_rollout.text import one_line

EVENTS_SHOWN = 5


class Tier(IntEnum):
    """How soon a trouble ends a release."""

    NEVER = 0
    AFTER_GRACE = 1
    AT_ONCE = 2


_WORDS: dict[str, tuple[Category, Tier]] = {
    "InvalidImageName": (Category.INVALID_IMAGE_NAME, Tier.AT_ONCE),
    "ErrImageNeverPull": (Category.IMAGE_PULL_ERROR, Tier.AT_ONCE),
    # A registry that stumbles recovers, so these wait (krane took its immediate failure back, #477).
    "ErrImagePull": (Category.IMAGE_PULL_ERROR, Tier.AFTER_GRACE),
    "ImagePullBackOff": (Category.IMAGE_PULL_ERROR, Tier.AFTER_GRACE),
    "ImageInspectError": (Category.IMAGE_PULL_ERROR, Tier.AFTER_GRACE),
    "RegistryUnavailable": (Category.IMAGE_PULL_ERROR, Tier.AFTER_GRACE),
    "CrashLoopBackOff": (Category.CRASH_LOOP_BACK_OFF, Tier.AFTER_GRACE),
    "OOMKilled": (Category.OOM_KILLED, Tier.AFTER_GRACE),
    "CreateContainerConfigError": (Category.CONTAINER_CONFIG_ERROR, Tier.AFTER_GRACE),
    "CreateContainerError": (Category.CONTAINER_CONFIG_ERROR, Tier.AFTER_GRACE),
    "RunContainerError": (Category.CONTAINER_CONFIG_ERROR, Tier.AFTER_GRACE),
    "ContainerCannotRun": (Category.CONTAINER_CONFIG_ERROR, Tier.AFTER_GRACE),
    "Unschedulable": (Category.UNSCHEDULABLE, Tier.AFTER_GRACE),
    "FailedScheduling": (Category.UNSCHEDULABLE, Tier.AFTER_GRACE),
    "FailedMount": (Category.CONTAINER_CONFIG_ERROR, Tier.NEVER),
    "Unhealthy": (Category.CONTAINER_NOT_READY, Tier.NEVER),
}

# What befalls a pod from outside: its successor decides, so nothing said of the pod ends a release.
_BEFALLEN = frozenset({"Evicted", "Preempting", "Preempted"})


class Event(BaseModel, frozen=True):
    """An event of the cluster; `name` is the pod that it is about, or else what made the pods."""

    name: str | None = None
    reason: str = ""
    message: str = ""
    count: int = 1

    def __str__(self) -> str:
        times = f" ×{self.count}" if self.count > 1 else ""
        return one_line(f"{self.reason or 'Event'}{times}: {self.message}")

    @property
    def word(self) -> str:
        """The waiting reason that the event amounts to; its own reason where it amounts to none."""
        text = self.message
        match self.reason:
            case "Failed" if text.startswith("Failed to pull image"):
                return "ErrImagePull"
            case "Failed" if text.startswith("Error: "):
                # Either a waiting reason or free text such as `Error: secret "x" not found`.
                word = text.removeprefix("Error: ").strip()
                return word if word in _WORDS else "CreateContainerError"
            case "BackOff" if "restarting failed" in text:
                return "CrashLoopBackOff"
            case "BackOff" if "pulling image" in text:
                return "ImagePullBackOff"
            case "InspectFailed":
                unreadable = "parse" in text or "InvalidImageName" in text
                return "InvalidImageName" if unreadable else "ImageInspectError"
        return self.reason

    @property
    def is_quota(self) -> bool:
        """Whether the namespace's quota refused a pod (`pods "…" is forbidden: exceeded quota: …`)."""
        return self.reason in {"FailedCreate", ""} and "exceeded quota" in self.message


class Trouble(BaseModel, frozen=True):
    """What is said to be wrong with one pod; `reported` are the platform's own words."""

    category: Category
    tier: Tier
    word: str
    reported: str
    container: str | None = None


def events_of(status: ClusterStatus) -> list[Event]:
    """The events in `deployment.podState.warnings`. What is no event becomes its text; nothing raises."""
    count = status.deployment.pod_state if status.deployment else None
    return [_event(item) for item in (count.warnings if count else None) or () if item]


def _event(item: Any) -> Event:
    if not isinstance(item, Mapping):
        return Event(message=one_line(item))
    name, reason, message, count = (item.get(key) for key in ("name", "reason", "message", "count"))
    return Event(
        name=name if isinstance(name, str) else None,
        reason=one_line(reason, 80) if isinstance(reason, str) else "",
        message=one_line(message) if isinstance(message, str) else "",
        count=count if isinstance(count, int) else 1,
    )


def is_befallen(pod: Pod, events: Sequence[Event]) -> bool:
    """Whether the pod was evicted or preempted, which is no fault of what it runs."""
    return not _BEFALLEN.isdisjoint({pod.reason, pod.state, *(event.reason for event in events)})


def trouble_of(pod: Pod, events: Sequence[Event], *, in_place: bool) -> Trouble | None:
    """The gravest trouble that is told of a pod which is not ready; `events` are those about it.

    Events stay listed after what they tell of is over, so they are believed only where the pod's state
    agrees: a pod whose containers were all made (ContainersNotReady) had its image and configuration,
    unless it was updated in place, and a pod on a node was scheduled.
    """
    told: list[tuple[str | None, str | None, str | None]]
    told = [(pod.reason, pod.message, None), (pod.state, None, None)]
    told += [(each.reason, each.message, each.name) for each in pod.container_status or () if each]
    found = [_trouble(word, message, container) for word, message, container in told if word]
    found += [
        trouble
        for event in events
        if (trouble := _trouble(event.word, event.message, None))
        and not _is_over(trouble.category, pod, in_place=in_place)
    ]
    # Of equally grave ones, that the memory ran out says more than that the container ends.
    return max(
        (trouble for trouble in found if trouble),
        key=lambda trouble: (trouble.tier, trouble.category is Category.OOM_KILLED),
        default=None,
    )


def _trouble(word: str, message: str | None, container: str | None) -> Trouble | None:
    word = word.removeprefix("Init:")  # as kubectl writes of init containers
    if word not in _WORDS:
        return None
    category, tier = _WORDS[word]
    return Trouble(
        category=category, tier=tier, word=word, reported=one_line(message or word), container=container
    )


def _is_over(category: Category, pod: Pod, *, in_place: bool) -> bool:
    made = pod.state == "ContainersNotReady" and not in_place
    match category:
        case Category.UNSCHEDULABLE:
            return made or bool(pod.node_name)
        case Category.IMAGE_PULL_ERROR | Category.INVALID_IMAGE_NAME | Category.CONTAINER_CONFIG_ERROR:
            return made
    return False


def restarts_of(pod: Pod) -> dict[str, int]:
    """`{container: restarts}` of the containers whose count is told; one without a name by its place."""
    return {
        each.name or str(place): each.restart_count
        for place, each in enumerate(pod.container_status or ())
        if each and each.restart_count is not None
    }
