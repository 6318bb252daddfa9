"""Random rollouts of the simulated cloud, judged at random moments: green means released.

The cloud runs in memory, on a clock of the test's own. What a rollout has really come to, it says itself.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from prefect_rollout.platforms.container_cloud.payloads import ClusterStatus
from prefect_rollout.simulator.cloud import Cloud
from prefect_rollout.simulator.engine import Rollout
from prefect_rollout.simulator.pod import CRASH_LOOKS_RUNNING
from prefect_rollout.simulator.scenario import Scenario
from prefect_rollout.verdict.expected import Expected, Grace
from prefect_rollout.verdict.judge import judge
from prefect_rollout.verdict.status import Observation, Status
from prefect_rollout.verdict.verdict import Ending, Verdict

APP, DEPLOYMENT = 1, 10
OLD, BAD, OURS, THEIRS = 100, 101, 102, 103
SETTINGS = settings(derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])

COUNTERS = frozenset({"generation", "observedGeneration", "updatedReplicas"})
STATUS_FIELDS = [*sorted(COUNTERS), "templateId", "deployment", "healthz"]
POD_FIELDS = ["templateId", "containerStatus", "nodeName", "podIp"]

LASTING = ["image_cannot_be_pulled", "invalid_image", "unschedulable", "config_error", "crash_loop"]
PASSING = ["normal", "slow_start", "slow_pull", "no_pods"]


@dataclass(frozen=True)
class Case:
    """One release and how it is watched."""

    wanted: dict[str, int]
    wanted_before: dict[str, int]
    meta: dict[str, Any]
    timings: dict[str, float]
    behaviour: dict[str, Any]
    same_content: bool
    bad_before: str | None
    theirs_at: float | None
    polls: list[float]
    unanswered: frozenset[int]
    status_hidden: frozenset[str]
    pod_hidden: frozenset[str]
    grace: Grace

    @property
    def in_place(self) -> bool:
        return bool(self.meta["inPlace"])

    @property
    def labelled(self) -> bool:
        return "templateId" not in self.pod_hidden

    @property
    def counted(self) -> bool:
        return not self.status_hidden & COUNTERS


PAYLOADS = st.one_of(
    st.sampled_from(
        [
            (frozenset[str](), frozenset[str]()),
            (frozenset(STATUS_FIELDS), frozenset(POD_FIELDS)),  # the article's: names and states
            (frozenset[str](), frozenset({"templateId"})),
            (COUNTERS | {"templateId"}, frozenset[str]()),
        ]
    ),
    st.tuples(st.frozensets(st.sampled_from(STATUS_FIELDS)), st.frozensets(st.sampled_from(POD_FIELDS))),
)


@st.composite
def cases(draw: st.DrawFn, kinds: list[str]) -> Case:
    clusters = draw(st.sampled_from([["east"], ["east", "west"]]))
    replicas = st.sampled_from([1, 2, 4, 0])
    wanted = {cluster: draw(replicas) for cluster in clusters}
    bound = st.sampled_from(["100%", "25%", 1, 0, "50%", 3])
    grace = Grace(seconds=draw(st.sampled_from([30, 10, 3])), restarts=draw(st.integers(1, 3)))
    kind = draw(st.sampled_from(kinds))
    behaviour: dict[str, Any] = {"kind": kind, "images": "ours"}
    if kind == "slow_pull":
        behaviour["seconds"] = grace.seconds * draw(st.sampled_from([0.9, 0.5, 0.1]))
    elif kind in {"slow_start", "no_pods"}:
        behaviour["seconds"] = draw(st.integers(0, 40))
    if draw(st.integers(0, 3)) == 3:
        behaviour["clusters"] = [clusters[-1]]
    duration = st.sampled_from([1, 2, 3, 0, 0.5, 5, 8])
    # Closer together than a crashing container's moment of Running, two looks may fall into one.
    closest = CRASH_LOOKS_RUNNING if kind == "crash_loop" else 0.1
    gap = st.sampled_from([each for each in (2, 1.6, 5, 7, 0.5, 9, 0.1) if each >= closest])
    looks = draw(st.sampled_from([10, 20, 40, 3]))
    status_hidden, pod_hidden = draw(PAYLOADS)
    return Case(
        wanted=wanted,
        wanted_before={cluster: draw(st.one_of(st.just(wanted[cluster]), replicas)) for cluster in clusters},
        meta={
            "inPlace": draw(st.booleans()),
            "strategy": {"rollingUpdate": {"maxSurge": draw(bound), "maxUnavailable": draw(bound)}},
        },
        timings={name: draw(duration) for name in ("observe", "pull", "start", "terminate")},
        behaviour=behaviour,
        same_content=draw(st.integers(0, 5)) == 5,
        bad_before=draw(st.one_of(st.none(), st.sampled_from([*LASTING, "never_ready"]))),
        theirs_at=draw(st.sampled_from([None, None, None, 0, 0.5, 4, 12])),
        polls=draw(st.lists(gap, min_size=looks, max_size=looks)),
        unanswered=draw(st.one_of(st.just(frozenset[int]()), st.frozensets(st.integers(0, 40), max_size=5))),
        status_hidden=status_hidden,
        pod_hidden=pod_hidden,
        grace=grace,
    )


class Release:
    """A release of template `OURS` in a cloud whose time is `now`."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.now = 0.0
        images = {OLD: "web:old", BAD: "web:bad", OURS: "web:ours", THEIRS: "web:theirs"}
        if case.same_content:
            images[OURS] = images[OLD]
        behaviours = [case.behaviour]
        if case.bad_before:
            behaviours.append({"kind": case.bad_before, "images": "bad"})
        deployment = {
            "id": DEPLOYMENT,
            "name": "web",
            "metaData": {
                **case.meta,
                "clusters": {name: {"replica": count} for name, count in case.wanted_before.items()},
            },
            "templates": [{"id": each, "image": image} for each, image in images.items()],
            "online": dict.fromkeys(case.wanted, OLD),
            "behaviour": behaviours,
            "timings": case.timings,
        }
        scenario = Scenario.model_validate(
            {"apps": [{"id": APP, "name": "shop", "deployments": [deployment]}]}
        )
        self.cloud = Cloud(scenario, clock=lambda: self.now)
        if case.bad_before:
            self._publish(BAD)
            self.now += 60  # by then it is stuck
        changed = bool(case.bad_before) or not case.same_content
        before = self._statuses(hide=False)
        self._publish(OURS)
        self.began = self.now
        self.expected = [
            Expected(
                cluster=cluster,
                revision=OURS,
                replicas=wanted,
                baseline={pod.name: pod.state for pod in before[cluster].pods or ()},
                generation_before=before[cluster].generation,
                changed=changed,
                in_place=case.in_place,
            )
            for cluster, wanted in case.wanted.items()
        ]

    def _publish(self, template: int) -> None:
        for cluster, wanted in self.case.wanted.items():
            self.cloud.publish(APP, DEPLOYMENT, template, cluster, wanted, user="test", key=None)

    def _statuses(self, *, hide: bool) -> dict[str, Status]:
        found = {}
        shapes = self.cloud.status(APP, DEPLOYMENT, list(self.case.wanted))
        for cluster, shape in zip(self.case.wanted, shapes, strict=True):
            status = shape.model_dump(mode="json", by_alias=True, exclude_unset=True)
            if hide:
                status = {key: value for key, value in status.items() if key not in self.case.status_hidden}
                status["pods"] = status["pods"] and [
                    {key: value for key, value in pod.items() if key not in self.case.pod_hidden}
                    for pod in status["pods"]
                ]
            found[cluster] = ClusterStatus.model_validate(status).status
        return found

    def rollout(self, cluster: str) -> Rollout:
        rollout = self.cloud._deployments[DEPLOYMENT].rollout(cluster)
        rollout.advance(self.now)
        return rollout

    def runs(self, cluster: str) -> bool:
        """The truth: our template runs in full, and nothing else is left."""
        pods = self.rollout(cluster).pods
        return len(pods) == self.case.wanted[cluster] and all(
            pod.template_id == OURS and pod.is_ready(self.now) for pod in pods
        )

    def watch(self) -> Iterator[Verdict]:
        """The verdicts, look by look, until one has an ending."""
        case, verdict = self.case, None
        theirs_at = math.inf if case.theirs_at is None else self.began + case.theirs_at
        for number, gap in enumerate(case.polls):
            moment = self.now + gap
            if moment >= theirs_at:
                self.now, theirs_at = theirs_at, math.inf
                self._publish(THEIRS)
            self.now = moment
            seen = None if number in case.unanswered else self._statuses(hide=True)
            last = number == len(case.polls) - 1
            look = Observation(at=self.now, clusters=seen)
            verdict = judge(self.expected, look, verdict, grace=case.grace, last=last)
            yield verdict
            if verdict.ending is not Ending.WAITING:
                return


