"""Reasons for a pod not being ready: the kubelet's waiting reasons and event reasons. Pure.

Sources: kubernetes, `pkg/kubelet/images/types.go`, `pkg/kubelet/container/sync_result.go` and
`pkg/kubelet/events/event.go`.
"""

from collections.abc import Sequence
from enum import IntEnum

from pydantic import BaseModel

from prefect_rollout.text import one_line
from prefect_rollout.verdict.diagnosis import Category
from prefect_rollout.verdict.status import Event, Pod

EVENTS_SHOWN = 5
LOG_LINES_SHOWN = 10


SETTLING = "Settling"
"""Reason of a pod that is ready, and has not been for as long as its platform requires."""


class Tier(IntEnum):
    """The time after which a trouble ends a release."""

    NEVER = 0
    AFTER_GRACE = 1
    AT_ONCE = 2


_WORDS: dict[str, tuple[Category, Tier]] = {
    "InvalidImageName": (Category.INVALID_IMAGE_NAME, Tier.AT_ONCE),
    "ErrImageNeverPull": (Category.IMAGE_PULL_ERROR, Tier.AT_ONCE),
    # Registries recover from short failures, so these wait (krane reverted its immediate failure, #477).
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
    SETTLING: (Category.SETTLING, Tier.NEVER),
    "Unhealthy": (Category.CONTAINER_NOT_READY, Tier.NEVER),
}

# Disruptions from outside the pod; its replacement is judged instead.
_DISRUPTIONS = frozenset({"Evicted", "Preempting", "Preempted"})


class Trouble(BaseModel, frozen=True):
    """The trouble of one pod; `reported` is the platform's own text."""

    category: Category
    tier: Tier
    word: str
    reported: str
    container: str | None = None


def waiting_reason(event: Event) -> str:
    """Return the waiting reason that corresponds to the event, or else the event's own reason."""
    text = event.message
    match event.reason:
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
    return event.reason


def is_quota(event: Event) -> bool:
    """Return whether the namespace's quota refused a pod (`pods "…" is forbidden: exceeded quota: …`)."""
    return event.reason in {"FailedCreate", ""} and "exceeded quota" in event.message


def is_disrupted(pod: Pod, events: Sequence[Event]) -> bool:
    """Return whether the pod was evicted or preempted, which is no fault of its containers."""
    return not _DISRUPTIONS.isdisjoint({pod.reason, pod.state, *(event.reason for event in events)})


def trouble_of(pod: Pod, events: Sequence[Event], *, in_place: bool) -> Trouble | None:
    """Return the most serious trouble of a pod that is not ready; `events` are those about the pod.

    Events stay listed after their cause is gone, so they count only if the pod's state agrees: a pod whose
    containers were all created (ContainersNotReady) had its image and configuration, unless it was updated
    in place, and a pod on a node was scheduled.
    """
    reasons: list[tuple[str | None, str | None, str | None]]
    reasons = [(pod.reason, pod.message, None), (pod.state, None, None)]
    reasons += [(each.reason, each.message, each.name) for each in pod.container_status or () if each]
    found = [_trouble(word, message, container) for word, message, container in reasons if word]
    found += [
        trouble
        for event in events
        if (trouble := _trouble(waiting_reason(event), event.message, None))
        and not _is_over(trouble.category, pod, in_place=in_place)
    ]
    # Of equally serious ones, OOMKilled is more specific than the end of the container.
    return max(
        (trouble for trouble in found if trouble),
        key=lambda trouble: (trouble.tier, trouble.category is Category.OOM_KILLED),
        default=None,
    )


def _trouble(word: str, message: str | None, container: str | None) -> Trouble | None:
    word = word.removeprefix("Init:")  # as kubectl shows init containers
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
    """Return `{container: restarts}` of the containers that report restarts; unnamed ones by position."""
    return {
        each.name or str(place): each.restart_count
        for place, each in enumerate(pod.container_status or ())
        if each and each.restart_count is not None
    }


def log_lines_of(pod: Pod, container: str | None) -> tuple[str, ...]:
    """Return the last lines of output, safe to show; without a `container`, of the one with most restarts."""
    found = [
        each
        for each in pod.container_status or ()
        if each and each.log_lines and container in {None, each.name}
    ]
    if not found:
        return ()
    loudest = max(found, key=lambda each: each.restart_count or 0)
    return tuple(one_line(line) for line in (loudest.log_lines or [])[-LOG_LINES_SHOWN:])
