"""The rules of the verdict: a fold over observations, without I/O and without a clock.

If the platform reports revisions (labels, generations, updated replicas), a cluster is released only if all
of them agree: strong evidence. If it reports only names and states, as in the article, the pods before the
publish are the baseline, and two consecutive observations must show the same: weak evidence. An unknown or
absent value never counts as agreement.

A release fails before its deadline only because of a *new* pod (`Grace`) or of the quota. The verdict does
not detect (tests/test_verdict_random.py has the same list):

- a later publish by somebody else, without labels;
- whether the cluster has acted yet, without labels and counters, if pods keep their names (`in_place`, or
  nothing changes): two observations then only show that the listed pods run;
- a crashing container that runs during each observation, without restart counts; with them, one that runs at
  two observations between two crashes.

By names alone, old and new pods cannot be distinguished if the pods before the publish are unknown, or if
some of them are part of the new state (a rollback in the middle of a rollout). The release then times out
and reports the reason.
"""

from collections.abc import Iterator, Sequence

from prefect_rollout.ids import same_id, template_name
from prefect_rollout.verdict.diagnosis import Category, Diagnosis
from prefect_rollout.verdict.expected import Expected, Grace
from prefect_rollout.verdict.pods import is_new, remember, shown
from prefect_rollout.verdict.reasons import is_quota
from prefect_rollout.verdict.status import FINISHED, Event, Observation, Pod, Status, state_of
from prefect_rollout.verdict.verdict import ClusterVerdict, Condition, Ending, Verdict

_GRACE = Grace()


def judge(
    expected: Sequence[Expected],
    look: Observation,
    before: Verdict | None = None,
    *,
    grace: Grace = _GRACE,
    last: bool = False,
) -> Verdict:
    """Return the verdict after this observation; the next call needs it as `before`.

    An observation without an answer changes no condition and confirms nothing. After the `last` observation,
    waiting ends as a time-out.
    """
    known = {cluster.cluster: cluster for cluster in before.clusters} if before else {}
    clusters = [_judge_cluster(each, look, known.get(each.cluster), grace) for each in expected]
    if any(cluster.failed for cluster in clusters):
        ending = Ending.FAILED
    elif clusters and all(cluster.released for cluster in clusters):
        ending = Ending.RELEASED
    else:
        ending = Ending.TIMED_OUT if last else Ending.WAITING
    over = ending in {Ending.FAILED, Ending.TIMED_OUT}
    return Verdict(
        ending=ending,
        at=look.at,
        clusters=clusters,
        diagnosis=_diagnose(clusters, look.at) if over else None,
    )


