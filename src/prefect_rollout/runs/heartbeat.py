"""Heartbeats of the guarded flow runs, and the loop that sends them and reads the runs' states.

All runs of an event loop share one request per tick and one message of heartbeats.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import ClassVar, Protocol, Self
from uuid import UUID
from weakref import WeakKeyDictionary

import httpx
from prefect import get_client
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import FlowRun
from prefect.events.schemas.events import Event, Resource
from prefect.exceptions import PrefectException
from prefect.logging import get_run_logger

from prefect_rollout.runs.flow_runs import by_id
from prefect_rollout.runs.prefect_errors import PREFECT_ERRORS

HEARTBEAT = "prefect-rollout.heartbeat"
"""Name of the event of a flow run that is alive."""

_SEND_SECONDS = 15.0  # for one heartbeat
_TICK_SECONDS = 3.0  # a cancel has to be noticed well within 10 s
_CONCURRENT_CHECKS = 8
_GATHER_SECONDS = 0.1  # in which the runs of a process that ask for their state join one request


async def send(client: PrefectClient, run_ids: Iterable[UUID]) -> None:
    """Send a heartbeat of each run, and return once it has arrived: a process may be killed at any time."""
    await send_for(client, [f"prefect.flow-run.{run_id}" for run_id in run_ids])


async def send_for(client: PrefectClient, resources: Iterable[str]) -> None:
    """Send a heartbeat of each resource.

    Raises:
        httpx.HTTPError, PrefectException, ValueError: the Prefect API did not accept it in time.
    """
    events = [
        Event(event=HEARTBEAT, resource=Resource({"prefect.resource.id": resource})) for resource in resources
    ]
    try:
        # Prefect's client retries for minutes with growing delays, even after the API has recovered.
        async with asyncio.timeout(_SEND_SECONDS):
            await client.request("POST", "/events", json=[event.model_dump(mode="json") for event in events])
    except TimeoutError as error:
        raise httpx.TimeoutException(f"no heartbeat was accepted for {_SEND_SECONDS:.0f} s") from error


class Monitored(Protocol):
    """A flow run that a `Monitor` watches: a `Guard`, which has the meaning of the attributes."""

    run_id: UUID
    silent: bool
    last_heartbeat: float

    async def check(self, run: FlowRun | None, read_at: float) -> None:
        """Act on the run's state, if it could be read; `read_at` is the request's `time.monotonic`."""

    def warn(self, error: Exception) -> None:
        """Log that the run cannot be monitored now."""


class _Reading:
    """A request for flow runs, which others join until it is sent."""

    def __init__(self) -> None:
        self.ids: set[UUID] = set()
        self.found: dict[UUID, FlowRun] | None = None


class Monitor:
    """Monitor of all guarded runs of an event loop. `of_this_loop` returns it."""

    _of: ClassVar[WeakKeyDictionary[asyncio.AbstractEventLoop, Self]] = WeakKeyDictionary()

    def __init__(self) -> None:
        self.sending = asyncio.Lock()
        """Held while heartbeats are sent."""
        self._intervals: dict[Monitored, float] = {}
        self._task: asyncio.Task[None] | None = None
        self._next = _Reading()
        self._one_reading = asyncio.Lock()

    @classmethod
    def of_this_loop(cls) -> Self:
        """Return the monitor of the running event loop."""
        return cls._of.setdefault(asyncio.get_running_loop(), cls())

    def __len__(self) -> int:
        return len(self._intervals)

    async def read(self, client: PrefectClient, run_id: UUID) -> FlowRun:
        """Return a run as it is after the call. Runs that are asked for at the same time share a request.

        Raises:
            httpx.HTTPError, PrefectException, ValueError: the Prefect API did not answer, or has no such run.
        """
        while True:
            reading = self._next
            reading.ids.add(run_id)
            if len(self) > 1:
                await asyncio.sleep(_GATHER_SECONDS)
            async with self._one_reading:
                if reading is self._next:
                    self._next = _Reading()
                    reading.found = await by_id(client, list(reading.ids))
            if reading.found is not None:  # else the one that sent the request has failed
                break
        if run_id not in reading.found:
            raise PrefectException("the flow run was deleted")
        return reading.found[run_id]

    @asynccontextmanager
    async def monitoring(self, run: Monitored, interval: float) -> AsyncIterator[None]:
        """Send heartbeats of the run every `interval` seconds within the context, and check its state."""
        self._intervals[run] = interval
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._monitor())
        try:
            yield
        finally:
            del self._intervals[run]
            if not self._intervals and (task := self._task) is not None:
                self._task = None
                task.cancel()
                await asyncio.wait([task])
                if not task.cancelled() and (error := task.exception()):
                    get_run_logger().error("Monitoring of the run stopped before its end", exc_info=error)

    async def _monitor(self) -> None:
        # Two tasks: a renewal that hangs must not delay the heartbeats.
        async with get_client() as client, asyncio.TaskGroup() as both:
            both.create_task(self._send_heartbeats(client))
            both.create_task(self._check_runs(client))

    async def _send_heartbeats(self, client: PrefectClient) -> None:
        while True:
            await self._send_due(client)
            await asyncio.sleep(self._tick)

    async def _send_due(self, client: PrefectClient) -> None:
        now = time.monotonic()
        async with self.sending:
            due = [
                run
                for run, interval in self._intervals.items()
                if now - run.last_heartbeat >= interval and not run.silent
            ]
            if not due:
                return
            try:
                await send(client, [run.run_id for run in due])
                for run in due:
                    run.last_heartbeat = now
            except PREFECT_ERRORS as error:
                due[0].warn(error)

    async def _check_runs(self, client: PrefectClient) -> None:
        limit = asyncio.Semaphore(_CONCURRENT_CHECKS)
        while True:
            await asyncio.sleep(self._tick)
            monitored = list(self._intervals)
            read: dict[UUID, FlowRun] = {}
            read_at = time.monotonic()
            try:
                read = await by_id(client, [run.run_id for run in monitored])
            except Exception as error:  # noqa: BLE001 - logged; monitoring must not stop
                for run in monitored:
                    run.warn(error)
            checks = (self._check(run, read.get(run.run_id), read_at, limit) for run in monitored)
            await asyncio.gather(*checks)

    async def _check(
        self, monitored: Monitored, run: FlowRun | None, read_at: float, limit: asyncio.Semaphore
    ) -> None:
        async with limit:
            if monitored in self._intervals:
                await monitored.check(run, read_at)

    @property
    def _tick(self) -> float:
        return min([_TICK_SECONDS, *self._intervals.values()])
