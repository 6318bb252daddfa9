"""What a release keeps up in Prefect while it runs: lock, heartbeat, results, an ear for a cancel.

A release may write only while it holds the lock of every cluster that it touches and nobody has asked
it to stop. Both are asked of the API right before each write (`safe_point`), so that a process that
lost its lock, or was given up for dead and replaced, never writes behind its successor's back.
"""

import asyncio
import os
import socket
import time
from collections import deque
from collections.abc import AsyncIterator, Collection, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from contextvars import ContextVar
from datetime import UTC, datetime
from enum import Enum
from typing import Any, ClassVar, Self, TypeVar
from uuid import UUID
from weakref import WeakKeyDictionary

import httpx
from prefect import get_client
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
    FlowRunFilterTags,
)
from prefect.client.schemas.objects import (
    TERMINAL_STATES,
    ConcurrencyLeaseHolder,
    FlowRun,
    State,
    StateType,
)
from prefect.client.schemas.sorting import FlowRunSort
from prefect.exceptions import ObjectAlreadyExists, PrefectException, PrefectHTTPStatusError
from prefect.logging import get_run_logger
from prefect.results import aget_default_result_storage, get_result_store
from prefect.settings import PREFECT_API_URL
from prefect.states import Running
from prefect.types.names import BANNED_CHARACTERS

from prefect_rollout import reaper
from prefect_rollout.errors import UNLISTED, ConfigurationError, LockedError, LockLostError, RolloutError
from prefect_rollout.flow_runs import PAGE, by_id
from prefect_rollout.images import ALLOW
from prefect_rollout.progress import Progress, tell
from prefect_rollout.text import one_line
from prefect_rollout.turns import resting

LEASE_SECONDS = 60.0
"""How long a lock outlives its holder: the shortest lease that Prefect's API grants.

Where one process runs dozens of releases, it is longer, up to 300 s.
"""

_TICK_SECONDS = 3.0  # a cancel has to be noticed well within 10 s
_LONGEST_LEASE_SECONDS = 300.0
_GUARDS_A_LEASE = 25  # with so many more, a lease is as much longer again: a busy API renews late
_RENEWALS = 4  # in the time of a lease
_AT_ONCE = 8  # questions that one keeper has on their way
_ASK_AGAIN_SECONDS = 2.0

# How long a write that is on its way is heard out after a cancel.
_ANSWER_SECONDS = 5.0

ENDS = "its process was told to end"
"""Why a run stops that nobody cancelled."""

stopped: deque[RolloutError] = deque(maxlen=1)
"""Errors of the runs that were stopped, for a command whose event loop ends with them."""

NO_ANSWER = (httpx.HTTPError, PrefectException, ValueError)
"""What Prefect's client raises where its API does not answer, or not as it should."""

T = TypeVar("T")

# Labels of a flow run that holds locks.
_LEASE, _LOCKS, _SINCE, _HOST = "rollout.lease", "rollout.locks", "rollout.locked-at", "rollout.host"
# Label of a flow run that began: the process that runs it, or did.
_PROCESS = "rollout.process"

CLOUD, TARGET = "rollout.cloud", "rollout.target"
"""Labels of a flow run: the address of its cloud, and the block that it reaches it through."""

BATCH_TAG = "batch:"
"""How the tag begins that a batch's releases have: its run's id follows."""

INHERITED = (ALLOW, UNLISTED)
"""Prefixes of the tags that a batch's run passes on to its releases."""

ROLLED_BACK = "rollout.rolled-back"
"""Label of a flow run that began to undo what it had published: it is not gone on with."""


def lock_name(platform: str, app_id: object, deployment: str, cluster: str) -> str:
    """The name of the concurrency limit that admits one release at a time to a deployment's cluster."""
    name = one_line(f"release:{platform}:{app_id}:{deployment}:{cluster}", 1000)
    return "".join("_" if char in BANNED_CHARACTERS else char for char in name)


