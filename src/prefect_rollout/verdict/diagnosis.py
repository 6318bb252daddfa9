"""Diagnosis of an unsuccessful release: its category, a summary, and what to do next. Pure.

The categories and sentences follow krane's `doom_reason` (a failure ends with a question that the user can
answer) and prefect-kubernetes' `diagnostics.py` (category, summary, resolution).
"""

from enum import StrEnum
from typing import Self

from pydantic import BaseModel

from prefect_rollout.text import one_line


class Category(StrEnum):
    """Categories of trouble. Programs rely on the values: renaming one is a breaking change."""

    # Problems of pods and rollouts.
    INVALID_IMAGE_NAME = "InvalidImageName"
    IMAGE_PULL_ERROR = "ImagePullError"
    CRASH_LOOP_BACK_OFF = "CrashLoopBackOff"
    OOM_KILLED = "OOMKilled"
    CONTAINER_CONFIG_ERROR = "ContainerConfigError"
    UNSCHEDULABLE = "Unschedulable"
    QUOTA_EXCEEDED = "QuotaExceeded"
    CONTAINER_NOT_READY = "ContainerNotReady"
    SETTLING = "Settling"
    POD_PENDING = "PodPending"
    UNKNOWN_STATE = "UnknownState"
    NO_PODS = "NoPods"
    OLD_PODS_LEFT = "OldPodsLeft"
    NOT_OBSERVED = "NotObserved"
    NO_STATUS = "NoStatus"
    UNCONFIRMED = "Unconfirmed"
    REPLICAS_DIFFER = "ReplicasDiffer"
    BASELINE_UNKNOWN = "BaselineUnknown"
    POD_CREATION_FAILED = "PodCreationFailed"
    PROGRESS_DEADLINE_EXCEEDED = "ProgressDeadlineExceeded"
    SUPERSEDED = "Superseded"

    # Problems before or outside the pods.
    INVALID_INPUT = "InvalidInput"
    CONFIGURATION = "Configuration"
    NOT_FOUND = "NotFound"
    WORKLOAD = "Workload"
    TEMPLATE = "Template"
    UNAUTHENTICATED = "Unauthenticated"
    ACCESS_DENIED = "AccessDenied"
    REJECTED = "Rejected"
    CONFLICT = "Conflict"
    OVERLOADED = "Overloaded"
    SERVER_FAULT = "ServerFault"
    UNREACHABLE = "Unreachable"
    UNUSABLE_ANSWER = "UnusableAnswer"
    CANCELLED = "Cancelled"
    LOCKED = "Locked"
    BATCH = "Batch"
    WINDOW_CLOSED = "WindowClosed"
    INTERNAL = "Internal"


_WORDS: dict[Category, tuple[str, str]] = {
    Category.INVALID_IMAGE_NAME: (
        "the image's name cannot be read",
        "Correct the image's name: is there a blank, a capital letter or a second colon in it?",
    ),
    Category.IMAGE_PULL_ERROR: (
        "the image cannot be pulled",
        "Was the tag built and pushed, is its name spelt right, and may the cluster read the registry?",
    ),
    Category.CRASH_LOOP_BACK_OFF: (
        "the container starts and ends again and again",
        "Its output is not available here: does it start with this image and configuration elsewhere?",
    ),
    Category.OOM_KILLED: (
        "the container used more memory than its limit",
        "Raise the template's memory limit, or find what in the new image needs more than the old one did.",
    ),
    Category.CONTAINER_CONFIG_ERROR: (
        "the container cannot be made from its configuration",
        "Do the config maps, secrets, volumes and the command that the template names exist there?",
    ),
    Category.UNSCHEDULABLE: (
        "no node can run the pod",
        "Lower the template's requests, widen its affinity, or ask the operators for room in the cluster.",
    ),
    Category.QUOTA_EXCEEDED: (
        "the namespace's quota is exceeded",
        "Free or raise the namespace's quota.",
    ),
    Category.CONTAINER_NOT_READY: (
        "the container runs and is not ready",
        "Does the readiness probe answer? If the app only needs longer, start again with more polls.",
    ),
    Category.SETTLING: (
        "the pod is ready, and has to stay ready for some seconds",
        "It only needs longer: start again with more polls.",
    ),
    Category.POD_PENDING: (
        "the pod is pending and no reason is reported",
        "Look at the pod's events: it waits for a node, an image or a volume.",
    ),
    Category.UNKNOWN_STATE: (
        "the pod is in no state that counts as ready",
        "Is the pod's node alive, and was the pod evicted?",
    ),
    Category.NO_PODS: (
        "no pod is listed",
        "Look at the deployment's events: does anything refuse its pods?",
    ),
    Category.OLD_PODS_LEFT: (
        "old pods are still running",
        "If they only need longer to end, start again with more polls; otherwise find out what keeps them.",
    ),
    Category.NOT_OBSERVED: (
        "the cluster has not acted on the publish",
        "Which template is online there, and did someone else publish?",
    ),
    Category.NO_STATUS: (
        "no status is reported",
        "Can the platform reach the cluster? Ask its operators, then look at the deployment there.",
    ),
    Category.UNCONFIRMED: (
        "seen once; a second poll has to confirm it",
        "Start again with more polls.",
    ),
    Category.REPLICAS_DIFFER: (
        "the number of pods differs from the desired replicas",
        "Was the deployment scaled meanwhile? Compare its replicas with its configuration, then start again.",
    ),
    Category.BASELINE_UNKNOWN: (
        "new and old pods cannot be told apart",
        "Which template do its pods run? A restart replaces them all.",
    ),
    Category.POD_CREATION_FAILED: (
        "the cluster refuses to create pods",
        "Create what the message names, such as a service account, or ask who runs the admission webhook.",
    ),
    Category.PROGRESS_DEADLINE_EXCEEDED: (
        "the rollout made no progress within the workload's deadline",
        "Find out why the new pods are not ready. If they only need longer, raise progressDeadlineSeconds.",
    ),
    Category.SUPERSEDED: (
        "another change followed before the release was complete",
        "Look at what is live now and who changed it; start a new release if it should change.",
    ),
    Category.INVALID_INPUT: ("a value cannot be used", "Correct the value and start again."),
    Category.CONFIGURATION: (
        "a setting is missing or unusable",
        "Run `prefect-rollout configure`, or correct the block in the Prefect UI.",
    ),
    Category.NOT_FOUND: ("the platform does not have it", "Look up its name on the platform."),
    Category.WORKLOAD: (
        "the deployment's configuration is incomplete",
        "Complete the deployment's clusters and replicas.",
    ),
    Category.TEMPLATE: ("the template cannot be released", "Choose another template."),
    Category.UNAUTHENTICATED: (
        "the platform does not accept the key",
        "Check the block's key id and secret key with `prefect-rollout configure`.",
    ),
    Category.ACCESS_DENIED: (
        "the key may not do this",
        "Ask the app's administrators for a key with the right to release it there.",
    ),
    Category.REJECTED: ("the platform refuses", "Correct what the message names, then start again."),
    Category.CONFLICT: ("another publish is running", "Wait for the other publish to end."),
    Category.OVERLOADED: ("the platform is overloaded", "Wait until the cloud has recovered."),
    Category.SERVER_FAULT: ("the platform failed", "Wait until the cloud has recovered."),
    Category.UNREACHABLE: (
        "the platform does not answer",
        "Check the network and the block's api_url.",
    ),
    Category.UNUSABLE_ANSWER: (
        "the platform's answer does not follow its contract",
        "Check that the block's api_url is the cloud's Open API and not a login page or a proxy.",
    ),
    Category.CANCELLED: (
        "the run was cancelled",
        "Look at what took effect, then start again if it is still wanted.",
    ),
    Category.LOCKED: ("another release of it is running", "Wait for the other run to end, then start again."),
    Category.BATCH: (
        "not all releases of the batch were released",
        "Fix the causes that the releases name.",
    ),
    Category.WINDOW_CLOSED: (
        "a release window is closed",
        "Start it when the window reopens, or let it wait with window_wait_seconds.",
    ),
    Category.INTERNAL: (
        "the release itself went wrong",
        "Read the flow run's log and report what it says to the maintainers.",
    ),
}


