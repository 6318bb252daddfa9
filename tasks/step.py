"""What the eight steps have in common: their retries, their persisted results, their progress."""

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

from prefect_rollout.errors import UNLISTED, NotFoundError, RolloutError
from prefect_rollout.progress import Progress, tell
from prefect_rollout.settings import patience

P = ParamSpec("P")
R = TypeVar("R")

_patience = patience()


async def another_try_may_help(_task: Any, _task_run: TaskRun, state: State[Any]) -> bool:
    """Whether Prefect should retry: only what an error of ours marks as retryable.

    Returns not before the time that the platform's `Retry-After` asked for has passed; Prefect's own
    back-off comes on top. It has to be `async def`: in an async task Prefect awaits it.
    """
    # The exception itself; `state.result()` would be a coroutine here, and the answer always no.
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
    cache_policy: CachePolicy = INPUTS + RUN_ID,
) -> Callable[[Callable[P, Coroutine[Any, Any, R]]], Task[P, Coroutine[Any, Any, R]]]:
    """Makes a step of a release from a coroutine function.

    Results persist under the step's inputs and the flow run, so that a flow run that is retried goes
    on after the last step that was completed. Errors of our tree are given the step's name.

    Args:
        name: the step's name in the article, one of `progress.STEPS`.
        task_run_name: what the UI shows, with the step's arguments in braces.
        cache_policy: replaces what the persisted result is kept under.
    """

    def decorate(fn: Callable[P, Coroutine[Any, Any, R]]) -> Task[P, Coroutine[Any, Any, R]]:
        @functools.wraps(fn)
        async def told(*args: P.args, **kwargs: P.kwargs) -> R:
            started = time.monotonic()
            tell(Progress(name, "running"))
            try:
                result = await fn(*args, **kwargs)
            except RolloutError as error:
                error.step = error.step or name
                if isinstance(error, NotFoundError) and UNLISTED in tags_of_the_run():
                    error.unlist()
                again = error.retryable and _tries_left()
                seconds = time.monotonic() - started
                tell(Progress(name, "retrying" if again else "failed", error.problem, seconds))
                raise
            tell(Progress(name, "done", "", time.monotonic() - started))
            return result

        return Task(
            told,
            name=name,
            task_run_name=task_run_name,
            cache_policy=cache_policy,
            persist_result=True,
            retries=_patience.retries,
            retry_delay_seconds=exponential_backoff(_patience.retry_delay_seconds),
            retry_jitter_factor=0.5,
            retry_condition_fn=another_try_may_help,
        )

    return decorate


def say(name: str, detail: str) -> None:
    """Says what a step found or does: to those who watch the release, and in the task run's log."""
    tell(Progress(name, "running", detail))
    run_logger().info("%s", detail)


def run_logger() -> "logging.Logger | logging.LoggerAdapter[logging.Logger]":
    """The run's logger, or a plain one where a step's function is called outside of any run."""
    try:
        return get_run_logger()
    except MissingContextError:
        return get_logger("prefect_rollout")


def may_have_run_before() -> bool:
    """Whether this step may have been tried before, so that a write of it may have taken effect.

    No only where Prefect knows that this is the first try of the task in the first run of the flow; in
    the flow itself, that it is the flow's first.
    """
    task_run, flow_run = TaskRunContext.get(), FlowRunContext.get()
    if flow_run is None or flow_run.flow_run is None:
        return True
    return flow_run.flow_run.run_count > 1 or (task_run is not None and task_run.task_run.run_count > 1)


def tags_of_the_run() -> list[str]:
    """The tags of the flow run that runs here; none outside of one."""
    context = FlowRunContext.get()
    return context.flow_run.tags if context and context.flow_run else []


def _tries_left() -> bool:
    context = TaskRunContext.get()
    return context is not None and context.task_run.run_count <= context.task.retries
