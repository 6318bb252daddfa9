"""Batches: real Prefect server, simulated clouds over real sockets, judged by the cloud's record."""

import asyncio
import json
import os
import signal
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import pytest
import respx
from prefect import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.exceptions import Pause
from prefect.flow_engine import run_flow
from prefect.states import Cancelling, Crashed, Pending

from prefect_rollout.batch.errors import BatchFailedError, PlanError
from prefect_rollout.batch.result import BatchResult, Stage
from prefect_rollout.errors import (
    ConfigurationError,
    InputError,
    NotApprovedError,
    PlanChangedError,
    ReleaseCancelledError,
    RolloutError,
)
from prefect_rollout.flows import deploy_batch, deploy_latest_image
from prefect_rollout.release.result import Outcome
from prefect_rollout.runs.children import children_of, name_of
from support import (
    BAD_IMAGE,
    ONCE,
    PATIENT,
    Cloud,
    Zygote,
    lives,
    plan_of,
    resume,
    shop,
    worker,
    written,
)

pytestmark = pytest.mark.usefixtures("prefect_api")


async def failing(plan: Any, **more: Any) -> BatchResult:
    with pytest.raises(BatchFailedError) as caught:
        await deploy_batch(plan, **more)
    result = caught.value.result
    assert isinstance(result, BatchResult)
    return result


def stages(result: BatchResult) -> dict[int, Stage]:
    return {int(row.app_id): row.stage for row in result.releases}


async def batch_of(result: BatchResult) -> FlowRun:
    return await batch_run(UUID(result.batch_id))


async def batch_run(run_id: UUID) -> FlowRun:
    async with get_client() as client:
        return await client.read_flow_run(run_id)


async def newest_batch() -> FlowRun:
    async with get_client() as client:
        runs = await client.read_flow_runs(
            flow_filter=FlowFilter(name=FlowFilterName(any_=["deploy-batch"])),
            sort=FlowRunSort.ID_DESC,
            limit=200,
        )
    return max(runs, key=lambda run: (run.created is not None, run.created))


async def children(batch_id: UUID) -> dict[str, list[FlowRun]]:
    found: dict[str, list[FlowRun]] = {}
    async with get_client() as client:
        for run in await children_of(client, batch_id, "release"):
            found.setdefault(name_of(run), []).append(run)
    return found


async def retried(batch_id: UUID) -> BatchResult:
    """The same flow run, once more, in this process; how it ended."""
    ended = await (await resume(batch_id)).aresult(raise_on_failure=False)
    found = ended.result if isinstance(ended, RolloutError) else ended
    assert isinstance(found, BatchResult), ended
    return found


# ---- many apps in waves --------------------------------------------------------------------------


def in_four_waves(count: int) -> tuple[dict[int, Mapping[str, Any]], dict[str, Any], set[int]]:
    """The behaviour of so many apps, their plan, and which fail.

    Images that nobody pushed are in waves 1 and 2, and an app of wave 3 takes long.
    """
    size = count // 4
    failing = {2, size + 2}
    slow: Mapping[str, Any] = {"kind": "slow_start", "seconds": 60}
    plan = plan_of(count, 4, failure_budget=2, max_parallel=size)
    return {**dict.fromkeys(failing, BAD_IMAGE), 2 * size + 1: slow}, plan, failing


COUNTS = [pytest.param(8, marks=pytest.mark.sample), pytest.param(40, marks=pytest.mark.complete)]


