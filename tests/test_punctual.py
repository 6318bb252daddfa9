"""Runs that skip themselves: real Prefect server, its own schedules, simulated clouds."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from prefect import flow, get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    FlowRunFilter,
    FlowRunFilterDeploymentId,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.schedules import IntervalSchedule
from prefect.client.schemas.sorting import FlowRunSort
from prefect.deployments import arun_deployment
from prefect.events.filters import EventFilter, EventNameFilter, EventRelatedFilter
from prefect.flow_engine import run_flow_async
from prefect.states import AwaitingConcurrencySlot, AwaitingRetry, Cancelled, Completed, Pending, Scheduled

from prefect_rollout.errors import SkippedError
from prefect_rollout.flows import deploy_latest_image, restart
from prefect_rollout.release.result import Outcome
from prefect_rollout.runs.staleness import about
from support import Cloud

pytestmark = pytest.mark.usefixtures("prefect_api")

HOME: dict[str, Any] = {
    "app_id": 3290,
    "deployment": "qapm-home",
    "poll_seconds": 0.1,
    "poll_attempts": 200,
}
# A run that does not skip itself shows it by its plan as well as by a release.
PLAN = {**HOME, "dry_run": True}


async def deployed(**parameters: Any) -> UUID:
    async with get_client() as client:
        return await client.create_deployment(
            await client.create_flow(deploy_latest_image),
            name=f"punctual-{uuid4()}",
            parameters=parameters,
        )


async def by_hand(deployment: UUID, due: datetime, /, **parameters: Any) -> FlowRun:
    async with get_client() as client:
        return await client.create_flow_run_from_deployment(
            deployment, parameters=parameters, state=Scheduled(scheduled_time=due)
        )


async def set_state(run: FlowRun, state: Any) -> None:
    async with get_client() as client:
        await client.set_flow_run_state(run.id, state, force=True)


async def read(run: FlowRun) -> FlowRun:
    async with get_client() as client:
        return await client.read_flow_run(run.id)


async def begun(run: FlowRun) -> Any:
    """Runs the run in this process as it stands, as a worker's process does."""
    run = await read(run)
    return await run_flow_async(deploy_latest_image, flow_run=run, parameters=run.parameters)


async def skipped(run: FlowRun, cloud: Cloud) -> SkippedError:
    """The run, which skips itself: it ends so, and nothing was asked or reported."""
    with pytest.raises(SkippedError) as caught:
        await begun(run)
    ended = await read(run)
    assert (ended.state_type, ended.state_name) == (StateType.CANCELLED, "Skipped")
    assert ended.state is not None
    assert ended.state.message == str(caught.value)
    assert caught.value.result is not None
    assert caught.value.result.outcome is Outcome.SKIPPED
    assert cloud.requests == []
    async with get_client() as client:
        artifacts = await client.read_artifacts(
            artifact_filter=ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run.id]))
        )
    assert [artifact for artifact in artifacts if artifact.type == "markdown"] == []
    return caught.value


async def told(run: FlowRun, name: str) -> int:
    """How many events of that name the run sent, once there is one."""
    wanted = EventFilter(
        event=EventNameFilter(name=[name]),
        related=EventRelatedFilter(id=[f"prefect.flow-run.{run.id}"]),
    )
    async with asyncio.timeout(30), get_client() as client:
        while True:
            if events := (await client.read_events(wanted, limit=10)).events:
                return len(events)
            await asyncio.sleep(0.1)


def minutes_ago(minutes: float) -> datetime:
    return datetime.now(UTC) - timedelta(minutes=minutes)


# ---- late ---------------------------------------------------------------------------------------


async def test_a_run_that_starts_too_late_skips_itself_and_a_retry_of_it_runs(cloud: Cloud) -> None:
    run = await by_hand(await deployed(), minutes_ago(90), **HOME)
    error = await skipped(run, cloud)
    assert await told(run, "prefect-rollout.release.skipped") == 1
    assert "90 minutes after its scheduled time" in str(error)
    assert "late_minutes allows 60" in str(error)
    await set_state(run, AwaitingRetry())
    assert (await begun(run)).outcome is Outcome.RELEASED


@pytest.mark.parametrize("late_minutes", [0, 100])
async def test_how_late_it_may_be_is_a_parameter(cloud: Cloud, late_minutes: float) -> None:
    run = await by_hand(await deployed(), minutes_ago(90), **PLAN, late_minutes=late_minutes)
    assert (await begun(run)).outcome is Outcome.PLANNED


async def test_waiting_for_a_slot_makes_a_run_late(cloud: Cloud) -> None:
    run = await by_hand(await deployed(), minutes_ago(90), **HOME)
    await set_state(run, AwaitingConcurrencySlot(scheduled_time=minutes_ago(0)))
    await skipped(run, cloud)


async def test_a_run_that_was_put_off_by_hand_is_not_late(cloud: Cloud) -> None:
    run = await by_hand(await deployed(), minutes_ago(90), **PLAN)
    await set_state(run, Scheduled(scheduled_time=minutes_ago(1)))
    assert (await begun(run)).outcome is Outcome.PLANNED


async def test_a_child_of_another_run_is_never_late(cloud: Cloud) -> None:
    deployment = await deployed()
    due = minutes_ago(90)

    @flow
    async def parent() -> UUID:
        run = await arun_deployment(deployment, parameters=PLAN, timeout=0, scheduled_time=due)
        return run.id

    async with get_client() as client:
        child = await client.read_flow_run(await parent())
    assert (await begun(child)).outcome is Outcome.PLANNED


