"""Whether a rollout is over: observations in, verdict out, no I/O and no clock.

Green means released. Where the platform reports revisions (template ids, generations, updated
replicas), every one of them must agree: strong evidence. Where it reports names and states only, as
in the article, the pods seen before the publish are the baseline, and what stands must stand on two
polls running: weak evidence. What is unknown or absent never counts as agreement.
"""

from collections.abc import Mapping, Sequence

from pydantic import BaseModel

from prefect_rollout.models import ClusterStatus, Id, Pod, same_id
from prefect_rollout.text import one_line

RUNNING = "Running"
"""The one state that means ready (contract: phase Running and Ready)."""

FINISHED = frozenset({"Succeeded", "Failed"})
"""States of pods that run no more. Kubernetes may list such pods long after they were replaced."""


class Expected(BaseModel):
    """What one cluster has to show.

    Attributes:
        template_id: the template that was published.
        replicas: pods wanted.
        baseline: `{pod: state}` as listed before the publish; `None` where that is unknown, so that
            only a platform that labels its pods can show which are new.
        generation_before: the generation before the publish, where it was reported.
        changed: whether what goes out differs from what was online; if not, pods may stay.
        in_place: whether the deployment updates pods in place, keeping their names.
    """

    cluster: str
    template_id: Id
    replicas: int
    baseline: dict[str, str | None] | None = None
    generation_before: int | None = None
    changed: bool = True
    in_place: bool = False
    restarted: bool = False


class ClusterVerdict(BaseModel):
    """The verdict on one cluster: what is `missing` until it is released, or nothing.

    `pods` are all that the platform listed; new pods that are `not_ready` and `old` ones stand in the
    way.
    """

    cluster: str
    wanted: int
    ready: int = 0
    missing: list[str] = []
    not_ready: list[Pod] = []
    old: list[Pod] = []
    pods: list[Pod] = []
    strong: bool = False

    @property
    def released(self) -> bool:
        """Whether the new template runs here with the wanted replicas, and nothing else does."""
        return not self.missing


class Verdict(BaseModel):
    """The verdict on all clusters of a release."""

    clusters: list[ClusterVerdict]

    @property
    def released(self) -> bool:
        """Whether every cluster is released."""
        return bool(self.clusters) and all(cluster.released for cluster in self.clusters)

    @property
    def evidence(self) -> str:
        """`strong` if every cluster reported revisions, else `weak`."""
        return "strong" if all(cluster.strong for cluster in self.clusters) else "weak"

    @property
    def counts(self) -> str:
        """Such as `pub-bjwdt 1/1, pub-bjyt 2/3`: new pods ready of those wanted."""
        return ", ".join(f"{one_line(c.cluster, 60)} {c.ready}/{c.wanted}" for c in self.clusters)

    def explain(self, most: int = 5) -> str:
        """What is missing in which clusters, naming at most `most` pods a cluster."""
        parts = []
        for cluster in self.clusters:
            if cluster.released:
                continue
            pods = [_described(pod) for pod in cluster.not_ready]
            pods += [f"old {_described(pod)}" for pod in cluster.old]
            more = f" and {len(pods) - most} more" if len(pods) > most else ""
            listed = f" ({'; '.join(pods[:most])}{more})" if pods else ""
            parts.append(f"{one_line(cluster.cluster, 60)}: {', '.join(cluster.missing)}{listed}")
        return "; ".join(parts)


def judge(
    expected: Sequence[Expected],
    now: Mapping[str, ClusterStatus],
    before: Mapping[str, ClusterStatus] | None = None,
) -> Verdict:
    """The verdict on the statuses of one poll.

    Args:
        expected: what each cluster has to show.
        now: this poll's status a cluster; a cluster that the platform said nothing of is absent.
        before: the poll before this one, if it was answered; weak evidence needs it.
    """
    return Verdict(
        clusters=[
            _judge_cluster(cluster, now.get(cluster.cluster), (before or {}).get(cluster.cluster))
            for cluster in expected
        ]
    )