@pytest.mark.xdist_group("batches")
async def test_apps_in_four_waves_end_as_their_plan_says(make_cloud: Any) -> None:
    count = 8
    behaviours, plan, failing_apps = in_four_waves(count)
    cloud = make_cloud(**shop(count, behaviours))
    result = await failing(plan | {"soak_seconds": 0.1})
    assert Counter(stages(result).values()) == {Stage.RELEASED: count - 2, Stage.FAILED: 2}
    assert {app for app, stage in stages(result).items() if stage is Stage.FAILED} == failing_apps
    assert written(cloud) == dict.fromkeys(range(1, count + 1), ONCE)
    # A wave begins when the one before has ended: each write of it comes after all of those before.
    at: dict[int, list[float]] = {}
    for entry in cloud.record:
        at.setdefault((entry["app"] - 1) * 4 // count, []).append(entry["at"])
    assert all(max(at[wave]) < min(at[wave + 1]) for wave in range(3))
    assert all(truth["rolled_out"] for truth in cloud.truth("web") if truth["app"] not in failing_apps)
    (row,) = [row for row in result.releases if row.app_id == 2]
    assert "ImagePullError" in row.detail
    assert (row.template_before, row.template != "") == ("20", True)
    # One child flow run each, below the batch.
    async with get_client() as client:
        found = await children(UUID(result.batch_id))
        assert {len(runs) for runs in found.values()} == {1}
        assert len(found) == count
        some = found["1/web"][0]
        assert some.name == "1/web → 2"
        assert {"app:1", "deployment:web"} <= set(some.tags)
        assert some.parent_task_run_id is not None
        parent = await client.read_task_run(some.parent_task_run_id)
        assert str(parent.flow_run_id) == result.batch_id
        assert parent.state is not None
        assert parent.state.is_completed()
        artifacts = await client.read_artifacts(
            artifact_filter=ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[UUID(result.batch_id)]))
        )
    by_type = {artifact.type: artifact for artifact in artifacts}
    assert by_type["progress"].data == 100
    page = str(by_type["markdown"].data)
    assert f"{count} in 4 waves: 2 failed, {count - 2} released" in page
    assert "ImagePullError" in page
    assert "Was the tag built and pushed" in page


async def test_more_failures_than_the_budget_start_no_further_release(make_cloud: Any) -> None:
    cloud = make_cloud(**shop(6, {2: BAD_IMAGE, 3: BAD_IMAGE}))
    result = await failing(plan_of(6, 3, failure_budget=1, max_parallel=2))
    # Wave 1 is apps 1 and 2, wave 2 apps 3 and 4: the second failure comes there, and wave 3 never starts.
    assert {app for app, stage in stages(result).items() if stage is Stage.FAILED} == {2, 3}
    assert {app for app, stage in stages(result).items() if stage is Stage.SKIPPED} == {5, 6}
    assert set(written(cloud)) == set(range(1, 5))
    skipped = next(row for row in result.releases if row.app_id == 5)
    assert skipped.detail == "2 failed, more than the failure budget of 1"


@pytest.mark.promise("A batch releases each app once")
async def test_what_waits_for_a_failed_release_is_skipped_and_the_rest_goes_on(make_cloud: Any) -> None:
    cloud = make_cloud(**shop(4, {1: BAD_IMAGE}))
    plan = plan_of(4, failure_budget="100%")
    plan["releases"][1]["after"] = ["1/web"]
    plan["releases"][2]["after"] = ["2/web"]
    result = await failing(plan)
    assert stages(result) == {1: Stage.FAILED, 2: Stage.SKIPPED, 3: Stage.SKIPPED, 4: Stage.RELEASED}
    assert set(written(cloud)) == {1, 4}


# ---- killed, retried, continued -------------------------------------------------------------------


