"""The flow that releases many deployments: a plan, in waves, each release a flow run of its own."""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, cast
from uuid import UUID

import httpx
import prefect.runtime
from prefect import flow, get_client, get_run_logger
from prefect.artifacts import acreate_markdown_artifact, acreate_progress_artifact
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.actions import ArtifactUpdate
from prefect.client.schemas.filters import FlowFilter, FlowFilterName, FlowRunFilter, FlowRunFilterTags
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.exceptions import Abort, MissingResult, Pause, PrefectException, TerminationSignal
from prefect.states import Cancelled, Completed, Crashed

from prefect_rollout.aftermath import aftermath_of_batch
from prefect_rollout.batch import BatchResult, Row, Stage, hash_of, render, show
from prefect_rollout.blocks import choose_target
from prefect_rollout.blocks.target import Chosen
from prefect_rollout.difference import summary
from prefect_rollout.errors import (
    BatchFailedError,
    ConfigurationError,
    InputError,
    LockLostError,
    NotApprovedError,
    PlanChangedError,
    ReleaseCancelledError,
    RolloutError,
    SkippedError,
)
from prefect_rollout.flow_runs import PAGE
from prefect_rollout.flows.allowed import refuse_by_block
from prefect_rollout.flows.approval import approve, refuse_where_nobody_answers
from prefect_rollout.flows.children import Children, InProcess, Kept, OnWorkPool, children_of, name_of
from prefect_rollout.flows.conduct import foreseen, pause, run_link
from prefect_rollout.flows.punctual import skip_unless_due
from prefect_rollout.guard import CLOUD, ENDS, Guard, Standing, watching
from prefect_rollout.guard import stopped as stopped_here
from prefect_rollout.ledger import leave_record
from prefect_rollout.models import (
    ApprovalSeconds,
    LateMinutes,
    Outcome,
    Person,
    PlanHash,
    Reason,
    ReleaseResult,
    WindowWait,
)
from prefect_rollout.plan import BatchApproval, BatchRequest, Plan, Release, RunIn
from prefect_rollout.progress import Progress, listening
from prefect_rollout.text import markdown, one_line

# Label of a batch's run: the try in which a person was asked last.
_ASKED = "rollout.asked-in-try"

_RENEW_SECONDS = 2.0
_BOARD_SECONDS = 6.0

# How often a release is begun or gone on with that the Prefect API did not hear, or whose process ended
# under it, and after which pause. One that was given up for dead and lives takes itself back meanwhile.
_TRIES = 3
_PAUSE_SECONDS = 10.0

# How long the releases of a batch that is cancelled have to come to their ends.
_END_SECONDS = 15.0


def _first_name() -> str:
    plan = prefect.runtime.flow_run.parameters.get("plan")
    if isinstance(plan, Plan):
        plan = plan.model_dump()
    releases = plan.get("releases") if isinstance(plan, dict) else None
    count = len(releases) if isinstance(releases, list) else "?"
    what = "plan" if prefect.runtime.flow_run.parameters.get("dry_run") else "batch"
    return f"{what} of {count} release{'' if count == 1 else 's'}"


@flow(name="deploy-batch", flow_run_name=_first_name, persist_result=True, validate_parameters=False)
async def deploy_batch(
    plan: Plan,
    run_in: RunIn = "process",
    child_deployment: str = "deploy-latest-image/batch-release",
    only_failed: bool = False,
    approval: BatchApproval = "none",
    approval_seconds: ApprovalSeconds = 86_400,
    dry_run: bool = False,
    expect_plan: PlanHash = "",
    requested_by: Person = "",
    window_wait_seconds: WindowWait = 0,
    break_glass: Reason = "",
    late_minutes: LateMinutes = 60,
) -> BatchResult:
    """Release many deployments, in waves: each a flow run of its own, with its own lock and report.

    The batch is green only when every release of the plan is. One that fails does not stop the others
    until more have failed than the plan's failure budget allows; then no new one is started. Retrying
    the run goes on with what has not been released.

    Args:
        plan: The releases, in waves, with defaults, the failure budget and how many run at once.
        run_in: process runs the releases in the batch's own process; work-pool as runs of child_deployment.
        child_deployment: Deployment of the flow deploy-latest-image, as flow/deployment, for work-pool.
        only_failed: Leave out what earlier batches of the same plan have released.
        approval: Wait, suspended, for a person's approval before the first release, or between the waves.
        approval_seconds: Seconds after which a batch that nobody approved fails.
        dry_run: Read everything and write nothing: report what would change, and the plan's hash.
        expect_plan: Hash of a dry run; the batch is refused where something has changed since.
        requested_by: Who asks for it; kept in the reports and in the history.
        window_wait_seconds: Seconds that a release waits where its window is closed; 0 refuses at once.
        break_glass: Why it passes closed release windows all the same; kept in the history.
        late_minutes: Minutes after its scheduled time at which a run skips itself; 0 for never.

    Raises:
        PlanError: the plan has mistakes; all are listed.
        BatchFailedError: not all were released; `error.batch` has a row for each.
        RolloutError: whatever else ended the batch.
    """
    given = locals()
    given["plan"] = Plan.of_parameter(plan)
    return await _conduct(BatchRequest.of(**given))


