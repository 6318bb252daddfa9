"""Start, cancel and retry the flow runs of releases."""

import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterIdempotencyKey,
    FlowRunFilterTags,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.client.schemas.responses import SetStateStatus
from prefect.client.schemas.sorting import FlowRunSort
from prefect.exceptions import ObjectNotFound
from prefect.states import AwaitingRetry

from prefect_rollout.errors import ConfigurationError, InputError
from prefect_rollout.mcp.connection import Api
from prefect_rollout.mcp.flow_runs import Found
from prefect_rollout.mcp.follow import check_retry, retry_token
from prefect_rollout.release.request import Checked
from prefect_rollout.release.workload import digest
from prefect_rollout.runs import flow_runs
from prefect_rollout.runs.prefect_errors import translate_errors

WINDOW = timedelta(minutes=10)
"""Period in which the same request means the same release."""

# Requests that differ only in these fields, wording and expected plan, are the same request.
_SAME = {"reason", "requested_by", "expect_plan"}
_SAME_PLAN = {*_SAME, "poll_seconds", "poll_attempts"}


async def submit(
    api: Api, flow: str, request: Checked, *, attempt: int, tags: Sequence[str] = ()
) -> tuple[FlowRun, bool]:
    """Return a run of the flow's deployment, and True if the same request created it in the last ten minutes.

    Raises:
        ConfigurationError: the API has no such deployment, or did not answer.
    """
    if known := await submitted(api, flow, request, attempt=attempt):
        return known, True
    return await _create(api, flow, request, tags, _keys(flow, request, attempt)[0]), False


async def submitted(api: Api, flow: str, request: Checked, *, attempt: int) -> FlowRun | None:
    """Return the flow run that the same request created in the last ten minutes, if any."""
    keys = FlowRunFilterIdempotencyKey(any_=_keys(flow, request, attempt))
    since = datetime.now(UTC) - WINDOW
    found = await _newest(api, FlowRunFilter(idempotency_key=keys))
    return next((run for run in found if run.created and run.created > since), None)


async def plan(
    api: Api, flow: str, request: Checked, *, tags: Sequence[str] = (), reuse: bool = False
) -> FlowRun:
    """Return a dry run of the request: one that is running, with `reuse` the last plan, or a new one.

    Raises:
        ConfigurationError: the API has no such deployment, or did not answer.
    """
    dry = request.model_copy(update={"dry_run": True, "expect_plan": ""})
    tag = f"plan:{_digest(flow, dry, 0, _SAME_PLAN)}"
    for run in (await _newest(api, FlowRunFilter(tags=FlowRunFilterTags(all_=[tag]))))[:1]:
        if run.state is None or not run.state.is_final() or (reuse and run.state.name == "Planned"):
            return run
    return await _create(api, flow, dry, [tag, *tags], None)


async def _newest(api: Api, wanted: FlowRunFilter) -> list[FlowRun]:
    with translate_errors():
        return await api.client.read_flow_runs(
            flow_run_filter=wanted, sort=FlowRunSort.EXPECTED_START_TIME_DESC, limit=2
        )


async def _create(api: Api, flow: str, request: Checked, tags: Sequence[str], key: str | None) -> FlowRun:
    with translate_errors():
        try:
            deployment = await api.client.read_deployment_by_name(f"{flow}/{flow}")
        except ObjectNotFound:
            raise ConfigurationError(
                f"this Prefect API has no deployment {flow}/{flow}",
                advice="Create it with `prefect-rollout init`.",
            ) from None
        run = await api.client.create_flow_run_from_deployment(
            deployment.id,
            parameters=request.model_dump(mode="json", exclude_unset=True),
            tags=[*flow_runs.first_tags("mcp", request), *tags],
            idempotency_key=key,
        )
    api.notify()
    return run


def _keys(flow: str, request: Checked, attempt: int) -> list[str]:
    """Return the idempotency keys of a request made now, and of one made in the window before."""
    now = int(time.time() // WINDOW.total_seconds())
    return [f"mcp:{_digest(flow, request, attempt, _SAME)}:{bucket}" for bucket in (now, now - 1)]


def _digest(flow: str, request: Checked, attempt: int, exclude: set[str]) -> str:
    same = request.model_dump(mode="json", exclude=exclude)
    return digest([flow, same, attempt])[:32]


async def cancel(api: Api, found: Found) -> None:
    """Ask a run to stop, unless it has ended."""
    with translate_errors():
        asked = await flow_runs.cancel(api.client, found.run)
    if asked:
        api.notify()


async def retry(api: Api, found: Found, token: str) -> None:
    """Continue a run where it stopped; `token` identifies the end that the user was shown.

    Raises:
        InputError: the run cannot be retried, or has run again since.
        ConfigurationError: the API did not answer.
    """
    run = found.run
    check_retry(run)
    if retry_token(run) != token:
        raise _changed(f"{run.id} has run again since")
    # Only Cancelled needs force. Without it, Prefect accepts one of two simultaneous retries.
    force = run.state is not None and run.state.type is StateType.CANCELLED
    with translate_errors():
        state: State[Any] = AwaitingRetry()
        answer = await api.client.set_flow_run_state(run.id, state, force=force)
    if answer.status is not SetStateStatus.ACCEPT:
        raise _changed(
            f"Prefect rejected the retry of {run.id}: another retry was first, or its state changed"
        )
    api.notify()


def _changed(problem: str) -> InputError:
    return InputError(
        f"flow_run_id: {problem}", advice="Check its state with get_release.", field="flow_run_id"
    )