@pytest.mark.promise("A batch releases each app once")
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.xdist_group("batches")
async def test_a_batch_that_is_killed_in_wave_2_is_gone_on_with_and_releases_nothing_twice(
    make_cloud: Any, prefect_api: str, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", prefect_api)  # for the process that is killed
    behaviours, plan, failing_apps = in_four_waves(count)
    cloud = make_cloud(speed=10, **shop(count, behaviours))
    plan["defaults"] = PATIENT
    size = count // 4
    async with get_client() as client:
        batch = await client.create_flow_run(deploy_batch, parameters={"plan": plan}, state=Pending())
    with Zygote() as zygote:
        pid = zygote.start(batch.id, cloud.environment)
        late = range(size + 1 + size // 3, 2 * size + 1)  # of wave 2, not the first one
        await until(lambda: any(entry["app"] in late for entry in cloud.record), 300)
        os.kill(pid, signal.SIGKILL)
        await until(lambda: not lives(pid))
    before = written(cloud)
    assert not set(before) & set(range(2 * size + 1, count + 1))
    async with get_client() as client:
        # What the automation does when the heartbeats stay away; the children's states are left as they are.
        await client.set_flow_run_state(batch.id, Crashed(), force=True)
    result = await retried(batch.id)
    failed = {int(row.app_id): row.detail for row in result.releases if row.stage is Stage.FAILED}
    assert set(failed) == failing_apps, failed
    assert Counter(stages(result).values()) == {Stage.RELEASED: count - 2, Stage.FAILED: 2}
    apps = range(1, count + 1)
    assert written(cloud) == dict.fromkeys(apps, ONCE)
    found = await children(batch.id)
    assert {name: len(runs) for name, runs in found.items()} == {f"{app}/web": 1 for app in apps}


def mend(cloud: Cloud, app: int) -> None:
    """New pods of the app are well from now on."""
    cloud.control("PUT", f"apps/{app}/deployments/web/behaviour", json=[])


async def until(holds: Any, seconds: float = 60) -> None:
    async with asyncio.timeout(seconds):
        while not holds():  # noqa: ASYNC110 - it comes true elsewhere
            await asyncio.sleep(0.05)


async def test_a_retry_runs_what_was_not_released_and_nothing_else(make_cloud: Any) -> None:
    cloud = make_cloud(**shop(4, {2: {"kind": "slow_pull", "seconds": 900}}))
    first = await failing(plan_of(4, 2, failure_budget=0))
    assert stages(first) == {
        1: Stage.RELEASED,
        2: Stage.FAILED,
        3: Stage.SKIPPED,
        4: Stage.SKIPPED,
    }
    cloud.control("POST", "advance", json={"seconds": 1000})  # somebody pushes the image
    second = await retried(UUID(first.batch_id))
    assert set(stages(second).values()) == {Stage.RELEASED}
    assert second.outcome is Outcome.RELEASED
    # The failed release went on where it stopped: its template was made and published before.
    assert written(cloud) == dict.fromkeys(range(1, 5), ONCE)


async def test_what_was_rolled_back_is_released_anew_by_a_retry(make_cloud: Any) -> None:
    cloud = make_cloud(**shop(2, {2: {**BAD_IMAGE, "images": "app2:2"}}))
    plan = plan_of(2)
    plan["releases"][1]["on_failure"] = "rollback"
    first = await failing(plan)
    assert stages(first) == {1: Stage.RELEASED, 2: Stage.FAILED}
    assert [row.rolled_back for row in first.releases] == [None, True]
    mend(cloud, 2)
    second = await retried(UUID(first.batch_id))
    assert second.outcome is Outcome.RELEASED
    assert [row.rolled_back for row in second.releases] == [None, None]
    assert written(cloud) == {1: ONCE, 2: [*ONCE, "publish", *ONCE]}


async def test_only_failed_leaves_out_what_earlier_batches_of_the_plan_released(make_cloud: Any) -> None:
    late: Any = {app: {"kind": "slow_pull", "seconds": 1000 * app} for app in (2, 3)}
    cloud = make_cloud(**shop(3, late))
    plan = plan_of(3, failure_budget="100%", soak_seconds=0.5)
    await failing(plan)
    cloud.control("POST", "advance", json={"seconds": 2000})  # the image of app 2 is there
    second = await failing(plan, only_failed=True)
    assert stages(second) == {1: Stage.RELEASED, 2: Stage.RELEASED, 3: Stage.FAILED}
    cloud.control("POST", "advance", json={"seconds": 3000})
    third = await deploy_batch(plan, only_failed=True)
    assert third.outcome is Outcome.RELEASED
    assert written(cloud) == {1: ONCE, 2: ONCE * 2, 3: ONCE * 3}
    with pytest.raises(InputError, match="no earlier batch of exactly this plan"):
        await deploy_batch(plan | {"soak_seconds": 0.75}, only_failed=True)


async def test_a_cancel_reaches_the_children(make_cloud: Any) -> None:
    cloud = make_cloud(**shop(4, {app: {"kind": "never_ready"} for app in (1, 2)}))
    batch = asyncio.create_task(deploy_batch(plan_of(4, 2)))
    await until(lambda: len([entry for entry in cloud.record if entry["kind"] == "publish"]) == 2)
    run = await newest_batch()
    async with get_client() as client:
        await client.set_flow_run_state(run.id, Cancelling())
    with pytest.raises(ReleaseCancelledError) as caught:
        await asyncio.wait_for(batch, 60)
    assert caught.value.result is not None
    assert stages(caught.value.result) == {
        1: Stage.CANCELLED,
        2: Stage.CANCELLED,
        3: Stage.SKIPPED,
        4: Stage.SKIPPED,
    }
    found = await children(run.id)
    assert set(found) == {"1/web", "2/web"}
    assert all(runs[0].state is not None and runs[0].state.is_cancelled() for runs in found.values())
    assert (await batch_of(caught.value.result)).state.is_cancelled()  # type: ignore[union-attr]


async def test_a_release_that_the_prefect_api_did_not_hear_of_is_begun_again(make_cloud: Any) -> None:
    cloud = make_cloud(**shop(2))
    refused: list[httpx.Request] = []

    def once(request: httpx.Request) -> httpx.Response | httpx.Request:
        child = json.loads(request.content).get("parent_task_run_id")
        if not child or refused:
            return request
        refused.append(request)
        return httpx.Response(500, json={})

    with respx.mock(assert_all_mocked=False, assert_all_called=False) as wire:
        wire.post(path="/api/flow_runs/").mock(side_effect=once)
        wire.route(host="127.0.0.1").pass_through()
        result = await deploy_batch(plan_of(2))
    assert len(refused) == 1
    assert result.outcome is Outcome.RELEASED
    assert written(cloud) == dict.fromkeys((1, 2), ONCE)


# ---- what is refused before anything starts --------------------------------------------------------


async def test_a_plan_with_mistakes_is_refused_with_all_of_them(make_cloud: Any) -> None:
    cloud = make_cloud(**shop(2))
    plan = plan_of(2)
    plan["releases"] += [{"app_id": 1, "deployment": "web"}, {"app_id": 2, "deployment": "x", "wave": 0}]
    with pytest.raises(PlanError) as caught:
        await deploy_batch(plan)
    assert "releases.2" in str(caught.value)
    assert "releases.3.wave" in str(caught.value)
    with pytest.raises(PlanError, match="there is no block container-cloud/nobody-saved-this"):
        await deploy_batch(plan_of(2, target="container-cloud/nobody-saved-this"))
    assert cloud.requests == []


async def test_a_child_deployment_that_does_not_exist_is_named(make_cloud: Any) -> None:
    make_cloud(**shop(1))
    with pytest.raises(ConfigurationError, match="no deployment 'deploy-latest-image/nowhere'"):
        await deploy_batch(plan_of(1), run_in="work-pool", child_deployment="deploy-latest-image/nowhere")


# ---- on a work pool ------------------------------------------------------------------------------


async def one_killed() -> UUID:
    """A release that a worker's process carried out until it was killed."""
    async with asyncio.timeout(300), get_client() as client:
        while True:
            running = await client.read_flow_runs(
                flow_filter=FlowFilter(name=FlowFilterName(any_=["deploy-latest-image"])),
                flow_run_filter=FlowRunFilter(
                    state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.RUNNING]))
                ),
            )
            for run in running:
                pid = str(run.labels.get("rollout.process", "")).rpartition(" ")[2]
                if pid and run.work_queue_name == "releases":
                    os.kill(int(pid), signal.SIGKILL)
                    return run.id
            await asyncio.sleep(0.5)


