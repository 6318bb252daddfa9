"""The hash of a plan covers everything that decides what is written, and nothing else."""

from typing import Any

import pytest

from prefect_rollout.batch.plan import Plan
from prefect_rollout.batch.result import BatchResult, hash_of, plan_of_all
from prefect_rollout.flows import deploy_latest_image
from prefect_rollout.release.plan import Procedure, ReleasePlan, Target, release_plan
from prefect_rollout.release.plan_words import NOTHING, plan_lines
from prefect_rollout.release.pod_diff import FieldChange
from prefect_rollout.release.replicas import Replicas
from prefect_rollout.release.report import render_plan
from prefect_rollout.release.request import Action, ReleaseRequest, Request
from prefect_rollout.release.workload import Baseline, Placement, Revision, Workload

REVISION = Revision(id=10, images={"web": "r/w:1"}, digest="d")


def planned(*clusters: str, **asked: Any) -> ReleasePlan:
    """The plan of a release that is asked for so."""
    names = clusters or ("c1", "c2")
    before = Baseline(online=10, revision=REVISION, pods={"web-1": "Running"})
    return release_plan(
        Action.DEPLOY,
        [Target(name, before, REVISION, REVISION.images, Replicas(1)) for name in names],
        platform="cloud",
        cloud="",
        target="",
        workload=Workload(app_id=1, app="shop", id=2, name="web"),
        placement=Placement(replicas=dict.fromkeys(names, 1)),
        creates=True,
        procedure=Procedure.of(ReleaseRequest.of(app_id=1, deployment="web", **asked)),
    )


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"canary": "c2"}, "canary c2 first, then all other clusters at once"),
        ({"order": "one-by-one"}, "one cluster after the other"),
        ({"pause_seconds": 60}, "60 s between clusters"),
        ({"on_failure": "rollback"}, "on failure: rollback"),
        ({"approval": "before-release"}, "only after a person's approval"),
    ],
)
def test_what_decides_the_writes_stands_in_the_lines_and_in_the_hash(
    asked: dict[str, Any], words: str
) -> None:
    plain, other = planned(), planned(**asked)
    assert other.plan_hash != plain.plan_hash
    assert words in "\n".join(plan_lines(other))
    assert words in render_plan(other)
    assert words not in "\n".join(plan_lines(plain))
    assert planned(**asked).plan_hash == other.plan_hash


def test_clusters_that_start_from_revisions_of_their_own_show_them() -> None:
    other = Revision(id=20, images={"web": "r/w:1"}, digest="e")
    before = [Baseline(online=each.id, revision=each) for each in (REVISION, other)]
    plan = release_plan(
        Action.DEPLOY,
        [
            Target(name, each, revision, {"web": "r/w:2"}, Replicas(None))
            for name, each, revision in zip(("c1", "c2"), before, (REVISION, other), strict=True)
        ],
        platform="cloud",
        cloud="",
        target="",
        workload=Workload(app_id=1, app="shop", id=2, name="web"),
        placement=Placement(replicas={"c1": None, "c2": None}),
        creates=True,
        procedure=Procedure(),
    )
    assert [each.base_template_id for each in plan.clusters] == [None, 20]
    lines = "\n".join(plan_lines(plan))
    assert "c1: template 10 → new, from 10" in lines
    assert "c2: template 20 → new, from 20" in lines


def test_the_plainest_release_says_how_it_proceeds() -> None:
    assert "  all clusters at once; on failure: stop; no approval" in plan_lines(planned())


@pytest.mark.parametrize(
    "asked",
    [
        {"poll_seconds": 1, "poll_attempts": 7, "grace_seconds": 2},
        {"lock_wait_seconds": 1, "approval_seconds": 9},
        {"reason": "other words", "requested_by": "lisi"},
    ],
)
def test_what_only_concerns_the_watching_is_no_part_of_the_hash(asked: dict[str, Any]) -> None:
    assert planned(**asked).plan_hash == planned().plan_hash


def test_one_after_the_other_the_sequence_of_the_clusters_counts() -> None:
    assert planned("c1", "c2").plan_hash == planned("c2", "c1").plan_hash
    one_by_one = {"order": "one-by-one"}
    assert planned("c1", "c2", **one_by_one).plan_hash != planned("c2", "c1", **one_by_one).plan_hash


