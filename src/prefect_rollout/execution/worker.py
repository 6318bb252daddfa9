"""A Prefect worker that executes releases inside its own process, as the work pool type `rollout`.

    prefect-rollout init
    prefect worker start --pool rollout

Prefect's process worker starts two interpreters for each flow run, which takes seconds and about a hundred
megabytes. Here a release begins at once and costs little: the flows are async and wait most of the time.
Polling, queues, priorities, limits and heartbeats are Prefect's own. The environment is the worker's: a pool
of this type has no job variables that matter. A worker that is shut down stops its releases before their
next write and marks them Crashed, so that others can continue them.

The local server's daemon runs one, of the pool `local`.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any
from uuid import UUID

import anyio
import anyio.abc
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import FlowRun
from prefect.workers.base import BaseJobConfiguration, BaseVariables, BaseWorker, BaseWorkerResult

from prefect_rollout.runs.throttle import Throttle, slot
from prefect_rollout.settings import rollout_settings
from prefect_rollout.text import one_line

if TYPE_CHECKING:
    from prefect_rollout.runs import zombies

# Seconds that a release has to end when its worker is shut down.
_END_SECONDS = 20.0

_DETECT_SECONDS = 60.0
_SYNC_SECONDS = 30.0
_POLL_SECONDS = 1.0


class RolloutWorker(BaseWorker[BaseJobConfiguration, BaseVariables, BaseWorkerResult]):
    """Executes the flows of prefect-rollout in its own process."""

    type = "rollout"
    job_configuration = BaseJobConfiguration
    _display_name = "Rollout"
    _description = "Executes releases inside the worker's own process: they begin at once and cost little."

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._throttle = Throttle(rollout_settings().api_turns)
        self._executing: set[UUID] = set()
        self._detected_at = -_DETECT_SECONDS
        self._detector: zombies.ZombieDetector | None = None

    # ---- Prefect's interface ------------------------------------------------------------------------

    async def sync_with_backend(self) -> None:
        """Send the worker's heartbeat to Prefect, and detect killed releases once a minute.

        Prefect's automations detect them too, except for five minutes after a restart of Redis.
        """
        await super().sync_with_backend()
        if time.monotonic() - self._detected_at < _DETECT_SECONDS:
            return
        from prefect_rollout.runs import guard, zombies
        from prefect_rollout.runs.prefect_errors import PREFECT_ERRORS

        self._detected_at = time.monotonic()
        self._detector = self._detector or zombies.ZombieDetector(self.client, self.work_pool.name)
        try:
            await self._detector.detect(alive=guard.guarded_runs())
        except PREFECT_ERRORS as error:
            # The worker's releases do not end with it.
            self._logger.warning("Killed releases could not be detected: %s", one_line(error))

    async def run(
        self,
        flow_run: FlowRun,
        configuration: BaseJobConfiguration,
        task_status: anyio.abc.TaskStatus[Any] | None = None,
    ) -> BaseWorkerResult:
        """Execute the flow run, to its end or until it waits for a person."""
        # Prefect's server loads this module too, as a collection, and needs no flow.
        from prefect_rollout.runs.guard import shut_down
        from prefect_rollout.runs.processes import this_process

        here = this_process()
        self._executing.add(flow_run.id)
        try:
            (task_status or anyio.TASK_STATUS_IGNORED).started(here)
            # A separate task: a worker that ends repeatedly cancels whatever its own tasks await, so that a
            # release could not write its report.
            running = asyncio.create_task(self._execute(flow_run.id), name=flow_run.name)
            try:
                await asyncio.shield(running)
            except asyncio.CancelledError:
                if not shut_down(flow_run.id):
                    running.cancel()
                with anyio.CancelScope(shield=True):
                    await asyncio.wait([running], timeout=_END_SECONDS)
                raise
        finally:
            self._executing.discard(flow_run.id)
        return BaseWorkerResult(status_code=0, identifier=here)

    async def _execute(self, run_id: UUID) -> None:
        from prefect.exceptions import Abort, Pause
        from prefect.states import Crashed
        from prefect.utilities.engine import propose_state

        from prefect_rollout.flows import FLOWS
        from prefect_rollout.runs.processes import execute

        try:
            run = await self.client.read_flow_run(run_id)
            name = (await self.client.read_flow(run.flow_id)).name
            if (flow := FLOWS.get(name)) is None:
                message = f"Only {', '.join(FLOWS)} are executed here, not {one_line(name, 80)}."
                await propose_state(self.client, Crashed(message=message), flow_run_id=run_id)
                return
            async with AsyncExitStack() as stack:
                if name != "deploy-batch":  # its releases have slots of their own
                    async with _heartbeats(self.client, run_id):
                        await stack.enter_async_context(slot(self._throttle))
                await execute(self.client, flow, run)
            await _end_if_cancelling(self.client, run_id)
        except Pause:  # suspended: it is scheduled again later
            self._logger.info("%s is suspended", run_id)
        except Abort as aborted:
            self._logger.info("%s is not this worker's: %s", run_id, aborted)
            await _end_if_cancelling(self.client, run_id)
        except Exception as error:  # a run that was not executed must not look executed
            self._logger.exception("%s could not be executed", run_id)
            message = f"It could not be executed: {type(error).__name__}."
            await propose_state(self.client, Crashed(message=message), flow_run_id=run_id)

    # ---- the local server's only worker -------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Return whether any run is taken or executed; needs a limit."""
        return self.limiter.borrowed_tokens > 0

    async def serve(self, notified: asyncio.Event, ready: Callable[[], None]) -> None:
        """Execute due runs of the flows' deployments, as the pool's only worker, until cancelled.

        Args:
            notified: when it is set, the worker polls at once, and ends cancelled runs.
            ready: called once the worker polls.
        """
        from prefect_rollout.runs.prefect_errors import PREFECT_ERRORS

        async with self:
            await self.end_cancelled()
            ready()
            synced_at = time.monotonic()
            while True:
                asked = notified.is_set()
                notified.clear()
                try:
                    await self.get_and_submit_flow_runs()
                    if asked:
                        await self.end_cancelled()
                    if time.monotonic() - synced_at > _SYNC_SECONDS:
                        synced_at = time.monotonic()
                        await self.sync_with_backend()
                        await self.end_cancelled()
                except PREFECT_ERRORS as error:
                    self._logger.warning("Prefect could not be asked what is due: %s", one_line(repr(error)))
                try:
                    async with asyncio.timeout(_POLL_SECONDS):
                        await notified.wait()
                except TimeoutError:
                    continue

    async def end_cancelled(self) -> None:
        """End the runs of the pool that were cancelled while no process executed them."""
        from prefect.client.schemas.filters import FlowRunFilter, WorkPoolFilter

        from prefect_rollout.runs.flow_runs import PROCESS
        from prefect_rollout.runs.processes import has_ended, this_process

        cancelling = {"state": {"type": {"any_": ["CANCELLING"]}}}
        for run in await self.client.read_flow_runs(
            flow_run_filter=FlowRunFilter.model_validate(cancelling),
            work_pool_filter=WorkPoolFilter.model_validate({"name": {"any_": [self.work_pool.name]}}),
        ):
            elsewhere = run.labels.get(PROCESS, this_process()) != this_process() and not has_ended(run)
            if run.id not in self._executing and not elsewhere:
                await _end_if_cancelling(self.client, run.id)


