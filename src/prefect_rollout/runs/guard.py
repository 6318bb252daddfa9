"""Guard of a running flow run: it may write only while it holds its locks and nobody has stopped it.

`Guard.safe_point` checks both with the Prefect API right before each write. Therefore a process that lost its
lock, or was marked Crashed and replaced, never writes while its successor runs.
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Collection, Coroutine, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from contextvars import ContextVar
from enum import Enum
from typing import Any, TypeVar
from uuid import UUID

import httpx
from prefect import get_client
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.exceptions import PrefectHTTPStatusError
from prefect.logging import get_run_logger
from prefect.settings import PREFECT_API_URL
from prefect.states import Running

from prefect_rollout.blocks import sharing_blocks
from prefect_rollout.errors import ConfigurationError, LockLostError, RolloutError
from prefect_rollout.runs import heartbeat, zombies
from prefect_rollout.runs.flow_runs import HOST, PROCESS, this_run
from prefect_rollout.runs.lock import Lock
from prefect_rollout.runs.prefect_errors import PREFECT_ERRORS, describe, translate_errors
from prefect_rollout.runs.processes import check_result_storage, this_host, this_process
from prefect_rollout.text import one_line

# Seconds to wait, after a cancel, for the answer to a write that was already sent.
_ANSWER_SECONDS = 5.0

SHUTDOWN = "its process was shut down"
"""Reason to stop a run that nobody cancelled."""

stopped: deque[RolloutError] = deque(maxlen=1)
"""Errors of the runs that were stopped, for a command whose event loop ends with them."""

T = TypeVar("T")


class Ownership(Enum):
    """Owner of a flow run when this process ends its work on it."""

    OURS = "ours"
    CANCELLING = "cancelling"
    """This process, but the run was cancelled, perhaps too late: it can end only as Cancelled."""
    TAKEN_OVER = "taken over"
    """Another process, because this one was marked dead."""


class Guard:
    """Guard of one flow run, created by `guarding`.

    Attributes:
        run: the flow run when this process began it, with the tags that it has got since.
        run_id: id of the flow run.
        client: client of the Prefect API.
        cancelled: reason why the run was asked to stop, or `None`.
        process_ends: the run was asked to stop because its process ends; another process can continue it.
        decided: a step has decided how the run ends; a later cancel does not change that.
        accepted: number of writes of this process that were accepted.
        unanswered: a write was sent and the run stopped before its answer arrived.
        silent: no heartbeats are sent: the process ends and the run stays paused.
        last_heartbeat: time of the last heartbeat, by `time.monotonic`.
    """

    def __init__(self, client: PrefectClient, run: FlowRun) -> None:
        self.run = run
        self.run_id = run.id
        self.client = client
        self.cancelled: str | None = None
        self.process_ends = False
        self.decided = False
        self.accepted = 0
        self.unanswered = False
        self.silent = False
        self.last_heartbeat = 0.0
        self._run_count = run.run_count
        self._lock = Lock(client, run)
        self._valid_from = 0.0  # anything read before this is out of date
        self._paused = False
        self._warned = ""
        self._logger = get_run_logger()
        self._task = asyncio.current_task()

    def cancel(self, why: str) -> None:
        """Stop the flow: it gets a `CancelledError` at its next await."""
        if self.cancelled is None and self._task is not None:
            self.cancelled = why
            if not self.decided:
                self._task.cancel(why)

    async def write(self, request: Coroutine[Any, Any, T]) -> T:
        """Send a write at a safe point, and wait for its answer even if the flow is cancelled.

        An aborted request may still take effect later. If it is not answered within some seconds of a cancel,
        the lock is held until its lease expires.

        Raises:
            LockLostError: nothing was sent.
        """
        try:
            await self.safe_point()
        except BaseException:
            request.close()
            raise
        sending = asyncio.ensure_future(request)
        try:
            answer = await asyncio.shield(sending)
        except asyncio.CancelledError:
            await asyncio.wait([sending], timeout=_ANSWER_SECONDS)
            self.unanswered = not sending.done() or sending.cancelled() or bool(sending.exception())
            sending.cancel()
            raise
        self.accepted += 1
        return answer

    async def lock(
        self, names: Sequence[str], tags: Sequence[str], labels: Mapping[str, str], wait_seconds: float
    ) -> bool:
        """Acquire all the locks, or none. Return whether another release held one of them.

        The flow run gets `tags` first, by which other runs find the holder of a lock, and `labels` once it
        holds the locks. With `wait_seconds` 0, it tries once.

        Raises:
            LockedError: another release held a lock all the time; the error has its name and start time.
            ConfigurationError: the Prefect API did not answer, or a limit is misconfigured.
        """
        with translate_errors():
            await self._update(tags)
            waited = await self._lock.acquire(names, tags, labels, wait_seconds)
        self._valid_from = time.monotonic()
        return waited

    async def release(self) -> None:
        """Release the locks, unless a write was sent that was not answered."""
        if not self.unanswered:
            await self._lock.release()

    async def label(self, labels: Mapping[str, str], tags: Collection[str] = ()) -> None:
        """Add labels and tags to the flow run.

        Raises:
            ConfigurationError: the Prefect API did not answer.
        """
        with translate_errors():
            await self._update(tags)
            if labels:
                await self.client.update_flow_run_labels(self.run_id, dict(labels))

    async def rename(self, name: str) -> None:
        """Name the flow run after its release, so that a list of runs is readable."""
        try:
            await self._update(name=name)
        except PREFECT_ERRORS as error:
            self._logger.warning("The run keeps its first name: %s", describe(error))

    async def _update(self, tags: Iterable[str] = (), name: str | None = None) -> None:
        """Give the flow run the name and, besides its own, the tags, unless it has them."""
        every = {*self.run.tags, *tags}
        if every != set(self.run.tags) or name not in {None, self.run.name}:
            await self.client.update_flow_run(self.run_id, name=name, tags=sorted(every))
            self.run.tags, self.run.name = sorted(every), name or self.run.name

    async def ownership(self) -> Ownership:
        """Return who owns the run at its end; `OURS` if that cannot be read."""
        try:
            run = await self._read()
            if not self._replaced(run) and zombies.marked_dead(run.state):
                await self._reclaim()
                return Ownership.OURS
        except PREFECT_ERRORS:
            return Ownership.OURS
        state = run.state.type if run.state else None
        if self._replaced(run) or state in {StateType.SCHEDULED, StateType.PENDING}:
            return Ownership.TAKEN_OVER
        return Ownership.CANCELLING if state is StateType.CANCELLING else Ownership.OURS

    async def _read(self) -> FlowRun:
        return await heartbeat.Monitor.of_this_loop().read(self.client, self.run_id)

    def _replaced(self, run: FlowRun) -> bool:
        """Return whether another process has begun the run since this process did."""
        return run.run_count != self._run_count or self._lock.taken_over(run)

    async def safe_point(self) -> None:
        """Return if a write may be sent now.

        Raises:
            LockLostError: the lock is lost, the run was ended by someone, or the API does not answer.
        """
        if self.cancelled is not None:
            raise asyncio.CancelledError(self.cancelled)
        try:
            await self._check_state(await self._read())
            await self._lock.renew()
        except PREFECT_ERRORS as error:
            if isinstance(error, PrefectHTTPStatusError) and error.response.status_code == httpx.codes.GONE:
                raise LockLostError("this release has lost its lock; nothing more is written") from error
            raise LockLostError(
                f"the Prefect API does not confirm the lock: {describe(error)}",
                retryable=True,
                prefect_api=True,
            ) from error

    async def _check_state(self, run: FlowRun) -> None:
        """Stop the flow if its run's state requires it."""
        # Prefect increments the run count if a paused run is resumed in the same process.
        if not self._paused and self._replaced(run):
            raise LockLostError("another process continues this run; this one writes nothing more")
        state = run.state
        if state is None or state.type is StateType.RUNNING or (self._paused and state.is_paused()):
            return
        if zombies.marked_dead(state):
            await self._reclaim()
            return
        if state.type in {StateType.CANCELLING, StateType.CANCELLED}:
            self.cancel("cancelled in Prefect")
            await asyncio.sleep(0)  # the CancelledError arrives here
            return
        raise LockLostError(
            f"the flow run was set to {one_line(state.name, 40)} while it ran; nothing more is written"
        )

    async def _reclaim(self) -> None:
        """Set a run that was marked dead to Running again: a busy server saw its heartbeats too late.

        If another process has taken it over meanwhile, that process has begun the run again or released its
        lease, and a safe point detects both.
        """
        state: State[None] = Running(message="It was marked Crashed, but its process is alive.")
        await self.client.set_flow_run_state(self.run_id, state, force=True)
        await self._read_run_count()
        self._logger.warning(
            "Prefect saw no heartbeat and marked this run Crashed; it is alive and continues"
        )

    async def _read_run_count(self) -> None:
        """Read the new run count, if this process still owns the run."""
        run = await self._read()
        if run.labels.get(PROCESS) == this_process():
            self._run_count = run.run_count
            self._valid_from = time.monotonic()

    async def send_heartbeat(self) -> None:
        """Send one heartbeat."""
        self.last_heartbeat = time.monotonic()
        try:
            await heartbeat.send(self.client, [self.run_id])
        except PREFECT_ERRORS as error:
            self._logger.warning("The Prefect API accepted no heartbeat: %s", describe(error))

    @asynccontextmanager
    async def pausing(self, *, leaves: bool) -> AsyncIterator[None]:
        """Let the run be paused within the context; nothing may be written in it.

        With `leaves`, the process ends with the pause, and another one continues the run.

        Raises:
            LockLostError: this process may not continue the run after the pause.
        """
        await self.safe_point()
        if leaves:
            # The process that continues the run needs the results of the completed steps.
            await self.client.update_flow_run_labels(self.run_id, {HOST: this_host()})
            # After a heartbeat during the pause, the run would be marked Crashed if no other one followed.
            async with heartbeat.Monitor.of_this_loop().sending:
                self.silent = True
        self._paused = True
        yield
        # Not after an exception: the run is still paused then.
        await self._read_run_count()
        self._paused = self.silent = False
        await self.safe_point()

    async def check(self, run: FlowRun | None, read_at: float) -> None:
        """See `heartbeat.Monitored`. Stop the flow if its run's state requires it; renew the lease if due."""
        if read_at < self._valid_from:
            run = None
        try:
            if run is not None:
                await self._check_state(run)
            await self._lock.renew_if_due()
            if run is not None:
                self._warned = ""
        except Exception as error:  # noqa: BLE001 - logged; monitoring must not stop
            self.warn(error)

    def warn(self, error: Exception) -> None:
        """Log once that the run cannot be monitored; only its next safe point stops it."""
        if self._warned != (kind := type(error).__name__):
            self._warned = kind
            self._logger.warning("The lock cannot be confirmed: %s", one_line(error))