def _judge_cluster(
    expected: Expected, now: ClusterStatus | None, before: ClusterStatus | None
) -> ClusterVerdict:
    verdict = ClusterVerdict(cluster=expected.cluster, wanted=expected.replicas)
    if now is None:
        verdict.missing.append("no status is reported")
        return verdict
    verdict.pods = now.pods or []
    pods = _standing(now, expected)
    verdict.strong = _reports_revisions(now, pods, expected)
    # Kubernetes lists pods that finished long after others took their place. Revisions tell an evicted
    # pod from its successor; by names alone, one that failed since the publish stays in the way.
    gone = FINISHED if verdict.strong else frozenset()
    old = [pod for pod in pods if not _is_new(pod, expected) and pod.state not in gone]
    new = [pod for pod in pods if _is_new(pod, expected)]
    ready = {pod.name for pod in new if pod.state == RUNNING}
    waiting = [pod for pod in new if pod.state != RUNNING and pod.state not in gone]
    verdict.ready = len(ready)
    verdict.not_ready, verdict.old = waiting, old
    if now.pods is None and not verdict.strong and not expected.replicas:
        verdict.missing.append("no pods are reported")
    elif not pods and expected.replicas:
        verdict.missing.append("no pod is listed")
    elif len(ready) != expected.replicas:
        verdict.missing.append(f"{len(ready)} of {expected.replicas} new pods ready")
    elif waiting:
        verdict.missing.append(f"{len(waiting)} {_pods(waiting)} not ready")
    if old:
        verdict.missing.append(f"{len(old)} old {_pods(old)} left")
    verdict.missing += _disagreements(expected, now)
    if not verdict.missing and not verdict.strong and not _stands(pods, before, expected):
        verdict.missing.append("seen so once, a second look has to agree")
    return verdict


def _standing(status: ClusterStatus, expected: Expected) -> list[Pod]:
    """The pods that are listed, less those that had finished before the release began."""
    return [
        pod
        for pod in status.pods or []
        if not (pod.state in FINISHED and (expected.baseline or {}).get(pod.name) in FINISHED)
    ]


def _is_new(pod: Pod, expected: Expected) -> bool:
    if pod.template_id is not None:
        return same_id(pod.template_id, expected.template_id)
    if expected.baseline is None:
        return False
    return pod.name not in expected.baseline or expected.in_place or not expected.changed


def _reports_revisions(status: ClusterStatus, pods: Sequence[Pod], expected: Expected) -> bool:
    """Whether the status tells new pods from old by itself, not only by their names.

    Counters alone agree with themselves right after a publish too, before the cluster has acted on it:
    they count only where no pod of before is listed any more.
    """
    counted = None not in (status.generation, status.observed_generation, status.updated_replicas)
    labelled = bool(pods) and all(pod.template_id is not None for pod in pods)
    replaced = expected.baseline is not None and not any(pod.name in expected.baseline for pod in pods)
    return labelled or (counted and replaced)


def _disagreements(expected: Expected, status: ClusterStatus) -> list[str]:
    """The revisions reported that do not agree with what was published."""
    missing = []
    if status.template_id is not None and not same_id(status.template_id, expected.template_id):
        missing.append(f"template {one_line(status.template_id, 80)} is still reported")
    if (
        status.generation is not None
        and status.observed_generation is not None
        and status.observed_generation < status.generation
    ):
        missing.append(
            f"the publish is not observed yet (generation {status.observed_generation} "
            f"of {status.generation})"
        )
    if (
        expected.changed
        and status.generation is not None
        and expected.generation_before is not None
        and status.generation <= expected.generation_before
    ):
        missing.append(f"the publish has not arrived yet (generation {status.generation} as before)")
    if status.updated_replicas is not None and status.updated_replicas != expected.replicas:
        missing.append(f"{status.updated_replicas} of {expected.replicas} pods updated")
    return missing


def _stands(pods: Sequence[Pod], before: ClusterStatus | None, expected: Expected) -> bool:
    """Whether the poll before this one showed the same pods in the same states."""
    if before is None:
        return False
    return {(pod.name, pod.state) for pod in pods} == {
        (pod.name, pod.state) for pod in _standing(before, expected)
    }


def _described(pod: Pod) -> str:
    return f"{one_line(pod.name, 80)}: {one_line(pod.state or 'no state', 40)}"


def _pods(pods: Sequence[Pod]) -> str:
    return "pod" if len(pods) == 1 else "pods"
