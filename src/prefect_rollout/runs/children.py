"""The child flow runs of a batch: one for each release, in this process or on a work pool."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from copy import copy
from typing import Any, Protocol
from uuid import UUID

import httpx
from prefect import Flow, Task, get_run_logger
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.actions import FlowRunCreate
from prefect.client.schemas.filters import FlowFilter, FlowFilterName, FlowRunFilter, FlowRunFilterTags
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.exceptions import ObjectNotFound, PrefectException
from prefect.states import AwaitingRetry, Cancelled, Cancelling, Crashed, Pending, to_state_create

from prefect_rollout.batch.plan import Plan
from prefect_rollout.errors import ConfigurationError, InputError
from prefect_rollout.runs import guard
from prefect_rollout.runs.flow_runs import (
    BATCH_TAG,
    INHERITED,
    PAGE,
    PROCESS,
    ROLLED_BACK,
    all_runs,
    by_id,
    deployment_tags,
)
from prefect_rollout.runs.lifecycle import asked_for
from prefect_rollout.runs.processes import execute, this_process
from prefect_rollout.runs.throttle import Throttle, slot
from prefect_rollout.settings import rollout_settings
from prefect_rollout.text import one_line

_POLL_SECONDS = 2.0

Begun = Callable[[FlowRun], None]

Labels = Mapping[str, Mapping[str, str]]
"""Labels of the runs that have a target, by target."""


class Children(Protocol):
    """The executor of a batch's child runs."""

    known: "ChildRuns"

    async def run(self, name: str, parameters: Mapping[str, Any], begun: Begun) -> State[Any]:
        """Run the child of that name, or continue it where it stopped, and return its final state.

        A retry of the batch finds the child by its name. `begun` is called as soon as its run is known.
        """
        ...

    async def cancel(self, why: str) -> None:
        """Cancel every child that has not ended."""
        ...