def cannot_be_told(case: Case, expected: Expected) -> bool:
    """The limits that the verdict's docstring names: what no observation of the case can show."""
    if case.behaviour["kind"] == "crash_loop" and "containerStatus" in case.pod_hidden:
        return True
    if case.labelled:
        return False
    if case.theirs_at is not None and "templateId" in case.status_hidden:
        return True
    return not case.counted and (expected.in_place or not expected.changed)


@settings(SETTINGS, max_examples=800)
@given(cases([*PASSING, "crash_loop", "crash_loop", "never_ready", "image_cannot_be_pulled"]))
def test_green_means_released(case: Case) -> None:
    release = Release(case)
    for verdict in release.watch():
        if verdict.ending is Ending.RELEASED:
            for expected in release.expected:
                assert cannot_be_told(case, expected) or release.runs(expected.cluster), verdict


@settings(SETTINGS, max_examples=500)
@given(cases([*PASSING, "slow_pull", "never_ready"]))
def test_what_gets_ready_within_the_grace_never_fails(case: Case) -> None:
    for verdict in Release(case).watch():
        assert verdict.ending is not Ending.FAILED, verdict.diagnosis


@settings(SETTINGS, max_examples=200)
@given(cases(PASSING))
def test_what_runs_becomes_green(case: Case) -> None:
    # By names alone, pods of before that are wanted again after a bad release are old for ever.
    assume(case.theirs_at is None and not (case.bad_before and case.same_content))
    release = Release(case)
    *_, verdict = release.watch()
    release.now += 1000
    for _ in range(2):
        look = Observation(at=release.now, clusters=release._statuses(hide=True))
        verdict = judge(release.expected, look, verdict, grace=case.grace)
    assert verdict.released, verdict.explain()