class Standing(Enum):
    """Whose a run is when this process has done with it."""

    OURS = "ours"
    CANCELLING = "cancelling"
    """It was cancelled, be it too late: Prefect lets it end as Cancelled only."""
    TAKEN_OVER = "taken over"
    """Another process goes on with it, since this one was given up for dead."""


class Guard:
    """Watches over one flow run. `watching` makes one.

    Attributes:
        run_id: the flow run's.
        cancelled: why the run was asked to stop, once it was.
        silent: whether no heartbeat is sent, since the process ends and the run stays paused.
        beaten: when it was last told that the run lives, by `time.monotonic`.
        ends: whether it was asked to stop because its process ends, so that another one can continue it.
        unanswered: whether it was stopped while a write was on its way whose answer nobody heard.
        accepted: how many writes this process sent that were accepted.
        client: of the Prefect API.
        labels: of the flow run, as they were when this process began it.
        decided: a step has decided how the run ends; a cancel that comes later does not change that.
        known_from: what was read of the run before is out of date, by `time.monotonic`.
    """

    def __init__(self, client: PrefectClient, run: FlowRun) -> None:
        self.run_id = run.id
        self.client = client
        self.labels = run.labels
        self.cancelled: str | None = None
        self.ends = False
        self.unanswered = False
        self.accepted = 0
        self._tries = run.run_count
        self._lease: UUID | None = None
        self.beaten = 0.0
        self._renew_at = 0.0
        self._problem = ""
        self._logger = get_run_logger()
        self.silent = False
        self.decided = False
        self.known_from = 0.0
        self._paused = False
        self._task = asyncio.current_task()

    def cancel(self, why: str) -> None:
        """Has the flow stop where it stands: it gets a `CancelledError` at its next await."""
        if self.cancelled is None and self._task is not None:
            self.cancelled = why
            if not self.decided:
                self._task.cancel(why)

    async def write(self, request: Coroutine[Any, Any, T]) -> T:
        """Sends a write, if this is a safe point, and hears its answer out even where the flow is cancelled.

        A request that is broken off on its way may take effect at any time after. What is not answered
        within some seconds of a cancel leaves the lock taken until the lease ends.

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
        self, names: Sequence[str], tags: Iterable[str], labels: Mapping[str, str], wait_seconds: float
    ) -> None:
        """Takes all the locks, or none; `tags` find their holder again.

        Args:
            names: by `lock_name`.
            tags: put on the flow run before it asks, so that others find it by them.
            labels: put on the flow run once it has the locks.
            wait_seconds: how long to wait for another holder; 0 asks once.

        Raises:
            LockedError: another release held them all the while; it is named, and since when.
            ConfigurationError: the Prefect API did not answer.
        """
        with answering():
            await self._lock(names, tags, labels, wait_seconds)

    async def _lock(
        self, names: Sequence[str], tags: Iterable[str], labels: Mapping[str, str], wait_seconds: float
    ) -> None:
        names = sorted(set(names))
        run = await self.client.read_flow_run(self.run_id)
        tags = sorted(set(tags))
        await self.client.update_flow_run(self.run_id, tags=sorted({*run.tags, *tags}))
        if stale := run.labels.get(_LEASE):
            # An earlier process of this very run held it. Should it live after all, its next safe
            # point finds the lease gone and stops.
            await self.client.release_concurrency_slots_with_lease(UUID(str(stale)))
        until = time.monotonic() + wait_seconds
        said = ""
        while (lease := await self._acquire(names)) is None:
            holders = await self._holders(names, tags)
            if await self._free_what_the_dead_hold(holders):
                continue
            who = _told(holders)
            if time.monotonic() >= until:
                raise LockedError.held(names, who, wait_seconds)
            if said != (said := who):
                detail = (
                    f"waiting for another release of the deployment: {who}" if who else "waiting for its lock"
                )
                tell(Progress("parse metadata", "running", detail, aloud=True))
                get_run_logger().info("%s", detail)
            async with resting():
                await asyncio.sleep(min(_ASK_AGAIN_SECONDS, max(0.05, until - time.monotonic())))
        try:
            await self.client.update_flow_run_labels(
                self.run_id,
                {
                    **labels,
                    _LEASE: str(lease),
                    _LOCKS: "\n".join(names),
                    _SINCE: datetime.now(UTC).isoformat(timespec="seconds"),
                    _HOST: _host(),
                },
            )
        except BaseException:
            await self.client.release_concurrency_slots_with_lease(lease)
            raise
        # Only now: a lease that the run does not name yet would look like a successor's.
        self._lease = lease
        self.known_from = time.monotonic()

    async def label(self, labels: Mapping[str, str], tags: Collection[str] = ()) -> None:
        """Labels the flow run, and adds the tags.

        Raises:
            ConfigurationError: the Prefect API did not answer.
        """
        with answering():
            if tags:
                run = await self.client.read_flow_run(self.run_id)
                await self.client.update_flow_run(self.run_id, tags=sorted({*run.tags, *tags}))
            await self.client.update_flow_run_labels(self.run_id, dict(labels))

    async def standing(self) -> Standing:
        """Where the run stands at its end, seen from this process; unknown counts as `ours`."""
        try:
            run = await self.client.read_flow_run(self.run_id)
            if not self._replaced(run) and reaper.given_up(run.state):
                await self._live_on()
                return Standing.OURS
        except NO_ANSWER:
            return Standing.OURS
        state = run.state.type if run.state else None
        if self._replaced(run) or state in {StateType.SCHEDULED, StateType.PENDING}:
            return Standing.TAKEN_OVER
        return Standing.CANCELLING if state is StateType.CANCELLING else Standing.OURS

    def _replaced(self, run: FlowRun) -> bool:
        """Whether the run was begun again since this process began it."""
        return run.run_count != self._tries or (
            self._lease is not None and run.labels.get(_LEASE) != str(self._lease)
        )

    async def safe_point(self) -> None:
        """Returns where a write may be sent now; asks the Prefect API.

        Raises:
            LockLostError: the lock is lost, the run was ended by someone, or the API does not answer.
        """
        if self.cancelled is not None:
            raise asyncio.CancelledError(self.cancelled)
        try:
            await self._mind(await self.client.read_flow_run(self.run_id))
            await self._renew()
        except NO_ANSWER as error:
            if isinstance(error, PrefectHTTPStatusError) and error.response.status_code == httpx.codes.GONE:
                raise LockLostError("this release has lost its lock, and nothing more is written") from error
            raise LockLostError(
                f"the Prefect API does not confirm the lock: {_told_of(error)}",
                retryable=True,
                prefect_api=True,
            ) from error

    async def _renew(self) -> None:
        if self._lease is not None:
            seconds, now = _Keeper.of_this_loop().lease_seconds, time.monotonic()
            await self.client.renew_concurrency_lease(self._lease, seconds)
            # By the length that this lease has: the next may be longer, and this one over before its part.
            self._renew_at = now + seconds / _RENEWALS

    async def _mind(self, run: FlowRun) -> None:
        """Stops the flow where its run's state says so."""
        # Prefect counts a run that is resumed in its process as begun again.
        if not self._paused and self._replaced(run):
            raise LockLostError("another process goes on with this run, and this one writes nothing more")
        state = run.state
        if state is None or state.type is StateType.RUNNING or (self._paused and state.is_paused()):
            return
        if reaper.given_up(state):
            await self._live_on()
            return
        if state.type in {StateType.CANCELLING, StateType.CANCELLED}:
            self.cancel("cancelled in Prefect")
            await asyncio.sleep(0)  # the CancelledError arrives here
            return
        raise LockLostError(
            f"the flow run was set to {one_line(state.name, 40)} while it ran, and nothing more is written"
        )

    async def _live_on(self) -> None:
        """Takes the run back that was given up for dead, as happens where a busy server sees heartbeats late.

        Whoever took it up meanwhile has begun it anew, or freed its lease: a safe point finds either.
        """
        state: State[None] = Running(message="It was given up for dead, and lives.")
        await self.client.set_flow_run_state(self.run_id, state, force=True)
        await self._count_anew()
        self._logger.warning("Prefect saw no heartbeat and marked this run Crashed, but it lives: it goes on")

    async def _count_anew(self) -> None:
        """Learns the count of a run that Prefect counts as begun again, where it is still this process's."""
        run = await self.client.read_flow_run(self.run_id)
        if run.labels.get(_PROCESS) == this_process():
            self._tries = run.run_count
            self.known_from = time.monotonic()

    async def beat(self) -> None:
        """Tells that the run lives."""
        self.beaten = time.monotonic()
        try:
            await reaper.beat(self.client, [self.run_id])
        except NO_ANSWER as error:
            self._logger.warning("The Prefect API took no heartbeat: %s", _told_of(error))

    @asynccontextmanager
    async def pausing(self, *, leaves: bool) -> AsyncIterator[None]:
        """Lets the run be paused within the context; nothing may be written in it.

        Args:
            leaves: the process ends with the pause, and another one goes on with the run.

        Raises:
            LockLostError: when it is over, the run is not this process's to go on with.
        """
        await self.safe_point()
        if leaves:
            # Whoever goes on has to see the results of the steps that were done by now.
            await self.client.update_flow_run_labels(self.run_id, {_HOST: _host()})
            # A heartbeat after the pause would have the run marked Crashed for lack of a next one.
            async with _Keeper.of_this_loop().beating:
                self.silent = True
        self._paused = True
        yield
        # Not where it raises: the run is still paused then.
        await self._count_anew()
        self._paused = self.silent = False
        await self.safe_point()

    async def look_after(self, run: FlowRun | None, asked: float) -> None:
        """Renew the lease, and stop the flow where its run's state says so.

        Args:
            run: as Prefect knows it, if it answered.
            asked: when the question for it was sent, by `time.monotonic`.
        """
        if asked < self.known_from:
            run = None
        try:
            if run is not None:
                await self._mind(run)
            if time.monotonic() >= self._renew_at:
                await self._renew()
            if run is not None:
                self._problem = ""
        except Exception as error:  # noqa: BLE001 - whatever it is, the watch goes on
            self.worry(error)

    def worry(self, error: Exception) -> None:
        """Says once that the run cannot be watched; its next safe point stops it, and not before."""
        if self._problem != (problem := type(error).__name__):
            self._problem = problem
            self._logger.warning("Not sure of the lock any more: %s", one_line(error))

    async def release(self) -> None:
        """Frees the locks, unless a write is on its way that was not answered."""
        if self._lease is None or self.unanswered:
            return
        lease, self._lease = self._lease, None
        try:
            await self.client.release_concurrency_slots_with_lease(lease)
        except NO_ANSWER as error:
            get_run_logger().warning("The lock ends by itself within a minute: %s", _told_of(error))

    async def _acquire(self, names: Sequence[str], made: Collection[str] = ()) -> UUID | None:
        seconds, now = _Keeper.of_this_loop().lease_seconds, time.monotonic()
        try:
            answer = await self.client.increment_concurrency_slots_with_lease(
                names=list(names),
                slots=1,
                mode="concurrency",
                lease_duration=seconds,
                holder=ConcurrencyLeaseHolder(type="flow_run", id=self.run_id),
            )
        except PrefectHTTPStatusError as error:
            if error.response.status_code == httpx.codes.LOCKED:
                return None
            if error.response.status_code == httpx.codes.UNPROCESSABLE_ENTITY:
                raise _spoilt(names) from error
            raise
        granted = answer.json()
        lease = UUID(granted["lease_id"])
        missing = set(names) - {limit["name"] for limit in granted["limits"]}
        if not missing:
            try:
                await self._check_limits([name for name in names if name not in made])
            except BaseException:
                await self.client.release_concurrency_slots_with_lease(lease)
                raise
            self._renew_at = now + seconds / _RENEWALS
            return lease
        # Prefect grants limits that do not exist to everyone: a lease without them guards nothing.
        await self.client.release_concurrency_slots_with_lease(lease)
        made = []
        for name in sorted(missing):
            with suppress(ObjectAlreadyExists):  # another release was quicker
                await self.client.create_global_concurrency_limit(
                    GlobalConcurrencyLimitCreate(name=name, limit=1)
                )
                made.append(name)
        return await self._acquire(names, made)

    async def _check_limits(self, names: Sequence[str]) -> None:
        """Raises where a limit admits more than one, as anybody can set it to in the Prefect UI."""
        for name in names:
            limit = await self.client.read_global_concurrency_limit_by_name(name)
            if not limit.active or limit.limit != 1 or limit.active_slots > 1:
                raise _spoilt([name])

    async def _holders(self, names: Sequence[str], tags: Sequence[str]) -> list[FlowRun]:
        """The runs that took any of the locks last, as far as they still may hold them."""
        runs = await self.client.read_flow_runs(
            flow_run_filter=FlowRunFilter(
                tags=FlowRunFilterTags(all_=[tag for tag in tags if not tag.startswith("cluster:")]),
                state=FlowRunFilterState(
                    type=FlowRunFilterStateType(
                        any_=[StateType.RUNNING, StateType.CANCELLING, StateType.CRASHED]
                    )
                ),
            ),
            sort=FlowRunSort.START_TIME_DESC,
            limit=PAGE,
        )
        return [
            run
            for run in runs
            if run.id != self.run_id
            and set(names) & set(str(run.labels.get(_LOCKS, "")).split("\n"))
            and run.labels.get(_LEASE)
        ]

    async def _free_what_the_dead_hold(self, holders: Sequence[FlowRun]) -> bool:
        """Releases the leases of crashed runs, where any is still held; whether there were any."""
        freed = False
        for run in holders:
            if run.state is not None and run.state.type in TERMINAL_STATES:
                await self.client.release_concurrency_slots_with_lease(UUID(str(run.labels[_LEASE])))
                await self.client.update_flow_run_labels(run.id, {_LEASE: ""})
                freed = True
        return freed


