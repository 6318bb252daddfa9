"""Whether a rollout is over and how it ended: a fold over looks, no I/O and no clock of its own.

Green means released. Where the platform reports revisions (template ids, generations, updated
replicas), every one of them must agree: strong evidence. Where it reports names and states only, as
in the article, the pods seen before the publish are the baseline, and what stands must stand on two
polls running: weak evidence. What is unknown or absent never counts as agreement.

A release fails before its deadline only by what the platform says of a *new* pod (`Grace`), or of its
quota. What no observation can tell, the verdict cannot either (tests/test_verdict_random.py holds the
same list):

- without any template id, a later publish of somebody else from this one;
- without labels and counters, whether the cluster has acted yet where pods keep their names
  (`in_place`, or nothing changes): two looks then say that what is listed runs;
- without restart counts, a crashing container that happens to run at the looks; with them, one that
  runs at two looks between two crashes.

By names alone, where the pods before the publish are not known, or are wanted again in part (a rollback
in the middle of a rollout), old and new cannot be told apart: then the release times out and says so.
"""

from collections.abc import Iterable, Iterator, Sequence
from enum import StrEnum

from pydantic import BaseModel, Field

from prefect_rollout.diagnosis import Category, Diagnosis
from prefect_rollout.models import FINISHED, RUNNING, ClusterStatus, Id, Pod, same_id
from prefect_rollout.text import one_line
from prefect_rollout.trouble import (
    EVENTS_SHOWN,
    Event,
    Tier,
    events_of,
    is_befallen,
    restarts_of,
    trouble_of,
)

_ENDING = FINISHED | {"Terminating"}


def running(pods: Iterable[Pod]) -> int:
    """How many of the pods are running and ready, of whichever template."""
    return sum(pod.state == RUNNING for pod in pods)


class Ending(StrEnum):
    """Whether a release is over, and its three endings."""

    WAITING = "waiting"
    RELEASED = "released"
    FAILED = "failed"
    TIMED_OUT = "timed-out"


class Look(BaseModel):
    """One poll.

    Attributes:
        at: seconds on any clock that does not run backwards.
        clusters: the status a cluster, without those that the platform said nothing of; `None` where
            the poll was not answered.
    """

    at: float
    clusters: dict[str, ClusterStatus] | None = None


class Grace(BaseModel, frozen=True):
    """The patience with new pods that may yet recover.

    Attributes:
        seconds: for how long a pod may be in one trouble, from the first look that shows it.
        restarts: how far a container's restart count may grow, from the first look at the pod.
    """

    seconds: float = Field(default=30, ge=0)
    restarts: int = Field(default=3, ge=1)


_GRACE = Grace()


class Expected(BaseModel):
    """What one cluster has to show.

    Attributes:
        template_id: the template that was published.
        replicas: pods wanted.
        baseline: `{pod: state}` as listed before the publish; `None` where that is unknown, so that
            only a platform that labels its pods can show which are new.
        mixed: whether the baseline may hold pods that are wanted, and it is unknown which.
        generation_before: the generation before the publish, where it was reported.
        changed: whether what goes out differs from what was online; if not, pods may stay.
        in_place: whether the deployment updates pods in place, keeping their names.
        restarted: whether the same template goes out again to have its pods replaced: those in the
            baseline are old whatever their label says.
    """

    cluster: str
    template_id: Id
    replicas: int
    baseline: dict[str, str | None] | None = None
    mixed: bool = False
    generation_before: int | None = None
    changed: bool = True
    in_place: bool = False
    restarted: bool = False


class Finding(BaseModel):
    """Something that stands between a cluster and being released, and since when."""

    category: Category
    text: str
    since: float
    reported: str | None = None
    final: bool = False


class Sight(BaseModel):
    """What is remembered of a new pod for as long as it is listed.

    Attributes:
        category: its present condition; `None` when it is ready to stay.
        since: since when that has been so.
        told: the last trouble that the platform told of and that the pod has not recovered from.
        told_since: since when that has been so; troubles that alternate are one.
        restarts: `{container: restarts}` as last told.
        restarts_first: the same when the pod was first seen.
        word: its condition as shown.
        final: whether it says that the release cannot succeed.
    """

    category: Category | None = None
    since: float
    told: Category | None = None
    told_since: float = 0
    restarts: dict[str, int] = {}
    restarts_first: dict[str, int] = {}
    word: str = ""
    reported: str | None = None
    container: str | None = None
    events: tuple[str, ...] = ()
    final: bool = False


