"""A Prefect worker that runs releases inside its own process, as the work pool type `rollout`.

    prefect work-pool create rollout --type rollout
    prefect worker start --pool rollout

Prefect's process worker starts two interpreters for each flow run, which takes seconds and about a hundred
megabytes. Here a release begins at once and costs little. Polling, queues, priorities, limits and
heartbeats are Prefect's own. The environment is the worker's: a pool of this type has no job variables
that matter. A worker that is told to end stops its releases before their next write and marks them
Crashed, so that others can go on with them.
"""

import asyncio
import time
from typing import TYPE_CHECKING, Any

import anyio
import anyio.abc
from prefect.client.schemas.objects import FlowRun
from prefect.workers.base import BaseJobConfiguration, BaseVariables, BaseWorker, BaseWorkerResult

from prefect_rollout.settings import batches
from prefect_rollout.text import one_line
from prefect_rollout.turns import Turns

if TYPE_CHECKING:
    from prefect_rollout import reaper

# How long a release has to come to its end when its worker is told to end.
_END_SECONDS = 20.0

_LOOK_SECONDS = 60.0


class RolloutResult(BaseWorkerResult):
    """What the worker tells Prefect of a run that it has carried out."""


class RolloutWorker(BaseWorker[BaseJobConfiguration, BaseVariables, RolloutResult]):
    """Runs the flows of prefect-rollout in its own process."""

    type = "rollout"
    job_configuration = BaseJobConfiguration
    _display_name = "Rollout"
    _description = "Runs releases inside the worker's own process: they begin at once and cost little."

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._turns = Turns(batches().api_turns)
        self._looked = -_LOOK_SECONDS
        self._lookout: reaper.Lookout | None = None

    async def sync_with_backend(self) -> None:
        """Tells Prefect that the worker lives; and looks for releases that were killed, once a minute.

        Prefect's automations do that as well, but for five minutes after a restart of Redis.
        """
        await super().sync_with_backend()
        if time.monotonic() - self._looked < _LOOK_SECONDS:
            return
        from prefect_rollout import guard, reaper

        self._looked = time.monotonic()
        self._lookout = self._lookout or reaper.Lookout(self.client, self.work_pool.name)
        try:
            await self._lookout.look(spared=guard.watched())
        except guard.NO_ANSWER as error:
            # The worker's releases do not end with it.
            self._logger.warning("Could not look for releases that were killed: %s", one_line(error))

    async def run(
        self,
        flow_run: FlowRun,
        configuration: BaseJobConfiguration,
        task_status: anyio.abc.TaskStatus[Any] | None = None,
    ) -> RolloutResult:
        """Carries the flow run out."""
        # Prefect's server loads this too, as a collection, and needs no flow.
        from prefect_rollout.guard import end_here, this_process
        from prefect_rollout.runner import carry_out

        here = this_process()
        (task_status or anyio.TASK_STATUS_IGNORED).started(here)
        run = await self.client.read_flow_run(flow_run.id)
        # As a task of its own: a worker that ends would not let a release say what it leaves behind, as it
        # cancels whatever its own tasks wait for, again and again.
        running = asyncio.create_task(carry_out(self.client, run, self._turns), name=run.name)
        try:
            await asyncio.shield(running)
        except asyncio.CancelledError:
            if not end_here(run.id):
                running.cancel()
            with anyio.CancelScope(shield=True):
                await asyncio.wait([running], timeout=_END_SECONDS)
            raise
        return RolloutResult(status_code=0, identifier=here)
