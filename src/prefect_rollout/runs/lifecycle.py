"""The lifecycle of a flow run that changes one deployment: its lock, its steps, its ending."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import Any, TypeVar
from uuid import UUID

import prefect.runtime
from prefect import Task, get_run_logger
from prefect.client.schemas.objects import FlowRun
from prefect.context import TagsContext
from prefect.exceptions import TerminationSignal
from prefect.utilities.urls import url_for

from prefect_rollout.blocks import open_target, opened_as
from prefect_rollout.errors import RolloutError, SkippedError
from prefect_rollout.release.progress import Progress, listening, tell
from prefect_rollout.release.request import Action, Request
from prefect_rollout.release.result import Outcome, ReleaseResult
from prefect_rollout.runs import events
from prefect_rollout.runs.endings import LAST_SECONDS, end, foreseen, ownership_of, skipped
from prefect_rollout.runs.flow_runs import CLOUD, INHERITED, TARGET, TRIGGER, deployment_tags, this_run
from prefect_rollout.runs.guard import Guard, Ownership, guarding
from prefect_rollout.runs.history import asker_of, trigger_of
from prefect_rollout.runs.prefect_errors import describe
from prefect_rollout.runs.run import Run
from prefect_rollout.runs.staleness import skip_unless_due
from prefect_rollout.text import address, one_line

RequestT = TypeVar("RequestT", bound=Request)

_NOT_FOR_TASKS = (TRIGGER, *INHERITED, *deployment_tags("", ""))

Report = Task[[ReleaseResult], Coroutine[Any, Any, ReleaseResult]]
"""The last step, which runs however the run ends."""


class Steps:
    """Progress of a run's steps. The result gets their durations and the failed steps."""

    def __init__(self, result: ReleaseResult) -> None:
        self._result = result
        self._last: dict[str, Progress] = {}
        self._latest: Progress | None = None

    def note(self, progress: Progress) -> None:
        """Record a progress message of a step."""
        self._last.pop(progress.step, None)
        self._latest = self._last[progress.step] = progress
        result = self._result
        result.failed_steps = [step for step, last in self._last.items() if last.state == "failed"]
        if progress.seconds:
            total = result.seconds.get(progress.step, 0) + progress.seconds
            result.seconds[progress.step] = round(total, 3)

    def fail(self, problem: str) -> None:
        """Report the step in which a run failed, if the step did not: not all steps raise in their tasks."""
        if (latest := self._latest) and (latest.state == "running" or not self._result.failed_steps):
            tell(Progress(latest.step, "failed", problem))

    def stop(self) -> None:
        """Report the step in which a run was stopped."""
        if (latest := self._latest) and latest.state in {"running", "retrying"}:
            tell(Progress(latest.step, "stopped"))


async def run_release(
    action: Action,
    request: RequestT,
    work: Callable[[Run, RequestT], Awaitable[None]],
    *,
    report: Report,
) -> ReleaseResult:
    """Run the steps of a release under its guard, then `report`, and end the flow run accordingly.

    Raises:
        ReleaseCancelledError: the run was cancelled in Prefect or by Ctrl-C; its state is Cancelled.
        SkippedError: the run is late, or a newer run supersedes it; its state is Skipped.
        NotApprovedError: a person rejected it; its state is Rejected.
        RolloutError: any other failure; `error.result` is the result so far.
    """
    result = _begun(action, request, this_run())
    steps = Steps(result)

    def note(progress: Progress) -> None:
        steps.note(progress)
        if guard is not None and progress.step != "report release":
            watched = progress.step == "wait for pods" and progress.state == "done"
            released = watched and run is not None and run.in_last_stage
            guard.decided = released or progress.state == "failed"

    guard: Guard | None = None
    run: Run | None = None
    ownership = Ownership.OURS
    try:
        with listening(note), _tags_of_tasks():
            await skip_unless_due(request.late_minutes)
            async with _opened(request, result) as (run, guard):
                try:
                    await _observed(run, lambda: work(run, request), steps)
                finally:
                    ownership = await ownership_of(guard)
        if result.outcome is not Outcome.PLANNED:
            result.outcome = Outcome.RELEASED
        ended: BaseException | None = None
    except SkippedError as error:
        returned = skipped(error, result)
        events.ended(result, None)
        return returned
    except (RolloutError, asyncio.CancelledError, TerminationSignal) as error:
        ended = error

    async def leave(stopped: bool) -> None:
        await _report(result, run, report, stopped=stopped)

    return await end(result, ended, guard, ownership, leave)


