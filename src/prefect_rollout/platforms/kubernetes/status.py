"""The status of a workload, from the objects that a cluster holds at one moment. Pure.

A pod counts as running once it has been ready for `minReadySeconds`. If it has neither that nor readiness
probes, the kubelet calls it ready when its containers start, so it also has to stay ready for the settle
time: a container that crashes after five seconds is not released.
"""

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

from prefect_rollout.platforms.kubernetes.objects import (
    Kind,
    Object,
    blocking,
    desired_of,
    observed,
    owner_of,
    stored_revisions,
)
from prefect_rollout.verdict.diagnosis import Category
from prefect_rollout.verdict.reasons import SETTLING
from prefect_rollout.verdict.status import RUNNING, ContainerStatus, Event, Pod, Status, StatusCondition

NOT_READY = "ContainersNotReady"


class Snapshot(NamedTuple):
    """The objects of a workload in a cluster.

    Attributes:
        workload: the workload; `None` if it is gone.
        holders: ReplicaSets, or ControllerRevisions, of its namespace.
        pods: pods that its selector matches.
        events: warnings of its namespace.
        now: the API server's time.
    """

    workload: Object | None
    holders: Sequence[Object]
    pods: Sequence[Object]
    events: Sequence[Object]
    now: datetime


class Ended(NamedTuple):
    """A container that has ended by itself; `previous` if another one runs, or will, in its place."""

    pod: str
    name: str
    restarts: int
    previous: bool

    @property
    def key(self) -> tuple[str, str, int]:
        """Identify the container that ended."""
        return (self.pod, self.name, self.restarts)


def ended_containers(seen: Snapshot) -> list[Ended]:
    """Return the containers whose output may say why they ended, those that restarted most first."""
    found: list[Ended] = []
    for pod in seen.pods:
        status = pod.get("status") or {}
        if pod["metadata"].get("deletionTimestamp"):
            continue
        for each in [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]:
            now, before = ((each.get(name) or {}).get("terminated") or {} for name in ("state", "lastState"))
            if now.get("exitCode") or before.get("exitCode"):
                restarts = each.get("restartCount") or 0
                found.append(Ended(pod["metadata"]["name"], each["name"], restarts, previous=not now))
    return sorted(found, key=lambda each: -each.restarts)


Output = Mapping[tuple[str, str], list[str]]
"""Last lines of containers, `{(pod, container): lines}`."""


def status_of(kind: Kind, seen: Snapshot, settle_seconds: float, output: Output | None = None) -> Status:
    """Return the status of a workload.

    Args:
        kind: the workload's kind.
        seen: what the cluster holds.
        settle_seconds: time that a pod without readiness probes has to stay ready.
        output: the last lines of containers that have ended.
    """
    workload = seen.workload
    if workload is None:
        gone = StatusCondition(category=Category.NOT_FOUND, text="it was deleted", ends="at-once")
        return Status(pods=[], events=[], conditions=[gone])
    uid = workload["metadata"]["uid"]
    owned = [each for each in seen.holders if owner_of(each) == uid]
    owners = {uid, *(each["metadata"]["uid"] for each in owned)}
    stored = stored_revisions(kind, workload, seen.holders)
    ids = {each.label: each.id for each in stored}
    pods = [each for each in seen.pods if owner_of(each) in owners]
    least = workload["spec"].get("minReadySeconds") or 0
    makers = {workload["metadata"]["name"], *(each["metadata"]["name"] for each in owned)}
    events = [each for each in sorted(seen.events, key=_at) if _about(each) in makers.union(map(_name, pods))]
    refusals = [each for each in events if each.get("reason") == "FailedCreate" and _about(each) in makers]
    ends = {_name(each): _end_of(each) for each in pods}
    status = workload.get("status") or {}
    updated = "updatedNumberScheduled" if kind.name == "DaemonSet" else "updatedReplicas"
    return Status(
        # Terminating pods serve nothing any more, and neither delay a release nor count for it.
        pods=[
            _pod(each, kind, ids, seen.now, least, settle_seconds, output or {})
            for each in pods
            if not each["metadata"].get("deletionTimestamp")
        ],
        desired=desired_of(kind, workload),
        # A refusal may last only until an old pod is gone: a condition says so.
        events=[_event(each, ends) for each in events if each not in refusals],
        revision=stored[0].id,
        revision_object=stored[0].held_by,
        current=True,
        changed_by=changed_by(workload),
        conditions=[
            *_refused(kind, workload, pods, refusals),
            *_conditions(kind, workload),
            *_blocked(kind, workload, pods, stored[0].label),
        ],
        generation=workload["metadata"].get("generation"),
        observed_generation=status.get("observedGeneration"),
        updated_replicas=status.get(updated, 0) if "observedGeneration" in status else None,
    )


