"""Random rollouts of the simulated cloud, judged at random moments: green means released.

The cloud runs in memory, on a clock of the test's own. What a rollout has really come to, it says itself.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from prefect_rollout.models import ClusterStatus
from prefect_rollout.simulator.cloud import Cloud
from prefect_rollout.simulator.engine import Rollout
from prefect_rollout.simulator.pod import CRASH_LOOKS_RUNNING
from prefect_rollout.simulator.scenario import Scenario
from prefect_rollout.verdict import Ending, Expected, Grace, Look, Verdict, judge

APP, DEPLOYMENT = 1, 10
OLD, BAD, OURS, THEIRS = 100, 101, 102, 103
SETTINGS = settings(
    derandomize=True,
    deadline=None,
    max_examples=int(__import__("os").environ.get("N", "400")),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)

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

    @property
    def can_fail(self) -> bool:
        """Whether the release cannot succeed, or a trouble outlasts the grace."""
        kind, seconds = self.behaviour["kind"], self.behaviour.get("seconds", 0)
        return kind in LASTING or (kind == "slow_pull" and seconds >= self.grace.seconds)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    clusters = ["east", "west"][: draw(st.integers(1, 2))]
    replicas = st.integers(0, 4)
    wanted = {cluster: draw(replicas) for cluster in clusters}
    bound = st.one_of(st.integers(0, 4), st.sampled_from(["0%", "25%", "50%", "100%"]))
    kind = draw(st.sampled_from([*PASSING, *PASSING, *LASTING, "never_ready", "crash_loop"]))
    behaviour: dict[str, Any] = {"kind": kind, "images": "ours"}
    if kind in {"slow_start", "slow_pull", "no_pods"}:
        behaviour["seconds"] = draw(st.integers(0, 40))
    if draw(st.booleans()):
        behaviour["clusters"] = [clusters[-1]]
    duration = st.sampled_from([0, 0.5, 1, 2, 3, 5, 8])
    # Closer together than a crashing container's moment of Running, two looks may fall into one.
    closest = CRASH_LOOKS_RUNNING if kind == "crash_loop" else 0.1
    gap = st.sampled_from([each for each in (0.1, 0.5, 1.6, 2, 5, 7, 9) if each >= closest])
    looks = draw(st.sampled_from([3, 10, 20, 40]))
    hidden = st.one_of(st.just(frozenset[str]()), st.frozensets(st.sampled_from(STATUS_FIELDS)))
    pod_hidden = st.one_of(st.just(frozenset[str]()), st.frozensets(st.sampled_from(POD_FIELDS)))
    names_alone = draw(st.integers(0, 4)) == 0
    return Case(
        wanted=wanted,
        wanted_before={cluster: draw(st.one_of(st.just(wanted[cluster]), replicas)) for cluster in clusters},
        meta={
            "inPlace": draw(st.booleans()),
            "strategy": {"rollingUpdate": {"maxSurge": draw(bound), "maxUnavailable": draw(bound)}},
        },
        timings={name: draw(duration) for name in ("observe", "pull", "start", "terminate")},
        behaviour=behaviour,
        same_content=draw(st.integers(0, 5)) == 0,
        bad_before=draw(st.one_of(st.none(), st.sampled_from([*LASTING, "never_ready"]))),
        theirs_at=draw(st.one_of(st.none(), st.none(), st.floats(0, 30, allow_nan=False))),
        polls=draw(st.lists(gap, min_size=looks, max_size=looks)),
        unanswered=draw(st.one_of(st.just(frozenset[int]()), st.frozensets(st.integers(0, 40), max_size=5))),
        status_hidden=frozenset(STATUS_FIELDS) if names_alone else draw(hidden),
        pod_hidden=frozenset(POD_FIELDS) if names_alone else draw(pod_hidden),
        grace=Grace(seconds=draw(st.sampled_from([3, 10, 30])), restarts=draw(st.integers(1, 3))),
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
                template_id=OURS,
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

    def _statuses(self, *, hide: bool) -> dict[str, ClusterStatus]:
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
            found[cluster] = ClusterStatus.model_validate(status)
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
            look = Look(at=self.now, clusters=seen)
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


@SETTINGS
@given(cases())
def test_green_means_released(case: Case) -> None:
    release = Release(case)
    for verdict in release.watch():
        if verdict.ending is Ending.RELEASED:
            for expected in release.expected:
                assert cannot_be_told(case, expected) or release.runs(expected.cluster), verdict


@SETTINGS
@given(cases())
def test_what_gets_ready_within_the_grace_never_fails(case: Case) -> None:
    for verdict in Release(case).watch():
        assert verdict.ending is not Ending.FAILED or case.can_fail, verdict.diagnosis


@SETTINGS
@given(cases())
def test_what_runs_becomes_green(case: Case) -> None:
    back = case.bad_before is not None and case.same_content
    assume(case.behaviour["kind"] in PASSING and case.theirs_at is None and not back)
    release = Release(case)
    *_, verdict = release.watch()
    release.now += 1000
    for _ in range(2):
        look = Look(at=release.now, clusters=release._statuses(hide=True))
        verdict = judge(release.expected, look, verdict, grace=case.grace)
    assert verdict.released or case.can_fail, verdict.explain()