@asynccontextmanager
async def _heartbeats(client: PrefectClient, run_id: UUID) -> AsyncIterator[None]:
    """Send heartbeats of a run that waits to begin, within the context."""
    from prefect.logging import get_logger

    from prefect_rollout.runs import heartbeat
    from prefect_rollout.runs.prefect_errors import PREFECT_ERRORS

    async def send() -> None:
        while True:
            try:
                await heartbeat.send(client, [run_id])
            except PREFECT_ERRORS as error:
                get_logger(__name__).warning(
                    "No heartbeat of %s was accepted: %s", run_id, one_line(repr(error))
                )
            await asyncio.sleep(rollout_settings().heartbeat_seconds)

    sending = asyncio.create_task(send())
    try:
        yield
    finally:
        sending.cancel()
        await asyncio.wait([sending])


async def _end_if_cancelling(client: PrefectClient, run_id: UUID) -> None:
    """End a run that was cancelled before its flow began: Prefect does not start such a run."""
    from prefect.client.schemas.objects import State
    from prefect.states import Cancelled

    run = await client.read_flow_run(run_id)
    if run.state is not None and run.state.is_cancelling():
        nothing = "nothing more was written" if run.run_count else "nothing was written"
        state: State[None] = Cancelled(message=f"cancelled in Prefect before it began: {nothing}")
        await client.set_flow_run_state(run_id, state)