class ClusterVerdict(BaseModel):
    """The verdict on one cluster: its `findings` until it is released, or none.

    `pods` are all that the platform listed, `None` where it listed none. New pods that are `not_ready`,
    `old` ones, and those of which it is `unclear` which they are, stand in the way. `ready` is `None`
    where it is unknown. `sights` (by pod), `stood` (names and states, where this look may confirm the
    next) and `refused_first` (how often the quota had `refused` a pod at the first look that told of
    events) are the memory for the next look; they hold nothing of pods that are gone.
    """

    cluster: str
    wanted: int
    ready: int | None = None
    findings: list[Finding] = []
    not_ready: list[Pod] = []
    old: list[Pod] = []
    unclear: list[Pod] = []
    pods: list[Pod] | None = None
    strong: bool = False
    events: tuple[str, ...] = ()
    sights: dict[str, Sight] = {}
    stood: list[tuple[str, str | None]] | None = None
    refused: int | None = None
    refused_first: int | None = None

    @property
    def missing(self) -> list[str]:
        """What is missing until it is released, in words."""
        return [finding.text for finding in self.findings]

    @property
    def released(self) -> bool:
        """Whether the new template runs here with the wanted replicas, and nothing else does."""
        return not self.findings

    @property
    def failed(self) -> bool:
        """Whether something here says that the release cannot succeed."""
        return any(each.final for each in self.findings) or any(s.final for s in self.sights.values())


class Verdict(BaseModel):
    """The verdict on all clusters of a release, as of the look `at`."""

    ending: Ending
    at: float
    clusters: list[ClusterVerdict]
    diagnosis: Diagnosis | None = None

    @property
    def released(self) -> bool:
        """Whether every cluster is released."""
        return self.ending is Ending.RELEASED

    @property
    def evidence(self) -> str:
        """`strong` if every cluster reported revisions, else `weak`."""
        return "strong" if all(cluster.strong for cluster in self.clusters) else "weak"

    @property
    def counts(self) -> str:
        """Such as `pub-bjwdt 1/1, pub-bjyt 2/3`: new pods ready of those wanted."""
        return ", ".join(
            f"{one_line(c.cluster, 60)} {'?' if c.ready is None else c.ready}/{c.wanted}"
            for c in self.clusters
        )

    def explain(self, most: int = 5) -> str:
        """What is missing in which clusters, naming at most `most` pods a cluster.

        Such as `2 of 3 new pods ready in pub-bjwdt; qapm-home-…-x2x7q: ImagePullBackOff for 35 s`.
        """
        parts = []
        for cluster in self.clusters:
            if cluster.released:
                continue
            parts.append(f"{', '.join(cluster.missing)} in {one_line(cluster.cluster, 60)}")
            pods = [self._described(pod, cluster) for pod in cluster.not_ready]
            pods += [f"old {self._described(pod, cluster)}" for pod in cluster.old]
            pods += [self._described(pod, cluster) for pod in cluster.unclear]
            more = f" and {len(pods) - most} more" if len(pods) > most else ""
            if pods:
                parts.append(", ".join(pods[:most]) + more)
        return "; ".join(parts)

    def _described(self, pod: Pod, cluster: ClusterVerdict) -> str:
        sight = cluster.sights.get(pod.name)
        seconds = self.at - sight.since if sight else 0
        long = f" for {seconds:.0f} s" if seconds >= 0.5 else ""
        return f"{one_line(pod.name, 80)}: {sight.word if sight else _state(pod)}{long}"


