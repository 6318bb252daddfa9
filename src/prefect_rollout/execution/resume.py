"""Continue an earlier run of a flow, in this process."""

from typing import Any
from uuid import UUID

from prefect import get_client
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.client.schemas.responses import SetStateStatus
from prefect.exceptions import ObjectNotFound
from prefect.states import Pending

from prefect_rollout.batch.result import BatchResult
from prefect_rollout.errors import InputError
from prefect_rollout.flows import FLOWS
from prefect_rollout.release.result import ReleaseResult
from prefect_rollout.runs.approval import staying
from prefect_rollout.runs.flow_runs import is_release
from prefect_rollout.runs.processes import execute
from prefect_rollout.text import one_line


async def find(run_id: UUID) -> FlowRun:
    """Return the flow run of that id.

    Raises:
        InputError: there is none.
    """
    async with get_client() as client:
        try:
            return await client.read_flow_run(run_id)
        except ObjectNotFound:
            raise InputError(
                f"run_id: this Prefect API has no flow run {run_id}",
                advice="Name one of its runs; `prefect flow-run ls` lists them. Nothing was written.",
                field="run_id",
            ) from None


async def resume(run_id: UUID) -> State[ReleaseResult | BatchResult]:
    """Run a flow run again that ended without success; completed steps are not repeated.

    Returns:
        The state in which it ends this time.

    Raises:
        InputError: there is no such run, it is of another flow, it has not ended, or it succeeded.
    """
    run = await find(run_id)
    async with get_client() as client:
        name = (await client.read_flow(run.flow_id)).name
        flow = FLOWS.get(name)
        if flow is None or not is_release(run):
            raise InputError(
                f"run_id: {run_id} is a run of the flow {one_line(name, 80)!r}, and only runs of "
                f"{', '.join(FLOWS)} can be continued here",
                field="run_id",
            )
        state = run.state
        if state is not None and state.is_completed():
            raise InputError(
                f"run_id: {one_line(run.name, 80)!r} has succeeded already",
                advice="Start a new release if there is something to release; nothing was written.",
                field="run_id",
            )
        # No worker takes a Pending run, so it belongs to this process. Only Cancelled needs force; without
        # it, Prefect admits one of two that continue the same run at once.
        force = state is not None and state.type is StateType.CANCELLED
        pending: State[Any] = Pending()
        ended = state is not None and state.is_final()
        if not ended or (
            (await client.set_flow_run_state(run_id, pending, force=force)).status
            is not SetStateStatus.ACCEPT
        ):
            raise InputError(
                f"run_id: {one_line(run.name, 80)!r} has not ended: it is "
                f"{one_line(state and state.name, 40)}",
                advice="Wait for its end, or cancel it. A run whose process was killed is marked Crashed "
                "after some time without heartbeats.",
                field="run_id",
            )
        run = await client.read_flow_run(run_id)
        with staying():
            return await execute(client, flow, run)