_READ_OUTPUT = "Its last lines say why it ended: does it start with this image and configuration elsewhere?"

RESOLUTIONS = frozenset(resolution for _, resolution in _WORDS.values()) | {_READ_OUTPUT}
"""The advice for each category."""


def resolution_of(category: Category) -> str:
    """Return the advice for a category."""
    return _WORDS[category][1]


class Diagnosis(BaseModel, frozen=True):
    """The most specific problem of a release, identical in every output.

    Attributes:
        category: the kind of problem, for programs.
        summary: the problem as a clause, without a final period.
        cluster: the cluster; unset if the problem is not specific to one.
        pod: full name of the pod.
        container: name of the container, if the platform reports it.
        reported: the platform's own text, on one line.
        seconds: duration of the problem since the first observation that showed it.
        resolution: what the user can do next, as a sentence.
        events: at most five events, oldest first, as the platform lists them.
        log_lines: the last lines of the container's output, if the platform delivers them.
    """

    category: Category
    summary: str
    cluster: str | None = None
    pod: str | None = None
    container: str | None = None
    reported: str | None = None
    seconds: float | None = None
    resolution: str
    events: tuple[str, ...] = ()
    log_lines: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        category: Category,
        *,
        summary: str | None = None,
        cluster: str | None = None,
        pod: str | None = None,
        container: str | None = None,
        reported: str | None = None,
        seconds: float | None = None,
        events: tuple[str, ...] = (),
        log_lines: tuple[str, ...] = (),
    ) -> Self:
        """Return a diagnosis with the category's text by default; all text is made safe to show."""
        words, resolution = _WORDS[category]
        if category is Category.CRASH_LOOP_BACK_OFF and log_lines:
            resolution = _READ_OUTPUT
        return cls(
            category=category,
            summary=one_line(summary or words, 1000),
            cluster=cluster and one_line(cluster, 60),
            pod=pod and one_line(pod, 253),
            container=container and one_line(container, 80),
            reported=one_line(reported) if reported else None,
            seconds=seconds,
            resolution=resolution,
            events=events,
            log_lines=log_lines,
        )

    def __str__(self) -> str:
        """Return one line: `ImagePullError: qapm-home-… in pub-bjwdt for 35 s: Failed to pull image …`."""
        subject = self.pod or self.summary
        container = f" ({self.container})" if self.pod and self.container else ""
        where = f" in {self.cluster}" if self.cluster else ""
        long = f" for {self.seconds:.0f} s" if self.seconds is not None and self.seconds >= 0.5 else ""
        detail = self.reported or (self.summary if self.pod else "")
        return f"{self.category}: {subject}{container}{where}{long}" + (f": {detail}" if detail else "")
