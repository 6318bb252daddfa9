"""Detect releases whose process was killed, and mark them Crashed, so that they can be retried.

A run whose process was killed stays `Running` in Prefect forever. A release sends a heartbeat every
`heartbeat_seconds`; an automation of the Prefect server marks a run Crashed after four and a half such
intervals without one. Prefect's own heartbeat would be too slow: by default it comes every 180 s.
"""

from collections.abc import Callable, Collection
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.client.schemas.responses import SetStateStatus
from prefect.events.actions import ChangeFlowRunState
from prefect.events.filters import EventFilter, EventNameFilter, EventOccurredFilter, EventResourceFilter
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification
from prefect.exceptions import ObjectNotFound
from prefect.states import Crashed

from prefect_rollout.runs import heartbeat
from prefect_rollout.runs.flow_runs import OF_RELEASES, all_runs, in_states, is_release
from prefect_rollout.runs.heartbeat import HEARTBEAT
from prefect_rollout.settings import rollout_settings

NAME = "prefect-rollout: releases that were killed"

_CONTINUE = (
    "What it published stays, and the cloud continues with it; roll back to undo it. "
    "Retry the run and it continues where it stopped: with `prefect-rollout retry` and its id, or with Retry "
    "in the UI if it is a run of a Prefect deployment."
)

_SILENT = "No sign of life for"
_KILLED = "The release's process was killed or cut off."

# A run is marked Crashed after this many intervals without a heartbeat.
_MISSED_INTERVALS = 4.5

# Prefect's server drops waits that expired longer ago than this while it was down. `sweep` finds their runs.
_BUFFER = timedelta(seconds=60)

# Label of a killed run: the state in which its continuation was offered to a person.
_OFFERED = "rollout.offered"

_ensured: dict[str, float] = {}


def automation(
    name: str = NAME, *, within_seconds: float, runs: str = "prefect.flow-run.*"
) -> AutomationCore:
    """Return the automation that marks runs, by resource id, Crashed after `within_seconds`, at least 10."""
    return AutomationCore(
        name=name,
        description=(
            "Marks a release Crashed when its process has been silent: killed, or cut off. "
            f"{_CONTINUE} Created by prefect-rollout."
        ),
        trigger=EventTrigger(
            match=ResourceSpecification({"prefect.resource.id": runs}),
            after={HEARTBEAT},
            # Any change of state ends the wait, and the next heartbeat starts another. A heartbeat that
            # arrives after the run's end starts one too: Prefect refuses to crash a run that has ended.
            expect={HEARTBEAT, "prefect.flow-run.*"},
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=within_seconds),
        ),
        actions=[
            ChangeFlowRunState(
                state=StateType.CRASHED,
                message=(
                    f"{_SILENT} {within_seconds:.0f} s: the release's process was killed or cut off. "
                    f"{_CONTINUE}"
                ),
            )
        ],
    )


async def ensure(client: PrefectClient) -> float:
    """Create the automation if the server has none, and sweep; once per process and server.

    An automation that was switched off stays off.

    Returns:
        Seconds between heartbeats: as set, or fewer if the automation waits for less.
    """
    server = str(client.api_url)
    if server not in _ensured:
        wanted = max(10, rollout_settings().heartbeat_seconds * _MISSED_INTERVALS)
        if not (found := await client.read_automations_by_name(NAME)):
            created = await client.create_automation(automation(within_seconds=wanted))
            # Two releases that start at once both find none: the older automation stays.
            found = sorted(await client.read_automations_by_name(NAME), key=lambda each: str(each.id))
            if found and found[0].id != created:
                await client.delete_automation(created)
        await sweep(client)
        within = [
            each.trigger.within.total_seconds() for each in found if isinstance(each.trigger, EventTrigger)
        ]
        _ensured[server] = min([wanted, *within]) / _MISSED_INTERVALS
    return min(rollout_settings().heartbeat_seconds, _ensured[server])


def marked_dead(state: State[Any] | None) -> bool:
    """Return whether a run is Crashed because no heartbeat of it was seen in time."""
    message = str(state and state.message)
    return state is not None and state.is_crashed() and message.startswith((_SILENT, _KILLED))