@pytest.mark.xdist_group("batch on a work pool")
async def test_a_batch_on_a_work_pool_with_two_workers_one_of_whose_releases_is_killed(
    make_cloud: Any, prefect_api: str, tmp_path: Path
) -> None:
    """Three apps; `tests/cluster` has two hundred."""
    count, waves, limit = 3, 2, "1"
    cloud = make_cloud(**shop(count, {2: BAD_IMAGE}))
    async with get_client() as client:
        await client.create_work_pool(WorkPoolCreate(name="rollout", type="process"), overwrite=True)
        await client.create_deployment(
            await client.create_flow(deploy_latest_image),
            name="batch-release",
            work_pool_name="rollout",
            work_queue_name="releases",
            entrypoint="prefect_rollout.flows.deploy.deploy_latest_image",
            pull_steps=[],
        )
    # They take children alone, from their queue.
    options = ("--work-queue", "releases", "--limit", limit, "--name")
    workers = [worker(prefect_api, tmp_path, cloud.environment, *options, name) for name in ("w1", "w2")]
    try:
        plan = plan_of(count, waves, failure_budget=1, max_parallel=2 * int(limit))
        plan["defaults"] = PATIENT
        killing = asyncio.create_task(one_killed())
        result = await failing(plan, run_in="work-pool")
        unlike = {row.name: (row.stage, row.detail) for row in result.releases if row.app_id != 2}
        assert Counter(stages(result).values()) == {Stage.RELEASED: count - 1, Stage.FAILED: 1}, unlike
        assert written(cloud) == dict.fromkeys(range(1, count + 1), ONCE)
        found = await children(UUID(result.batch_id))
        assert len(found) == count
        for runs in found.values():
            (run,) = runs
            assert run.work_queue_name == "releases"
            assert run.parent_task_run_id is not None
        (row,) = [row for row in result.releases if row.app_id == 2]
        assert "ImagePullError" in row.detail
        async with get_client() as client:  # another process went on with it
            assert (await client.read_flow_run(await killing)).run_count > 1
    finally:
        for process in workers:
            process.kill()
            process.wait(60)