def _told(holders: Sequence[FlowRun]) -> str:
    live = [run for run in holders if run.state is not None and run.state.type not in TERMINAL_STATES]
    return ", ".join(
        f"{one_line(run.name, 80)} (flow run {run.id}) since {one_line(run.labels.get(_SINCE), 40)}"
        for run in live
    )


_guard: ContextVar[Guard | None] = ContextVar("guard", default=None)
_running: set[Guard] = set()


@contextmanager
def answering(*, retryable: bool = False) -> Iterator[None]:
    """Turns what Prefect's client raises into an error of ours, `retryable` or not."""
    try:
        yield
    except NO_ANSWER as error:
        raise ConfigurationError(
            f"the Prefect API did not answer: {_told_of(error)}",
            advice="Check PREFECT_API_URL and that the Prefect server runs.",
            retryable=retryable,
            prefect_api=True,
        ) from error


def _told_of(error: Exception) -> str:
    return f"{type(error).__name__} {one_line(error, 120)}".rstrip()


def _spoilt(names: Sequence[str]) -> ConfigurationError:
    listed = ", ".join(repr(name) for name in names)
    return ConfigurationError(
        f"the concurrency limit {listed} does not admit one release at a time any more",
        advice="Set it to active with a limit of 1 and no slot taken (`prefect gcl update`), or delete it.",
    )