def _judge_cluster(
    expected: Expected, look: Observation, before: ClusterVerdict | None, grace: Grace
) -> ClusterVerdict:
    now = (look.clusters or {}).get(expected.cluster)
    if look.clusters is None and before:
        return before.model_copy(update={"seen": None})
    if expected.replicas is None:
        expected = expected.model_copy(update={"replicas": now and now.desired})
    verdict = ClusterVerdict(cluster=expected.cluster, wanted=expected.replicas)
    began = {condition.category: condition.since for condition in before.conditions} if before else {}

    def miss(category: Category, text: str, *, reported: str | None = None, final: bool = False) -> None:
        since = began.get(category, look.at)
        verdict.conditions.append(
            Condition(category=category, text=text, since=since, reported=reported, final=final)
        )

    if now is None:
        verdict.memory = before.memory if before else {}
        verdict.refused_first = before.refused_first if before else None
        miss(Category.NO_STATUS, "no status is reported")
        return verdict
    verdict.pods = now.pods
    if now.revision is not None and same_id(now.revision, expected.revision):
        verdict.revision_object = now.revision_object
    pods = _relevant(now, expected)
    verdict.strong = _reports_revisions(now, pods, expected)
    verdict.seen = [(pod.name, pod.state) for pod in pods]
    # Kubernetes lists finished pods long after their replacement. Revisions distinguish an evicted pod from
    # its replacement; by names alone, a pod that failed since the publish still counts.
    gone = FINISHED if verdict.strong else frozenset()
    current = [pod for pod in pods if pod.state not in gone]
    verdict.old = [pod for pod in current if is_new(pod, expected) is False]
    verdict.unclear = [pod for pod in current if is_new(pod, expected) is None]
    new = [pod for pod in current if is_new(pod, expected)]

    events = now.events or []
    listed = {pod.name for pod in now.pods or []}
    general = [event for event in events if event.name not in listed]
    verdict.events = shown(general)
    for pod in new:
        about = [event for event in events if event.name == pod.name]
        known = before.memory.get(pod.name) if before else None
        verdict.memory[pod.name] = remember(pod, about, expected, known, look.at, grace)
    verdict.not_ready = [pod for pod in new if verdict.memory[pod.name].category]
    ready = {pod.name for pod in new} - {pod.name for pod in verdict.not_ready}
    counted = now.pods is not None or (verdict.strong and expected.replicas == 0)
    verdict.ready = len(ready) if counted and not verdict.unclear else None

    refusals = [event for event in general if is_quota(event)]
    _count_refusals(verdict, now, refusals, before.refused_first if before else None)
    if refusals and (expected.replicas is None or len(new) < expected.replicas):
        miss(
            Category.QUOTA_EXCEEDED,
            "the quota refuses further pods",
            reported=refusals[-1].message,
            final=verdict.refused is not None and verdict.refused > (verdict.refused_first or 0),
        )
    for category, text in _differences(verdict, now, pods, len(ready), expected):
        miss(category, text)
    for each in now.conditions:
        waited = look.at - began.get(each.category, look.at) >= grace.seconds
        final = each.ends == "at-once" or (each.ends == "after-grace" and waited)
        miss(each.category, each.text, reported=each.reported, final=final)
    if _is_superseded(expected, now):
        miss(
            Category.SUPERSEDED,
            f"{template_name(now.revision)} has replaced it",
            reported=now.changed_by,
            final=True,
        )
    confirmed = before is not None and before.seen is not None and set(before.seen) == set(verdict.seen)
    if not verdict.conditions and not verdict.strong and not confirmed:
        miss(Category.UNCONFIRMED, "seen once; a second poll has to confirm it")
    return verdict


def _count_refusals(
    verdict: ClusterVerdict, status: Status, refusals: Sequence[Event], first: int | None
) -> None:
    """Count the pods that the quota refused, now and at the first observation with events.

    Events stay listed for an hour: the first observation may show another release's. A status without events
    does not mean that there were none.
    """
    if status.events is not None:
        verdict.refused = sum(event.count for event in refusals)
        first = verdict.refused if first is None else min(first, verdict.refused)
    verdict.refused_first = first


def _differences(
    verdict: ClusterVerdict, status: Status, pods: Sequence[Pod], ready: int, expected: Expected
) -> Iterator[tuple[Category, str]]:
    """Yield the differences from the expected state: number of pods, old pods, revisions."""
    wanted = expected.replicas
    if wanted is None:
        yield Category.REPLICAS_DIFFER, "the desired replicas are not reported"
    if status.desired not in {None, wanted}:
        yield (
            Category.REPLICAS_DIFFER,
            f"the platform wants {status.desired} pods, but this run asked for {wanted}",
        )
    if status.pods is None and not verdict.strong and wanted == 0:
        yield Category.NO_PODS, "no pods are reported"
    elif not pods and wanted:
        yield Category.NO_PODS, "no pod is listed"
    elif verdict.unclear:
        yield (
            Category.BASELINE_UNKNOWN,
            "new and old pods cannot be told apart: which pods ran before is not known",
        )
    elif wanted is not None and ready != wanted:
        yield Category.REPLICAS_DIFFER, f"{ready} of {wanted} new pods ready"
    elif verdict.not_ready:
        yield (
            Category.REPLICAS_DIFFER,
            f"{len(verdict.not_ready)} {_pods(verdict.not_ready)} not ready",
        )
    if verdict.old:
        yield Category.OLD_PODS_LEFT, f"{len(verdict.old)} old {_pods(verdict.old)} left"
    for text in _disagreements(expected, status):
        yield Category.NOT_OBSERVED, text


