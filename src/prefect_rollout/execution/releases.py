"""Find, list, follow and continue flow runs of releases."""

import asyncio
import re
from typing import Any, NamedTuple
from uuid import UUID

from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import TERMINAL_STATES, FlowRun, State, StateType
from prefect.client.schemas.responses import SetStateStatus
from prefect.client.schemas.sorting import FlowRunSort
from prefect.exceptions import ObjectNotFound
from prefect.states import Pending

from prefect_rollout.batch.result import BatchResult
from prefect_rollout.errors import InputError
from prefect_rollout.flows import FLOWS
from prefect_rollout.release.result import ReleaseResult
from prefect_rollout.runs.approval import staying
from prefect_rollout.runs.flow_runs import OF_RELEASES, Wanted, in_states, is_release, pages
from prefect_rollout.runs.processes import execute
from prefect_rollout.text import id_in, one_line

_SHORTEST_PREFIX = 4
_NEWEST = FlowRunSort.EXPECTED_START_TIME_DESC


class Found(NamedTuple):
    """A flow run of a release, and the name of its flow."""

    run: FlowRun
    flow: str


async def find(client: PrefectClient, run_id: str) -> Found:
    """Return the flow run with that id: complete, the end of its link, or the first characters of its id.

    Raises:
        InputError: there is none, there are several, or it is a run of another flow.
    """
    given = id_in(run_id)
    try:
        run = await client.read_flow_run(UUID(given))
    except ObjectNotFound:
        raise _refused(f"this Prefect API has no flow run {given}", _LIST) from None
    except ValueError:
        run = await _beginning_with(client, given)
    flow = (await client.read_flow(run.flow_id)).name
    if flow not in FLOWS or not is_release(run):
        known = ", ".join(FLOWS)
        problem = f"{run.id} is a run of the flow {one_line(flow, 80)!r}, and not of {known}"
        raise _refused(problem, _LIST)
    return Found(run, flow)


async def _beginning_with(client: PrefectClient, prefix: str) -> FlowRun:
    shown = one_line(prefix, 80)
    if len(prefix) < _SHORTEST_PREFIX or not re.fullmatch("[0-9a-f-]+", prefix):
        raise _refused(
            f"{shown!r} is not the id of a flow run, such as {UUID(int=0)}, nor its first "
            f"{_SHORTEST_PREFIX} or more characters",
            _LIST,
        )
    found = [
        run
        async for page in pages(client, FlowRunFilter(), _NEWEST, OF_RELEASES)
        for run in page
        if str(run.id).startswith(prefix) and is_release(run)
    ]
    if len(found) != 1:
        ids = ", ".join(str(run.id) for run in found[:5])
        problem = f"{len(found)} runs have an id that begins" if found else "no run has an id that begins"
        raise _refused(f"{problem} with {shown}{ids and ': ' + ids}", _LIST)
    return found[0]


_LIST = "`prefect-rollout list` shows the runs. Nothing was written."


def _refused(problem: str, advice: str) -> InputError:
    return InputError(f"run_id: {problem}", advice=advice, field="run_id")


async def listed(client: PrefectClient, wanted: Wanted, limit: int) -> list[FlowRun]:
    """Return the newest runs that match, newest first."""
    states = in_states(*(each for each in StateType if each not in TERMINAL_STATES))
    runs = FlowRunFilter(state=states if wanted.running else None)
    found: list[FlowRun] = []
    async for page in pages(client, runs, _NEWEST, OF_RELEASES):
        found += filter(wanted.match, page)
        if len(found) >= limit:
            break
    return found[:limit]


async def ended(client: PrefectClient, run_id: UUID, seconds: float) -> FlowRun:
    """Return the run once it has ended, or as it is when that takes too long."""
    until = asyncio.get_running_loop().time() + seconds
    while True:
        run = await client.read_flow_run(run_id)
        if (run.state and run.state.is_final()) or asyncio.get_running_loop().time() > until:
            return run
        await asyncio.sleep(1)


async def resume(client: PrefectClient, found: Found) -> State[ReleaseResult | BatchResult]:
    """Run a flow run again that ended without success; completed steps are not repeated.

    Returns:
        The state in which it ends this time.

    Raises:
        InputError: it has not ended, or it succeeded.
    """
    run, state = found.run, found.run.state
    if state is not None and state.is_completed():
        raise _refused(
            f"{one_line(run.name, 80)!r} has succeeded already",
            "Start a new release if there is something to release; nothing was written.",
        )
    # No worker takes a Pending run, so it belongs to this process. Only Cancelled needs force; without it,
    # Prefect admits one of two that continue the same run at once.
    force = state is not None and state.type is StateType.CANCELLED
    pending: State[Any] = Pending()
    if not (state is not None and state.is_final()) or (
        (await client.set_flow_run_state(run.id, pending, force=force)).status is not SetStateStatus.ACCEPT
    ):
        raise _refused(
            f"{one_line(run.name, 80)!r} has not ended: it is {one_line(state and state.name, 40)}",
            f"Wait for its end, or cancel it with `prefect-rollout cancel {run.id}`. A run whose process was "
            "killed is marked Crashed after some time without heartbeats.",
        )
    with staying():
        return await execute(client, FLOWS[found.flow], await client.read_flow_run(run.id))
