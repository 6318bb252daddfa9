"""Releases over several workers, with a server of several processes; judged by the simulator's record."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from prefect import get_client
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterDeploymentId,
    FlowRunFilterExpectedStartTime,
    FlowRunFilterTags,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.schedules import IntervalSchedule
from prefect.deployments import arun_deployment
from prefect.states import AwaitingRetry, Cancelling

from cluster.topology import Topology
from prefect_rollout.batch.result import BatchResult, Stage
from prefect_rollout.errors import RolloutError
from prefect_rollout.runs.children import children_of
from support import BAD_IMAGE, FAST, ONCE, PATIENT, Cloud, eventually, plan_of, shop, written

pytestmark = pytest.mark.usefixtures("prefect_api")

WORKERS = ("w1", "w2", "w3")
BATCH = "deploy-batch/deploy-batch"
RELEASE = "deploy-latest-image/deploy-latest-image"


@contextmanager
def working(topology: Topology, cloud: Cloud, *names: str, **environment: str) -> Iterator[None]:
    """Workers of the cluster, while the context lasts."""
    with ExitStack() as stack:
        for name in names or WORKERS:
            process = topology.worker(name, {**cloud.environment, **environment})
            stack.callback(process.kill)
        yield


async def started(name: str, parameters: dict[str, Any], **options: Any) -> FlowRun:
    """A run of the deployment, as the UI's Run button makes it."""
    return await arun_deployment(name, parameters=parameters, timeout=0, as_subflow=False, **options)


async def now(run_id: UUID) -> FlowRun:
    async with get_client() as client:
        return await client.read_flow_run(run_id)


async def ended(run_id: UUID, seconds: float = 1200) -> FlowRun:
    async with asyncio.timeout(seconds), get_client() as client:
        while True:
            run = await client.read_flow_run(run_id)
            if run.state is not None and run.state.is_final():
                return run
            await asyncio.sleep(0.5)


async def in_state(run_id: UUID, name: str) -> None:
    async def is_in_it() -> bool:
        return (await now(run_id)).state_name == name

    await eventually(is_in_it, 600)


async def has_written(cloud: Cloud, apps: int, writes: int = 1) -> None:
    async def has() -> bool:
        return len(written(cloud)) >= apps and len(cloud.record) >= writes

    await eventually(has, 600)


async def result_of(run: FlowRun) -> BatchResult:
    assert run.state is not None
    found: Any = await run.state.aresult(raise_on_failure=False)
    batch = found.result if isinstance(found, RolloutError) else found
    assert isinstance(batch, BatchResult), (run.state, found)
    return batch


@asynccontextmanager
async def under_way(cloud: Cloud, plan: Any, releases: int) -> AsyncIterator[UUID]:
    """A batch on the pool, once so many of its releases have written."""
    run = await started(BATCH, {"plan": plan, "run_in": "work-pool"})
    await has_written(cloud, releases)
    yield run.id


def process_of(run: FlowRun) -> int:
    return int(str(run.labels.get("rollout.process", " 0")).rpartition(" ")[2])


async def running(client: PrefectClient, batch_id: UUID) -> list[FlowRun]:
    runs = await children_of(client, batch_id, "release")
    return [run for run in runs if run.state is not None and run.state.type is StateType.RUNNING]


async def test_two_hundred_apps_over_three_workers_one_of_which_is_killed(
    topology: Topology, make_cloud: Any
) -> None:
    cloud = make_cloud(**shop(200, {4: BAD_IMAGE, 117: BAD_IMAGE}))
    plan = plan_of(200, 4, failure_budget="2%", max_parallel=48)
    plan["defaults"] = PATIENT
    with working(topology, cloud):
        async with under_way(cloud, plan, 60) as batch_id, get_client() as client:
            parent = process_of(await now(batch_id))
            name = next(name for name in WORKERS if topology.processes[name].pid != parent)
            victim = topology.processes[name]

            async def its() -> set[UUID]:
                return {run.id for run in await running(client, batch_id) if process_of(run) == victim.pid}

            async def has_some() -> bool:
                return len(await its()) > 3

            await eventually(has_some, 600)
            victim.kill()
            orphans = await its()
            assert orphans
            run = await ended(batch_id)
        result = await result_of(run)
        stages = Counter(row.stage for row in result.releases)
        unlike = [(row.name, row.stage, row.detail) for row in result.unreleased]
        assert stages == {Stage.RELEASED: 198, Stage.FAILED: 2}, unlike
        assert written(cloud) == dict.fromkeys(range(1, 201), ONCE)
        async with get_client() as client:
            found = await children_of(client, batch_id, "release")
        assert len(found) == 200
        # A busy server may have recorded the end of some only after it was asked.
        again = [run for run in found if run.id in orphans and run.run_count > 1]
        assert again
        assert {process_of(run) for run in again}.isdisjoint({victim.pid})
        # All three had their share.
        assert len({process_of(run) for run in found}) == 2 + any(
            process_of(run) == victim.pid for run in found
        )


