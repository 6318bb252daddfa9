"""One attempt of a batch's run: its releases as child runs, in waves, with approvals between them."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any
from uuid import UUID

import httpx
from prefect import Flow, get_client
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.exceptions import Abort, MissingResult, Pause, PrefectException, TerminationSignal

from prefect_rollout.batch.errors import BatchFailedError
from prefect_rollout.batch.plan import BatchRequest, Plan, Release
from prefect_rollout.batch.result import BatchResult, Row, Stage, hash_of, show
from prefect_rollout.blocks import choose_target, forget_blocks
from prefect_rollout.blocks.target import Chosen
from prefect_rollout.errors import (
    ConfigurationError,
    InputError,
    LockLostError,
    NotApprovedError,
    PlanChangedError,
    RolloutError,
    SkippedError,
)
from prefect_rollout.release.progress import Progress, listening
from prefect_rollout.release.result import Outcome, ReleaseResult
from prefect_rollout.runs.allowed_images import refuse_by_block
from prefect_rollout.runs.approval import approve
from prefect_rollout.runs.batch_page import BatchPage
from prefect_rollout.runs.children import (
    Children,
    ChildRuns,
    InProcess,
    OnWorkPool,
    plan_tag,
    released_before,
)
from prefect_rollout.runs.endings import end, foreseen, ownership_of, skipped
from prefect_rollout.runs.flow_runs import CLOUD, TARGET, this_run
from prefect_rollout.runs.guard import Guard, Ownership, guarding
from prefect_rollout.runs.lifecycle import run_link
from prefect_rollout.runs.staleness import skip_unless_due
from prefect_rollout.text import markdown, one_line

# Label of a batch's run: the attempt in which it last asked for an approval.
_ASKED = "rollout.asked-in-try"

# Attempts to run a release if the Prefect API does not accept it or its process ends, and the pause between
# them. In that time, a run that was marked dead but is alive reclaims itself.
_TRIES = 3
_PAUSE_SECONDS = 10.0

# Seconds that the releases of a cancelled batch have to end.
_END_SECONDS = 15.0


async def run_batch(
    request: BatchRequest, steps: Callable[["Batch"], Awaitable[None]], flow: Flow[..., Any]
) -> BatchResult:
    """Run the steps of a batch under the guard, and report every ending.

    Each release is a run of `flow`.

    Raises:
        ReleaseCancelledError: the batch was cancelled; the run's state is Cancelled.
        SkippedError: the run is late, or a newer run supersedes it; its state is Skipped.
        NotApprovedError: a person rejected it; its state is Rejected.
        RolloutError: another error ended it; `error.result` is the result so far.
    """
    run = this_run()
    result = BatchResult.of(
        request.plan,
        str(run.id),
        approval=request.approval,
        dry_run=request.dry_run,
        requested_by=request.requested_by,
        link=run_link(run.id),
    )
    guard: Guard | None = None
    ended: BaseException | None = None
    ownership = Ownership.OURS
    async with get_client() as client:
        page = BatchPage(result, client)
        try:
            await skip_unless_due(request.late_minutes)
            async with guarding() as guard:
                batch = Batch(request, result, guard, client, run, flow)
                try:
                    async with page.kept_up_to_date():
                        await foreseen(batch.carry_out(steps))
                finally:
                    ownership = await ownership_of(guard)
        except SkippedError as error:
            return skipped(error, result)
        except (RolloutError, asyncio.CancelledError, TerminationSignal) as error:
            ended = error
        return await end(result, ended, guard, ownership, lambda _: page.update(running=False))


class Batch:
    """One attempt of a batch's run. Its result is correct at any time."""

    def __init__(
        self,
        request: BatchRequest,
        result: BatchResult,
        guard: Guard,
        client: PrefectClient,
        run: FlowRun,
        flow: Flow[..., Any],
    ) -> None:
        self.request = request
        self.result = result
        self._plan = request.plan
        self._guard = guard
        self._client = client
        self._run = run
        self._flow = flow
        self._labels: dict[str, dict[str, str]] = {}
        self._running: dict[str, asyncio.Task[None]] = {}

    async def carry_out(self, steps: Callable[["Batch"], Awaitable[None]]) -> None:
        """Run the steps, and judge the result.

        Raises:
            BatchFailedError: not every release succeeded.
        """
        result, began = self.result, time.monotonic()
        try:
            await steps(self)
        finally:
            result.seconds = round(time.monotonic() - began, 3)
            result.wave = None
        if not self.request.dry_run and result.unreleased:
            raise _failed(result)
        result.outcome = Outcome.PLANNED if self.request.dry_run else Outcome.RELEASED

    async def check_targets(self) -> None:
        """Check the plan's targets and images against their blocks.

        Raises:
            PlanError: a target cannot be used, or its block does not allow an image.
            ConfigurationError: the Prefect API did not answer.
        """
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
        self._plan.refuse(_refused_images(self._plan, found))
        self._labels = {
            target: {CLOUD: chosen.block.address, TARGET: chosen.name} for target, chosen in found.items()
        }
        self.result.clouds = list(dict.fromkeys(chosen.words for chosen in found.values()))
        await self._guard.label(
            {CLOUD: one_line(", ".join(self.result.clouds), 1000)}, {plan_tag(self._plan)}
        )

    async def leave_out_released(self) -> None:
        """Leave out the releases that succeeded in earlier batches of the plan.

        Raises:
            InputError: there is no earlier batch, or one has not ended.
        """
        released = await released_before(self._client, self._plan, self._run.id)
        for row in self.result.releases:
            if row.name in released:
                row.stage, row.detail = Stage.RELEASED, "by an earlier batch of this plan"
                _link(row, released[row.name])

    # ---- plan ----

    async def plan_releases(self) -> dict[str, str]:
        """Run a dry run of every release, and return `{name: plan hash}`.

        Raises:
            BatchFailedError: a release could not be planned.
            PlanChangedError: the plans are not those of `expect_plan`.
        """
        result, wanted = self.result, self.request.expect_plan
        rows = [row for row in result.releases if not row.stage.ended]
        room = asyncio.Semaphore(self._plan.max_parallel)
        releases = {release.name: release for release in self._plan.releases}

        async def one(children: Children, row: Row) -> None:
            async with room:
                await self._run_child(children, releases[row.name], row, {"dry_run": True})

        async with self._children("dry-run") as children:
            self._running = {row.name: asyncio.create_task(one(children, row)) for row in rows}
            while self._running:
                await self._wait_for_one()
        if any(row.stage is not Stage.PLANNED or row.plan is None for row in rows):
            for row in rows:
                if row.stage is Stage.PLANNED:
                    row.stage, row.detail = Stage.SKIPPED, "not every release of the batch could be planned"
            raise _failed(result)
        hashes = {row.name: row.plan.plan_hash for row in rows if row.plan}
        result.plan_hash = hash_of(self._plan, self.request.approval, hashes)
        if wanted and wanted != result.plan_hash:
            for row in rows:
                row.stage, row.detail = Stage.SKIPPED, "the plan has changed"
            raise PlanChangedError(
                f"the plan of the batch is {result.plan_hash} now, and {wanted} was expected",
                plan_hash=result.plan_hash,
                expect_plan=wanted,
            )
        if not self.request.dry_run:
            for row in rows:
                row.stage, row.detail, row.seconds = Stage.WAITING, "", None
                row.flow_run_id, row.link = None, ""
        return hashes

    # ---- approval ----

    async def get_approval(self, what: str, key: str, text: str) -> None:
        """Wait until a person has approved `what`, such as `wave 2`, and record who.

        The `key` identifies the question within the run; `text` is the effect, as markdown.

        Raises:
            NotApprovedError: a person rejected it, or nobody approved it in time.
        """
        request, result = self.request, self.result
        await self._guard.label({_ASKED: str(self._run.run_count)})
        result.waiting = what
        show(result)
        by = f", requested by {markdown(request.requested_by)}" if request.requested_by else ""
        try:
            decision = await approve(
                f"**Release {what}**{by}\n\n{text}",
                key=key,
                seconds=request.approval_seconds,
                requested_by=request.requested_by,
            )
        except NotApprovedError as error:
            if error.rejected:
                result.outcome = Outcome.CANCELLED
            self._skip_waiting(error.problem)
            raise
        result.waiting = ""
        result.approved_by = f"{result.approved_by}, {decision.name}".lstrip(", ")

    # ---- release ----

    async def release_waves(self, expected: Mapping[str, str], pause: Callable[..., Awaitable[str]]) -> None:
        """Release all waves, with `pause` between them; the result says how each release ended.

        A release that `expected` names has to have that plan hash.

        Raises:
            NotApprovedError: a person rejected a wave, or nobody approved it in time.
        """
        rows = {row.name: row for row in self.result.releases}
        if expected:
            forget_blocks()  # a tag may have moved since the plans were made
        async with self._children("release") as children:
            await self._note_earlier_tries(children, rows)
            while True:
                done = {name for name, row in rows.items() if row.stage is Stage.RELEASED}
                not_failed = {Stage.RELEASED, Stage.SKIPPED}
                failed = {
                    name for name, row in rows.items() if row.stage.ended and row.stage not in not_failed
                }
                ready = self._plan.ready(done, failed, self._running)
                for name, why in ready.skipped.items():
                    rows[name].stage, rows[name].detail = Stage.SKIPPED, why
                if ready.start and not self._running and ready.wave != self.result.wave:
                    await self._before_wave(ready.wave, pause)
                self.result.wave = ready.wave
                for release in ready.start:
                    more = {"expect_plan": expected[release.name]} if release.name in expected else {}
                    self._running[release.name] = asyncio.create_task(
                        self._run_child(children, release, rows[release.name], more)
                    )
                show(self.result)
                if not self._running:
                    return
                await self._wait_for_one()

    async def _before_wave(self, wave: int | None, pause: Callable[..., Awaitable[str]]) -> None:
        """Let the earlier wave soak, and get the approval of this one. A retry does not soak again."""
        before = [each[0].wave for each in self._plan.waves if wave is not None and each[0].wave < wave]
        if not before:
            return
        if self._plan.soak_seconds:
            await pause(self._plan.soak_seconds, after=f"wave {before[-1]}")
        if self.request.approval == "between-waves":
            names = [markdown(row.name) for row in self.result.releases if row.wave == wave]
            text = f"**So far:** {self.result.counted}\n\n**Wave {wave} is next:** {', '.join(names)}\n"
            await self.get_approval(f"wave {wave}", f"wave-{wave}", text)

    async def _note_earlier_tries(self, children: Children, rows: Mapping[str, Row]) -> None:
        """Record how the children of earlier attempts ended.

        A retry repeats the releases that did not succeed. A run that continues after an approval does not.
        """
        # Only a retry counts as another attempt.
        answered = self._run.labels.get(_ASKED) == str(self._run.run_count)
        for name, run in children.known.runs.items():
            state = run.state
            if name in rows and state and (state.is_completed() or (answered and state.is_final())):
                row = rows[name]
                _link(row, run.id)
                row.seconds = run.total_run_time.total_seconds()
                await _note_end(row, state)

    async def _wait_for_one(self) -> None:
        """Wait until a release has ended."""
        ended, _ = await asyncio.wait(self._running.values(), return_when=asyncio.FIRST_COMPLETED)
        for name in [name for name, task in self._running.items() if task in ended]:
            task = self._running.pop(name)
            if not task.cancelled() and (error := task.exception()):
                raise error

    async def _run_child(
        self, children: Children, release: Release, row: Row, more: Mapping[str, Any]
    ) -> None:
        """Run one release from its start to its end."""
        request, began = self.request, time.monotonic()
        parameters = self._plan.request(release).model_dump(mode="json") | {
            "requested_by": request.requested_by,
            "window_wait_seconds": request.window_wait_seconds,
            "break_glass": request.break_glass,
            "late_minutes": 0,  # the batch decides when it starts
            **more,
        }

        def begun(run: FlowRun) -> None:
            nonlocal began
            began = time.monotonic()
            _link(row, run.id)
            row.stage = Stage.RUNNING
            show(self.result)

        def listen(progress: Progress) -> None:
            row.detail = progress.step if not progress.detail else f"{progress.step}: {progress.detail}"
            show(self.result)

        ended = Stage.FAILED
        for attempt in range(1, _TRIES + 1):
            try:
                # A process that was replaced starts no more releases.
                await self._guard.safe_point()
                with listening(listen, alone=True):
                    state = await children.run(release.name, parameters, begun)
            except Abort:
                row.stage, row.detail = Stage.FAILED, "another process continues its flow run"
                row.may_pass = True
                return
            except LockLostError as error:
                if not error.retryable:
                    raise
                problem = error.problem
            except (httpx.HTTPError, PrefectException) as error:
                problem = f"the Prefect API did not accept it: {one_line(error)}"
            else:
                row.seconds = round(time.monotonic() - began, 3)
                await _note_end(row, state)
                api_failed = row.error is not None and row.error.get("prefect_api")
                if not api_failed and row.stage is not Stage.CRASHED:
                    show(self.result)
                    return
                ended, problem = row.stage, row.detail
            # An overloaded API recovers, and another worker may take over a dropped release; the
            # release continues where it stopped.
            if attempt < _TRIES:
                row.stage, row.detail, row.error = Stage.RUNNING, f"to be continued: {problem}", None
                await asyncio.sleep(attempt * _PAUSE_SECONDS)
        row.stage, row.detail, row.may_pass = ended, problem, True
        show(self.result)

    @asynccontextmanager
    async def _children(self, kind: str) -> AsyncIterator[Children]:
        known = ChildRuns(self._client, self._run, kind)
        await known.find()
        async with AsyncExitStack() as stack:
            children: Children
            if self.request.run_in == "work-pool":
                on_pool = OnWorkPool(known, self.request.child_deployment)
                children = await stack.enter_async_context(on_pool.waiting())
            else:
                flow_id = await self._client.create_flow(self._flow)
                children = InProcess(known, self._flow, flow_id, self._labels)
            try:
                yield children
            except Pause:  # no release runs while a person is asked
                raise
            except BaseException:
                await self._stop(children)
                raise

    async def _stop(self, children: Children) -> None:
        """Cancel the running releases, and give them some seconds to end."""
        await children.cancel("its batch was cancelled")
        if self._running:
            await asyncio.wait(self._running.values(), timeout=_END_SECONDS)
        for name, task in self._running.items():
            if not task.done():
                task.cancel()
                self.result.row(name).detail = "it was cancelled and has not ended yet"
        self._skip_waiting("the batch was cancelled")

    def _skip_waiting(self, why: str) -> None:
        for row in self.result.releases:
            if row.stage is Stage.WAITING:
                row.stage, row.detail = Stage.SKIPPED, why