# ---- plan first ----------------------------------------------------------------------------------


async def test_a_dry_run_of_a_batch_writes_nothing_and_its_hash_holds_the_real_one(make_cloud: Any) -> None:
    cloud = make_cloud(**shop(3))
    plan = plan_of(3, 2)
    planned = await deploy_batch(plan, dry_run=True)
    assert cloud.record == []
    assert planned.outcome is Outcome.PLANNED
    assert {row.stage for row in planned.releases} == {Stage.PLANNED}
    assert all(
        row.plan and row.plan.clusters[0].images == {"web": f"r/app{row.app_id}:2"}
        for row in planned.releases
    )
    run = await batch_of(planned)
    assert run.state is not None
    assert (run.state.name, run.name) == ("Planned", "plan of 3 releases")

    released = await deploy_batch(plan, expect_plan=planned.plan_hash)
    assert released.outcome is Outcome.RELEASED
    assert written(cloud) == dict.fromkeys(range(1, 4), ONCE)

    # The world has moved: what is online is another template now, of every app.
    with pytest.raises(PlanChangedError) as caught:
        await deploy_batch(plan, expect_plan=planned.plan_hash)
    assert planned.plan_hash in str(caught.value)
    assert written(cloud) == dict.fromkeys(range(1, 4), ONCE)


async def test_a_dry_run_names_every_release_that_cannot_be_planned(make_cloud: Any) -> None:
    cloud = make_cloud(**shop(2))
    plan = plan_of(2)
    plan["releases"].append({"app_id": 1, "deployment": "wbe"})
    plan["releases"][1]["template_id"] = 999
    result = await failing(plan, dry_run=True)
    assert [row.stage for row in result.releases] == [Stage.SKIPPED, Stage.FAILED, Stage.FAILED]
    assert "there is no template '999'" in result.releases[1].detail
    assert "'wbe'" in result.releases[2].detail
    assert cloud.record == []


# ---- approval ------------------------------------------------------------------------------------


