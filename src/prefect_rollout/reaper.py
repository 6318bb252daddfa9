"""Killed releases are found: the automation that marks them Crashed, so that they can be retried.

Prefect leaves a run whose process was killed in `Running` for ever. A release tells every
`heartbeat_seconds` that it lives; this automation of the Prefect server ends a run that has not for
four and a half such spans. Prefect's own heartbeat would not do: by default it comes every 180 s.
"""

import asyncio
from collections.abc import Callable, Collection, Iterable
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import httpx
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.filters import (
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.client.schemas.responses import SetStateStatus
from prefect.client.schemas.sorting import FlowRunSort
from prefect.events.actions import ChangeFlowRunState
from prefect.events.filters import EventFilter, EventNameFilter, EventOccurredFilter, EventResourceFilter
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.events.schemas.events import Event, Resource, ResourceSpecification
from prefect.exceptions import ObjectNotFound
from prefect.states import Crashed

from prefect_rollout.flow_runs import pages
from prefect_rollout.models import Action
from prefect_rollout.settings import liveness

HEARTBEAT = "prefect-rollout.heartbeat"
"""The event of a release that lives."""

NAME = "prefect-rollout: releases that were killed"

FLOWS = (
    "deploy-batch",
    "deploy-latest-image",
    *(action.value for action in Action if action is not Action.DEPLOY),
)
"""The names of the flows that beat."""

_FLOWS_OF_OURS = FlowFilter(name=FlowFilterName(any_=list(FLOWS)))

_GO_ON = (
    "What it published stays, and the cloud continues with it; roll back to undo it. "
    "Retry the run and it continues where it stopped: with `prefect-rollout retry` and its id, or with Retry "
    "in the UI where it is a deployment's."
)

_SILENT = "No sign of life for"
_KILLED = "The release's process was killed or cut off."

# A heartbeat that is late by this many beats and a half is the last one.
_BEATS = 4.5

_BEAT_SECONDS = 15.0  # for which one heartbeat is tried

# How long Prefect's server keeps a wait that ended while it was down itself. What it dropped, `sweep` finds.
_BUFFER = timedelta(seconds=60)

# Label of a killed run: the state that somebody was offered to go on from.
_OFFERED = "rollout.offered"

_ensured: dict[str, float] = {}


def automation(
    name: str = NAME, *, within_seconds: float, runs: str = "prefect.flow-run.*"
) -> AutomationCore:
    """The automation.

    Args:
        name: its name in the Prefect UI.
        within_seconds: how long a run may be silent; at least 10.
        runs: the resource id of the runs that it looks after.
    """
    return AutomationCore(
        name=name,
        description=(
            "Marks a release Crashed when its process has been silent: killed, or cut off. "
            f"{_GO_ON} Created by prefect-rollout."
        ),
        trigger=EventTrigger(
            match=ResourceSpecification({"prefect.resource.id": runs}),
            after={HEARTBEAT},
            # Any change of state ends the wait, and the next heartbeat starts it anew. A heartbeat that
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
                    f"{_SILENT} {within_seconds:.0f} s: the release's process was killed or cut off. {_GO_ON}"
                ),
            )
        ],
    )


async def ensure(client: PrefectClient) -> float:
    """Creates the automation where the server has none, and sweeps; once a process and server.

    One that was switched off stays so.

    Returns:
        Seconds between heartbeats: as set, or fewer where the automation waits for less.
    """
    server = str(client.api_url)
    if server not in _ensured:
        wanted = max(10, liveness().heartbeat_seconds * _BEATS)
        if not (found := await client.read_automations_by_name(NAME)):
            created = await client.create_automation(automation(within_seconds=wanted))
            # Two releases that start at once both find none: the elder automation stays.
            found = sorted(await client.read_automations_by_name(NAME), key=lambda each: str(each.id))
            if found and found[0].id != created:
                await client.delete_automation(created)
        await sweep(client)
        within = [
            each.trigger.within.total_seconds() for each in found if isinstance(each.trigger, EventTrigger)
        ]
        _ensured[server] = min([wanted, *within]) / _BEATS
    return min(liveness().heartbeat_seconds, _ensured[server])


async def beat(client: PrefectClient, run_ids: Iterable[UUID]) -> None:
    """Tells that the runs live. It has arrived when this returns: a process may be killed at any time."""
    await _beat(client, [f"prefect.flow-run.{run_id}" for run_id in run_ids])


