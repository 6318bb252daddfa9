"""The number of pods of a cluster: the platform's desired number counts, and assumptions are named."""

import asyncio
from typing import Any

import httpx
import pytest

from prefect_rollout.platforms.container_cloud.client import ContainerCloudClient
from prefect_rollout.platforms.container_cloud.exchange import Exchange
from prefect_rollout.platforms.container_cloud.payloads import ClusterStatus
from prefect_rollout.platforms.container_cloud.signing import StarkHmacSigner
from prefect_rollout.release.plan import UNSEEN, Procedure, ReleasePlan, Target, release_plan
from prefect_rollout.release.plan_words import plan_lines
from prefect_rollout.release.replicas import Replicas, kept, now, released
from prefect_rollout.release.report import render_plan
from prefect_rollout.release.request import Action
from prefect_rollout.release.result import ClusterResult
from prefect_rollout.release.workload import Baseline, Placement, Revision, Workload
from prefect_rollout.tasks.read_baseline import baseline_of

UNREPORTED = "the platform does not report its desired replicas"
PODS = {"a": "Running", "b": "Pending", "c": "Terminating", "d": "Failed", "e": None}


@pytest.mark.parametrize(
    ("status", "desired"),
    [
        ({"deployment": {"podState": {"desired": 3}}}, 3),
        ({"deployment": {"podState": {"desired": 0}}}, 0),
        ({"deployment": {"podState": {"desired": "3"}}}, None),
        ({"deployment": {"podState": None}}, None),
        ({"deployment": None}, None),
        ({}, None),
    ],
)
def test_the_desired_number_is_the_platforms_or_unknown(status: dict[str, Any], desired: int | None) -> None:
    assert ClusterStatus.model_validate(status).status.desired == desired


@pytest.mark.parametrize(
    ("desired", "pods", "expected"),
    [
        (1, None, Replicas(1)),
        (3, {"a": "Running"}, Replicas(3, "replicas stay at 3 (configured: 1)")),
        (0, None, Replicas(0, "replicas stay at 0 (configured: 1)")),
        (None, PODS, Replicas(3, f"{UNREPORTED}: 3 assumed, as so many pods are listed", assumed=True)),
        (None, {}, Replicas(1, f"{UNREPORTED}: 1 assumed, as configured", assumed=True)),
        (None, None, Replicas(1, f"{UNREPORTED}: 1 assumed, as configured", assumed=True)),
    ],
)
def test_a_restart_keeps_the_number_that_runs(
    desired: int | None, pods: dict[str, str | None] | None, expected: Replicas
) -> None:
    assert kept(desired, pods, 1) == expected


@pytest.mark.parametrize(
    ("desired", "pods", "note"),
    [
        (1, PODS, ""),
        (3, None, "replicas 3 → 1, as configured"),
        (None, {"a": "Running"}, ""),
        (None, None, ""),
        (None, PODS, f"pods 3 → 1, as configured; {UNREPORTED}"),
    ],
)
def test_a_release_that_changes_the_number_back_says_so(
    desired: int | None, pods: dict[str, str | None] | None, note: str
) -> None:
    assert released(desired, pods, 1) == Replicas(1, note)


def test_a_look_shows_the_desired_number_or_says_that_it_is_assumed() -> None:
    assert now(1, 1) == Replicas(1)
    assert now(3, 1) == Replicas(3, "configured replicas: 1, restored by the next release")
    assert now(None, 1) == Replicas(1, f"{UNREPORTED}: 1 assumed, as configured", assumed=True)


def test_what_is_live_names_the_number_that_the_cloud_was_asked_for() -> None:
    cluster = ClusterResult(
        cluster="c", replicas=1, online=5, online_known=True, running=3, desired=3, published=False
    )
    assert "3 pods of any template Running, 3 wanted" in cluster.live


# ---- plans --------------------------------------------------------------------------------------

WORKLOAD = Workload(app_id=1, app="shop", id=2, name="web")
REVISION = Revision(id=10, images={"web": "r/w:1"}, digest="d")
ONE = Replicas(1)


def planned(action: Action = Action.DEPLOY, replicas: Replicas = ONE, **changes: Any) -> ReleasePlan:
    """The plan for a cluster in which one pod runs; `changes` are of the state before, or the images."""
    images = changes.pop("images", {"web": "r/w:2"} if action is Action.DEPLOY else REVISION.images)
    before = Baseline(**{"online": 10, "revision": REVISION, "pods": {"web-1": "Running"}, **changes})
    return release_plan(
        action,
        [Target("c1", before, REVISION, images, replicas)],
        platform="cloud",
        cloud="",
        target="",
        workload=WORKLOAD,
        placement=Placement(replicas={"c1": 1}),
        creates=action is Action.DEPLOY,
        procedure=Procedure(),
    )


def pods(count: int) -> dict[str, str | None]:
    return {f"web-{number}": "Running" for number in range(count)}


