"""Flow runs in the process of a command: Prefect API, progress, Ctrl-C and exit code."""

import asyncio
import contextlib
import signal
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import UUID

from prefect_rollout.batch.plan import Plan
from prefect_rollout.batch.result import BatchResult, looking_on
from prefect_rollout.cli.output import Ended, err, program, say, waiting
from prefect_rollout.cli.progress_view import LiveProgress
from prefect_rollout.cli.results import end
from prefect_rollout.errors import ConfigurationError, InputError, LockLostError, UnforeseenError
from prefect_rollout.execution import endpoint, prefect_api
from prefect_rollout.release.progress import listening
from prefect_rollout.release.request import Checked
from prefect_rollout.release.result import ReleaseResult
from prefect_rollout.text import one_line

if TYPE_CHECKING:
    from prefect.client.orchestration import PrefectClient
    from prefect.client.schemas.objects import State

T = TypeVar("T")
Result = ReleaseResult | BatchResult
Work = Callable[[LiveProgress], Coroutine[Any, Any, Result]]


def retry(run_id: str) -> Ended:
    """Continue a flow run that ended; `run_id` may be the beginning of its id."""

    async def work(view: LiveProgress) -> Result:
        from prefect import get_client

        from prefect_rollout.execution import releases

        async with get_client() as client:
            found = await releases.find(client, run_id)
            await _show_clouds(found.run.parameters)
            with _link_shown(), view.showing(found.flow, found.run.parameters):
                return await (await releases.resume(client, found)).aresult()

    return _conduct(work)


def run_flow(flow: str, request: Checked, home: Path = endpoint.HOME) -> Ended:
    """Run the flow of that name in this process."""

    async def work(view: LiveProgress) -> Result:
        from prefect import tags

        from prefect_rollout.flows import FLOWS
        from prefect_rollout.runs.flow_runs import first_tags

        # No `model_dump`: a plan keeps the lines of its file.
        parameters = {field: getattr(request, field) for field in type(request).model_fields}
        await _show_clouds(parameters)
        with tags(*first_tags("cli", request)), _link_shown(), view.showing(flow, parameters):
            made: Any = FLOWS[flow](**parameters, return_state=True)
            state: State[Result] = await made
        return await state.aresult()

    return _conduct(work, home)


def _conduct(work: Work, home: Path = endpoint.HOME) -> Ended:
    """Run a flow, and show its progress and its result.

    Raises:
        RolloutError: the run did not succeed.
    """
    view = LiveProgress(err)

    async def cancellable() -> Result:
        return await _cancelled_by_ctrl_c(work(view))

    prefect_api.prepare()  # before Prefect is imported
    with waiting("Loading Prefect"):
        from prefect.exceptions import Abort, TerminationSignal
    try:
        return end(in_prefect(cancellable, home))
    except (TerminationSignal, KeyboardInterrupt, asyncio.CancelledError) as signalled:  # the first: SIGTERM
        from prefect_rollout.runs import guard

        if not guard.stopped:
            raise KeyboardInterrupt from signalled
        raise guard.stopped[-1] from signalled
    except Abort as aborted:  # another process continues the run
        raise LockLostError(str(aborted)) from aborted
    except ConfigurationError as error:
        if view.begun and error.result is None:
            raise UnforeseenError(
                error.problem,
                advice=f"{error.advice} The run had begun: `prefect-rollout list` shows its state.",
            ) from error
        raise


def with_client(work: Callable[["PrefectClient"], Awaitable[T]], what: str = "Reading from Prefect") -> T:
    """Run `work` with a client of the Prefect API."""

    async def call() -> T:
        from prefect import get_client

        with waiting(what):
            async with get_client() as client:
                return await work(client)

    return in_prefect(call)


def in_prefect(work: Callable[[], Coroutine[Any, Any, T]], home: Path = endpoint.HOME) -> T:
    """Run `work` with the configured Prefect API, or with the user's local server in the folder `home`.

    Raises:
        ConfigurationError: the API did not answer.
    """
    prefect_api.prepare()
    with waiting("Loading Prefect"):
        import httpx
        from prefect.exceptions import PrefectException

        from prefect_rollout import flows  # noqa: F401 - takes seconds
    try:
        return asyncio.run(_connected(work, home))
    except (httpx.HTTPError, PrefectException) as error:
        raise prefect_api.problem_of(error) from error


async def _connected(work: Callable[[], Coroutine[Any, Any, T]], home: Path) -> T:
    def starting() -> None:
        say("Starting the local Prefect server. This takes a few seconds.")

    async with contextlib.AsyncExitStack() as stack:
        with waiting("Connecting to Prefect"):
            daemon = await stack.enter_async_context(prefect_api.connected(home, starting=starting))
            say(f"Prefect API: {prefect_api.api_in_use()}")
            if daemon is not None:
                say(f"Its UI asks for the password in {home / endpoint.PASSWORD}")
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


@contextlib.contextmanager
def _link_shown() -> Iterator[None]:
    """Show the link of the run once it has begun, within the context."""
    shown: list[object] = []

    def show(_: object) -> None:
        from prefect.runtime import flow_run

        from prefect_rollout.runs.lifecycle import run_link

        if not shown and flow_run.id:
            shown.append(flow_run.id)
            say(f"Flow run: {run_link(UUID(flow_run.id)) or flow_run.id}")

    with listening(show), looking_on(show):
        yield


async def _show_clouds(parameters: Mapping[str, Any]) -> None:
    """Show which clouds a run with these parameters changes."""
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
