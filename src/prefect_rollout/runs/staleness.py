"""Runs that skip themselves because they start too late or a newer run supersedes them."""

import json
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from prefect import get_client
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterDeploymentId,
    FlowRunFilterExpectedStartTime,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.sorting import FlowRunSort

from prefect_rollout.errors import SkippedError
from prefect_rollout.release.request import Request
from prefect_rollout.runs.flow_runs import all_runs, in_states, this_run
from prefect_rollout.runs.prefect_errors import translate_errors
from prefect_rollout.text import one_line, when

# A run in one of these states did or will do what the older run would do.
_COUNTS = in_states(
    StateType.SCHEDULED, StateType.PENDING, StateType.RUNNING, StateType.PAUSED, StateType.COMPLETED
)


async def skip_unless_due(late_minutes: float) -> None:
    """Check that the current flow run is due; call it before any other request.

    Only a run of a Prefect deployment skips itself, and only at its first start: not a child of another run,
    a retry, or a run that was paused or suspended. A newer run supersedes one that a schedule created, never
    one that a person started.

    Args:
        late_minutes: minutes after the scheduled time at which a start is too late; 0 for never.

    Raises:
        SkippedError: the run is late or superseded.
        ConfigurationError: the Prefect API did not answer.
    """
    run = this_run()
    if run.deployment_id is None or run.parent_task_run_id is not None:
        return
    with translate_errors():
        async with get_client() as client:
            due = await _due(client, run)
            if run.run_count > 1 or run.empirical_policy.pause_keys or due is None:
                return
            now = datetime.now(UTC)
            refuse_late(due, run.start_time or now, late_minutes)
            if run.auto_scheduled:
                for other in await _later(client, run.deployment_id, due, now):
                    refuse_superseded(run, other, now)


def refuse_late(due: datetime, started: datetime, late_minutes: float) -> None:
    """Raise a `SkippedError` if a run that was due at `due` started too late."""
    minutes = (started - due).total_seconds() / 60
    if late_minutes and minutes > late_minutes:
        raise SkippedError(
            f"it started {minutes:.0f} minutes after its scheduled time, {when(due)}, and late_minutes "
            f"allows {late_minutes:g}",
            advice="Start it by hand to release anyway, or raise late_minutes.",
        )


def refuse_superseded(run: FlowRun, other: FlowRun, now: datetime) -> None:
    """Raise a `SkippedError` if `other`, which was due after `run`, is due and has the same subject."""
    planned = other.state and other.state.name in {"Scheduled", "Late"} and other.next_scheduled_start_time
    if (
        other.id == run.id
        or other.parent_task_run_id is not None
        or (planned and planned > now)
        or about(other.parameters) != about(run.parameters)
    ):
        return
    raise SkippedError(
        f"a newer run supersedes it: {one_line(other.name, 80)} (flow run {other.id}), "
        f"{one_line(other.state and other.state.name, 40)}, due {when(other.expected_start_time)}",
        newer_run=str(other.id),
    )


def about(parameters: dict[str, Any]) -> str:
    """Return the subject of a run with these parameters; a run supersedes older runs of its subject."""
    target, clusters = parameters.get("target"), parameters.get("clusters") or []
    what = parameters.get("plan") or [
        str(parameters.get("app_id")),
        parameters.get("deployment"),
        target or Request.model_fields["target"].default,
        sorted(map(str, clusters)),
    ]
    # A dry run supersedes no release.
    return json.dumps([what, bool(parameters.get("dry_run"))], sort_keys=True, default=str)


async def _due(client: PrefectClient, run: FlowRun) -> datetime | None:
    """Return when the run was due: its last schedule, even by hand, not when it got a concurrency slot."""
    states = await client.read_flow_run_states(run.id)
    scheduled = [state for state in states if state.name == "Scheduled"]
    last = max(scheduled, key=lambda state: state.timestamp, default=None)
    return (last and last.state_details.scheduled_time) or run.expected_start_time


async def _later(client: PrefectClient, deployment_id: UUID, due: datetime, now: datetime) -> list[FlowRun]:
    """Return the runs of the Prefect deployment that were due after `due`, newest first."""
    wanted = FlowRunFilter(
        deployment_id=FlowRunFilterDeploymentId(any_=[deployment_id]),
        expected_start_time=FlowRunFilterExpectedStartTime(after_=due, before_=now),
        state=_COUNTS,
    )
    later = await all_runs(client, wanted, FlowRunSort.EXPECTED_START_TIME_DESC)
    return [run for run in later if run.expected_start_time and run.expected_start_time > due]