# ---- superseded ---------------------------------------------------------------------------------


@asynccontextmanager
async def scheduled(count: int, **parameters: Any) -> AsyncIterator[tuple[UUID, list[FlowRun]]]:
    """A deployment, and so many runs of it that its schedule created, each a minute later; all are due."""
    deployment = await deployed(**{**HOME, **parameters})
    first = minutes_ago(count + 2).replace(second=0, microsecond=0)
    schedule = IntervalSchedule(interval=timedelta(minutes=1), anchor_date=first)
    async with get_client() as client:
        await client.create_deployment_schedules(deployment, [DeploymentScheduleCreate(schedule=schedule)])
        answer = await client.request(
            "POST",
            "/deployments/{id}/schedule",
            path_params={"id": deployment},
            json={
                "start_time": first.isoformat(),
                "end_time": minutes_ago(0).isoformat(),
                "max_runs": count,
            },
        )
        answer.raise_for_status()
        runs = await client.read_flow_runs(
            flow_run_filter=FlowRunFilter(deployment_id=FlowRunFilterDeploymentId(any_=[deployment])),
            sort=FlowRunSort.EXPECTED_START_TIME_ASC,
            limit=count,
        )
        assert all(run.auto_scheduled for run in runs)
        try:
            yield deployment, runs
        finally:
            await client.delete_deployment(deployment)


async def test_of_scheduled_runs_that_are_all_due_the_newest_alone_releases(cloud: Cloud) -> None:
    async with scheduled(3) as (_, runs):
        for older in runs[:2]:
            error = await skipped(older, cloud)
            assert str(runs[2].id) in str(error)
            assert runs[2].name in str(error)
        assert (await begun(runs[2])).outcome is Outcome.RELEASED
    assert len(cloud.record) == 2


async def test_a_newer_one_that_waits_or_runs_or_is_done_takes_its_place(cloud: Cloud) -> None:
    async with scheduled(4, **PLAN) as (_, runs):
        newest = runs[3]
        states: list[Any] = [Scheduled(), Pending(), Completed()]
        for older, state in zip(runs, states, strict=False):
            await set_state(newest, state)
            assert str(newest.id) in str(await skipped(older, cloud))


async def test_newer_ones_that_are_cancelled_skipped_or_put_off_take_no_place(cloud: Cloud) -> None:
    async with scheduled(4, **PLAN) as (_, (older, *newer)):
        put_off: Any = Scheduled(scheduled_time=minutes_ago(-60))
        states: list[Any] = [Cancelled(), Cancelled(name="Skipped"), put_off]
        for run, state in zip(newer, states, strict=True):
            await set_state(run, state)
        assert (await begun(older)).outcome is Outcome.PLANNED


async def test_a_run_that_a_person_started_is_never_superseded_and_supersedes(cloud: Cloud) -> None:
    async with scheduled(1, **PLAN) as (deployment, (older,)):
        manual = await by_hand(deployment, minutes_ago(0.1), **PLAN)
        await by_hand(deployment, minutes_ago(0), **PLAN)
        await skipped(older, cloud)
        assert (await begun(manual)).outcome is Outcome.PLANNED


async def test_a_newer_run_about_something_else_takes_no_place(cloud: Cloud) -> None:
    async with scheduled(1, **PLAN) as (deployment, (older,)):
        await by_hand(deployment, minutes_ago(0), **PLAN | {"deployment": "qapm-api"})
        assert (await begun(older)).outcome is Outcome.PLANNED


async def test_runs_of_no_prefect_deployment_never_skip_themselves(cloud: Cloud) -> None:
    assert (await deploy_latest_image(**PLAN, late_minutes=0.001)).outcome is Outcome.PLANNED


async def test_every_flow_skips_itself(cloud: Cloud) -> None:
    async with get_client() as client:
        deployment = await client.create_deployment(
            await client.create_flow(restart), name=f"punctual-{uuid4()}"
        )
    run = await by_hand(deployment, minutes_ago(90), app_id=3290, deployment="qapm-home")
    with pytest.raises(SkippedError):
        await run_flow_async(restart, flow_run=run, parameters=run.parameters)
    assert cloud.requests == []


# ---- what a run is about ------------------------------------------------------------------------


def test_parameters_that_are_left_out_are_those_of_the_flow() -> None:
    full = {"app_id": "3290", "deployment": "x", "target": "", "clusters": []}
    assert about({"app_id": 3290, "deployment": "x"}) == about(full)
    assert about(full | {"clusters": ["a", "b"]}) == about(full | {"clusters": ["b", "a"]})
    assert about(full | {"template_id": 5}) == about(full)


@pytest.mark.parametrize(
    "other",
    [{"deployment": "y"}, {"clusters": ["a"]}, {"app_id": 1}, {"dry_run": True}, {"target": "x/y"}],
    ids=lambda other: next(iter(other)),
)
def test_runs_are_about_something_else_by_any_of(other: dict[str, Any]) -> None:
    full = {"app_id": 3290, "deployment": "x"}
    assert about(full | other) != about(full)


def test_runs_of_a_plan_are_about_the_plan() -> None:
    assert about({"plan": {"releases": [1], "name": "n"}}) == about({"plan": {"name": "n", "releases": [1]}})
    assert about({"plan": {"releases": [1]}}) != about({"plan": {"releases": [2]}})