async def _conduct(request: BatchRequest) -> BatchResult:
    run_id = UUID(str(prefect.runtime.flow_run.id))
    result = BatchResult.of(
        request.plan,
        str(run_id),
        approval=request.approval,
        dry_run=request.dry_run,
        requested_by=request.requested_by,
        link=run_link(run_id),
    )
    standing = Standing.OURS
    guard: Guard | None = None
    last: RolloutError | None = None
    try:
        await skip_unless_due(request.late_minutes)
        async with watching(run_id) as guard, get_client() as client:
            run = await client.read_flow_run(run_id)
            batch = Batch(request, result, guard, client, run)
            async with Board(result, client).shown():
                try:
                    await foreseen(batch.carry_out())
                except (RolloutError, asyncio.CancelledError, TerminationSignal) as ended:
                    standing = await _standing(guard)
                    last = _last_word(ended, result, guard, standing)
                    raise
                standing = await _standing(guard)
                last = _last_word(None, result, guard, standing)
    except RolloutError as error:
        if standing is Standing.TAKEN_OVER:
            raise Abort(f"another process goes on with this run: {error}") from error
        error.batch = result  # even if the batch had not begun
        if name := _name_of_end(error, result, standing):
            return _as(Cancelled(data=error, message=str(error), name=name))
        raise
    except (asyncio.CancelledError, TerminationSignal):
        current = asyncio.current_task()
        if guard is None or last is None or guard.cancelled is None or current is None:
            # Prefect says how: Crashed, or Cancelled by the worker that ends the process.
            raise
        current.uncancel()
        kind = Crashed if guard.ends else Cancelled
        return _as(kind(data=last, message=str(last)))
    if standing is Standing.TAKEN_OVER:
        raise Abort("another process goes on with this run")
    if last is not None:
        return _as(Cancelled(data=last, message=str(last)))
    if result.outcome is Outcome.PLANNED:
        message = f"Nothing was written. Plan {result.plan_hash}: {result.counted}."
        return _as(Completed(name="Planned", data=result, message=message))
    return result


def _name_of_end(error: RolloutError, result: BatchResult, standing: Standing) -> str:
    """The name of the state in which a batch ends that nothing has failed in; empty where it failed."""
    if isinstance(error, SkippedError):
        result.outcome, result.error = Outcome.SKIPPED, error.to_dict()
        return "Skipped"
    if isinstance(error, NotApprovedError) and error.rejected:
        return "Rejected"
    return "Cancelled" if standing is Standing.CANCELLING else ""


def _as(state: State[Any]) -> BatchResult:
    """What a flow returns to end in a state of its choice."""
    return cast(BatchResult, state)


async def _standing(guard: Guard) -> Standing:
    return await guard.standing() if guard.cancelled is None else Standing.OURS


def _last_word(
    ended: BaseException | None, result: BatchResult, guard: Guard, standing: Standing
) -> RolloutError | None:
    """Return the error that a batch ends with, noted in its result; `None` where all is well."""
    left = aftermath_of_batch(result)
    cancelling = standing is Standing.CANCELLING
    if isinstance(ended, RolloutError):
        error = ended
        if cancelling:
            error.problem += f"; it was cancelled too: {left.left}"
            error.advice = f"{error.advice} {left.undo}"
    elif ended is not None:
        result.outcome = Outcome.CANCELLED
        why = f"{guard.cancelled or ENDS}; {result.counted}: {left.left}"
        error = ReleaseCancelledError(why, advice=left.undo)
        stopped_here.append(error)
    elif cancelling:
        why = f"it was cancelled too late, all was done: {left.left}"
        error = ReleaseCancelledError(why, advice=left.undo)
    else:
        return None
    error.batch = result
    result.error = error.to_dict()
    return error


