from typing import Any

import pytest

from prefect_rollout.models import ClusterStatus
from prefect_rollout.verdict import Expected, Verdict, judge

OLD = {"old-1": "Running", "old-2": "Running"}


def expected(**changes: Any) -> Expected:
    return Expected(**{"cluster": "a", "template_id": 2, "replicas": 2, "baseline": OLD, **changes})


def pods(template_id: int | None = None, **states: str) -> list[dict[str, Any]]:
    return [
        {"name": name.replace("_", "-"), "state": state, "templateId": template_id}
        for name, state in states.items()
    ]


def status(listed: list[dict[str, Any]] | None, **fields: Any) -> ClusterStatus:
    return ClusterStatus.model_validate({"cluster": "a", "pods": listed, **fields})


def verdict(wanted: Expected, *looks: ClusterStatus | None) -> Verdict:
    now, before = looks[-1], looks[-2] if len(looks) > 1 else None
    return judge([wanted], {"a": now} if now else {}, {"a": before} if before else None)


NEW = pods(new_1="Running", new_2="Running")
OLD_PODS = pods(old_1="Running", old_2="Running")
COUNTED = {"templateId": 2, "generation": 5, "observedGeneration": 5, "updatedReplicas": 2}

RELEASED: dict[str, tuple[Expected, list[ClusterStatus | None]]] = {
    "labelled new pods, all ready": (expected(), [status(pods(2, n1="Running", n2="Running"))]),
    "ids are compared as text": (expected(template_id="2"), [status(pods(2, n1="Running", n2="Running"))]),
    "every revision agrees": (expected(), [status(NEW, **COUNTED)]),
    "an evicted new pod beside its successor": (
        expected(),
        [status(pods(2, n1="Running", n2="Running", n3="Failed"))],
    ),
    "names alone, the same on two looks": (expected(), [status(NEW), status(NEW)]),
    "an old pod that was evicted during the rollout": (
        expected(),
        [status([*pods(2, n1="Running", n2="Running"), *pods(1, old_1="Failed")])],
    ),
    "pods that had finished before the release": (
        expected(baseline={**OLD, "corpse": "Failed"}),
        [status([*NEW, *pods(corpse="Failed")])] * 2,
    ),
    "nothing changes, so the platform keeps its pods": (expected(changed=False), [status(OLD_PODS)] * 2),
    "in place, so names stay": (expected(in_place=True), [status(OLD_PODS)] * 2),
    "zero replicas were asked for": (expected(replicas=0), [status([])] * 2),
    "zero replicas, counted": (
        expected(replicas=0),
        [status(None, **{**COUNTED, "updatedReplicas": 0})],
    ),
}