def _refused(
    kind: Kind, workload: Object, pods: Sequence[Object], refusals: Sequence[Object]
) -> list[StatusCondition]:
    """Return why the cluster refuses to create pods, unless the end of a terminating pod may let it.

    A Deployment has a condition for it. For the other kinds, pods are missing, and the last refusal is newer
    than all pods.
    """
    if not observed(workload) or any(each["metadata"].get("deletionTimestamp") for each in pods):
        return []
    reported = next(
        (
            each.get("message") or ""
            for each in (workload.get("status") or {}).get("conditions") or []
            if (each["type"], each["status"]) == ("ReplicaFailure", "True")
        ),
        None,
    )
    if kind.name != "Deployment" and refusals and len(pods) < (desired_of(kind, workload) or 0):
        newest = max((each["metadata"].get("creationTimestamp") or "" for each in pods), default="")
        if _at(refusals[-1]) >= newest:
            reported = str(refusals[-1].get("message") or "")
    if reported is None:
        return []
    quota = "exceeded quota" in reported
    return [
        StatusCondition(
            category=Category.QUOTA_EXCEEDED if quota else Category.POD_CREATION_FAILED,
            text="the quota refuses further pods" if quota else "the cluster refuses to create pods",
            reported=reported,
            ends="after-grace",
        )
    ]


def _name(found: Object) -> str:
    return str(found["metadata"]["name"])


def _conditions(kind: Kind, workload: Object) -> list[StatusCondition]:
    """Return why the controller does not call the rollout complete, as `kubectl rollout status` does."""
    if not observed(workload):
        return []  # the status is older than the change, as the generations show
    status = workload.get("status") or {}
    found: list[StatusCondition] = []
    for each in status.get("conditions") or []:
        if (each["type"], each["status"], each.get("reason")) == (
            "Progressing",
            "False",
            "ProgressDeadlineExceeded",
        ):
            seconds = workload["spec"].get("progressDeadlineSeconds")
            found.append(
                StatusCondition(
                    category=Category.PROGRESS_DEADLINE_EXCEEDED,
                    text=f"no progress for {seconds} s (progressDeadlineSeconds)",
                    reported=each.get("message"),
                    ends="at-once",
                )
            )
    if kind.name == "DaemonSet":
        desired, updated = status.get("desiredNumberScheduled", 0), status.get("updatedNumberScheduled", 0)
        available, every = status.get("numberAvailable", 0), desired
    else:
        desired, updated = desired_of(kind, workload) or 0, status.get("updatedReplicas", 0)
        available, every = status.get("availableReplicas", 0), status.get("replicas", 0)
    if updated < desired or every > updated or available < updated:
        found.append(
            StatusCondition(
                category=Category.NOT_OBSERVED,
                text=f"the controller counts {updated} of {desired} pods updated, {every} in all and "
                f"{available} available",
            )
        )
    return found


def _blocked(kind: Kind, workload: Object, pods: Sequence[Object], label: str) -> Iterator[StatusCondition]:
    """Yield a condition if pods of another revision block the rollout."""
    if label and observed(workload) and (found := blocking(kind, workload, pods, label)):
        names = ", ".join(each["metadata"]["name"] for each in found)
        yield StatusCondition(
            category=Category.OLD_PODS_LEFT,
            text=f"the StatefulSet waits for {names} of another revision, which is not ready: delete it, or "
            "start again with unblock",
        )


def changed_by(workload: Object) -> str:
    """Return the field manager that changed the pod template last, and when; empty if it is not recorded."""
    changes = [
        each
        for each in workload["metadata"].get("managedFields") or []
        if "f:template" in ((each.get("fieldsV1") or {}).get("f:spec") or {})
    ]
    last = max(changes, key=lambda each: each.get("time") or "", default=None)
    return f"changed by {last['manager']} at {last.get('time') or 'an unknown time'}" if last else ""


