"""The table: every file in data/statuses is a claim, with whole payloads and what the verdict has to be."""

from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from prefect_rollout.platforms.container_cloud.payloads import ClusterStatus
from prefect_rollout.verdict.diagnosis import Category
from prefect_rollout.verdict.expected import Expected, Grace
from prefect_rollout.verdict.judge import judge
from prefect_rollout.verdict.status import Observation, Pod, Status, StatusCondition
from prefect_rollout.verdict.verdict import Ending, Verdict

CLAIMS = {path.stem: path for path in sorted((Path(__file__).parent / "data" / "statuses").glob("*.yaml"))}


def observed(at: float, clusters: dict[str, Any] | None = None) -> Observation:
    """Return the observation that the client makes of these payloads, `{cluster: payload}`."""
    found = clusters and {
        name: ClusterStatus.model_validate(payload).status for name, payload in clusters.items()
    }
    return Observation(at=at, clusters=found)


def verdicts(claim: dict[str, Any]) -> list[Verdict]:
    """The verdict after each look of the claim, as it comes back from JSON."""
    expected = [Expected.model_validate(each) for each in claim["expected"]]
    grace = Grace.model_validate(claim.get("grace", {}))
    found: list[Verdict] = []
    for number, each in enumerate(claim["looks"], start=1):
        last = claim.get("last", False) and number == len(claim["looks"])
        before = found[-1] if found else None
        verdict = judge(expected, observed(**each), before, grace=grace, last=last)
        again = Verdict.model_validate_json(verdict.model_dump_json())
        assert again == verdict
        found.append(again)
    return found


@pytest.mark.parametrize("path", CLAIMS.values(), ids=CLAIMS)
def test_the_verdict_is_as_claimed(path: Path) -> None:
    claim = yaml.safe_load(path.read_text(encoding="utf-8"))
    want = claim["want"]
    assert path.stem.startswith(want["ending"])
    *waiting, verdict = verdicts(claim)
    assert [each.ending for each in waiting] == [Ending.WAITING] * len(waiting)
    assert verdict.ending == want["ending"], verdict.explain()
    assert verdict.released == (verdict.ending is Ending.RELEASED) == (verdict.explain() == "")
    assert want.get("missing", "") in verdict.explain()
    if verdict.ending in {Ending.WAITING, Ending.RELEASED}:
        assert verdict.diagnosis is None
        return
    assert verdict.diagnosis is not None
    assert verdict.diagnosis.category == want["category"]
    assert want.get("diagnosis", "") in str(verdict.diagnosis)
    assert verdict.diagnosis.cluster in {each["cluster"] for each in claim["expected"]}


OLD = {"old-1": "Running", "old-2": "Running"}
NEW = [{"name": "new-1", "state": "Running"}, {"name": "new-2", "state": "Running"}]
LABELLED = [{**pod, "templateId": 2} for pod in NEW]


def expected(**changes: Any) -> Expected:
    return Expected(**{"cluster": "a", "revision": 2, "replicas": 2, "baseline": OLD, **changes})


def look(at: float = 0, **listed: list[dict[str, Any]]) -> Observation:
    return observed(at, {name: {"cluster": name, "pods": pods} for name, pods in listed.items()})


def test_every_cluster_has_to_be_released() -> None:
    wanted = [expected(), expected(cluster="b")]
    old = [{"name": name, "state": "Running"} for name in OLD]
    judged = judge(wanted, look(a=LABELLED, b=old))
    assert not judged.released
    assert judged.counts == "a 2/2, b 0/2"
    assert judged.explain().startswith("0 of 2 new pods ready, 2 old pods left in b; old old-1: Running")
    assert "in a" not in judged.explain()
    assert judge(wanted, look(a=LABELLED, b=LABELLED)).released


def test_the_evidence_is_as_strong_as_its_weakest_cluster() -> None:
    wanted = [expected(), expected(cluster="b")]
    assert judge(wanted, look(a=LABELLED, b=LABELLED)).evidence == "strong"
    first = judge(wanted, look(a=LABELLED, b=NEW))
    second = judge(wanted, look(a=LABELLED, b=NEW), first)
    assert (first.released, second.released, second.evidence) == (False, True, "weak")