_guard: ContextVar[Guard | None] = ContextVar("guard", default=None)
_running: set[Guard] = set()


@asynccontextmanager
async def guarding(
    labels: Mapping[str, str] | None = None, tags: Collection[str] = ()
) -> AsyncIterator[Guard]:
    """Guard the current flow run within the context, and add labels and tags to it.

    Raises:
        ConfigurationError: no Prefect API is configured; or results cannot be stored, or those of the run's
            earlier attempts cannot be read.
    """
    if not PREFECT_API_URL.value():
        raise ConfigurationError(
            "no Prefect API is configured, and the one that Prefect starts for a single process has no "
            "password, and shares no lock with other releases",
            advice="Set PREFECT_API_URL, or run the flow within "
            "`prefect_rollout.execution.prefect_api.connected()`; nothing was written.",
        )
    run = this_run()
    async with get_client() as client:
        with translate_errors():
            guard = Guard(client, run)
            interval = await zombies.ensure(client)
            # First of all: a run that is killed before its first heartbeat is detected late. Further runs of
            # the process join its next heartbeat.
            if not len(heartbeat.Monitor.of_this_loop()):
                await guard.send_heartbeat()
            wanted = {PROCESS: this_process(), **(labels or {})}
            await guard.label({} if wanted.items() <= run.labels.items() else wanted, tags)
            await check_result_storage(run)
        token = _guard.set(guard)
        try:
            async with heartbeat.Monitor.of_this_loop().monitoring(guard, interval):
                _running.add(guard)
                try:
                    with sharing_blocks():
                        yield guard
                finally:
                    _running.discard(guard)
        finally:
            _guard.reset(token)
            await guard.release()