def _refused_images(plan: Plan, found: Mapping[str, Chosen]) -> dict[tuple[str | int, ...], str]:
    """Return why a block does not allow an image of the plan, by the image's path."""
    places: dict[tuple[str | int, ...], str] = {}
    for number, release in enumerate(plan.releases):
        chosen = found[release.target or plan.target]
        for container, image in (release.images or {}).items():
            try:
                refuse_by_block(chosen, {container: image})
            except InputError as error:
                places["releases", number, "images", container] = error.problem
    return places


def _link(row: Row, run_id: UUID) -> None:
    row.flow_run_id, row.link = str(run_id), run_link(run_id)


_STAGES = {
    (StateType.COMPLETED, ""): Stage.RELEASED,
    (StateType.COMPLETED, "Planned"): Stage.PLANNED,
    (StateType.CANCELLED, ""): Stage.CANCELLED,
    (StateType.CANCELLED, "Skipped"): Stage.SKIPPED,
    (StateType.CRASHED, ""): Stage.CRASHED,
    (StateType.FAILED, ""): Stage.FAILED,
}


async def _note_end(row: Row, state: State[Any]) -> None:
    """Record how a child ended. The stage is set last, so that onlookers never see a partial row."""
    stage = _STAGES.get((state.type, state.name or "")) or _STAGES[(state.type, "")]
    detail = "" if state.is_completed() else one_line(state.message or state.name, 1000)
    result: Any = None
    may_pass = True  # unknown, if it left no error
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


def _failed(result: BatchResult) -> BatchFailedError:
    worst = [row for row in result.unreleased if row.stage is not Stage.SKIPPED] or result.unreleased
    shown = "; ".join(f"{one_line(row.name, 120)}: {one_line(row.why, 200)}" for row in worst[:3])
    more = f"; and {len(worst) - 3} more" if len(worst) > 3 else ""
    return BatchFailedError(f"{result.counted}: {shown}{more}")