class Board:
    """What a person sees of the batch while it runs: its progress, and a page that is kept up to date."""

    def __init__(self, result: BatchResult, client: PrefectClient) -> None:
        self._result = result
        self._client = client
        self._progress: UUID | None = None
        self._page: UUID | None = None
        self._shown = ""

    @asynccontextmanager
    async def shown(self) -> AsyncIterator[None]:
        """Keeps both up to date while the context lasts, and true at its end."""
        keeping = asyncio.create_task(self._keep())
        waiting = False
        try:
            yield
        except Pause:
            waiting = True
            raise
        finally:
            keeping.cancel()
            await asyncio.wait([keeping])
            await self._update(running=waiting)

    async def _keep(self) -> None:
        while True:
            await self._update(running=True)
            await asyncio.sleep(_RENEW_SECONDS)

    async def _update(self, *, running: bool) -> None:
        state = self._result.model_dump_json()
        if running and state == self._shown:
            return
        try:
            async with asyncio.timeout(_BOARD_SECONDS):
                await self._renew(running=running)
            self._shown = state
        # A page that cannot be left changes nothing of what is released.
        except (httpx.HTTPError, PrefectException, TimeoutError) as error:
            why = one_line(error) or type(error).__name__
            get_run_logger().warning("The batch's page could not be renewed: %s", why)

    async def _renew(self, *, running: bool) -> None:
        page, progress = render(self._result, running=running), self._result.progress
        if self._progress is None:
            self._progress = await acreate_progress_artifact(progress, description="Releases that have ended")
        else:
            await self._client.update_artifact(self._progress, ArtifactUpdate(data=progress))
        if self._page is None:
            key = f"batch-{self._result.plan_digest}"  # its versions are the batches of the plan
            self._page = await acreate_markdown_artifact(page, key=key, description=self._result.counted)
        else:
            await self._client.update_artifact(
                self._page, ArtifactUpdate(data=page, description=self._result.counted)
            )
        if not running:
            await leave_record(self._result)