async def _beat(client: PrefectClient, resources: Iterable[str]) -> None:
    events = [
        Event(event=HEARTBEAT, resource=Resource({"prefect.resource.id": resource})) for resource in resources
    ]
    try:
        # Prefect's client tries again for minutes, ever more seldom, though the API be back by then.
        async with asyncio.timeout(_BEAT_SECONDS):
            await client.request("POST", "/events", json=[event.model_dump(mode="json") for event in events])
    except TimeoutError as error:
        raise httpx.TimeoutException(f"no heartbeat was taken for {_BEAT_SECONDS:.0f} s") from error


def ours(run: FlowRun) -> bool:
    """Whether the parameters are those of a flow of `FLOWS`: another program's may have one of the names."""
    return "plan" in run.parameters or {"app_id", "deployment"} <= set(run.parameters)


def given_up(state: State[Any] | None) -> bool:
    """Whether a run is Crashed because no heartbeat of it was seen in time, and for no other reason."""
    message = str(state and state.message)
    return state is not None and state.is_crashed() and message.startswith((_SILENT, _KILLED))


class Lookout:
    """Looks for killed releases again and again, beside releases that run in the same process.

    A heartbeat that nobody has recorded is no sign of death: the server's background services may be down.
    So each look leaves a heartbeat of its own, and counts only where that of the look before is on record.

    Args:
        client: of the server.
        pool: a work pool whose workers beat for what they have taken, too, before it begins.
    """

    def __init__(self, client: PrefectClient, pool: str) -> None:
        self._client = client
        self._pool = pool
        self._resource = f"prefect-rollout.lookout.{uuid4()}"
        self._left: datetime | None = None

    async def look(self, spared: Collection[UUID]) -> list[FlowRun]:
        """Sweeps, and returns what was found; but for the runs that are known to live.

        Raises:
            httpx.HTTPError, PrefectException, ValueError: the Prefect API did not answer, or not so.
        """
        known = self._left is not None and await _heard(self._client, self._resource, self._left)
        self._left = datetime.now(UTC)
        await _beat(self._client, [self._resource])
        return await sweep(self._client, spared=spared, pool=self._pool) if known else []


async def sweep(
    client: PrefectClient,
    gone: Callable[[FlowRun], bool] = lambda _run: False,
    spared: Collection[UUID] = (),
    pool: str | None = None,
) -> list[FlowRun]:
    """Marks the releases Crashed that the automation cannot find, and returns them.

    Those are the ones that were killed before their first heartbeat, or whose wait ended while no
    Prefect server ran.

    Args:
        client: of the server to sweep.
        gone: whether the process of a run is known to have ended, so that there is no need to wait.
        spared: runs that are known to live.
        pool: a work pool; its runs that a worker has taken and not begun are looked for, too.
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
    running = FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=begun_or_taken)))
    found = [
        run
        async for page in pages(client, running, FlowRunSort.ID_DESC, _FLOWS_OF_OURS)
        for run in page
        if ours(run)
        and run.id not in spared
        and (run.state_type is StateType.RUNNING or run.work_pool_name == pool)
    ]
    return [
        run for run in found if (gone(run) or await _silent(client, run, since)) and await _end(client, run)
    ]


async def to_offer(client: PrefectClient) -> list[FlowRun]:
    """Return the killed releases that nobody was offered to go on with yet; they count as offered then.

    The releases of a batch are left out: the batch continues them.
    """
    crashed = FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.CRASHED])))
    found = [
        run
        async for page in pages(client, crashed, FlowRunSort.ID_DESC, _FLOWS_OF_OURS)
        for run in page
        if ours(run)
        and given_up(run.state)
        and run.parent_task_run_id is None
        and run.labels.get(_OFFERED) != str(run.state_id)
    ]
    for run in found:
        await client.update_flow_run_labels(run.id, {_OFFERED: str(run.state_id)})
    return found


async def _silent(client: PrefectClient, run: FlowRun, since: datetime) -> bool:
    if run.state is None or run.state.timestamp > since:
        return False
    return not await _heard(client, f"prefect.flow-run.{run.id}", since)


async def _heard(client: PrefectClient, resource: str, since: datetime) -> bool:
    beats = await client.read_events(
        EventFilter(
            event=EventNameFilter(name=[HEARTBEAT]),
            resource=EventResourceFilter(id=[resource]),
            occurred=EventOccurredFilter(since=since),
        ),
        limit=1,
    )
    return bool(beats.events)


async def _end(client: PrefectClient, run: FlowRun) -> bool:
    """Marks the run Crashed where nobody has ended it or begun it again since it was read."""
    try:
        now = await client.read_flow_run(run.id)
        if now.state is None or run.state is None or now.state.id != run.state.id:
            return False
        state: State[None] = Crashed(message=f"{_KILLED} {_GO_ON}")
        answer = await client.set_flow_run_state(run.id, state)
    except ObjectNotFound:  # somebody deleted it
        return False
    return answer.status is SetStateStatus.ACCEPT