def test_an_action_without_rollback_and_approval_speaks_of_neither() -> None:
    how = Procedure.of(Request.of(app_id=1, deployment="web"))
    assert (how.on_failure, how.approval) == (None, None)


# ---- batches ------------------------------------------------------------------------------------


def batch(**changes: Any) -> Plan:
    releases = [
        {"app_id": 1, "deployment": "web", "wave": 1},
        {"app_id": 2, "deployment": "web", "wave": 2},
    ]
    return Plan.of(**{"releases": releases, **changes})


HASHES = {"1/web": "0" * 16, "2/web": "1" * 16}


@pytest.mark.parametrize(
    "changes",
    [
        {"max_parallel": 1},
        {"failure_budget": 1},
        {"soak_seconds": 60},
        {"releases": [{"app_id": 1, "deployment": "web"}, {"app_id": 2, "deployment": "web"}]},
        {
            "releases": [
                {"app_id": 1, "deployment": "web", "wave": 1},
                {"app_id": 2, "deployment": "web", "wave": 2, "after": ["1/web"]},
            ]
        },
    ],
)
def test_a_batch_of_another_procedure_is_another_plan(changes: dict[str, Any]) -> None:
    assert hash_of(batch(**changes), "none", HASHES) != hash_of(batch(), "none", HASHES)


def test_a_batchs_hash_covers_its_releases_and_its_approval_and_no_polling() -> None:
    plain = hash_of(batch(), "none", HASHES)
    assert hash_of(batch(), "before-release", HASHES) != plain
    assert hash_of(batch(), "none", {**HASHES, "2/web": "2" * 16}) != plain
    assert hash_of(batch(defaults={"poll_attempts": 9, "reason": "x"}), "none", HASHES) == plain


def test_a_batchs_plan_says_how_it_proceeds() -> None:
    result = BatchResult.of(batch(soak_seconds=60), "b", approval="between-waves")
    assert plan_of_all(result)[0] == (
        "Batch: 2 waves of 1 and 1 releases; at most 10 at once; no new one when more than 0 have failed; "
        "60 s between waves; each wave after the first only after a person's approval"
    )
    one = BatchResult.of(Plan.of(releases=[{"app_id": 1, "deployment": "web"}]), "b")
    assert one.procedure.startswith("1 wave of 1 release; ")


# ---- through the flow ---------------------------------------------------------------------------


@pytest.mark.promise("What was planned is what is done")
@pytest.mark.usefixtures("prefect_api")
async def test_a_plan_that_was_confirmed_with_a_canary_does_not_confirm_a_release_without_one(
    cloud: Any,
) -> None:
    asked: dict[str, Any] = {"app_id": 3290, "deployment": "qapm-api", "dry_run": True}
    shown = await deploy_latest_image(**asked, canary="pub-bjyt", on_failure="rollback")
    assert shown.plan is not None
    others: list[dict[str, Any]] = [
        {},
        {"canary": "pub-bjyt"},
        {"canary": "pub-bjwdt", "on_failure": "rollback"},
    ]
    for other in others:
        found = await deploy_latest_image(**asked, **other)
        assert found.plan is not None
        assert found.plan.plan_hash != shown.plan.plan_hash
    same = await deploy_latest_image(
        **asked,
        canary="pub-bjyt",
        on_failure="rollback",
        poll_attempts=3,
        expect_plan=shown.plan.plan_hash,
    )
    assert same.plan == shown.plan
    assert cloud.record == []


@pytest.mark.parametrize(
    ("after", "changes", "effect"),
    [
        ("r/w:2", [], "; pods are replaced"),
        ("r/w:1", [FieldChange(path="spec.x", what="changed")], "; image unchanged, pods restart"),
    ],
)
def test_a_plan_says_if_pods_are_replaced(after: str, changes: list[FieldChange], effect: str) -> None:
    plan = planned("c1")
    (cluster,) = plan.clusters
    changed = cluster.model_copy(update={"images": {"web": after}, "changes": changes})
    first = plan_lines(plan.model_copy(update={"clusters": [changed]}))[1]
    assert first.endswith(effect), first


def test_a_plan_that_changes_nothing_names_no_template() -> None:
    said = plan_lines(planned())
    assert NOTHING in said
    assert not [line for line in said if line.startswith("  c1")]
