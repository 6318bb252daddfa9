"""Flow runs in the process of a command: Prefect API, progress, Ctrl-C and exit code."""

import asyncio
import contextlib
import signal
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, TypeVar
from uuid import UUID

from prefect_rollout.batch.plan import Plan
from prefect_rollout.batch.result import BatchResult
from prefect_rollout.cli.output import err, say
from prefect_rollout.cli.progress_view import LiveProgress
from prefect_rollout.cli.results import end, program, stdout_for_json
from prefect_rollout.errors import ConfigurationError, InputError, LockLostError, RolloutError
from prefect_rollout.execution import earlier, endpoint, prefect_api
from prefect_rollout.release.request import Checked
from prefect_rollout.release.result import ReleaseResult
from prefect_rollout.text import one_line

if TYPE_CHECKING:
    from prefect.client.schemas.objects import State

T = TypeVar("T")
Result = ReleaseResult | BatchResult
Work = Callable[[], Coroutine[Any, Any, Result]]

_api_lines: ContextVar[Sequence[str]] = ContextVar("api_lines", default=())
"""The Prefect API in use; shown after the cloud, which matters more."""


def run_flow(flow: str, request: Callable[[], Checked], as_json: bool) -> int:
    """Check the request, run the flow of that name, and return the exit code."""
    prefect_api.prepare()
    with stdout_for_json(as_json) as stdout:
        try:
            checked = request()
        except InputError as error:
            return end(None, error, stdout)
        return conduct(lambda: call_flow(flow, checked), stdout)


def retry_run(run_id: str, as_json: bool) -> int:
    """Continue a flow run that ended, and return the exit code."""
    prefect_api.prepare()
    with stdout_for_json(as_json) as stdout:
        try:
            wanted = UUID(run_id)
        except ValueError:
            problem = f"run_id: {one_line(run_id, 80)!r} is not the id of a flow run, such as {UUID(int=0)}"
            return end(None, InputError(problem, field="run_id"), stdout)
        return conduct(lambda: _retry(wanted), stdout)


async def _retry(run_id: UUID) -> Result:
    from prefect_rollout.execution.resume import find, resume

    await _show_clouds((await find(run_id)).parameters)
    return await (await resume(run_id)).aresult()


async def call_flow(name: str, request: Checked) -> Result:
    """Run the flow of that name in this process."""
    from prefect import tags

    from prefect_rollout import flows
    from prefect_rollout.runs.labels import TRIGGER

    # No `model_dump`: a plan keeps the lines of its file.
    parameters = {field: getattr(request, field) for field in type(request).model_fields}
    await _show_clouds(parameters)
    with tags(f"{TRIGGER}cli"):
        state: State[Result] = await getattr(flows, name)(**parameters, return_state=True)
    return await state.aresult()


def conduct(work: Work, stdout: TextIO | None, home: Path = endpoint.HOME) -> int:
    """Run a flow, show its progress and its result, and return the exit code."""
    from prefect.exceptions import Abort, TerminationSignal

    async def shown() -> Result:
        with LiveProgress(err).showing():
            return await _cancelled_by_ctrl_c(work())

    result: Result | None = None
    error: RolloutError | None = None
    try:
        result = asyncio.run(at_the_api(shown, home))
    except RolloutError as failure:
        result, error = failure.result, failure
    except (TerminationSignal, KeyboardInterrupt, asyncio.CancelledError) as signalled:  # the first: SIGTERM
        from prefect_rollout.runs import guard

        if not guard.stopped:
            raise KeyboardInterrupt from signalled
        error = guard.stopped[-1]
        result = error.result
    except Abort as aborted:  # another process continues the run
        error = LockLostError(str(aborted))
    return end(result, error, stdout)


async def at_the_api(work: Callable[[], Coroutine[Any, Any, T]], home: Path = endpoint.HOME) -> T:
    """Run `work` with the configured Prefect API, or with the user's local server.

    Args:
        work: what to run.
        home: folder of the local server.
    """

    def starting() -> None:
        say("Starting the local Prefect server. This takes a few seconds.")

    async with prefect_api.connected(home, starting=starting) as daemon:
        lines = [f"Prefect API: {prefect_api.api_in_use()}"]
        _api_lines.set(lines)
        if daemon is not None:
            lines.append(f"Its UI asks for the password in {home / endpoint.PASSWORD}")
            if home == endpoint.HOME:
                earlier.tell_once(say)
            await _offer_killed_runs()
        return await work()


async def _offer_killed_runs() -> None:
    from prefect import get_client

    from prefect_rollout.runs import processes, zombies

    async with get_client() as client:
        # All users of this server run on this machine, so their processes can be checked.
        await zombies.sweep(client, ended=processes.has_ended)
        for run in await zombies.to_offer(client):
            say(
                f"A release was killed while it ran: {one_line(run.name, 80)}. "
                f"Continue it: {program('prefect-rollout')} retry {run.id}"
            )


async def _cancelled_by_ctrl_c(work: Coroutine[Any, Any, Result]) -> Result:
    """Run `work`; the first Ctrl-C cancels the release cleanly, a second one ends it at once."""
    from prefect_rollout.runs import guard

    def cancel() -> None:
        loop.remove_signal_handler(signal.SIGINT)
        if guard.cancel_all("cancelled by Ctrl-C"):
            err.print("\nCancelling, and reading what is live. Press Ctrl-C again to end at once.")
        else:
            task.cancel()

    loop, task = asyncio.get_running_loop(), asyncio.ensure_future(work)
    with contextlib.suppress(NotImplementedError):  # Windows, where Ctrl-C ends it at once
        loop.add_signal_handler(signal.SIGINT, cancel)
    return await task


async def _show_clouds(parameters: Mapping[str, Any]) -> None:
    """Show which clouds a run with these parameters changes, then the Prefect API in use."""
    from prefect_rollout.blocks import choose_target

    clouds = []
    with contextlib.suppress(ConfigurationError, InputError):  # the run itself reports the error
        targets = [str(parameters.get("target") or "")]
        if "plan" in parameters:
            targets = Plan.of_parameter(parameters["plan"]).targets
        for target in targets:
            clouds.append((await choose_target(target)).words)  # noqa: PERF401 - keep those found before an error
    for cloud in dict.fromkeys(clouds):
        say(f"Cloud: {one_line(cloud)}")
    for line in _api_lines.get():
        say(line)
