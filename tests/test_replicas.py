"""The number of pods of a cluster: the platform's desired number counts, and assumptions are named."""

import asyncio
from typing import Any

import httpx
import pytest
from pydantic import TypeAdapter

from prefect_rollout.difference import UNSEEN, Found, hold_choice, plan_lines, release_plan
from prefect_rollout.models import Action, ClusterResult, ClusterStatus, Deployment, ReleasePlan, Template
from prefect_rollout.platforms.container_cloud import ContainerCloudClient
from prefect_rollout.platforms.signing import StarkHmacSigner
from prefect_rollout.replicas import Replicas, kept, now, released
from prefect_rollout.report import render_plan
from prefect_rollout.tasks.before import look_before

UNREPORTED = "the cloud does not report how many pods it was asked for"
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
    assert ClusterStatus.model_validate(status).desired == desired


@pytest.mark.parametrize(
    ("desired", "pods", "expected"),
    [
        (1, None, Replicas(1)),
        (3, {"a": "Running"}, Replicas(3, "3 pods stay, the metaData says 1")),
        (0, None, Replicas(0, "0 pods stay, the metaData says 1")),
        (None, PODS, Replicas(3, f"{UNREPORTED}: 3 are assumed, as so many are listed", assumed=True)),
        (None, {}, Replicas(1, f"{UNREPORTED}: 1 are assumed, as the metaData says", assumed=True)),
        (None, None, Replicas(1, f"{UNREPORTED}: 1 are assumed, as the metaData says", assumed=True)),
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
        (3, None, "replicas 3 → 1: the metaData says 1"),
        (None, {"a": "Running"}, ""),
        (None, None, ""),
        (None, PODS, f"pods 3 → 1: the metaData says 1; {UNREPORTED}"),
    ],
)
def test_a_release_that_changes_the_number_back_says_so(
    desired: int | None, pods: dict[str, str | None] | None, note: str
) -> None:
    assert released(desired, pods, 1) == Replicas(1, note)


def test_a_look_shows_the_desired_number_or_says_that_it_is_assumed() -> None:
    assert now(1, 1) == Replicas(1)
    assert now(3, 1) == Replicas(3, "the metaData says 1: the next release changes it back")
    assert now(None, 1) == Replicas(1, f"{UNREPORTED}: 1 are assumed, as the metaData says", assumed=True)


def test_what_is_live_names_the_number_that_the_cloud_was_asked_for() -> None:
    cluster = ClusterResult(
        cluster="c", replicas=1, online=5, online_known=True, running=3, desired=3, published=False
    )
    assert "3 pods of any template Running, 3 wanted" in cluster.live


# ---- plans --------------------------------------------------------------------------------------

TEXT = (
    '{"kind": "Deployment", "spec": {"template": {"spec": {"containers": '
    '[{"name": "web", "image": "r/w:1"}]}}}}'
)
TEMPLATE = Template(id=10, template=TEXT)


def planned(action: Action = Action.DEPLOY, **changes: Any) -> ReleasePlan:
    fields: dict[str, Any] = {
        "cluster": "c1",
        "online": 10,
        "before": TEMPLATE,
        "after": TEMPLATE,
        "images": {"web": "r/w:2"} if action is Action.DEPLOY else TEMPLATE.version.images,
        "pods": 1,
        "replicas": 1,
    }
    return release_plan(
        action,
        [Found(**{**fields, **changes})],
        platform="cloud",
        app_id=1,
        deployment_id=2,
        deployment="web",
        base=10 if action is Action.DEPLOY else None,
        strategy=None,
        in_place=False,
    )


def test_a_plan_says_that_the_number_of_pods_changes_back() -> None:
    note = "replicas 3 → 1: the metaData says 1"
    plan = planned(desired=3, pods=3, note=note)
    assert f"    {note}" in plan_lines(plan)
    assert note in render_plan(plan)
    assert plan.plan_hash == planned().plan_hash  # it writes 1 either way


def test_a_plan_does_not_say_that_nothing_changes_where_the_desired_number_does() -> None:
    same: dict[str, Any] = {"images": TEMPLATE.version.images}
    assert planned(**same, desired=1).nothing
    assert not planned(**same, desired=3).nothing


def test_a_number_that_is_assumed_holds_no_restart_up() -> None:
    two, three = (planned(Action.RESTART, replicas=count, pods=count, assumed=True) for count in (2, 3))
    assert two.plan_hash == three.plan_hash
    images = TEMPLATE.version.images
    hold_choice(two, {"c1": (10, images, 3)})
    known = planned(Action.RESTART, replicas=2, desired=2)
    assert known.plan_hash != planned(Action.RESTART, replicas=3, desired=3).plan_hash


@pytest.mark.parametrize(
    ("action", "changes", "unseen"),
    [
        (Action.DEPLOY, {"pods": None}, True),
        (Action.RESTART, {"pods": None}, True),
        (Action.DEPLOY, {"pods": 0}, False),
        (Action.DEPLOY, {"pods": None, "online": None, "before": None}, False),
        (Action.DEPLOY, {"pods": None, "images": TEMPLATE.version.images}, False),
        (Action.SCALE, {"pods": None, "replicas": 2}, False),
    ],
)
def test_a_plan_says_where_new_and_old_pods_cannot_be_told_apart(
    action: Action, changes: dict[str, Any], unseen: bool
) -> None:
    plan = planned(action, **changes)
    assert (f"    {UNSEEN}" in plan_lines(plan)) is unseen
    assert (UNSEEN in render_plan(plan)) is unseen


# ---- what stood before --------------------------------------------------------------------------


def looked(*pods: list[dict[str, Any]] | None, online: int | None = 10) -> tuple[Any, int]:
    """What `look_before` finds where the statuses list these pods, the last ones for ever; and its looks."""
    looks = 0

    def cloud(request: httpx.Request) -> httpx.Response:
        nonlocal looks
        data: Any = [{"templateId": online, "cluster": "c1"}] if online else []
        if request.url.path.endswith("/status"):
            data = [{"cluster": "c1", "pods": pods[min(looks, len(pods) - 1)]}]
            looks += 1
        elif "/tpls/" in request.url.path:
            data = {"id": online, "template": TEXT}
        return httpx.Response(200, json={"data": data})

    async def look() -> Any:
        signer = StarkHmacSigner(key_id="k", secret_key="s", env="prod")
        transport = httpx.MockTransport(cloud)
        async with ContainerCloudClient("https://cloud", signer=signer, transport=transport) as client:
            return (await look_before(client, Deployment(id=2, name="web", app_id=1), ["c1"]))["c1"]

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
    assert TypeAdapter(ClusterStatus).validate_python({"pods": None}).pods is None