@asynccontextmanager
async def _opened(request: Request, result: ReleaseResult) -> AsyncIterator[tuple[Run, Guard]]:
    """Yield the run, on the platform of its target, and its guard; result and labels name the platform."""
    async with open_target(request.target) as platform:
        chosen = await opened_as(request.target)
        result.cloud, result.target = chosen.block.address, chosen.name
        link = run_link(UUID(result.release_id))
        result.links = ({"Flow run": link} if link else {}) | platform.links()
        labels = {CLOUD: result.cloud, TARGET: result.target}
        async with guarding(labels, deployment_tags(request.app_id, request.deployment)) as guard:
            yield Run(request, result, platform, chosen, guard), guard


def _begun(action: Action, request: Request, run: FlowRun) -> ReleaseResult:
    """Return the result of a run that has not begun."""
    return ReleaseResult(
        action=action,
        outcome=Outcome.FAILED,
        app_id=request.app_id,
        deployment=request.deployment,
        release_id=str(run.id),
        reason=request.reason,
        requested_by=one_line(request.requested_by, 200) or asker_of(run),
        trigger=trigger_of(run),
        dry_run=not request.writes,
        tries=run.run_count,
    )


def _tags_of_tasks() -> TagsContext:
    """Give tasks the run's tags that they need: Prefect checks a limit for each tag."""
    tags = TagsContext.get().current_tags
    return TagsContext(current_tags={tag for tag in tags if not tag.startswith(_NOT_FOR_TASKS)})


async def _observed(run: Run, work: Callable[[], Awaitable[None]], steps: Steps) -> None:
    """Run `work`. If it fails after a write, record the live state."""
    try:
        await foreseen(work())
    except RolloutError as error:
        steps.fail(error.problem)
        run.failed(error)
        if run.result.wrote:
            await run.look()
            error.saw(run.result.live)
        raise
    except (asyncio.CancelledError, TerminationSignal):
        steps.stop()
        if run.result.wrote:
            await run.look()
        raise


def asked_for(parameters: Mapping[str, Any]) -> str:
    """Return the template or images that a release asks for, as the last part of its run's name."""
    images, template = parameters.get("images"), parameters.get("template_id")
    if isinstance(images, dict) and images:
        return tags_of(map(str, images.values()))
    return "newest" if template in (None, "") else f"template {one_line(template, 40)}"


def tags_of(images: Iterable[str]) -> str:
    """Return the tags of images, such as `1.4.2 +1`."""
    names = (image.partition("@")[0].rpartition("/")[2] for image in images)
    tags = sorted({name.partition(":")[2] or "latest" for name in names})
    return one_line(tags[0], 80) + (f" +{len(tags) - 1}" if len(tags) > 1 else "")


def first_name(what: str) -> Callable[[], str]:
    """Return a function that names a run of `what` until more is known."""

    def name() -> str:
        parameters: dict[str, Any] = prefect.runtime.flow_run.parameters
        plan = "plan to " if parameters.get("dry_run") else ""
        return f"{plan}{what} {one_line(parameters.get('deployment'), 80)}".strip()

    return name


async def _report(result: ReleaseResult, run: Run | None, report: Report, *, stopped: bool) -> None:
    """Send the last event and run step 8. The outcome of the release does not depend on them.

    A run that is being stopped has time for neither a task nor a long wait.
    """
    events.ended(result, run.platform.identity if run else None)
    try:
        if stopped:
            async with asyncio.timeout(LAST_SECONDS):
                await report.fn(result)
        else:
            with _tags_of_tasks():
                await report(result)
    except Exception as error:  # noqa: BLE001 - any failure, of Prefect or of ours
        get_run_logger().warning("The report could not be left: %s", describe(error))


def run_link(run_id: UUID) -> str:
    """Return the address of a flow run in the Prefect UI; empty if there is none."""
    return address(url_for("flow-run", obj_id=run_id) or "")