@pytest.mark.parametrize("name", ["api1", "redis", "postgres"])
async def test_a_batch_outlasts_the_restart_of(topology: Topology, make_cloud: Any, name: str) -> None:
    cloud = make_cloud(**shop(40))
    plan = plan_of(40, 2, max_parallel=12)
    plan["defaults"] = PATIENT
    with working(topology, cloud):
        async with under_way(cloud, plan, 10) as batch_id:
            part = topology.processes[name]
            part.kill()
            await asyncio.sleep(2)
            part.start()
            run = await ended(batch_id)
        result = await result_of(run)
        assert result.unreleased == [], (result.error, [(row.name, row.detail) for row in result.unreleased])
        assert written(cloud) == dict.fromkeys(range(1, 41), ONCE)


async def test_a_batch_whose_own_worker_is_killed_goes_on_elsewhere_when_it_is_retried(
    topology: Topology, make_cloud: Any
) -> None:
    cloud = make_cloud(**shop(24))
    plan = plan_of(24, 2, max_parallel=6)
    plan["defaults"] = PATIENT
    with working(topology, cloud):
        async with under_way(cloud, plan, 4) as batch_id:
            parent = process_of(await now(batch_id))
            (victim,) = [
                topology.processes[name] for name in WORKERS if topology.processes[name].pid == parent
            ]
            victim.kill()
            await in_state(batch_id, "Crashed")
            async with get_client() as client:  # what Retry in the UI does
                await client.set_flow_run_state(batch_id, AwaitingRetry(), force=True)
            await asyncio.sleep(1)
            run = await ended(batch_id)
        result = await result_of(run)
        assert result.unreleased == [], (result.error, [(row.name, row.detail) for row in result.unreleased])
        assert written(cloud) == dict.fromkeys(range(1, 25), ONCE)


async def test_a_rollback_overtakes_a_batch(topology: Topology, make_cloud: Any) -> None:
    cloud = make_cloud(**shop(6))
    async with get_client() as client:
        # All are due before the worker comes, the rollback last.
        release = await client.read_deployment_by_name("deploy-latest-image/batch-release")
        back = await client.read_deployment_by_name("rollback/rollback")
        releases = [
            await client.create_flow_run_from_deployment(
                release.id, parameters={"app_id": app, "deployment": "web", **FAST}
            )
            for app in range(1, 6)
        ]
        rollback = await client.create_flow_run_from_deployment(
            back.id, parameters={"app_id": 6, "deployment": "web", "template_id": 60, "poll_seconds": 0.2}
        )
    with ExitStack() as stack:
        worker = topology.worker("one-at-a-time", cloud.environment, "--limit", "1")
        stack.callback(worker.kill)
        for run in [*releases, rollback]:
            await ended(run.id)
    starts = {run.id: (await now(run.id)).start_time for run in [*releases, rollback]}
    assert min(starts, key=lambda run_id: str(starts[run_id])) == rollback.id


async def test_locks_hold_across_workers(topology: Topology, make_cloud: Any) -> None:
    cloud = make_cloud(**shop(1))
    parameters = {
        "app_id": 1,
        "deployment": "web",
        "images": {"web": "r/app1:2"},
        **PATIENT,
        "lock_wait_seconds": 900,
    }
    with working(topology, cloud):
        runs = [await started(RELEASE, parameters) for _ in range(6)]
        states = [(await ended(run.id)).state for run in runs]
        assert all(state is not None and state.is_completed() for state in states), states
        publishes = [entry["at"] for entry in cloud.record if entry["kind"] == "publish"]
        # Never two at once: each begins when the rollout of the one before has ended.
        assert all(truth["rolled_out"] for truth in cloud.truth("web"))
        assert len(publishes) == 6
        assert publishes == sorted(publishes)