def _pod(
    pod: Object,
    kind: Kind,
    ids: Mapping[str, str],
    now: datetime,
    least: float,
    settle_seconds: float,
    output: Output,
) -> Pod:
    metadata, status = pod["metadata"], pod.get("status") or {}
    label = (metadata.get("labels") or {}).get(kind.label, "")
    conditions = {each["type"]: each for each in status.get("conditions") or []}
    state, reason, message = status.get("phase") or "Unknown", status.get("reason"), status.get("message")
    scheduled = conditions.get("PodScheduled") or {}
    if state == "Pending" and scheduled.get("status") == "False":
        reason, message = scheduled.get("reason"), scheduled.get("message")
    if state == RUNNING:
        wait = _settling(pod, least, settle_seconds)
        long = _ready_for(pod, now)
        if long is None:
            state = NOT_READY
        elif long < wait:
            state, reason = NOT_READY, SETTLING
            message = f"ready for {max(0.0, long):.0f} s of {wait:.0f} s"
    return Pod(
        name=metadata["name"],
        state=state,
        reason=reason,
        message=message,
        namespace=metadata.get("namespace"),
        pod_ip=status.get("podIP"),
        node_name=(pod.get("spec") or {}).get("nodeName"),
        start_time=status.get("startTime"),
        container_status=[
            _container(each, output.get((metadata["name"], each["name"])))
            for group in ("initContainerStatuses", "containerStatuses")
            for each in status.get(group) or []
        ],
        template_id=ids.get(label, label or None),
    )


def settles_after(seen: Snapshot, settle_seconds: float) -> float | None:
    """Return the seconds until time alone makes a pod count as running; `None` if it makes none."""
    least = (seen.workload or {}).get("spec", {}).get("minReadySeconds") or 0
    left = [
        _settling(pod, least, settle_seconds) - long
        for pod in seen.pods
        if (long := _ready_for(pod, seen.now)) is not None and not pod["metadata"].get("deletionTimestamp")
    ]
    return min((each for each in left if each > 0), default=None)


def _settling(pod: Object, least: float, settle_seconds: float) -> float:
    """Return the seconds that a pod has to stay ready."""
    return max(least, 0 if least or _probed(pod) else settle_seconds)


def _ready_for(pod: Object, now: datetime) -> float | None:
    """Return the seconds for which a pod has been ready; `None` if it is not ready."""
    for each in (pod.get("status") or {}).get("conditions") or []:
        if each["type"] == "Ready" and each["status"] == "True":
            since = _time(each.get("lastTransitionTime"))
            return (now - since).total_seconds() if since else 0.0
    return None


def _probed(pod: Object) -> bool:
    """Return whether every container that keeps running has a readiness probe."""
    return all(each.get("readinessProbe") for each in pod["spec"]["containers"])


def _container(status: Mapping[str, Any], lines: list[str] | None) -> ContainerStatus:
    """Return a container's status; an OOM kill explains a crash loop better than the loop itself."""
    state, before = status.get("state") or {}, status.get("lastState") or {}
    ended = state.get("terminated") or before.get("terminated") or {}
    waiting = state.get("waiting") or {}
    reason = waiting.get("reason") or (state.get("terminated") or {}).get("reason")
    parts = [waiting.get("message") or ""]
    if ended.get("exitCode"):
        parts += [_end(ended), ended.get("message", "")]
        if ended.get("reason") == "OOMKilled" and reason in {None, "CrashLoopBackOff", "Error"}:
            reason = "OOMKilled"
        elif reason == "StartError":
            reason = "RunContainerError"
    if reason in {"Completed", "PodInitializing", "ContainerCreating"}:
        reason = None
    return ContainerStatus(
        name=status.get("name"),
        restart_count=status.get("restartCount"),
        reason=reason,
        message="; ".join(part for part in parts if part) or None,
        log_lines=lines,
    )


def _end(ended: Mapping[str, Any]) -> str:
    of = f" ({ended['reason']})" if ended.get("reason") not in {None, "Error"} else ""
    return f"the last container ended with exit code {ended['exitCode']}{of}"


def _end_of(pod: Object) -> str:
    """Return how a container of the pod ended that failed; empty if none did."""
    for each in (pod.get("status") or {}).get("containerStatuses") or []:
        for name in ("state", "lastState"):
            ended = (each.get(name) or {}).get("terminated") or {}
            if ended.get("exitCode"):
                return _end(ended)
    return ""


def _about(event: Object) -> str:
    found = event.get("involvedObject") or event.get("regarding") or {}
    return str(found.get("name") or "")


def _event(event: Object, ends: Mapping[str, str]) -> Event:
    """Return an event; that of a crash says how the container ended, even while the next one runs."""
    series = event.get("series") or {}
    message = event.get("message") or event.get("note") or ""
    if event.get("reason") == "BackOff" and "restarting failed" in message:
        message = "; ".join(filter(None, (message, ends.get(_about(event)))))
    return Event(
        name=_about(event) or None,
        reason=event.get("reason") or "",
        message=message,
        count=series.get("count") or event.get("count") or 1,
    )


def _at(event: Object) -> str:
    series = event.get("series") or {}
    last = series.get("lastObservedTime") or event.get("lastTimestamp") or event.get("eventTime")
    return str(last or event["metadata"].get("creationTimestamp") or "")


def _time(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text).astimezone(UTC) if text else None