class Batch:
    """One try of a batch's run."""

    def __init__(
        self, request: BatchRequest, result: BatchResult, guard: Guard, client: PrefectClient, run: FlowRun
    ) -> None:
        self._request = request
        self._plan = request.plan
        self._result = result
        self._guard = guard
        self._client = client
        self._run = run
        self._running: dict[str, asyncio.Task[None]] = {}
        self._began = time.monotonic()

    async def carry_out(self) -> None:
        """The whole batch; its result says at any time how far it is.

        Raises:
            PlanError: a target of the plan cannot be used.
            PlanChangedError: the world is not as `expect_plan` says.
            BatchFailedError: not every release was released.
            ReleaseCancelledError: nobody approved it.
        """
        request, result = self._request, self._result
        try:
            await self._client.update_flow_run(
                self._run.id, tags=sorted({*self._run.tags, plan_tag(self._plan)})
            )
            await self._check_targets()
            if request.only_failed:
                await self._leave_out_what_is_released()
            if request.approval != "none" and not request.dry_run:
                refuse_where_nobody_answers()
            expected: dict[str, str] = {}
            if request.dry_run or request.expect_plan or request.approval == "before-release":
                expected = await self._look_ahead()
            if request.dry_run:
                result.outcome = Outcome.PLANNED
                return
            if request.approval == "before-release":
                await self._approved("the batch", "batch", _plans(result))
            async with self._children("release") as children:
                await self._release(children, expected)
        finally:
            result.seconds = round(time.monotonic() - self._began, 3)
            result.wave = None
        if result.unreleased:
            raise _failed(result)
        result.outcome = Outcome.RELEASED

    async def _check_targets(self) -> None:
        problems: dict[str, str] = {}
        found: dict[str, Chosen] = {}
        for target in self._plan.targets:
            try:
                found[target] = await choose_target(target)
            except ConfigurationError as error:
                if error.retryable:
                    raise
                problems[target] = f"{error.problem}. {error.advice.removesuffix('.')}"
        self._plan.refuse_targets(problems)
        self._plan.refuse(_images_refused(self._plan, found))
        self._result.clouds = list(dict.fromkeys(chosen.words for chosen in found.values()))
        await self._guard.label({CLOUD: one_line(", ".join(self._result.clouds), 1000)})

    async def _leave_out_what_is_released(self) -> None:
        released = await released_before(self._client, self._plan, self._run.id)
        for row in self._result.releases:
            if row.name in released:
                row.stage, row.detail = Stage.RELEASED, "by an earlier batch of this plan"
                _point(row, released[row.name])

    # ---- plan first ----

    async def _look_ahead(self) -> dict[str, str]:
        """A dry run of every release: `{name: plan hash}`, where all could be planned and are as expected."""
        rows = [row for row in self._result.releases if not row.stage.ended]
        room = asyncio.Semaphore(self._plan.max_parallel)
        releases = {release.name: release for release in self._plan.releases}

        async def one(children: Children, row: Row) -> None:
            async with room:
                await self._carry_out(children, releases[row.name], row, {"dry_run": True})

        async with self._children("dry-run") as children:
            self._running = {row.name: asyncio.create_task(one(children, row)) for row in rows}
            while self._running:
                await self._some_of()
        if any(row.stage is not Stage.PLANNED or row.plan is None for row in rows):
            for row in rows:
                if row.stage is Stage.PLANNED:
                    row.stage, row.detail = Stage.SKIPPED, "not every release of the batch could be planned"
            raise _failed(self._result)
        hashes = {row.name: row.plan.plan_hash for row in rows if row.plan}
        self._result.plan_hash = hash_of(self._plan, self._request.approval, hashes)
        wanted = self._request.expect_plan
        if wanted and wanted != self._result.plan_hash:
            for row in rows:
                row.stage, row.detail = Stage.SKIPPED, "the plan has changed"
            raise PlanChangedError(
                f"the plan of the batch is {self._result.plan_hash} now, and {wanted} was expected",
                plan_hash=self._result.plan_hash,
                expect_plan=wanted,
            )
        if not self._request.dry_run:
            for row in rows:
                row.stage, row.detail, row.seconds = Stage.WAITING, "", None
                row.flow_run_id, row.link = None, ""
        return hashes

    # ---- the releases ----

    async def _release(self, children: Children, expected: dict[str, str]) -> None:
        rows = {row.name: row for row in self._result.releases}
        await self._note_earlier(children, rows)
        numbers = [wave[0].wave for wave in self._plan.waves]
        while True:
            done = {name for name, row in rows.items() if row.stage is Stage.RELEASED}
            failed = {
                name
                for name, row in rows.items()
                if row.stage.ended and row.stage not in {Stage.RELEASED, Stage.SKIPPED}
            }
            ready = self._plan.ready(done, failed, self._running)
            for name, why in ready.skipped.items():
                rows[name].stage, rows[name].detail = Stage.SKIPPED, why
            if ready.start and not self._running and ready.wave != self._result.wave:
                await self._before_wave(numbers, ready.wave)
            self._result.wave = ready.wave
            for release in ready.start:
                more = {"expect_plan": expected[release.name]} if release.name in expected else {}
                self._running[release.name] = asyncio.create_task(
                    self._carry_out(children, release, rows[release.name], more)
                )
            show(self._result)
            if not self._running:
                return
            await self._some_of()

    async def _before_wave(self, numbers: list[int], wave: int | None) -> None:
        """Lets what the wave before has released soak; a retry does not soak again."""
        before = [number for number in numbers if wave is not None and number < wave]
        if not before:
            return
        if self._plan.soak_seconds:
            await pause(self._plan.soak_seconds, after=f"wave {before[-1]}")
        if self._request.approval == "between-waves":
            names = [markdown(row.name) for row in self._result.releases if row.wave == wave]
            told = f"**So far:** {self._result.counted}\n\n**Wave {wave} is next:** {', '.join(names)}\n"
            await self._approved(f"wave {wave}", f"wave-{wave}", told)

    async def _approved(self, what: str, key: str, told: str) -> None:
        """Returns once a person has approved, and notes who."""
        request, result = self._request, self._result
        await self._guard.label({_ASKED: str(self._run.run_count)})
        result.waiting = what
        show(result)
        head = f"**Release {what}**" + (f", asked by {markdown(by)}" if (by := request.requested_by) else "")
        try:
            decision = await approve(
                f"{head}\n\n{told}",
                key=key,
                seconds=request.approval_seconds,
                requested_by=request.requested_by,
            )
        except NotApprovedError as error:
            if error.rejected:
                result.outcome = Outcome.CANCELLED
            for row in result.releases:
                if row.stage is Stage.WAITING:
                    row.stage, row.detail = Stage.SKIPPED, error.problem
            raise
        result.waiting = ""
        result.approved_by = f"{result.approved_by}, {decision.name}".lstrip(", ")

    async def _note_earlier(self, children: Children, rows: dict[str, Row]) -> None:
        """Takes over what earlier tries of the run have done.

        A run that begins again because a person has answered goes on as if it had never ended; a retry
        tries again what was not released.
        """
        # Only a retry counts as another try.
        answered = self._run.labels.get(_ASKED) == str(self._run.run_count)
        for name, run in children.kept.runs.items():
            state = run.state
            if name in rows and state and (state.is_completed() or (answered and state.is_final())):
                row = rows[name]
                _point(row, run.id)
                row.seconds = run.total_run_time.total_seconds()
                await _note(row, state)

    async def _some_of(self) -> None:
        """Waits until a release has ended."""
        ended, _ = await asyncio.wait(self._running.values(), return_when=asyncio.FIRST_COMPLETED)
        for name in [name for name, task in self._running.items() if task in ended]:
            task = self._running.pop(name)
            if not task.cancelled() and (error := task.exception()):
                raise error

    async def _stop(self, children: Children) -> None:
        """Cancels what runs, and waits for some seconds until it has ended."""
        await children.cancel("its batch was cancelled")
        if self._running:
            await asyncio.wait(self._running.values(), timeout=_END_SECONDS)
        for name, task in self._running.items():
            if not task.done():
                task.cancel()
                self._result.row(name).detail = "it was cancelled, and has not ended yet"
        for row in self._result.releases:
            if row.stage is Stage.WAITING:
                row.stage, row.detail = Stage.SKIPPED, "the batch was cancelled"

    async def _carry_out(self, children: Children, release: Release, row: Row, more: dict[str, Any]) -> None:
        """One release, from its start to its end."""
        request = self._request
        parameters = self._plan.request(release).model_dump(mode="json") | {
            "requested_by": request.requested_by,
            "window_wait_seconds": request.window_wait_seconds,
            "break_glass": request.break_glass,
            "late_minutes": 0,  # when it starts is the batch's affair
            **more,
        }
        began = time.monotonic()

        def begun(run: FlowRun) -> None:
            nonlocal began
            began = time.monotonic()
            _point(row, run.id)
            row.stage = Stage.RUNNING
            show(self._result)

        def listen(progress: Progress) -> None:
            row.detail = progress.step if not progress.detail else f"{progress.step}: {progress.detail}"
            show(self._result)

        ended = Stage.FAILED
        for attempt in range(1, _TRIES + 1):
            try:
                # A process that was replaced starts nothing more.
                await self._guard.safe_point()
                with listening(listen, alone=True):
                    state = await children.carry_out(release.name, parameters, begun)
            except Abort:
                row.stage, row.detail = Stage.FAILED, "another process goes on with its flow run"
                row.may_pass = True
                return
            except LockLostError as error:
                if not error.retryable:
                    raise
                problem = error.problem
            except (httpx.HTTPError, PrefectException) as error:
                problem = f"the Prefect API did not take it: {one_line(error)}"
            else:
                row.seconds = round(time.monotonic() - began, 3)
                await _note(row, state)
                unheard = row.error is not None and row.error.get("prefect_api")
                if not unheard and row.stage is not Stage.CRASHED:
                    show(self._result)
                    return
                ended, problem = row.stage, row.detail
            # An API that a burst has overwhelmed recovers, and another worker may take up what one has
            # dropped; the release goes on where it stopped.
            if attempt < _TRIES:
                row.stage, row.detail, row.error = Stage.RUNNING, f"to be gone on with: {problem}", None
                await asyncio.sleep(attempt * _PAUSE_SECONDS)
        row.stage, row.detail, row.may_pass = ended, problem, True
        show(self._result)

    @asynccontextmanager
    async def _children(self, kind: str) -> AsyncIterator[Children]:
        kept = Kept(self._client, self._run, kind)
        await kept.find()
        async with AsyncExitStack() as stack:
            children: Children = InProcess(kept)
            if self._request.run_in == "work-pool":
                on_pool = OnWorkPool(kept, self._request.child_deployment)
                children = await stack.enter_async_context(on_pool.waiting())
            try:
                yield children
            except Pause:  # nothing runs while a person is asked
                raise
            except BaseException:
                await self._stop(children)
                raise