def test_no_cluster_at_all_is_not_released() -> None:
    assert judge([], look()).ending is Ending.WAITING
    assert judge([], look(), last=True).diagnosis is not None


def test_replicas_that_others_set_are_the_ones_that_the_platform_reports() -> None:
    def look_at(desired: int | None) -> Observation:
        state = {"desired": desired, "pods": LABELLED}
        return observed(0, {"a": {"cluster": "a", "deployment": {"podState": state}, "pods": LABELLED}})

    wanted = [expected(replicas=None)]
    assert judge(wanted, look_at(2)).released
    waiting = judge(wanted, look_at(3))
    assert (waiting.ending, waiting.counts) == (Ending.WAITING, "a 2/3")
    unknown = judge(wanted, look_at(None), last=True)
    assert (unknown.ending, unknown.counts) == (Ending.TIMED_OUT, "a 2/?")
    assert "the desired replicas are not reported" in unknown.explain()
    assert not judge(wanted, look_at(None), judge(wanted, look_at(None))).released


@pytest.mark.parametrize(
    ("ends", "endings"),
    [
        ("never", [Ending.WAITING, Ending.WAITING]),
        ("after-grace", [Ending.WAITING, Ending.FAILED]),
        ("at-once", [Ending.FAILED, Ending.FAILED]),
    ],
)
def test_a_condition_of_the_platform_keeps_a_release_from_green_and_may_end_it(
    ends: Literal["never", "after-grace", "at-once"], endings: list[Ending]
) -> None:
    said = StatusCondition(
        category=Category.POD_CREATION_FAILED, text="refused", reported="no account", ends=ends
    )
    pod = Pod(name="n", state="Running", template_id=2)
    status = Status(pods=[pod], desired=1, conditions=[said])
    first = judge([expected(replicas=1)], Observation(0, {"a": status}))
    second = judge([expected(replicas=1)], Observation(30, {"a": status}), first)
    assert [first.ending, second.ending] == endings
    if second.diagnosis:
        found = (second.diagnosis.category, second.diagnosis.reported)
        assert found == (Category.POD_CREATION_FAILED, "no account")
    assert judge([expected(replicas=1)], Observation(31, {"a": Status(pods=[pod])}), second).released


def test_a_change_that_followed_ends_a_release_and_is_never_green() -> None:
    pod = Pod(name="n", state="Running", template_id=3)
    status = Status(pods=[pod], revision=3, current=True, changed_by="changed by kubectl at noon")
    verdict = judge([expected(replicas=1)], Observation(0, {"a": status}))
    assert verdict.ending is Ending.FAILED
    assert verdict.diagnosis is not None
    assert verdict.diagnosis.category is Category.SUPERSEDED
    assert verdict.diagnosis.reported == "changed by kubectl at noon"
    late = status.model_copy(update={"current": False})
    assert judge([expected(replicas=1)], Observation(0, {"a": late})).ending is Ending.WAITING


def test_many_pods_are_named_up_to_a_number() -> None:
    listed = [{"name": f"n{i}", "state": "Pending", "templateId": 2} for i in range(9)]
    assert "and 4 more" in judge([expected(replicas=9)], look(a=listed)).explain(most=5)


def test_what_is_remembered_does_not_grow_with_the_looks() -> None:
    verdict: Verdict | None = None
    sizes = []
    for number in range(100):
        pods = [
            {
                "name": f"crashed-{number % 10}{each}",
                "state": "ContainersNotReady",
                "templateId": 2,
                "containerStatus": [{"name": "web", "restartCount": 0}],
            }
            for each in range(5)
        ]
        verdict = judge([expected()], look(float(10 + number % 10), a=pods), verdict)
        sizes.append(len(verdict.model_dump_json()))
    assert max(sizes) == max(sizes[:10])