# ---- the guarded runs of this process ---------------------------------------------------------------


def guarded_runs() -> set[UUID]:
    """Return the ids of the runs that this process guards."""
    return {guard.run_id for guard in _running}


def cancel_all(why: str, only: Collection[UUID] | None = None) -> bool:
    """Cancel the guarded runs of this process, or those of `only`; return whether there was one."""
    guards = [guard for guard in _running if only is None or guard.run_id in only]
    for guard in guards:
        guard.cancel(why)
    return bool(guards)


def shut_down(run_id: UUID) -> bool:
    """Stop a run because its process ends. Return whether it is guarded, and therefore writes a report."""
    guards = [guard for guard in _running if guard.run_id == run_id]
    for guard in guards:
        guard.process_ends = guard.process_ends or guard.cancelled is None
        guard.cancel(SHUTDOWN)
    return bool(guards)


# ---- the guard of the current flow ------------------------------------------------------------------


@asynccontextmanager
async def pausing(*, leaves: bool) -> AsyncIterator[None]:
    """Enter `Guard.pausing` of the current flow."""
    guard = _guard.get()
    if guard is None:
        raise RuntimeError("only a guarded flow can be paused")
    with translate_errors():
        async with guard.pausing(leaves=leaves):
            yield


@asynccontextmanager
async def prefect_client() -> AsyncIterator[PrefectClient]:
    """Yield the client of the current flow, or a new one for a step that is called outside a flow."""
    guard = _guard.get()
    if guard is not None:
        yield guard.client
        return
    async with get_client() as client:
        yield client


async def write(request: Coroutine[Any, Any, T]) -> T:
    """Send a write through `Guard.write` of the current flow, or directly outside a flow."""
    guard = _guard.get()
    return await (request if guard is None else guard.write(request))