def _images_refused(plan: Plan, found: Mapping[str, Chosen]) -> dict[tuple[str | int, ...], str]:
    """The images that the plan names and the block of their release does not allow: why, by their path."""
    places: dict[tuple[str | int, ...], str] = {}
    for number, release in enumerate(plan.releases):
        chosen = found[release.target or plan.target]
        for container, image in (release.images or {}).items():
            try:
                refuse_by_block(chosen, {container: image})
            except InputError as error:
                places["releases", number, "images", container] = error.problem
    return places


def _point(row: Row, run_id: UUID) -> None:
    """Has the row point to the child's flow run."""
    row.flow_run_id, row.link = str(run_id), run_link(run_id)


async def _note(row: Row, state: State[Any]) -> None:
    """Takes over how a child ended; its stage last, so that whoever looks on sees all of it at once."""
    stage = _STAGES.get((state.type, state.name or "")) or _STAGES[(state.type, "")]
    detail = "" if state.is_completed() else one_line(state.message or state.name, 1000)
    result: Any = None
    may_pass = True  # of one that left no word nobody knows better
    try:
        result = await state.aresult(raise_on_failure=False)
    except MissingResult:
        if state.is_completed():
            stage, detail = Stage.FAILED, "its flow run was set to Completed by hand"
    except (ValueError, OSError) as error:
        detail = detail or f"its result is out of reach here: {one_line(error, 120)}"
    if isinstance(result, RolloutError):
        may_pass = result.may_pass
        row.error, detail, result = result.to_dict(), str(result), result.result
    if isinstance(result, ReleaseResult):
        row.note(result)
        if result.outcome is Outcome.TIMED_OUT:
            stage = Stage.TIMED_OUT
    row.may_pass = may_pass and stage not in {Stage.RELEASED, Stage.PLANNED, Stage.SKIPPED}
    row.detail, row.stage = detail, stage


