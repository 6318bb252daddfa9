"""Runs flow runs inside one warm process: those of the local deployments, and for `worker` those of a pool.

A process of its own for each release would cost seconds and a hundred megabytes: most of both is the
import of Prefect. The flows are async and wait most of their time, as the releases of a batch do, and
a cancel reaches them through `guard`.
"""

import asyncio
from collections.abc import AsyncIterator, Collection
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime
from typing import Any, Self
from uuid import UUID

import httpx
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterDeploymentId,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.exceptions import Abort, Pause, PrefectException
from prefect.flow_engine import run_flow
from prefect.logging import get_logger
from prefect.states import Cancelled, Crashed, Pending
from prefect.types.entrypoint import EntrypointType
from prefect.utilities.engine import propose_state

from prefect_rollout import guard, reaper
from prefect_rollout.flows.again import FLOWS
from prefect_rollout.settings import batches, liveness
from prefect_rollout.text import one_line
from prefect_rollout.turns import Turns, taking

_LOOK_SECONDS = 1.0
_MOST_AT_ONCE = 100


class Runner:
    """Runs what is due of its deployments. `of` makes one."""

    def __init__(self, client: PrefectClient, deployments: Collection[UUID], poked: asyncio.Event) -> None:
        self._client = client
        self._deployments = list(deployments)
        self._poked = poked
        self._tasks: dict[UUID, asyncio.Task[None]] = {}
        self._turns = Turns(batches().api_turns)
        self._stopping = False
        self._logger = get_logger("prefect_rollout.runner")

    @classmethod
    async def of(cls, client: PrefectClient, poked: asyncio.Event) -> Self:
        """A runner of all flows here, each as the deployment `<flow>/<flow>`.

        Args:
            client: of the API.
            poked: when it is set, the runner looks at once for what is due.
        """
        deployments = []
        for name, flow in FLOWS.items():
            deployment = await flow.ato_deployment(
                name,
                description=(flow.description or "").partition("\n\nArgs:")[0],
                tags=["prefect-rollout"],
                entrypoint_type=EntrypointType.MODULE_PATH,
            )
            deployments.append(await deployment.aapply())
        return cls(client, deployments, poked)

    @property
    def busy(self) -> bool:
        """Whether any flow run is under way."""
        return bool(self._tasks)

    async def run(self) -> None:
        """Runs what is due, until `stop`."""
        while not self._stopping:
            self._poked.clear()
            try:
                await self._look()
            except (httpx.HTTPError, PrefectException) as error:
                self._logger.warning("The Prefect API did not say what is due: %s", one_line(repr(error)))
            try:
                async with asyncio.timeout(_LOOK_SECONDS):
                    await self._poked.wait()
            except TimeoutError:
                continue

    async def stop(self) -> None:
        """Ends, and has the flow runs that are under way say what they leave behind."""
        self._stopping = True
        self._poked.set()
        for run_id, task in self._tasks.items():
            if not guard.end_here(run_id):
                task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks.values(), timeout=20)

    async def _look(self) -> None:
        room = _MOST_AT_ONCE - len(self._tasks)
        if room <= 0:
            return
        due = await self._client.get_scheduled_flow_runs_for_deployments(
            deployment_ids=self._deployments, scheduled_before=datetime.now(UTC), limit=room
        )
        for run in due:
            if run.id not in self._tasks:
                task = asyncio.create_task(self._conduct(run), name=run.name)
                self._tasks[run.id] = task

    async def sweep(self) -> None:
        """Ends what was cancelled while no runner ran: nobody else would ever do so."""
        cancelling = FlowRunFilter(
            deployment_id=FlowRunFilterDeploymentId(any_=self._deployments),
            state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.CANCELLING])),
        )
        for run in await self._client.read_flow_runs(flow_run_filter=cancelling):
            await end_if_cancelling(self._client, run.id)

    async def _conduct(self, run: FlowRun) -> None:
        try:
            if (await propose_state(self._client, Pending(), flow_run_id=run.id)).is_pending():
                await carry_out(self._client, await self._client.read_flow_run(run.id), self._turns)
        except Abort as aborted:
            self._logger.info("%s is not this runner's: %s", run.id, aborted)
            await end_if_cancelling(self._client, run.id)
        except (httpx.HTTPError, PrefectException) as error:
            self._logger.warning(
                "The Prefect API did not take what became of %s: %s", run.id, one_line(repr(error))
            )
        finally:
            del self._tasks[run.id]


async def carry_out(client: PrefectClient, run: FlowRun, turns: Turns) -> None:
    """Runs a pending flow run in this process, to its end or until it waits for a person.

    Args:
        client: of the API.
        run: of any of the flows here; a run of another one is marked Crashed.
        turns: what the releases of this process take at the API.
    """
    logger = get_logger("prefect_rollout.runner")
    try:
        name = (await client.read_flow(run.flow_id)).name
        if (flow := FLOWS.get(name)) is None:
            message = f"Only {', '.join(FLOWS)} are run here, and not {one_line(name, 80)}."
            await propose_state(client, Crashed(message=message), flow_run_id=run.id)
            return
        await guard.claim(client, run)
        ended: Any = run_flow(flow, flow_run=run, return_type="state")
        async with AsyncExitStack() as stack:
            if name != "deploy-batch":  # its releases take turns of their own
                async with _heard(client, run.id):
                    await stack.enter_async_context(taking(turns))
            await ended
        await end_if_cancelling(client, run.id)
    except Pause:  # suspended: it comes back as a scheduled run
        logger.info("%s is suspended", run.id)
    except Abort as aborted:
        logger.info("%s is another process's: %s", run.id, aborted)
        await end_if_cancelling(client, run.id)
    except Exception as error:  # whatever it is, the run must not look as if it ran
        logger.exception("%s could not be run", run.id)
        message = f"It could not be run: {type(error).__name__}."
        await propose_state(client, Crashed(message=message), flow_run_id=run.id)


@asynccontextmanager
async def _heard(client: PrefectClient, run_id: UUID) -> AsyncIterator[None]:
    """Tells that a run's process lives, though the run has not begun, while the context lasts."""

    async def beat_on() -> None:
        while True:
            try:
                await reaper.beat(client, [run_id])
            except guard.NO_ANSWER as error:
                get_logger("prefect_rollout.runner").warning(
                    "No heartbeat of %s was taken: %s", run_id, one_line(repr(error))
                )
            await asyncio.sleep(liveness().heartbeat_seconds)

    beating = asyncio.create_task(beat_on())
    try:
        yield
    finally:
        beating.cancel()
        await asyncio.wait([beating])


async def end_if_cancelling(client: PrefectClient, run_id: UUID) -> None:
    """Ends a run that was cancelled before its flow began, which Prefect then does not let begin."""
    run = await client.read_flow_run(run_id)
    if run.state is not None and run.state.type is StateType.CANCELLING:
        nothing = "nothing more was written" if run.run_count else "nothing was written"
        state: State[None] = Cancelled(message=f"cancelled in Prefect before it began: {nothing}")
        await client.set_flow_run_state(run_id, state)