@asynccontextmanager
async def watching(run_id: UUID, labels: Mapping[str, str] | None = None) -> AsyncIterator[Guard]:
    """Guards the flow run while the context lasts; `safe_point` finds the guard.

    Args:
        run_id: the flow run's.
        labels: further labels of the flow run.

    Raises:
        ConfigurationError: no Prefect API is configured; or results cannot be kept, or those of the run's
            earlier tries are out of reach.
    """
    if not PREFECT_API_URL.value():
        raise ConfigurationError(
            "no Prefect API is configured, and the one that Prefect starts for a single process has no "
            "password, and shares no lock with other releases",
            advice="Set PREFECT_API_URL, or run the flow within `prefect_rollout.prefect_api.reached()`; "
            "nothing was written.",
        )
    async with get_client() as client:
        with answering():
            run = await client.read_flow_run(run_id)
            guard = Guard(client, run)
            beat_seconds = await reaper.ensure(client)
            await guard.beat()  # before anything else: a run that never beat is found late when it is killed
            await client.update_flow_run_labels(run_id, {_PROCESS: this_process(), **(labels or {})})
            await _check_results(run)
        token = _guard.set(guard)
        try:
            async with _Keeper.of_this_loop().keeping(guard, beat_seconds):
                yield guard
        finally:
            _guard.reset(token)
            await guard.release()