async def answer(run_id: UUID, decision: str, name: str = "lisi") -> None:
    async with get_client() as client:
        await client.resume_flow_run(run_id, run_input={"decision": decision, "name": name, "comment": ""})


async def form(run_id: UUID, key: str) -> str:
    """The question of a paused run, once it has been asked."""
    async with asyncio.timeout(60), get_client() as client:
        while True:
            found = await client.filter_flow_run_input(
                run_id, key_prefix=f"paused-{key}-description", limit=1, exclude_keys=set()
            )
            state = (await client.read_flow_run(run_id)).state
            if found and state is not None and state.is_paused():
                return str(found[0].decoded_value)
            await asyncio.sleep(0.1)


async def test_a_batch_waits_for_approval_between_its_waves_and_goes_on_as_approved(make_cloud: Any) -> None:
    cloud = make_cloud(**shop(4, {2: BAD_IMAGE}))
    plan = plan_of(4, 2, failure_budget=1)
    batch = asyncio.create_task(deploy_batch(plan, approval="between-waves", requested_by="zhangsan"))
    await until(lambda: set(written(cloud)) == {1, 2})
    run = await newest_batch()
    question = await form(run.id, "wave-2-1")
    assert "1 failed, 2 waiting, 1 released" in question
    assert "3/web, 4/web" in question
    assert set(written(cloud)) == {1, 2}
    await answer(run.id, "approve")
    with pytest.raises(BatchFailedError) as caught:
        await asyncio.wait_for(batch, 120)
    assert caught.value.result is not None
    assert caught.value.result.approved_by == "lisi"
    assert stages(caught.value.result) == {
        1: Stage.RELEASED,
        2: Stage.FAILED,
        3: Stage.RELEASED,
        4: Stage.RELEASED,
    }
    assert written(cloud) == dict.fromkeys(range(1, 5), ONCE)


async def test_a_batch_of_a_deployment_is_suspended_and_goes_on_in_another_process(
    make_cloud: Any, prefect_api: str
) -> None:
    cloud = make_cloud(**shop(4, {2: BAD_IMAGE}))
    parameters = {"plan": plan_of(4, 2, failure_budget=1), "approval": "between-waves"}
    async with get_client() as client:
        deployment = await client.create_deployment(
            flow_id=await client.create_flow(deploy_batch), name="suspended", pull_steps=[]
        )
        run = await client.create_flow_run_from_deployment(deployment, parameters=parameters)

        async def begun() -> State[Any]:
            ended: Any = run_flow(
                deploy_batch, flow_run=await client.read_flow_run(run.id), return_type="state"
            )
            state: State[Any] = await ended
            return state

        with pytest.raises(Pause):
            await begun()
        assert set(written(cloud)) == {1, 2}
        suspended = await client.read_flow_run(run.id)
        assert suspended.state_name == "Suspended"
        await answer(run.id, "approve")
        ended = await (await begun()).aresult(raise_on_failure=False)
    # What had failed is counted, and not tried again: nobody has asked for a retry.
    assert isinstance(ended, BatchFailedError)
    assert ended.result is not None
    assert Counter(stages(ended.result).values()) == {Stage.RELEASED: 3, Stage.FAILED: 1}
    assert written(cloud) == dict.fromkeys(range(1, 5), ONCE)
    assert {len(runs) for runs in (await children(run.id)).values()} == {1}


async def test_a_batch_that_is_rejected_before_its_first_release_writes_nothing(make_cloud: Any) -> None:
    cloud = make_cloud(**shop(2))
    batch = asyncio.create_task(deploy_batch(plan_of(2), approval="before-release"))
    await until(lambda: bool(cloud.requests))
    run = await newest_batch()
    question = await form(run.id, "batch-1")
    assert "r/app1:2" in question
    assert "Plan hash" in question
    await answer(run.id, "reject")
    with pytest.raises(NotApprovedError, match="lisi rejected it"):
        await asyncio.wait_for(batch, 60)
    ended = await batch_run(run.id)
    assert (ended.state_type, ended.state_name) == (StateType.CANCELLED, "Rejected")
    assert cloud.record == []
