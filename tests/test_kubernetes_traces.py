"""Rollouts that a real control plane went through, a state a second, as claims about the verdict."""

import json
import lzma
from datetime import datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from prefect_rollout.platforms.kubernetes.objects import (
    KINDS,
    Kind,
    revision_id,
    stored_revisions,
    template_of,
)
from prefect_rollout.platforms.kubernetes.status import Snapshot, status_of
from prefect_rollout.verdict.expected import Expected
from prefect_rollout.verdict.judge import judge
from prefect_rollout.verdict.status import RUNNING, Observation, Status
from prefect_rollout.verdict.verdict import Ending, Verdict

TRACES = Path(__file__).parent / "data" / "kubernetes"
CLAIMS: dict[str, dict[str, Any]] = yaml.safe_load((TRACES / "claims.yaml").read_text(encoding="utf-8"))
SETTLE = 10
DEADLINE = 95  # 20 polls, 5 s apart


class State(NamedTuple):
    at: float
    seen: Snapshot


class Trace(NamedTuple):
    kind: Kind
    states: list[State]

    def statuses(self) -> list[tuple[float, Status]]:
        return [(at, status_of(self.kind, seen, SETTLE)) for at, seen in self.states]


@cache
def read(case: str) -> Trace:
    with lzma.open(TRACES / f"{case}.jsonl.xz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    kind = next(kind for prefix, kind in KINDS.items() if prefix in rows[0])
    # The trace has no clock of the API server: nothing was created after the state that shows it.
    started = max(
        datetime.fromisoformat(found["metadata"]["creationTimestamp"]) - timedelta(seconds=row["t"])
        for row in rows
        for found in [*row[kind.revisions], *row["pods"], *row["events"]]
    )
    states = [
        State(
            row["t"],
            Snapshot(
                workload=row[kind.prefix],
                holders=row[kind.revisions],
                pods=row["pods"],
                events=[event for event in row["events"] if event["type"] == "Warning"],
                now=started + timedelta(seconds=row["t"]),
            ),
        )
        for row in rows
    ]
    return Trace(kind, states)


def change_of(statuses: list[tuple[float, Status]]) -> int:
    """Return the number of the first state after the change of the pod template."""
    return next(
        number
        for number in range(1, len(statuses))
        if statuses[number][1].revision != statuses[number - 1][1].revision
    )


def follow(case: str) -> Verdict:
    """Return the verdict of a release that made the change, at its end or at the end of the trace."""
    statuses = read(case).statuses()
    first = change_of(statuses)
    before, revision = statuses[first - 1][1], statuses[first][1].revision
    assert revision is not None
    expected = Expected(
        cluster="here",
        revision=revision,
        replicas=None,
        baseline=before.pod_states,
        generation_before=before.generation,
    )
    verdict = None
    for at, status in statuses[first:]:
        verdict = judge([expected], Observation(at, {"here": status}), verdict, last=at >= DEADLINE)
        if verdict.ending is not Ending.WAITING:
            break
    assert verdict is not None
    return verdict


def test_every_trace_has_a_claim() -> None:
    assert {file.name.removesuffix(".jsonl.xz") for file in TRACES.glob("*.xz")} == set(CLAIMS)


@pytest.mark.parametrize("case", CLAIMS)
def test_the_verdict_on_a_recorded_rollout(case: str) -> None:
    claim, verdict = CLAIMS[case], follow(case)
    assert verdict.ending == claim["ending"], verdict.explain()
    if "by" in claim:
        assert verdict.at <= claim["by"] + 0.5
        assert verdict.evidence == claim.get("evidence", "strong")
    if "category" in claim:
        found = verdict.diagnosis
        assert found is not None
        assert (found.category, found.container) == (claim["category"], claim.get("container"))
        assert claim.get("says", "") in (found.reported or "")


@pytest.mark.parametrize("case", [case for case, claim in CLAIMS.items() if claim["ending"] == "released"])
def test_a_release_is_green_only_when_the_controller_agrees(case: str) -> None:
    """Compare with counters of the controller, which the verdict does not read from the pods."""
    trace, at = read(case), follow(case).at
    workload = next(seen.workload for t, seen in trace.states if t == at)
    assert workload is not None
    status, desired = workload["status"], workload["spec"].get("replicas")
    assert status["observedGeneration"] == workload["metadata"]["generation"]
    if trace.kind.name == "DaemonSet":
        desired = status["desiredNumberScheduled"]
        assert status["updatedNumberScheduled"] == status["numberAvailable"] == desired
    elif desired:
        assert status["updatedReplicas"] == status["availableReplicas"] == status["replicas"] == desired


def test_the_revision_after_an_undo_is_that_of_before() -> None:
    statuses = read("undo-finished").statuses()
    revisions = [status.revision for _, status in statuses]
    assert revisions[0] == revisions[-1] != revisions[10]


@pytest.mark.parametrize("case", [case for case in CLAIMS if case != "deleted-midway"])
def test_the_controller_stores_the_revision_under_the_same_id(case: str) -> None:
    trace = read(case)
    workload, holders = trace.states[-1].seen.workload, trace.states[-1].seen.holders
    assert workload is not None
    stored = stored_revisions(trace.kind, workload, holders)
    assert len(stored) == len({each.id for each in stored}) == len(holders)
    assert stored[0].id == revision_id(template_of(workload))
    assert stored[0].number == max(each.number for each in stored)


def test_a_container_without_a_probe_that_crashes_after_five_seconds_never_counts_as_running() -> None:
    statuses = read("crash-loop-no-probe").statuses()
    new = statuses[change_of(statuses)][1].revision
    states = {pod.state for _, status in statuses for pod in status.pods or [] if pod.template_id == new}
    assert "ContainersNotReady" in states
    assert RUNNING not in states