def judge(
    expected: Sequence[Expected],
    look: Look,
    before: Verdict | None = None,
    *,
    grace: Grace = _GRACE,
    last: bool = False,
) -> Verdict:
    """The verdict as of this look, and what the next one needs to know.

    A look that was not answered changes no finding, and confirms none either.

    Args:
        expected: what each cluster has to show.
        look: what the poll showed.
        before: the verdict on the look before this one, if there was one.
        grace: the patience with new pods that may yet recover.
        last: whether no further look follows, so that waiting ends.
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
    expected: Expected, look: Look, before: ClusterVerdict | None, grace: Grace
) -> ClusterVerdict:
    now = (look.clusters or {}).get(expected.cluster)
    if look.clusters is None and before:
        return before.model_copy(update={"stood": None})
    verdict = ClusterVerdict(cluster=expected.cluster, wanted=expected.replicas)
    began = {finding.category: finding.since for finding in before.findings} if before else {}

    def miss(category: Category, text: str, *, reported: str | None = None, final: bool = False) -> None:
        since = began.get(category, look.at)
        verdict.findings.append(
            Finding(category=category, text=text, since=since, reported=reported, final=final)
        )

    if now is None:
        verdict.sights = before.sights if before else {}
        verdict.refused_first = before.refused_first if before else None
        miss(Category.NO_STATUS, "no status is reported")
        return verdict
    verdict.pods = now.pods
    pods = _standing(now, expected)
    verdict.strong = _reports_revisions(now, pods, expected)
    verdict.stood = [(pod.name, pod.state) for pod in pods]
    # Kubernetes lists pods that finished long after others took their place. Revisions tell an evicted
    # pod from its successor; by names alone, one that failed since the publish stays in the way.
    gone = FINISHED if verdict.strong else frozenset()
    there = [pod for pod in pods if pod.state not in gone]
    verdict.old = [pod for pod in there if _is_new(pod, expected) is False]
    verdict.unclear = [pod for pod in there if _is_new(pod, expected) is None]
    new = [pod for pod in there if _is_new(pod, expected)]

    events = events_of(now)
    listed = {pod.name for pod in now.pods or []}
    general = [event for event in events if event.name not in listed]
    verdict.events = _shown(general)
    for pod in new:
        about = [event for event in events if event.name == pod.name]
        seen = before.sights.get(pod.name) if before else None
        verdict.sights[pod.name] = _sight(pod, about, expected, seen, look.at, grace)
    verdict.not_ready = [pod for pod in new if verdict.sights[pod.name].category]
    ready = {pod.name for pod in new} - {pod.name for pod in verdict.not_ready}
    told = now.pods is not None or (verdict.strong and not expected.replicas)
    verdict.ready = len(ready) if told and not verdict.unclear else None

    refusals = [event for event in general if event.is_quota]
    _count_refusals(verdict, now, refusals, before.refused_first if before else None)
    if refusals and len(new) < expected.replicas:
        miss(
            Category.QUOTA_EXCEEDED,
            "the quota refuses further pods",
            reported=refusals[-1].message,
            final=verdict.refused is not None and verdict.refused > (verdict.refused_first or 0),
        )
    for category, text in _differences(verdict, now, pods, len(ready), expected):
        miss(category, text)
    stands = before is not None and before.stood is not None and set(before.stood) == set(verdict.stood)
    if not verdict.findings and not verdict.strong and not stands:
        miss(Category.UNCONFIRMED, "seen so once, a second look has to agree")
    return verdict


def _count_refusals(
    verdict: ClusterVerdict, status: ClusterStatus, refusals: Sequence[Event], first: int | None
) -> None:
    """Note how often the quota has refused a pod, and how often it had at the first look that tells.

    Events stay listed for an hour: what the first look shows may be another release's. A status without
    `podState` tells of no events, and so does not say that there were none.
    """
    if status.deployment is not None and status.deployment.pod_state is not None:
        verdict.refused = sum(event.count for event in refusals)
        first = verdict.refused if first is None else min(first, verdict.refused)
    verdict.refused_first = first


def _differences(
    verdict: ClusterVerdict, status: ClusterStatus, pods: Sequence[Pod], ready: int, expected: Expected
) -> Iterator[tuple[Category, str]]:
    """Yield what differs from what the cluster has to show: the number of its pods, which, and revisions."""
    wanted = expected.replicas
    if status.desired not in {None, wanted}:
        yield (
            Category.REPLICAS_DIFFER,
            f"the cloud is asked for {status.desired} pods, and not for the {wanted} of this run",
        )
    if status.pods is None and not verdict.strong and not wanted:
        yield Category.NO_PODS, "no pods are reported"
    elif not pods and wanted:
        yield Category.NO_PODS, "no pod is listed"
    elif verdict.unclear:
        yield (
            Category.BASELINE_UNKNOWN,
            "new and old pods cannot be told apart: which pods ran before is not known",
        )
    elif ready != wanted:
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


def _standing(status: ClusterStatus, expected: Expected) -> list[Pod]:
    """The pods that are listed, less those that had finished before the release began."""
    return [
        pod
        for pod in status.pods or []
        if not (pod.state in FINISHED and (expected.baseline or {}).get(pod.name) in FINISHED)
    ]


def _is_new(pod: Pod, expected: Expected) -> bool | None:
    """Return whether the pod is of the published revision; `None` if that is unknown."""
    replaces = expected.restarted and not expected.in_place
    if pod.template_id is not None:
        labelled = same_id(pod.template_id, expected.template_id)
        if not labelled or not replaces:
            return labelled
    elif expected.in_place or not (expected.changed or expected.restarted):
        return True  # it keeps its name, or nothing of it changes
    if expected.baseline is None:
        return None
    if pod.name not in expected.baseline:
        return True
    return None if expected.mixed else False


def _reports_revisions(status: ClusterStatus, pods: Sequence[Pod], expected: Expected) -> bool:
    """Whether the status tells new pods from old by itself, not only by their names.

    Counters alone agree with themselves right after a publish too, before the cluster has acted on it:
    they count only where no pod of before is listed any more. Labels say nothing of a restart in place,
    which changes neither name nor template.
    """
    counted = None not in (status.generation, status.observed_generation, status.updated_replicas)
    labelled = bool(pods) and all(pod.template_id is not None for pod in pods)
    replaced = expected.baseline is not None and not any(pod.name in expected.baseline for pod in pods)
    return (labelled and not (expected.restarted and expected.in_place)) or (counted and replaced)


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
        (expected.changed or expected.restarted)
        and status.generation is not None
        and expected.generation_before is not None
        and status.generation <= expected.generation_before
    ):
        missing.append(f"the publish has not arrived yet (generation {status.generation} as before)")
    if status.updated_replicas is not None and status.updated_replicas != expected.replicas:
        missing.append(f"{status.updated_replicas} of {expected.replicas} pods updated")
    return missing


# ---- one new pod ------------------------------------------------------------------------------


def _sight(
    pod: Pod, events: Sequence[Event], expected: Expected, before: Sight | None, at: float, grace: Grace
) -> Sight:
    """What this look shows of a new pod, and what is remembered of it.

    Ready to stay is a pod that runs and whose restarts are no more than at the look before: a crashing
    container runs for moments as well.
    """
    before = before or Sight(since=at)
    restarts = before.restarts | restarts_of(pod)
    first = {name: min(count, before.restarts_first.get(name, count)) for name, count in restarts.items()}
    grown = max((count - first[name] for name, count in restarts.items()), default=0)
    grew = any(count > before.restarts.get(name, 0) for name, count in restarts.items())
    if pod.state == RUNNING and not grew:
        since = at if before.category else before.since
        return Sight(since=since, restarts=restarts, restarts_first=first, word=RUNNING)

    befallen = is_befallen(pod, events)
    silent = befallen or pod.state == RUNNING or pod.state in _ENDING
    trouble = None if silent else trouble_of(pod, events, in_place=expected.in_place)
    told, told_since = before.told, before.told_since
    if trouble and trouble.tier is not Tier.NEVER:
        if not told or _kind(told) is not _kind(trouble.category):
            told, told_since = trouble.category, at
        elif told is not Category.OOM_KILLED:  # which alternates with CrashLoopBackOff and says more
            told = trouble.category
    elif pod.state == "ContainersNotReady" and told and _kind(told) is not Category.CRASH_LOOP_BACK_OFF:
        told = None  # its containers are made: image, configuration and node were found meanwhile

    # An update in place restarts the containers once by itself. Where the pod is labelled, it is new
    # only from then on.
    by_itself = 1 if expected.in_place and pod.template_id is None else 0
    restarted = grown >= grace.restarts + by_itself
    waited = trouble is not None and (
        trouble.tier is Tier.AT_ONCE
        or (trouble.tier is Tier.AFTER_GRACE and at - told_since >= grace.seconds)
    )
    if trouble and trouble.tier is not Tier.NEVER:
        category: Category | None = told
        since = told_since
    else:
        category = trouble.category if trouble else _condition(pod, grown - by_itself)
        since = before.since if before.category is category else at
    count = f"{grown} restart{'s' if grown > 1 else ''}" if grown else ""
    word = trouble.word if trouble else _state(pod)
    return Sight(
        category=category,
        since=since,
        told=told,
        told_since=told_since,
        restarts=restarts,
        restarts_first=first,
        word=", ".join(filter(None, (one_line(word, 40), count))),
        reported=(trouble.reported if trouble else pod.message or pod.reason) or count or None,
        container=trouble.container if trouble else None,
        events=_shown(events),
        final=(waited or restarted)
        and not befallen
        and pod.state not in _ENDING
        and _began_well(pod, expected),
    )


def _kind(category: Category) -> Category:
    return Category.CRASH_LOOP_BACK_OFF if category is Category.OOM_KILLED else category


def _condition(pod: Pod, restarts: int) -> Category:
    """The condition of a pod that is not ready and of which nothing is told."""
    if restarts > 0:
        return Category.CRASH_LOOP_BACK_OFF
    return {
        RUNNING: Category.UNCONFIRMED,
        "Pending": Category.POD_PENDING,
        "ContainersNotReady": Category.CONTAINER_NOT_READY,
    }.get(pod.state or "", Category.UNKNOWN_STATE)


def _began_well(pod: Pod, expected: Expected) -> bool:
    """Whether a trouble of this pod is the release's, and not one from before.

    A pod of the baseline that no label calls new may still run what ran before, even where the update
    will keep its name: its trouble counts only if it ran well before and is updated in place.
    """
    if pod.template_id is not None:
        return True
    if expected.baseline is None:
        return False
    if pod.name not in expected.baseline:
        return True
    return expected.in_place and expected.baseline[pod.name] == RUNNING


# ---- the diagnosis ----------------------------------------------------------------------------

# The most telling first. A pod says more than the deployment, and what it said of itself most.
_ORDER = (
    Category.QUOTA_EXCEEDED,
    Category.OLD_PODS_LEFT,
    Category.BASELINE_UNKNOWN,
    Category.NO_PODS,
    Category.NOT_OBSERVED,
    Category.NO_STATUS,
    Category.REPLICAS_DIFFER,
    Category.UNCONFIRMED,
)


def _diagnose(clusters: Sequence[ClusterVerdict], at: float) -> Diagnosis:
    """The most telling trouble: a final one, then the longest told, then pods that are not ready."""
    ranked: list[tuple[tuple[int, float], Diagnosis]] = []
    for cluster in clusters:
        for pod in cluster.not_ready:
            sight = cluster.sights[pod.name]
            if sight.category is None:
                continue
            diagnosis = Diagnosis.of(
                sight.category,
                cluster=cluster.cluster,
                pod=pod.name,
                container=sight.container,
                reported=sight.reported,
                seconds=at - sight.since,
                events=sight.events or cluster.events,
            )
            plain = sight.category in {
                Category.POD_PENDING,
                Category.CONTAINER_NOT_READY,
                Category.UNKNOWN_STATE,
                Category.UNCONFIRMED,
            }
            ranked.append(((0 if sight.final else 2 if plain else 1, sight.since), diagnosis))
        for finding in cluster.findings:
            left = cluster.old[0] if finding.category is Category.OLD_PODS_LEFT else None
            diagnosis = Diagnosis.of(
                finding.category,
                summary=finding.text,
                cluster=cluster.cluster,
                pod=left.name if left else None,
                reported=_state(left) if left else finding.reported,
                seconds=at - finding.since,
                events=cluster.events,
            )
            rank = 0 if finding.final else 3 + _ORDER.index(finding.category)
            ranked.append(((rank, finding.since), diagnosis))
    return min(ranked, key=lambda each: each[0])[1] if ranked else Diagnosis.of(Category.NO_STATUS)


def _shown(events: Sequence[Event]) -> tuple[str, ...]:
    return tuple(str(event) for event in events[-EVENTS_SHOWN:])


def _state(pod: Pod) -> str:
    return one_line(pod.state or "no state", 40)


def _pods(pods: Sequence[Pod]) -> str:
    return "pod" if len(pods) == 1 else "pods"