_STAGES = {
    (StateType.COMPLETED, ""): Stage.RELEASED,
    (StateType.COMPLETED, "Planned"): Stage.PLANNED,
    (StateType.CANCELLED, ""): Stage.CANCELLED,
    (StateType.CANCELLED, "Skipped"): Stage.SKIPPED,
    (StateType.CRASHED, ""): Stage.CRASHED,
    (StateType.FAILED, ""): Stage.FAILED,
}


def _failed(result: BatchResult) -> BatchFailedError:
    worst = [row for row in result.unreleased if row.stage is not Stage.SKIPPED] or result.unreleased
    told = "; ".join(f"{one_line(row.name, 120)}: {one_line(row.why, 200)}" for row in worst[:3])
    more = f"; and {len(worst) - 3} more" if len(worst) > 3 else ""
    return BatchFailedError(f"{result.counted}: {told}{more}")


def _plans(result: BatchResult) -> str:
    """What the releases of a batch would change, a line each, as markdown."""
    lines = [
        f"- **{markdown(row.name)}:** {markdown(summary(row.plan))}" for row in result.releases if row.plan
    ]
    return "\n".join([*lines, f"\n{markdown(result.procedure)}\n\nPlan hash: `{result.plan_hash}`\n"])


def plan_tag(plan: Plan) -> str:
    """The tag of all batches of the plan."""
    return f"plan:{plan.digest}"


async def released_before(client: PrefectClient, plan: Plan, but: UUID) -> dict[str, UUID]:
    """What the last batches of the plan have released: `{name of the release: its flow run}`.

    Those are the latest one and, where that was itself of `only_failed`, the ones before it.

    Raises:
        InputError: there was none, or one has not ended.
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
            advice="Start the plan without only_failed; a plan that was changed is another plan.",
            field="only_failed",
        )
    for run in earlier:
        if run.state is None or not run.state.is_final():
            raise InputError(
                f"only_failed: a batch of this plan has not ended: {one_line(run.name, 120)} ({run.id})",
                advice="Wait for its end, or cancel it.",
                field="only_failed",
            )
        for child in await children_of(client, run.id, "release"):
            if child.state is not None and child.state.is_completed():
                released[name_of(child)] = child.id
        if not run.parameters.get("only_failed"):
            break
    return released