def test_a_plan_says_that_the_number_of_pods_changes_back() -> None:
    note = "replicas 3 → 1, as configured"
    plan = planned(replicas=released(3, pods(3), 1), desired=3, pods=pods(3))
    assert f"    {note}" in plan_lines(plan)
    assert note in render_plan(plan)
    assert plan.plan_hash == planned().plan_hash  # it writes 1 either way


def test_replicas_that_others_set_are_not_changed() -> None:
    kept_or_released = (kept(3, PODS, None), released(3, PODS, None), now(3, None))
    assert kept_or_released == (Replicas(None), Replicas(None), Replicas(3))
    plan = planned(replicas=released(3, pods(3), None), desired=3, pods=pods(3))
    assert plan.clusters[0].replicas is None
    assert "pods 3, replicas not changed" in "\n".join(plan_lines(plan))
    assert "3, replicas not changed" in render_plan(plan)
    assert planned(replicas=Replicas(None), images=REVISION.images, pods=pods(4), desired=3).nothing
    cluster = ClusterResult(cluster="c", replicas=None, desired=4, ready=4, online=5, running=4)
    assert (cluster.wanted, "4 pods of any template Running, 4 wanted" in cluster.live) == (4, True)


def test_a_plan_does_not_say_that_nothing_changes_where_the_desired_number_does() -> None:
    assert planned(images=REVISION.images, desired=1).nothing
    assert not planned(images=REVISION.images, desired=3).nothing


def test_a_number_that_is_assumed_holds_no_restart_up() -> None:
    two, three = (planned(Action.RESTART, kept(None, pods(count), 1), pods=pods(count)) for count in (2, 3))
    assert [each.clusters[0].replicas for each in (two, three)] == [2, 3]
    assert two.plan_hash == three.plan_hash
    known = planned(Action.RESTART, kept(2, None, 1), desired=2)
    assert known.plan_hash != planned(Action.RESTART, kept(3, None, 1), desired=3).plan_hash


@pytest.mark.parametrize(
    ("action", "changes", "unseen"),
    [
        (Action.DEPLOY, {"pods": None}, True),
        (Action.RESTART, {"pods": None}, True),
        (Action.DEPLOY, {"pods": {}}, False),
        (Action.DEPLOY, {"pods": None, "online": None, "revision": None}, False),
        (Action.DEPLOY, {"pods": None, "images": REVISION.images}, False),
        (Action.SCALE, {"pods": None, "replicas": Replicas(2)}, False),
    ],
)
def test_a_plan_says_where_new_and_old_pods_cannot_be_told_apart(
    action: Action, changes: dict[str, Any], unseen: bool
) -> None:
    plan = planned(action, **changes)
    assert (f"    {UNSEEN}" in plan_lines(plan)) is unseen
    assert (UNSEEN in render_plan(plan)) is unseen


# ---- what stood before --------------------------------------------------------------------------


TEXT = (
    '{"kind": "Deployment", "spec": {"template": {"spec": {"containers": '
    '[{"name": "web", "image": "r/w:1"}]}}}}'
)


def looked(*listed: list[dict[str, Any]] | None, online: int | None = 10) -> tuple[Any, int]:
    """The baseline if the statuses list these pods, the last ones for ever; and the number of looks."""
    looks = 0

    def cloud(request: httpx.Request) -> httpx.Response:
        nonlocal looks
        data: Any = [{"templateId": online, "cluster": "c1"}] if online else []
        if request.url.path.endswith("/status"):
            data = [{"cluster": "c1", "pods": listed[min(looks, len(listed) - 1)]}]
            looks += 1
        elif "/tpls/" in request.url.path:
            data = {"id": online, "deploymentId": 2, "template": TEXT}
        return httpx.Response(200, json={"data": data})

    async def look() -> Any:
        signer = StarkHmacSigner(key_id="k", secret_key="s", env="prod")
        transport = httpx.MockTransport(cloud)
        exchange = Exchange("https://cloud", signer=signer, transport=transport)
        async with ContainerCloudClient(exchange) as client:
            return (await baseline_of(client, WORKLOAD, ["c1"]))["c1"]

    return asyncio.run(look()), looks


def test_pods_that_were_not_reported_are_looked_for_again() -> None:
    before, looks = looked(None, [{"name": "web-1", "state": "Running"}])
    assert (before.pods, looks) == ({"web-1": "Running"}, 2)


def test_the_looks_for_pods_that_stay_unknown_are_bounded() -> None:
    before, looks = looked(None)
    assert (before.pods, looks) == (None, 4)


def test_an_empty_list_is_an_answer_and_nothing_is_looked_for_where_nothing_is_online() -> None:
    assert looked([])[0].pods == {}
    before, looks = looked(None, online=None)
    assert (before.pods, looks) == ({}, 1)
    assert ClusterStatus.model_validate({"pods": None}).status.pods is None