class _Keeper:
    """Looks after all guarded runs of an event loop: one question a tick, one message of heartbeats."""

    _of: ClassVar[WeakKeyDictionary[asyncio.AbstractEventLoop, Self]] = WeakKeyDictionary()

    def __init__(self) -> None:
        self.beating = asyncio.Lock()
        self._guards: dict[Guard, float] = {}
        self._task: asyncio.Task[None] | None = None

    @classmethod
    def of_this_loop(cls) -> Self:
        return cls._of.setdefault(asyncio.get_running_loop(), cls())

    @asynccontextmanager
    async def keeping(self, guard: Guard, beat_seconds: float) -> AsyncIterator[None]:
        """Renews the lease, tells that the run lives, listens for a cancel, while the context lasts."""
        self._guards[guard] = beat_seconds
        _running.add(guard)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._keep())
        try:
            yield
        finally:
            _running.discard(guard)
            del self._guards[guard]
            if not self._guards and (task := self._task) is not None:
                self._task = None
                task.cancel()
                await asyncio.wait([task])
                if not task.cancelled() and (error := task.exception()):
                    get_run_logger().error("The release was not watched over to its end", exc_info=error)

    async def _keep(self) -> None:
        # Apart from each other: a renewal that hangs must not hold up the heartbeats.
        async with get_client() as client, asyncio.TaskGroup() as both:
            both.create_task(self._beat_on(client))
            both.create_task(self._look_on(client))

    async def _beat_on(self, client: PrefectClient) -> None:
        while True:
            await self._beat(client)
            await asyncio.sleep(self._tick)

    async def _look_on(self, client: PrefectClient) -> None:
        room = asyncio.Semaphore(_AT_ONCE)
        while True:
            guards = list(self._guards)
            runs: dict[UUID, FlowRun] = {}
            asked = time.monotonic()
            try:
                runs = await by_id(client, [guard.run_id for guard in guards])
            except Exception as error:  # noqa: BLE001 - whatever it is, the watch goes on
                for guard in guards:
                    guard.worry(error)
            looks = (self._look_after(guard, runs.get(guard.run_id), asked, room) for guard in guards)
            await asyncio.gather(*looks)
            await asyncio.sleep(self._tick)

    @property
    def _tick(self) -> float:
        return min([_TICK_SECONDS, *self._guards.values()])

    async def _look_after(
        self, guard: Guard, run: FlowRun | None, asked: float, room: asyncio.Semaphore
    ) -> None:
        async with room:
            if guard in self._guards:
                await guard.look_after(run, asked)

    @property
    def lease_seconds(self) -> float:
        """How long a lease is that is taken or renewed now."""
        longer = LEASE_SECONDS * max(1, len(self._guards) // _GUARDS_A_LEASE)
        return min(_LONGEST_LEASE_SECONDS, longer)

    async def _beat(self, client: PrefectClient) -> None:
        now = time.monotonic()
        async with self.beating:
            due = [
                guard
                for guard, seconds in self._guards.items()
                if now - guard.beaten >= seconds and not guard.silent
            ]
            if not due:
                return
            try:
                await reaper.beat(client, [guard.run_id for guard in due])
                for guard in due:
                    guard.beaten = now
            except NO_ANSWER as error:
                due[0].worry(error)


async def _check_results(run: FlowRun) -> None:
    """Proves that the results of the run's steps can be kept, and found again by a retry of it.

    A retry on a machine that does not see the results of the first try would do the steps again, and
    would not know any more what stood before the release.
    """
    storage = get_result_store().result_storage or await aget_default_result_storage()
    key, host = f"prefect-rollout-{run.id}", run.labels.get(_HOST)
    problem = f"results cannot be kept in {storage.get_block_type_slug()}"
    advice = (
        "Keep results where every machine that runs releases finds them: set "
        "PREFECT_DEFAULT_RESULT_STORAGE_BLOCK to a storage block that all share."
    )
    try:
        if (batch := _batch_of(run)) is not None:
            problem = f"the results of the batch that started this run ({batch}) are out of reach here"
            await storage.read_path(f"prefect-rollout-{batch}")
        if host:
            problem = f"what this run did in its earlier try, on {one_line(host, 80)}, is out of reach here"
            advice += " Until then, retry the run on that machine, or start a new release."
            await storage.read_path(key)
        else:
            await storage.write_path(key, content=b"{}")
    except Exception as error:  # whatever a storage block raises, of a file that is not there too
        raise ConfigurationError(
            f"{problem}: {type(error).__name__} {one_line(error, 120)}", advice=advice
        ) from error


def _batch_of(run: FlowRun) -> str | None:
    """The run of the batch that the run is a release of: it has proved its own results by then."""
    if run.parent_task_run_id is None:
        return None
    return next((tag.removeprefix(BATCH_TAG) for tag in run.tags if tag.startswith(BATCH_TAG)), None)


def _host() -> str:
    return one_line(socket.gethostname(), 80)


def this_process(pid: int | None = None) -> str:
    """What a run's label calls this process, or the one of that id on this machine."""
    return f"{_host()} {os.getpid() if pid is None else pid}"


async def claim(client: PrefectClient, run: FlowRun) -> None:
    """Label a run that ran before as this process's, so that `ended_here` does not see its earlier process.

    Call it before the run is Running again.
    """
    if _PROCESS in run.labels:
        await client.update_flow_run_labels(run.id, {_PROCESS: this_process()})


def ended_here(run: FlowRun) -> bool:
    """Whether the run's process ran on this machine and has ended. No, where that is unknown.

    For runs of a local server alone: containers can share a host's name, and not its processes.
    """
    pid = str(run.labels.get(_PROCESS, "")).rpartition(" ")[2]
    # On Windows os.kill would end the process.
    if os.name != "posix" or not pid.isdecimal() or run.labels[_PROCESS] != this_process(int(pid)):
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False


def watched() -> set[UUID]:
    """The runs that this process guards."""
    return {guard.run_id for guard in _running}


def cancel_all(why: str, only: Collection[UUID] | None = None) -> bool:
    """Cancels the guarded flows of this process, or those of `only`; whether there was one."""
    asked = [guard for guard in _running if only is None or guard.run_id in only]
    for guard in asked:
        guard.cancel(why)
    return bool(asked)


def end_here(run_id: UUID) -> bool:
    """Stop a run of this process, which ends; whether it is guarded, and so says what it leaves behind."""
    guarded = [guard for guard in _running if guard.run_id == run_id]
    for guard in guarded:
        guard.ends = guard.ends or guard.cancelled is None
        guard.cancel(ENDS)
    return bool(guarded)


@asynccontextmanager
async def pausing(*, leaves: bool) -> AsyncIterator[None]:
    """`Guard.pausing` of the flow that runs here."""
    guard = _guard.get()
    if guard is None:
        raise RuntimeError("only a flow that is watched over can be paused")
    with answering():
        async with guard.pausing(leaves=leaves):
            yield


@asynccontextmanager
async def api() -> AsyncIterator[PrefectClient]:
    """Yield the client of the flow that runs here; a step that is called by itself opens one."""
    guard = _guard.get()
    if guard is not None:
        yield guard.client
        return
    async with get_client() as client:
        yield client


async def write(request: Coroutine[Any, Any, T]) -> T:
    """`Guard.write` of the flow that runs here; a step that is called by itself has none."""
    guard = _guard.get()
    return await (request if guard is None else guard.write(request))
