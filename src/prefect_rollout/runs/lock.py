"""Lock that allows one release at a time per cluster of a deployment: a Prefect concurrency limit of 1."""

import asyncio
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from uuid import UUID

import httpx
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterTags
from prefect.client.schemas.objects import TERMINAL_STATES, ConcurrencyLeaseHolder, FlowRun, StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.exceptions import ObjectAlreadyExists, PrefectHTTPStatusError
from prefect.logging import get_run_logger
from prefect.types.names import BANNED_CHARACTERS

from prefect_rollout.errors import ConfigurationError, LockedError
from prefect_rollout.release.progress import Progress, tell
from prefect_rollout.runs.flow_runs import HOST, LEASE, LOCKED_AT, LOCKS, PAGE, in_states
from prefect_rollout.runs.heartbeat import Monitor
from prefect_rollout.runs.prefect_errors import PREFECT_ERRORS, describe
from prefect_rollout.runs.processes import this_host
from prefect_rollout.runs.throttle import slot_released
from prefect_rollout.text import one_line

LEASE_SECONDS = 60.0
"""Seconds that a lock outlives its holder: the shortest lease that Prefect's API grants.

In a process that runs dozens of releases it is longer, up to 300 s.
"""

_LONGEST_LEASE_SECONDS = 300.0
_RUNS_PER_LEASE = 25  # guarded runs per `LEASE_SECONDS` of a lease: a busy API renews late
_RENEWALS = 4  # per lease
_RETRY_SECONDS = 2.0


def lock_name(platform: str, app_id: object, deployment: str, cluster: str) -> str:
    """Return the name of the concurrency limit of a deployment's cluster."""
    name = one_line(f"release:{platform}:{app_id}:{deployment}:{cluster}", 1000)
    return "".join("_" if char in BANNED_CHARACTERS else char for char in name)