class ZombieDetector:
    """Periodic detection of killed releases, in a process that also runs releases.

    A missing heartbeat alone proves nothing: the server's background services may be down. So each call
    sends a heartbeat of its own, and the next call counts only if that one was recorded. The workers of
    `pool` also send heartbeats of runs that they have taken and not begun.
    """

    def __init__(self, client: PrefectClient, pool: str) -> None:
        self._client = client
        self._pool = pool
        self._resource = f"prefect-rollout.detector.{uuid4()}"
        self._sent: datetime | None = None

    async def detect(self, alive: Collection[UUID]) -> list[FlowRun]:
        """Sweep, except for the runs that are known to be alive, and return the killed ones.

        Raises:
            httpx.HTTPError, PrefectException, ValueError: the Prefect API did not answer.
        """
        reliable = self._sent is not None and await _heartbeat_since(self._client, self._resource, self._sent)
        self._sent = datetime.now(UTC)
        await heartbeat.send_for(self._client, [self._resource])
        return await sweep(self._client, alive=alive, pool=self._pool) if reliable else []


async def sweep(
    client: PrefectClient,
    ended: Callable[[FlowRun], bool] = lambda _run: False,
    alive: Collection[UUID] = (),
    pool: str | None = None,
) -> list[FlowRun]:
    """Mark killed releases Crashed that the automation cannot find, and return them.

    They were killed before their first heartbeat, or their wait expired while no Prefect server ran.

    Args:
        client: client of the server to sweep.
        ended: returns True if the process of a run is known to have ended: there is no need to wait then.
        alive: runs that are known to be alive.
        pool: a work pool; its runs that a worker has taken and not begun are included.
    """
    windows = [
        each.trigger.within
        for each in await client.read_automations_by_name(NAME)
        if each.enabled and isinstance(each.trigger, EventTrigger)
    ]
    if not windows:
        return []
    since = datetime.now(UTC) - max(windows) - _BUFFER
    begun_or_taken = [StateType.RUNNING, *([StateType.PENDING] if pool else [])]
    found = [
        run
        for run in await _releases_in(client, *begun_or_taken)
        if run.id not in alive and (run.state_type is StateType.RUNNING or run.work_pool_name == pool)
    ]
    return [
        run for run in found if (ended(run) or await _silent(client, run, since)) and await _end(client, run)
    ]


async def to_offer(client: PrefectClient) -> list[FlowRun]:
    """Return the killed releases that were not offered to a person yet, and mark them as offered.

    The releases of a batch are left out: the batch continues them.
    """
    found = [
        run
        for run in await _releases_in(client, StateType.CRASHED)
        if marked_dead(run.state)
        and run.parent_task_run_id is None
        and run.labels.get(_OFFERED) != str(run.state_id)
    ]
    for run in found:
        await client.update_flow_run_labels(run.id, {_OFFERED: str(run.state_id)})
    return found


async def _releases_in(client: PrefectClient, *states: StateType) -> list[FlowRun]:
    found = await all_runs(client, FlowRunFilter(state=in_states(*states)), flows=OF_RELEASES)
    return [run for run in found if is_release(run)]


async def _silent(client: PrefectClient, run: FlowRun, since: datetime) -> bool:
    if run.state is None or run.state.timestamp > since:
        return False
    return not await _heartbeat_since(client, f"prefect.flow-run.{run.id}", since)


async def _heartbeat_since(client: PrefectClient, resource: str, since: datetime) -> bool:
    found = await client.read_events(
        EventFilter(
            event=EventNameFilter(name=[HEARTBEAT]),
            resource=EventResourceFilter(id=[resource]),
            occurred=EventOccurredFilter(since=since),
        ),
        limit=1,
    )
    return bool(found.events)


async def _end(client: PrefectClient, run: FlowRun) -> bool:
    """Mark the run Crashed, unless somebody has ended it or begun it again since it was read."""
    try:
        now = await client.read_flow_run(run.id)
        if now.state is None or run.state is None or now.state.id != run.state.id:
            return False
        state: State[None] = Crashed(message=f"{_KILLED} {_CONTINUE}")
        answer = await client.set_flow_run_state(run.id, state)
    except ObjectNotFound:  # somebody deleted it
        return False
    return answer.status is SetStateStatus.ACCEPT