NOT_RELEASED: dict[str, tuple[Expected, list[ClusterStatus | None], str]] = {
    "the cluster says nothing": (expected(), [None], "no status is reported"),
    "pods are absent": (expected(), [status(None)] * 2, "no pod is listed"),
    "pods are an empty list": (expected(), [status([])] * 2, "no pod is listed"),
    "the old pods still run": (expected(), [status(OLD_PODS)] * 2, "2 old pods left"),
    "the old pods are labelled, too": (
        expected(),
        [status(pods(1, old_1="Running", old_2="Running"))] * 2,
        "2 old pods left",
    ),
    "old pods under new names, told by their label": (
        expected(),
        [status(pods(1, x1="Running", x2="Running"))] * 2,
        "2 old pods left",
    ),
    "an old pod terminates": (
        expected(),
        [status([*NEW, *pods(old_1="Terminating")])] * 2,
        "1 old pod left (old old-1: Terminating)",
    ),
    "one of two is ready": (
        expected(),
        [status(pods(2, n1="Running", n2="ContainersNotReady"))],
        "1 of 2 new pods ready (n2: ContainersNotReady)",
    ),
    "a state that nobody knows": (
        expected(),
        [status(pods(2, n1="Running", n2="Sleeping"))],
        "(n2: Sleeping)",
    ),
    "a pod without a state": (
        expected(),
        [status([*pods(2, n1="Running"), {"name": "n2", "templateId": 2}])],
        "(n2: no state)",
    ),
    "more pods than wanted": (
        expected(replicas=1),
        [status(pods(2, n1="Running", n2="Running"))],
        "2 of 1 new pods ready",
    ),
    "one pod listed twice": (expected(), [status(pods(2, n1="Running") * 2)], "1 of 2 new pods ready"),
    "the wanted number and one more on its way": (
        expected(),
        [status(pods(2, n1="Running", n2="Running", n3="Pending"))],
        "1 pod not ready",
    ),
    "names alone, seen once": (expected(), [status(NEW)], "a second look has to agree"),
    "names alone, other names the look before": (
        expected(),
        [status(pods(n1="Running", n2="Running")), status(NEW)],
        "a second look has to agree",
    ),
    "names alone, another state the look before": (
        expected(),
        [status(pods(new_1="Running", new_2="Pending")), status(NEW)],
        "a second look has to agree",
    ),
    "names alone, the look before failed": (expected(), [None, status(NEW)], "a second look has to agree"),
    "names alone, a new pod failed": (
        expected(),
        [status([*NEW, *pods(new_3="Failed")])] * 2,
        "1 pod not ready",
    ),
    "the cluster reports another template": (
        expected(),
        [status(NEW, **{**COUNTED, "templateId": 1})],
        "template 1 is still reported",
    ),
    "the generation is not observed": (
        expected(),
        [status(NEW, **{**COUNTED, "observedGeneration": 4})],
        "generation 4 of 5",
    ),
    "too few pods are updated": (
        expected(),
        [status(NEW, **{**COUNTED, "updatedReplicas": 1})],
        "1 of 2 pods updated",
    ),
    "healthz is no evidence": (expected(), [status(OLD_PODS, healthz=True)] * 2, "2 old pods left"),
    "half a revision is weak evidence": (
        expected(),
        [status(NEW, generation=5, updatedReplicas=2)],
        "a second look has to agree",
    ),
    "some pods are labelled and one is not": (
        expected(),
        [status([*pods(2, n1="Running"), *pods(n2="Running")])],
        "a second look has to agree",
    ),
    "counters that agree with themselves, and nothing labelled, in place": (
        expected(in_place=True),
        [status(OLD_PODS, **COUNTED)],
        "a second look has to agree",
    ),
    "counters that agree with themselves, and nothing changes": (
        expected(changed=False),
        [status(OLD_PODS, **COUNTED)],
        "a second look has to agree",
    ),
    "the generation stands where it stood before the publish": (
        expected(in_place=True, generation_before=5),
        [status(OLD_PODS, **COUNTED)] * 2,
        "generation 5 as before",
    ),
    "the pods before the publish are unknown": (
        expected(baseline=None),
        [status(OLD_PODS)] * 2,
        "2 old pods left",
    ),
    "the pods before the publish are unknown, and counters agree": (
        expected(baseline=None),
        [status(OLD_PODS, **COUNTED)] * 2,
        "2 old pods left",
    ),
    "zero replicas were asked for and no pods are reported": (
        expected(replicas=0),
        [status(None)] * 2,
        "no pods are reported",
    ),
    "zero replicas were asked for and old pods run": (
        expected(replicas=0),
        [status(OLD_PODS)] * 2,
        "2 old pods left",
    ),
}


@pytest.mark.parametrize(("wanted", "looks"), RELEASED.values(), ids=RELEASED)
def test_released(wanted: Expected, looks: list[ClusterStatus | None]) -> None:
    assert verdict(wanted, *looks).explain() == ""
    assert verdict(wanted, *looks).released


@pytest.mark.parametrize(("wanted", "looks", "missing"), NOT_RELEASED.values(), ids=NOT_RELEASED)
def test_not_released(wanted: Expected, looks: list[ClusterStatus | None], missing: str) -> None:
    judged = verdict(wanted, *looks)
    assert not judged.released
    assert missing in judged.explain()


def test_every_cluster_has_to_be_released() -> None:
    wanted = [expected(), expected(cluster="b")]
    done = status(pods(2, n1="Running", n2="Running"))
    judged = judge(wanted, {"a": done, "b": status(OLD_PODS)})
    assert not judged.released
    assert judged.counts == "a 2/2, b 0/2"
    assert "b: 0 of 2 new pods ready, 2 old pods left" in judged.explain()
    assert "a:" not in judged.explain()
    assert judge(wanted, {"a": done, "b": done}).released


def test_the_evidence_is_as_strong_as_its_weakest_cluster() -> None:
    wanted = [expected(), expected(cluster="b")]
    strong, weak = status(pods(2, n1="Running", n2="Running")), status(NEW)
    assert judge(wanted, {"a": strong, "b": strong}).evidence == "strong"
    assert judge(wanted, {"a": strong, "b": weak}, {"a": strong, "b": weak}).evidence == "weak"


def test_no_cluster_at_all_is_not_released() -> None:
    assert not judge([], {}).released


def test_many_pods_are_named_up_to_a_number() -> None:
    listed = status([{"name": f"n{i}", "state": "Pending", "templateId": 2} for i in range(9)])
    assert "and 4 more" in verdict(expected(replicas=9), listed).explain(most=5)