def lease_seconds() -> float:
    """Return the length of a lease that is acquired or renewed now."""
    longer = LEASE_SECONDS * max(1, len(Monitor.of_this_loop()) // _RUNS_PER_LEASE)
    return min(_LONGEST_LEASE_SECONDS, longer)


class Lock:
    """The locks of all clusters that a flow run writes to: one lease for all of them."""

    def __init__(self, client: PrefectClient, run: FlowRun) -> None:
        self._client = client
        self._run_id = run.id
        self._retried = run.run_count > 1
        self._lease: UUID | None = None
        self._renew_at = 0.0

    async def acquire(
        self, names: Sequence[str], tags: Sequence[str], labels: Mapping[str, str], wait_seconds: float
    ) -> bool:
        """Acquire all the locks, or none; see `Guard.lock`."""
        names = sorted(set(names))
        if self._retried and (stale := (await self._client.read_flow_run(self._run_id)).labels.get(LEASE)):
            # An earlier process of this run held it. If that process is still alive, it finds the lease
            # released at its next safe point, and stops.
            await self._client.release_concurrency_slots_with_lease(UUID(str(stale)))
        until = time.monotonic() + wait_seconds
        logged = ""
        while (lease := await self._request_lease(names)) is None:
            holders = await self._holders(names, tags)
            if await self._release_leases_of_ended(holders):
                continue
            described = _describe_holders(holders)
            if time.monotonic() >= until:
                raise LockedError.held(names, described, wait_seconds)
            if logged != (logged := described):
                other = f"another release of the deployment: {described}"
                detail = f"waiting for {other if described else 'its lock'}"
                tell(Progress("parse metadata", "running", detail, aloud=True))
                get_run_logger().info("%s", detail)
            async with slot_released():
                await asyncio.sleep(min(_RETRY_SECONDS, max(0.05, until - time.monotonic())))
        try:
            await self._client.update_flow_run_labels(
                self._run_id,
                {
                    **labels,
                    LEASE: str(lease),
                    LOCKS: "\n".join(names),
                    LOCKED_AT: datetime.now(UTC).isoformat(timespec="seconds"),
                    HOST: this_host(),
                },
            )
        except BaseException:
            await self._client.release_concurrency_slots_with_lease(lease)
            raise
        # Set after the label: a lease that differs from the label would look like a takeover.
        self._lease = lease
        return bool(logged)

    def taken_over(self, run: FlowRun) -> bool:
        """Return whether another process of the run has replaced this lease, by the run's label."""
        return self._lease is not None and run.labels.get(LEASE) != str(self._lease)

    async def renew(self) -> None:
        """Renew the lease, if there is one.

        Raises:
            PrefectHTTPStatusError: with status 410 if the lease has expired or was released.
        """
        if self._lease is not None:
            seconds, now = lease_seconds(), time.monotonic()
            await self._client.renew_concurrency_lease(self._lease, seconds)
            # From the length of this lease: a longer next one must not delay its renewal.
            self._renew_at = now + seconds / _RENEWALS

    async def renew_if_due(self) -> None:
        """Renew the lease once a quarter of its time has passed."""
        if time.monotonic() >= self._renew_at:
            await self.renew()

    async def release(self) -> None:
        """Release the locks, if they are held."""
        if self._lease is None:
            return
        lease, self._lease = self._lease, None
        try:
            await self._client.release_concurrency_slots_with_lease(lease)
        except PREFECT_ERRORS as error:
            get_run_logger().warning("The lock expires by itself within a minute: %s", describe(error))

    async def _request_lease(self, names: Sequence[str], created: Collection[str] = ()) -> UUID | None:
        """Return a lease of all the names; `None` if another run holds one of them."""
        seconds, now = lease_seconds(), time.monotonic()
        try:
            answer = await self._client.increment_concurrency_slots_with_lease(
                names=list(names),
                slots=1,
                mode="concurrency",
                lease_duration=seconds,
                holder=ConcurrencyLeaseHolder(type="flow_run", id=self._run_id),
            )
        except PrefectHTTPStatusError as error:
            if error.response.status_code == httpx.codes.LOCKED:
                return None
            if error.response.status_code == httpx.codes.UNPROCESSABLE_ENTITY:
                raise _misconfigured(names) from error
            raise
        granted = answer.json()
        lease = UUID(granted["lease_id"])
        missing = set(names) - {limit["name"] for limit in granted["limits"]}
        if not missing:
            try:
                await self._check_limits([name for name in names if name not in created])
            except BaseException:
                await self._client.release_concurrency_slots_with_lease(lease)
                raise
            self._renew_at = now + seconds / _RENEWALS
            return lease
        # Prefect grants a limit that does not exist to everyone: a lease without it locks nothing.
        if granted["limits"]:
            await self._client.release_concurrency_slots_with_lease(lease)
        created = []
        for name in sorted(missing):
            with suppress(ObjectAlreadyExists):  # another release was faster
                await self._client.create_global_concurrency_limit(
                    GlobalConcurrencyLimitCreate(name=name, limit=1)
                )
                created.append(name)
        return await self._request_lease(names, created)

    async def _check_limits(self, names: Sequence[str]) -> None:
        """Raise an error if a limit admits more than one run: anybody can change it in the Prefect UI."""
        for name in names:
            limit = await self._client.read_global_concurrency_limit_by_name(name)
            if not limit.active or limit.limit != 1 or limit.active_slots > 1:
                raise _misconfigured([name])

    async def _holders(self, names: Sequence[str], tags: Sequence[str]) -> list[FlowRun]:
        """Return the runs that may hold any of the locks."""
        runs = await self._client.read_flow_runs(
            flow_run_filter=FlowRunFilter(
                tags=FlowRunFilterTags(all_=list(tags)),
                state=in_states(StateType.RUNNING, StateType.CANCELLING, StateType.CRASHED),
            ),
            sort=FlowRunSort.START_TIME_DESC,
            limit=PAGE,
        )
        return [
            run
            for run in runs
            if run.id != self._run_id
            and set(names) & set(str(run.labels.get(LOCKS, "")).split("\n"))
            and run.labels.get(LEASE)
        ]

    async def _release_leases_of_ended(self, holders: Sequence[FlowRun]) -> bool:
        """Release the leases of the runs that have ended; return whether there was any."""
        released = False
        for run in holders:
            if run.state is not None and run.state.type in TERMINAL_STATES:
                await self._client.release_concurrency_slots_with_lease(UUID(str(run.labels[LEASE])))
                await self._client.update_flow_run_labels(run.id, {LEASE: ""})
                released = True
        return released


def _describe_holders(holders: Sequence[FlowRun]) -> str:
    active = [run for run in holders if run.state is not None and run.state.type not in TERMINAL_STATES]
    return ", ".join(
        f"{one_line(run.name, 80)} (flow run {run.id}) since {one_line(run.labels.get(LOCKED_AT), 40)}"
        for run in active
    )


def _misconfigured(names: Sequence[str]) -> ConfigurationError:
    listed = ", ".join(repr(name) for name in names)
    return ConfigurationError(
        f"the concurrency limit {listed} does not admit exactly one release at a time",
        advice="Set it to active with a limit of 1 and no slot taken (`prefect gcl update`), or delete it.",
    )
