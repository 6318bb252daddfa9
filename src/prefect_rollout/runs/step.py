"""Steps of a release as Prefect tasks: retries, persisted results, progress."""

import asyncio
import functools
import logging
import time
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec, TypeVar

from prefect import Task, get_run_logger
from prefect.cache_policies import INPUTS, RUN_ID, CachePolicy
from prefect.client.schemas.objects import State, TaskRun
from prefect.context import FlowRunContext, TaskRunContext
from prefect.exceptions import MissingContextError
from prefect.logging import get_logger
from prefect.tasks import exponential_backoff

from prefect_rollout.errors import NotFoundError, RolloutError
from prefect_rollout.release.images import UNLISTED
from prefect_rollout.release.progress import Progress, tell
from prefect_rollout.settings import rollout_settings

P = ParamSpec("P")
R = TypeVar("R")

_patience = rollout_settings()


async def another_try_may_help(_task: Any, _task_run: TaskRun, state: State[Any]) -> bool:
    """Return True if Prefect should retry a step: only after a retryable error.

    Wait out the platform's `Retry-After` first; Prefect's own back-off comes on top. The function is
    `async def` because Prefect awaits it in an async task.
    """
    # The exception itself: `state.result()` is a coroutine here.
    error = state.data
    if not isinstance(error, RolloutError) or not error.retryable:
        return False
    seconds = error.retry_after or 0
    if seconds > _patience.longest_retry_after_seconds:
        return False
    await asyncio.sleep(seconds)
    return True


def step(
    name: str,
    task_run_name: str,
    *,
    cache_policy: CachePolicy | None = None,
    quiet: bool = False,
) -> Callable[[Callable[P, Coroutine[Any, Any, R]]], Task[P, Coroutine[Any, Any, R]]]:
    """Make a step of a release from a coroutine function.

    Results persist under the step's inputs and the flow run: a retried flow run continues after the last
    completed step. A `RolloutError` without a step gets this one.

    Args:
        name: name of the step in the article, one of `progress.STEPS`.
        task_run_name: name in the UI, with the step's arguments in braces.
        cache_policy: replaces the key of the persisted result.
        quiet: hide the step from the progress of a release.
    """

    def decorate(fn: Callable[P, Coroutine[Any, Any, R]]) -> Task[P, Coroutine[Any, Any, R]]:
        @functools.wraps(fn)
        async def reported(*args: P.args, **kwargs: P.kwargs) -> R:
            started = time.monotonic()
            report: Callable[[Progress], None] = (lambda _: None) if quiet else tell
            report(Progress(name, "running"))
            try:
                result = await fn(*args, **kwargs)
            except RolloutError as error:
                error.step = error.step or name
                if isinstance(error, NotFoundError) and UNLISTED in tags_of_the_run():
                    error.unlist()
                again = error.retryable and _tries_left()
                seconds = time.monotonic() - started
                report(Progress(name, "retrying" if again else "failed", error.problem, seconds))
                raise
            report(Progress(name, "done", "", time.monotonic() - started))
            return result

        # Steps with the same inputs must not share results.
        own = CachePolicy.from_cache_key_fn(lambda _context, _parameters: fn.__name__)
        return Task(
            reported,
            name=name,
            task_run_name=task_run_name,
            cache_policy=cache_policy or INPUTS + RUN_ID + own,
            persist_result=True,
            retries=_patience.retries,
            retry_delay_seconds=exponential_backoff(_patience.retry_delay_seconds),
            retry_jitter_factor=0.5,
            retry_condition_fn=another_try_may_help,
        )

    return decorate


def _without_traceback(record: logging.LogRecord) -> bool:
    """Leave out the traceback of an error that says itself what happened."""
    if record.exc_info and isinstance(record.exc_info[1], RolloutError):
        record.exc_info = None
    return True


get_logger("task_runs").addFilter(_without_traceback)


def say(name: str, detail: str) -> None:
    """Report what a step finds or does, to viewers of the release and in the task run's log."""
    tell(Progress(name, "running", detail))
    run_logger().info("%s", detail)


def run_logger() -> "logging.Logger | logging.LoggerAdapter[logging.Logger]":
    """Return the run's logger, or a plain one if the function is called outside of any run."""
    try:
        return get_run_logger()
    except MissingContextError:
        return get_logger("prefect_rollout")


def may_have_run_before() -> bool:
    """Return True if an earlier attempt of this step may have written.

    Return False only if Prefect knows that this is the first attempt of the flow run and, in a task, of the
    task run.
    """
    task_run, flow_run = TaskRunContext.get(), FlowRunContext.get()
    if flow_run is None or flow_run.flow_run is None:
        return True
    return flow_run.flow_run.run_count > 1 or (task_run is not None and task_run.task_run.run_count > 1)


def tags_of_the_run() -> list[str]:
    """Return the tags of the current flow run; empty outside of one."""
    context = FlowRunContext.get()
    return context.flow_run.tags if context and context.flow_run else []


def _tries_left() -> bool:
    context = TaskRunContext.get()
    return context is not None and context.task_run.run_count <= context.task.retries