async def test_a_cancel_reaches_a_release_on_whichever_worker(topology: Topology, make_cloud: Any) -> None:
    cloud = make_cloud(**shop(1, {1: {"kind": "slow_start", "seconds": 6000}}))
    with working(topology, cloud):
        run = await started(RELEASE, {"app_id": 1, "deployment": "web", **PATIENT, "poll_attempts": 10_000})
        await has_written(cloud, 1, 2)
        async with get_client() as client:
            await client.set_flow_run_state(run.id, Cancelling())
        assert (await ended(run.id)).state_name == "Cancelled"


async def test_an_approval_frees_the_worker_and_another_goes_on(topology: Topology, make_cloud: Any) -> None:
    cloud = make_cloud(**shop(1))
    asked = {
        "app_id": 1,
        "deployment": "web",
        "approval": "before-release",
        "requested_by": "zhangsan",
        **PATIENT,
    }
    with working(topology, cloud, "w1"):
        run = await started(RELEASE, asked)
        await in_state(run.id, "Suspended")
        assert cloud.record == []
    with working(topology, cloud, "w2"):
        async with get_client() as client:
            answer = {"decision": "approve", "name": "lisi", "comment": ""}
            await client.resume_flow_run(run.id, run_input=answer)
        state = (await ended(run.id)).state
        assert state is not None
        assert state.is_completed(), state
    assert len(cloud.record) == 2


async def test_a_schedule_starts_a_release_once(topology: Topology, make_cloud: Any) -> None:
    cloud = make_cloud(**shop(1))
    async with get_client() as client:
        deployment = await client.read_deployment_by_name(RELEASE)
        due = datetime.now(UTC) + timedelta(seconds=20)
        (schedule,) = await client.create_deployment_schedules(
            deployment.id,
            [
                DeploymentScheduleCreate(
                    schedule=IntervalSchedule(interval=timedelta(days=1), anchor_date=due),
                    max_scheduled_runs=1,
                    parameters={"app_id": 1, "deployment": "web", **PATIENT},
                )
            ],
        )

        found: list[FlowRun] = []

        async def scheduled() -> bool:
            found[:] = await client.read_flow_runs(
                flow_run_filter=FlowRunFilter(
                    deployment_id=FlowRunFilterDeploymentId(any_=[deployment.id]),
                    tags=FlowRunFilterTags(all_=["auto-scheduled"]),
                    expected_start_time=FlowRunFilterExpectedStartTime(before_=due + timedelta(minutes=1)),
                )
            )
            return bool(found)

        try:
            with working(topology, cloud):
                await eventually(scheduled, 300)
                (run,) = found
                state = (await ended(run.id)).state
                assert state is not None
                assert state.is_completed(), state
        finally:
            await client.delete_deployment_schedule(deployment.id, schedule.id)
    assert written(cloud) == {1: ONCE}


async def test_a_worker_that_does_not_share_results_refuses_a_batch_s_releases(
    topology: Topology, make_cloud: Any
) -> None:
    cloud = make_cloud(**shop(2))
    plan = plan_of(2)
    plan["defaults"] = PATIENT
    with ExitStack() as stack:
        batches = topology.worker("shares", cloud.environment, "--work-queue", "batches")
        stack.callback(batches.kill)
        # Without the block it keeps results on its own disk.
        alone = topology.worker(
            "alone",
            {**cloud.environment, "PREFECT_DEFAULT_RESULT_STORAGE_BLOCK": ""},
            "--work-queue",
            "releases",
        )
        stack.callback(alone.kill)
        run = await started(BATCH, {"plan": plan, "run_in": "work-pool"})
        result = await result_of(await ended(run.id))
    assert {row.stage for row in result.releases} == {Stage.FAILED}
    assert "out of reach here" in result.releases[0].detail
    assert "PREFECT_DEFAULT_RESULT_STORAGE_BLOCK" in result.releases[0].detail
    assert cloud.record == []
