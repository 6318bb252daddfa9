"""Why a pod is not ready, as the events that Wayne lists in `podState.warnings`.

The messages are the kubelet's and the scheduler's (kubernetes, `pkg/kubelet/images/image_manager.go`,
`pkg/kubelet/kuberuntime`, `pkg/kubelet/prober`).
"""

from collections.abc import Callable

from prefect_rollout.release.images import is_reference
from prefect_rollout.simulator.pod import Pod
from prefect_rollout.simulator.shapes import EventShape

_EVERY = 10.0  # seconds after which such an event is told again


def events_of(pod: Pod, now: float, iso: Callable[[float], str]) -> list[EventShape]:
    """The warnings about a pod as of `now`; none once what they tell of is over or the pod is to go."""
    age = now - pod.began
    if pod.deleted is not None or pod.is_ready(now):
        return []
    crashes = pod.restart_count(now) - pod.updates
    return [
        EventShape(
            message=message,
            source_component="default-scheduler" if reason == "FailedScheduling" else "kubelet",
            name=pod.name,
            object="Pod",
            count=crashes or 1 + int(age // _EVERY),
            first_seen=iso(pod.began),
            last_seen=iso(now - age % _EVERY),
            reason=reason,
            type="Warning",
        )
        for reason, message in _told(pod, age, crashes)
    ]


def _told(pod: Pod, age: float, crashes: int) -> list[tuple[str, str]]:
    """`(reason, message)` of each event."""
    container, image = next(iter(pod.revision.images), ("app", "?"))
    kind, fate = pod.fate.kind, pod.fate
    told: list[tuple[str, str]] = []
    if kind == "image_cannot_be_pulled" or (kind == "slow_pull" and age < fate.failing):
        missing = f'rpc error: code = NotFound desc = failed to resolve reference "{image}": not found'
        told.append(("Failed", f'Failed to pull image "{image}": {missing}'))
        told.append(("Failed", "Error: ErrImagePull"))
        told.append(("BackOff", f'Back-off pulling image "{image}"'))
    elif kind == "invalid_image":
        image = next((each for _, each in pod.revision.images if not is_reference(each)), image)
        unreadable = f'couldn\'t parse image name "{image}": invalid reference format'
        told.append(("InspectFailed", f'Failed to apply default image tag "{image}": {unreadable}'))
    elif kind == "unschedulable":
        told.append(("FailedScheduling", "0/12 nodes are available: 12 Insufficient memory."))
    elif kind == "config_error":
        told.append(("Failed", "Error: CreateContainerConfigError"))
    elif kind == "crash_loop" and crashes:
        told.append(("BackOff", f"Back-off restarting failed container {container} in pod {pod.name}"))
    elif kind == "never_ready" and age >= fate.pull:
        refused = "Readiness probe failed: dial tcp 10.0.3.7:8080: connect: connection refused"
        told.append(("Unhealthy", refused))
    return told
