"""Going on with a run of the flows here, in this process."""

from typing import Any, cast
from uuid import UUID

from prefect import Flow, get_client
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.client.schemas.responses import SetStateStatus
from prefect.exceptions import ObjectNotFound
from prefect.flow_engine import run_flow
from prefect.states import Pending

from prefect_rollout import guard, reaper
from prefect_rollout.batch import BatchResult
from prefect_rollout.errors import InputError
from prefect_rollout.flows.approval import staying
from prefect_rollout.flows.batch import deploy_batch
from prefect_rollout.flows.deploy import deploy_latest_image
from prefect_rollout.flows.restart import restart
from prefect_rollout.flows.rollback import rollback
from prefect_rollout.flows.scale import scale
from prefect_rollout.models import ReleaseResult
from prefect_rollout.text import one_line

FLOWS: dict[str, Flow[Any, Any]] = {
    flow.name: flow for flow in (deploy_latest_image, deploy_batch, rollback, restart, scale)
}


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


async def go_on(run_id: UUID) -> State[ReleaseResult | BatchResult]:
    """Runs a flow run again that has ended and did not end well; steps that were completed stay done.

    Returns:
        The state in which it ended this time.

    Raises:
        InputError: there is no such run, it is none of these flows', it has not ended, or it released.
    """
    run = await find(run_id)
    async with get_client() as client:
        name = (await client.read_flow(run.flow_id)).name
        flow = FLOWS.get(name)
        if flow is None or not reaper.ours(run):
            raise InputError(
                f"run_id: {run_id} is a run of the flow {one_line(name, 80)!r}, and only {', '.join(FLOWS)} "
                "can be gone on with here",
                field="run_id",
            )
        if run.state is not None and run.state.is_completed():
            raise InputError(
                f"run_id: {one_line(run.name, 80)!r} ended well already",
                advice="Start a new release if there is something to release; nothing was written.",
                field="run_id",
            )
        # As a state that a worker does not take up: the run is this process's. Only Cancelled needs
        # force; without it, Prefect admits one of two that go on with the same run at once.
        force = run.state is not None and run.state.type is StateType.CANCELLED
        pending: State[Any] = Pending()
        if (
            not (run.state is not None and run.state.is_final())
            or (await client.set_flow_run_state(run_id, pending, force=force)).status
            is not SetStateStatus.ACCEPT
        ):
            raise InputError(
                f"run_id: {one_line(run.name, 80)!r} has not ended: it is "
                f"{one_line(run.state and run.state.name, 40)}",
                advice="Wait for its end, or cancel it. A run whose process was killed is marked Crashed "
                "when it has been silent for some time.",
                field="run_id",
            )
        run = await client.read_flow_run(run_id)
        await guard.claim(client, run)
    ended: Any = run_flow(flow, flow_run=run, return_type="state")  # of an async flow, to be awaited
    with staying():
        return cast(State[ReleaseResult | BatchResult], await ended)
