"""The child flow runs of a batch: each a release of its own, run in this process or on a work pool."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, Protocol
from uuid import UUID

import httpx
from prefect import Task, get_run_logger
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterTags
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.exceptions import ObjectNotFound, PrefectException
from prefect.flow_engine import run_flow
from prefect.states import AwaitingRetry, Cancelled, Cancelling, Crashed, Pending

from prefect_rollout import guard
from prefect_rollout.errors import ConfigurationError
from prefect_rollout.flow_runs import by_id, pages
from prefect_rollout.flows.deploy import deploy_latest_image
from prefect_rollout.settings import batches
from prefect_rollout.text import one_line
from prefect_rollout.turns import Turns, taking

_LOOK_SECONDS = 2.0

Begun = Callable[[FlowRun], None]


class Children(Protocol):
    """Where the child runs of a batch are carried out."""

    kept: "Kept"

    async def carry_out(self, name: str, parameters: Mapping[str, Any], begun: Begun) -> State[Any]:
        """Has the child of that name run, or go on where it stopped; the state in which it ended.

        Args:
            name: of the release, unique in the batch; with the batch's run it finds the child again.
            parameters: of `deploy_latest_image`.
            begun: called with the child's run once it is known.
        """
        ...

    async def cancel(self, why: str) -> None:
        """Asks every child that has not ended to stop."""
        ...


class Kept:
    """The children that the batch's run has, by name; those of its earlier tries too."""

    def __init__(self, client: PrefectClient, batch: FlowRun, kind: str) -> None:
        self.client = client
        self.batch = batch
        self.kind = kind
        self.runs: dict[str, FlowRun] = {}
        self.attempts: dict[str, int] = {}

    async def find(self) -> None:
        """Looks up the children of earlier tries, and of this one before a person was asked."""
        for run in await children_of(self.client, self.batch.id, self.kind):
            self.add(name_of(run), run)  # the newest comes last

    def add(self, name: str, run: FlowRun) -> FlowRun:
        """Keeps a child that was created, and returns it."""
        self.runs[name] = run
        self.attempts[name] = self.attempts.get(name, 0) + 1
        return run

    async def now(self, name: str) -> FlowRun | None:
        """The child of that name that can be gone on with, as it is now; none where a new one is needed."""
        known = self.runs.get(name)
        if known is None:
            return None
        run = await self.client.read_flow_run(known.id)
        undone = run.state is not None and run.state.is_final() and run.labels.get(guard.ROLLED_BACK)
        return None if undone else run

    def tags(self, name: str) -> list[str]:
        """The tags by which a child is found again, and those that limit what it may do."""
        inherited = [tag for tag in self.batch.tags if tag.startswith(guard.INHERITED)]
        return [batch_tag(self.batch.id), f"{self.kind}:{name}", *inherited]

    async def parent_task(self, name: str) -> UUID:
        """A task run of the batch that stands for the child, as Prefect makes one for each subflow."""
        task: Task[[], None] = Task(fn=_nothing, name=f"{self.kind} {one_line(name, 120)}")
        key = f"{self.kind}-{name}-{self.attempts.get(name, 0)}"
        run = await self.client.create_task_run(
            task, flow_run_id=self.batch.id, dynamic_key=key, name=task.name, state=Pending()
        )
        return run.id


def _nothing() -> None:
    """What a task run does that stands for a child."""


def batch_tag(batch_id: UUID) -> str:
    """The tag of a batch's children."""
    return f"{guard.BATCH_TAG}{batch_id}"


def name_of(child: FlowRun) -> str:
    """The name of the release that the child is."""
    return next(tag.partition(":")[2] for tag in child.tags if tag.startswith(("release:", "dry-run:")))


async def children_of(client: PrefectClient, batch_id: UUID, kind: str) -> list[FlowRun]:
    """The children of a batch's run, the eldest first."""
    wanted = FlowRunFilter(tags=FlowRunFilterTags(all_=[batch_tag(batch_id)]))
    ours = [
        run
        async for page in pages(client, wanted, FlowRunSort.ID_DESC)
        for run in page
        if any(tag.startswith(f"{kind}:") for tag in run.tags)
    ]
    return sorted(ours, key=lambda run: (run.created is not None, run.created))