class ChildRuns:
    """The child runs of a batch's run by name, including those of its earlier attempts.

    They are of one kind: `release` or `dry-run`.
    """

    def __init__(self, client: PrefectClient, batch: FlowRun, kind: str) -> None:
        self.client = client
        self.batch = batch
        self.kind = kind
        self.runs: dict[str, FlowRun] = {}
        self.attempts: dict[str, int] = {}

    async def find(self) -> None:
        """Look up the children of earlier attempts, and those from before an approval."""
        for run in await children_of(self.client, self.batch.id, self.kind):
            self.add(name_of(run), run)  # the last one is the newest

    def add(self, name: str, run: FlowRun) -> FlowRun:
        """Add a child that was created, and return it."""
        self.runs[name] = run
        self.attempts[name] = self.attempts.get(name, 0) + 1
        return run

    async def now(self, name: str) -> FlowRun | None:
        """Return the current child of that name if it can continue, or `None` if a new one is needed."""
        known = self.runs.get(name)
        if known is None:
            return None
        run = await self.client.read_flow_run(known.id)
        undone = run.state is not None and run.state.is_final() and run.labels.get(ROLLED_BACK)
        return None if undone else run

    async def new(self, name: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """Return the name, parameters and tags of a new child, and its parent, to create it with."""
        plan = "plan " if self.kind == "dry-run" else ""
        return {
            "name": f"{plan}{one_line(name, 120)} → {asked_for(parameters)}",
            "parameters": dict(parameters),
            "tags": self.tags(name, parameters),
            "parent_task_run_id": await self.parent_task(name),
        }

    def tags(self, name: str, parameters: Mapping[str, Any]) -> list[str]:
        """Return the tags that identify a child and its deployment, and those that limit it."""
        of_deployment = deployment_tags(parameters["app_id"], parameters["deployment"])
        inherited = [tag for tag in self.batch.tags if tag.startswith(INHERITED)]
        return [batch_tag(self.batch.id), f"{self.kind}:{name}", *of_deployment, *inherited]

    async def parent_task(self, name: str) -> UUID:
        """Create the task run of the batch that represents the child, as Prefect does for a subflow."""
        task: Task[[], None] = Task(fn=_nothing, name=f"{self.kind} {one_line(name, 120)}")
        key = f"{self.kind}-{name}-{self.attempts.get(name, 0)}"
        run = await self.client.create_task_run(
            task, flow_run_id=self.batch.id, dynamic_key=key, name=task.name, state=Pending()
        )
        return run.id


def _nothing() -> None:
    """Do nothing: the task run represents a child."""


def batch_tag(batch_id: UUID) -> str:
    """Return the tag of a batch's children."""
    return f"{BATCH_TAG}{batch_id}"


def name_of(child: FlowRun) -> str:
    """Return the name of a child's release."""
    return next(tag.partition(":")[2] for tag in child.tags if tag.startswith(("release:", "dry-run:")))


async def children_of(client: PrefectClient, batch_id: UUID, kind: str) -> list[FlowRun]:
    """Return the children of a batch's run, the oldest first."""
    wanted = FlowRunFilter(tags=FlowRunFilterTags(all_=[batch_tag(batch_id)]))
    children = await all_runs(client, wanted)
    ours = [run for run in children if any(tag.startswith(f"{kind}:") for tag in run.tags)]
    return sorted(ours, key=lambda run: (run.created is not None, run.created))


class InProcess:
    """Children that run in this process, on its event loop."""

    def __init__(self, known: ChildRuns, flow: Flow[..., Any], flow_id: UUID, labels: Labels) -> None:
        self.known = known
        self._flow = copy(flow)
        self._flow.flow_run_name = None  # each run has its name from the start
        self._flow_id = flow_id
        self._labels = labels
        self._begun: set[UUID] = set()
        self._throttle = Throttle(rollout_settings().api_turns)

    async def run(self, name: str, parameters: Mapping[str, Any], begun: Begun) -> State[Any]:
        """See `Children`."""
        async with slot(self._throttle):
            run = await self._run_of(name, parameters)
            begun(run)
            if run.state is not None and run.state.is_completed():
                return run.state
            self._begun.add(run.id)
            try:
                return await execute(self.known.client, self._flow, run)
            finally:
                self._begun.discard(run.id)

    async def _run_of(self, name: str, parameters: Mapping[str, Any]) -> FlowRun:
        client = self.known.client
        run = await self.known.now(name)
        if run is None:
            new = FlowRunCreate(
                **await self.known.new(name, parameters),
                flow_id=self._flow_id,
                flow_version=self._flow.version,
                state=to_state_create(Pending()),
                labels={PROCESS: this_process(), **self._labels[parameters["target"]]},
            )
            # The client's own method creates the flow each time, and takes no labels.
            sent = new.model_dump(mode="json", exclude_unset=True)
            answer = await client.request("POST", "/flow_runs/", json=sent)
            return self.known.add(name, FlowRun.model_validate(answer.json()))
        state = run.state
        if state is None or state.is_completed() or state.type is StateType.PENDING:
            return run
        if not state.is_final():
            # It ran in the process of an earlier attempt, which was marked dead. If that process is
            # alive, it detects before its next write that it was replaced.
            await client.set_flow_run_state(run.id, Crashed(message="its batch was retried"), force=True)
        await client.set_flow_run_state(run.id, Pending(), force=True)
        return await client.read_flow_run(run.id)

    async def cancel(self, why: str) -> None:
        """See `Children`."""
        guard.cancel_all(why, only=self._begun)


class OnWorkPool:
    """Children that are flow runs of a Prefect deployment, run by workers."""

    def __init__(self, known: ChildRuns, deployment: str) -> None:
        self.known = known
        self._deployment = deployment
        self._waited_for: dict[UUID, asyncio.Future[State[Any]]] = {}

    @asynccontextmanager
    async def waiting(self) -> AsyncIterator["OnWorkPool"]:
        """Poll the running children, all in one request, while the context lasts.

        Raises:
            ConfigurationError: there is no such deployment.
        """
        try:
            found = await self.known.client.read_deployment_by_name(self._deployment)
        except ObjectNotFound:
            raise ConfigurationError(
                f"child_deployment: this Prefect API has no deployment {one_line(self._deployment, 120)!r}",
                advice="Create it with `prefect-rollout init`, or name a deployment of "
                "the flow deploy-latest-image as flow/deployment.",
                field="child_deployment",
            ) from None
        self._deployment_id = found.id
        polling = asyncio.create_task(self._poll())
        try:
            yield self
        finally:
            polling.cancel()
            await asyncio.wait([polling])

    async def run(self, name: str, parameters: Mapping[str, Any], begun: Begun) -> State[Any]:
        """See `Children`."""
        run = await self._run_of(name, parameters)
        begun(run)
        if run.state is not None and run.state.is_final():
            return run.state
        ended: asyncio.Future[State[Any]] = asyncio.get_running_loop().create_future()
        self._waited_for[run.id] = ended
        try:
            return await ended
        finally:
            self._waited_for.pop(run.id, None)

    async def _run_of(self, name: str, parameters: Mapping[str, Any]) -> FlowRun:
        client = self.known.client
        run = await self.known.now(name)
        if run is None:
            attempt = self.known.attempts.get(name, 0)
            created = await client.create_flow_run_from_deployment(
                self._deployment_id,
                **await self.known.new(name, parameters),
                # A request that is sent twice creates one run.
                idempotency_key=f"{self.known.batch.id}:{self.known.kind}:{name}:{attempt}",
            )
            return self.known.add(name, created)
        if run.state is not None and run.state.is_final() and not run.state.is_completed():
            await client.set_flow_run_state(run.id, AwaitingRetry(), force=True)
            return await client.read_flow_run(run.id)
        return run

    async def _poll(self) -> None:
        problem = ""
        while True:
            try:
                await self._poll_once()
                problem = ""
            except (httpx.HTTPError, PrefectException) as error:
                # The children keep running, so keep waiting for them.
                if problem != (problem := type(error).__name__):
                    get_run_logger().warning("The state of the releases cannot be read: %s", one_line(error))
            await asyncio.sleep(_POLL_SECONDS)

    async def _poll_once(self) -> None:
        ids = list(self._waited_for)
        runs = await by_id(self.known.client, ids)
        for run_id in ids:
            run, waiting = runs.get(run_id), self._waited_for.get(run_id)
            state = run.state if run else Crashed(message="its flow run was deleted")
            if waiting and not waiting.done() and state is not None and state.is_final():
                waiting.set_result(state)

    async def cancel(self, why: str) -> None:
        """See `Children`."""
        client = self.known.client

        async def one(run_id: UUID) -> None:
            run = await client.read_flow_run(run_id)
            state = run.state
            if state is None or state.type in {StateType.SCHEDULED, StateType.PENDING, StateType.PAUSED}:
                nothing = "nothing more was written" if run.run_count else "nothing was written"
                await client.set_flow_run_state(run_id, Cancelled(message=f"{why}: {nothing}"))
            elif not state.is_final():
                await client.set_flow_run_state(run_id, Cancelling(message=why))

        await asyncio.gather(*(one(run_id) for run_id in list(self._waited_for)))


def plan_tag(plan: Plan) -> str:
    """Return the tag of all batches of a plan."""
    return f"plan:{plan.digest}"


async def released_before(client: PrefectClient, plan: Plan, but: UUID) -> dict[str, UUID]:
    """Return the releases that succeeded in the latest batches of a plan, as `{name: flow run}`.

    These are the latest batch, except for `but`, and, if it ran with `only_failed`, the ones before it.

    Raises:
        InputError: there is no earlier batch, or one has not ended.
    """
    released: dict[str, UUID] = {}
    runs = await client.read_flow_runs(
        flow_filter=FlowFilter(name=FlowFilterName(any_=["deploy-batch"])),
        flow_run_filter=FlowRunFilter(tags=FlowRunFilterTags(all_=[plan_tag(plan)])),
        sort=FlowRunSort.START_TIME_DESC,
        limit=PAGE,
    )
    earlier = [run for run in runs if run.id != but and not run.parameters.get("dry_run")]
    if not earlier:
        raise InputError(
            "only_failed: there is no earlier batch of exactly this plan",
            advice="Start the plan without only_failed; a changed plan is another plan.",
            field="only_failed",
        )
    for run in earlier:
        if run.state is None or not run.state.is_final():
            raise InputError(
                f"only_failed: a batch of this plan has not ended: {one_line(run.name, 120)} ({run.id})",
                advice="Wait until it ends, or cancel it.",
                field="only_failed",
            )
        for child in await children_of(client, run.id, "release"):
            if child.state is not None and child.state.is_completed():
                released[name_of(child)] = child.id
        if not run.parameters.get("only_failed"):
            break
    return released
