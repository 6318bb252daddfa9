"""The endings of a run, the same for releases and batches: its error, its report, its state in Prefect."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar, cast

from prefect import get_run_logger
from prefect.client.schemas.objects import State
from prefect.exceptions import Abort
from prefect.states import Cancelled, Completed, Crashed, Failed

from prefect_rollout.batch.result import BatchResult, aftermath_of_batch
from prefect_rollout.errors import (
    NotApprovedError,
    ReleaseCancelledError,
    RolloutError,
    SkippedError,
    UnforeseenError,
)
from prefect_rollout.release.aftermath import aftermath_of_release
from prefect_rollout.release.plan_words import summary
from prefect_rollout.release.result import Outcome, ReleaseResult
from prefect_rollout.runs.guard import SHUTDOWN, Guard, Ownership
from prefect_rollout.runs.guard import stopped as stopped_here

LAST_SECONDS = 6.0
"""Seconds for each last action of a run that is being stopped, while the user waits."""

ResultT = TypeVar("ResultT", ReleaseResult, BatchResult)


async def foreseen(work: Awaitable[None]) -> None:
    """Await `work`, and raise an unexpected error as `UnforeseenError`, except if it hides a cancellation."""
    try:
        await work
    except RolloutError:
        raise
    except Exception as error:
        # Prefect's engine raises a ValueError if a task is cancelled before its run is created.
        if isinstance(error.__context__, asyncio.CancelledError):
            raise error.__context__ from error
        raise UnforeseenError(f"unexpected {type(error).__name__}") from error


async def ownership_of(guard: Guard) -> Ownership:
    """Return who owns the run; `OURS` if the Prefect API does not answer in time."""
    try:
        async with asyncio.timeout(LAST_SECONDS):
            return await guard.ownership()
    except TimeoutError:
        return Ownership.OURS


def _cancelled(error: RolloutError, name: str) -> State[Any]:
    """Return the state that a flow returns to end as Cancelled. Prefect raises `error` in its caller."""
    return Cancelled(data=error, message=str(error), name=name)


def skipped(error: SkippedError, result: ResultT) -> ResultT:
    """Return the state that a flow returns to end as Skipped. There is nothing to report."""
    result.outcome = Outcome.SKIPPED
    _attach(error, result)
    return cast(ResultT, _cancelled(error, "Skipped"))


async def end(
    result: ResultT,
    ended: BaseException | None,
    guard: Guard | None,
    ownership: Ownership,
    report: Callable[[bool], Awaitable[None]],
) -> ResultT:
    """End a run: note the error in `result`, report, and return what the flow returns.

    Args:
        result: the result so far.
        ended: the error or cancellation that ended the work, if any.
        guard: the run's guard; `None` if the run had not begun.
        ownership: who owns the run.
        report: writes the report; its argument is true if the run is being stopped and time is short.

    Raises:
        Abort: another process continues the run, and this one sets no state and writes no report.
        BaseException: `ended`, if it is unforeseen, nobody approved in time, or Prefect sets the state of a
            stopped run.
    """
    if ownership is Ownership.TAKEN_OVER:
        problem = f": {ended}" if isinstance(ended, RolloutError) else ""
        raise Abort(f"another process continues this run{problem}") from ended
    cancelling = ownership is Ownership.CANCELLING
    stopped = ended is not None and not isinstance(ended, RolloutError)
    error = _error(result, ended, guard, cancelling=cancelling)
    result.error = None
    if error is not None:
        _attach(error, result)
    await report(stopped)
    if error is None:
        if (planned := _planned(result)) is None:
            return result
        message = f"Nothing was written. Plan {planned}."
        return cast(ResultT, Completed(name="Planned", data=result, message=message))
    if ended is not None and stopped:
        current = asyncio.current_task()
        if guard is None or guard.cancelled is None or current is None:
            # Prefect sets the state: Crashed, or Cancelled by the worker that ends the process.
            get_run_logger().warning("%s", error)
            raise ended
        current.uncancel()
        if guard.process_ends and not cancelling:
            return cast(ResultT, Crashed(data=error, message=str(error)))
    rejected = isinstance(error, NotApprovedError) and error.rejected
    if ended is not None and not (stopped or cancelling or rejected):
        # Prefect fails a run by itself that was paused for too long, and would hide a returned error.
        if isinstance(error, UnforeseenError | NotApprovedError):
            raise ended
        # Prefect would log the traceback of an error that is raised, and begin its message otherwise.
        return cast(ResultT, Failed(data=error, message=str(error)))
    return cast(ResultT, _cancelled(error, "Rejected" if rejected else "Cancelled"))


def _planned(result: ReleaseResult | BatchResult) -> str | None:
    """Return hash and summary of the plan that a dry run made; `None` for other runs."""
    if result.outcome is not Outcome.PLANNED:
        return None
    if isinstance(result, BatchResult):
        return f"{result.plan_hash}: {result.counted}"
    return f"{result.plan.plan_hash}: {summary(result.plan)}" if result.plan else None


def _attach(error: RolloutError, result: ReleaseResult | BatchResult) -> None:
    error.result = result
    result.error = error.to_dict()


def _error(
    result: ReleaseResult | BatchResult,
    ended: BaseException | None,
    guard: Guard | None,
    *,
    cancelling: bool,
) -> RolloutError | None:
    """Return the error that a run ends with; `None` if it succeeds."""
    if isinstance(result, BatchResult):
        left, what, counted, live = aftermath_of_batch(result), "batch", f"; {result.counted}", None
    else:
        left, what, counted = aftermath_of_release(result, done=ended is None), "release", ""
        live = result.live if result.wrote else "as before, no cluster was written to"
    if isinstance(ended, RolloutError):
        if cancelling:
            ended.problem += f"; the run was also cancelled: {left.left}"
            ended.advice = f"{ended.advice} {left.undo}"
        return ended
    if ended is not None:
        result.outcome = Outcome.CANCELLED
        why = (guard and guard.cancelled) or SHUTDOWN
        error = ReleaseCancelledError(f"{why}{counted}: {left.left}", advice=left.undo)
        stopped_here.append(error)
    elif cancelling:
        problem = f"the cancel arrived after the {what} finished: {left.left}"
        error = ReleaseCancelledError(problem, advice=left.undo)
    else:
        return None
    if live is not None:
        error.saw(live)
    return error