def _relevant(status: Status, expected: Expected) -> list[Pod]:
    """Return the listed pods without those that had finished before the release."""
    return [
        pod
        for pod in status.pods or []
        if not (pod.state in FINISHED and (expected.baseline or {}).get(pod.name) in FINISHED)
    ]


def _reports_revisions(status: Status, pods: Sequence[Pod], expected: Expected) -> bool:
    """Return whether the status, and not only the pod names, distinguishes new pods from old ones.

    Right after a publish, before the cluster acts, counters agree as well. So counters alone count only if no
    pod of the baseline is listed any more. Labels do not show a restart in place: pods keep name and label.
    """
    counted = None not in (status.generation, status.observed_generation, status.updated_replicas)
    labelled = bool(pods) and all(pod.template_id is not None for pod in pods)
    replaced = expected.baseline is not None and not any(pod.name in expected.baseline for pod in pods)
    return (labelled and not (expected.restarted and expected.in_place)) or (counted and replaced)


def _is_superseded(expected: Expected, status: Status) -> bool:
    """Return whether another change has followed the write."""
    return status.current and status.revision is not None and not same_id(status.revision, expected.revision)


def _disagreements(expected: Expected, status: Status) -> list[str]:
    """Return the reported revisions that do not agree with the published one."""
    missing = []
    differs = status.revision is not None and not same_id(status.revision, expected.revision)
    if differs and not _is_superseded(expected, status):
        missing.append(f"{template_name(status.revision)} is still reported")
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
        (expected.changed or expected.restarted)
        and status.generation is not None
        and expected.generation_before is not None
        and status.generation <= expected.generation_before
    ):
        missing.append(f"the publish has not arrived yet (generation {status.generation} as before)")
    if (
        None not in (status.updated_replicas, expected.replicas)
        and status.updated_replicas != expected.replicas
    ):
        missing.append(f"{status.updated_replicas} of {expected.replicas} pods updated")
    return missing


# ---- the diagnosis ----------------------------------------------------------------------------

# The most specific first: pods, then the deployment.
_ORDER = (
    Category.QUOTA_EXCEEDED,
    Category.POD_CREATION_FAILED,
    Category.OLD_PODS_LEFT,
    Category.BASELINE_UNKNOWN,
    Category.NO_PODS,
    Category.NOT_OBSERVED,
    Category.NO_STATUS,
    Category.REPLICAS_DIFFER,
    Category.UNCONFIRMED,
)
_RANKS = {category: rank for rank, category in enumerate(_ORDER)}


def _diagnose(clusters: Sequence[ClusterVerdict], at: float) -> Diagnosis:
    """Return the most specific trouble: a final one, then the oldest, then pods that are not ready."""
    ranked: list[tuple[tuple[int, float], Diagnosis]] = []
    for cluster in clusters:
        for pod in cluster.not_ready:
            memory = cluster.memory[pod.name]
            if memory.category is None:
                continue
            diagnosis = Diagnosis.of(
                memory.category,
                cluster=cluster.cluster,
                pod=pod.name,
                container=memory.container,
                reported=memory.reported,
                seconds=at - memory.since,
                events=memory.events or cluster.events,
                log_lines=memory.log_lines,
            )
            plain = memory.category in {
                Category.POD_PENDING,
                Category.CONTAINER_NOT_READY,
                Category.SETTLING,
                Category.UNKNOWN_STATE,
                Category.UNCONFIRMED,
            }
            ranked.append(((0 if memory.final else 2 if plain else 1, memory.since), diagnosis))
        for condition in cluster.conditions:
            left = cluster.old[0] if condition.category is Category.OLD_PODS_LEFT else None
            diagnosis = Diagnosis.of(
                condition.category,
                summary=condition.text,
                cluster=cluster.cluster,
                pod=left.name if left else None,
                reported=state_of(left) if left else condition.reported,
                seconds=at - condition.since,
                events=cluster.events,
            )
            rank = 0 if condition.final else 3 + _RANKS.get(condition.category, 0)
            ranked.append(((rank, condition.since), diagnosis))
    return min(ranked, key=lambda each: each[0])[1] if ranked else Diagnosis.of(Category.NO_STATUS)


def _pods(pods: Sequence[Pod]) -> str:
    return "pod" if len(pods) == 1 else "pods"