class InProcess:
    """Children that run in this process, on its event loop."""

    def __init__(self, kept: Kept) -> None:
        self.kept = kept
        self._begun: set[UUID] = set()
        self._turns = Turns(batches().api_turns)

    async def carry_out(self, name: str, parameters: Mapping[str, Any], begun: Begun) -> State[Any]:
        """See `Children`."""
        async with taking(self._turns):
            run = await self._run_of(name, parameters)
            begun(run)
            if run.state is not None and run.state.is_completed():
                return run.state
            self._begun.add(run.id)
            try:
                ended: Any = run_flow(deploy_latest_image, flow_run=run, return_type="state")
                state: State[Any] = await ended
            finally:
                self._begun.discard(run.id)
            return state

    async def _run_of(self, name: str, parameters: Mapping[str, Any]) -> FlowRun:
        client = self.kept.client
        run = await self.kept.now(name)
        if run is None:
            created = await client.create_flow_run(
                deploy_latest_image,
                parameters=dict(parameters),
                tags=self.kept.tags(name),
                parent_task_run_id=await self.kept.parent_task(name),
                state=Pending(),
            )
            return self.kept.add(name, created)
        state = run.state
        if state is None or state.is_completed() or state.type is StateType.PENDING:
            return run
        if not state.is_final():
            # It ran in the process of an earlier try, which was given up for dead; should that live
            # after all, it finds itself replaced before its next write.
            await client.set_flow_run_state(run.id, Crashed(message="its batch was retried"), force=True)
        await client.set_flow_run_state(run.id, Pending(), force=True)
        return await client.read_flow_run(run.id)

    async def cancel(self, why: str) -> None:
        """See `Children`."""
        guard.cancel_all(why, only=self._begun)


class OnWorkPool:
    """Children that are flow runs of a Prefect deployment, run by workers."""

    def __init__(self, kept: Kept, deployment: str) -> None:
        self.kept = kept
        self._deployment = deployment
        self._waited_for: dict[UUID, asyncio.Future[State[Any]]] = {}

    @asynccontextmanager
    async def waiting(self) -> AsyncIterator["OnWorkPool"]:
        """Looks at the children that run, all in one question, while the context lasts.

        Raises:
            ConfigurationError: there is no such deployment.
        """
        try:
            found = await self.kept.client.read_deployment_by_name(self._deployment)
        except ObjectNotFound:
            raise ConfigurationError(
                f"child_deployment: this Prefect API has no deployment {one_line(self._deployment, 120)!r}",
                advice="Apply prefect.yaml with `prefect --no-prompt deploy --all`, or name a deployment of "
                "the flow deploy-latest-image as flow/deployment.",
                field="child_deployment",
            ) from None
        self._deployment_id = found.id
        looking = asyncio.create_task(self._look())
        try:
            yield self
        finally:
            looking.cancel()
            await asyncio.wait([looking])

    async def carry_out(self, name: str, parameters: Mapping[str, Any], begun: Begun) -> State[Any]:
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
        client = self.kept.client
        run = await self.kept.now(name)
        if run is None:
            attempt = self.kept.attempts.get(name, 0)
            created = await client.create_flow_run_from_deployment(
                self._deployment_id,
                parameters=dict(parameters),
                tags=self.kept.tags(name),
                parent_task_run_id=await self.kept.parent_task(name),
                # Sent twice, it is one run.
                idempotency_key=f"{self.kept.batch.id}:{self.kept.kind}:{name}:{attempt}",
            )
            return self.kept.add(name, created)
        if run.state is not None and run.state.is_final() and not run.state.is_completed():
            await client.set_flow_run_state(run.id, AwaitingRetry(), force=True)
            return await client.read_flow_run(run.id)
        return run

    async def _look(self) -> None:
        problem = ""
        while True:
            try:
                await self._look_once()
                problem = ""
            except (httpx.HTTPError, PrefectException) as error:
                # The children go on without the API's answer to us, and so does the wait for them.
                if problem != (problem := type(error).__name__):
                    get_run_logger().warning("The children cannot be looked at: %s", one_line(error))
            await asyncio.sleep(_LOOK_SECONDS)

    async def _look_once(self) -> None:
        ids = list(self._waited_for)
        runs = await by_id(self.kept.client, ids)
        for run_id in ids:
            run, waiting = runs.get(run_id), self._waited_for.get(run_id)
            state = run.state if run else Crashed(message="its flow run was deleted")
            if waiting and not waiting.done() and state is not None and state.is_final():
                waiting.set_result(state)

    async def cancel(self, why: str) -> None:
        """See `Children`."""
        client = self.kept.client

        async def one(run_id: UUID) -> None:
            run = await client.read_flow_run(run_id)
            state = run.state
            if state is None or state.type in {StateType.SCHEDULED, StateType.PENDING, StateType.PAUSED}:
                nothing = "nothing more was written" if run.run_count else "nothing was written"
                await client.set_flow_run_state(run_id, Cancelled(message=f"{why}: {nothing}"))
            elif not state.is_final():
                await client.set_flow_run_state(run_id, Cancelling(message=why))

        await asyncio.gather(*(one(run_id) for run_id in list(self._waited_for)))
