"""Prefect's embedded API: its settings, a home of its own for the demo, and a clean end.

Call `prepare` or `isolate` before Prefect is imported: it reads its settings from the environment then.
"""

import asyncio
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import UUID

from prefect_rollout.errors import ConfigurationError
from prefect_rollout.text import one_line

# Defaults for a run from the command line; whoever sets a variable keeps it.
DEFAULTS = {
    "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "true",
    # A first start migrates a new database and takes longer than Prefect's 20 s on a small machine.
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    # With the default of 1 every flow run waits seconds behind the records of its task runs.
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_BATCH_SIZE": "200",
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_READ_BATCH_SIZE": "50",
    # Whole seconds: Prefect cuts fractions off, and with 0 its server would never rest.
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_FLUSH_INTERVAL": "1",
    # By default leases live in memory, and a server that restarts forgets who holds what.
    "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
    # The steps are shown by the command itself; the flow run's log holds the rest.
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
    "PREFECT_CLI_PROMPT": "false",
}

DEMO_HOME = Path.home() / ".prefect-rollout" / "demo"


def prepare() -> None:
    """Sets defaults for whichever Prefect API is configured, and for the embedded one otherwise."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)


def isolate(home: Path) -> None:
    """Gives this process a Prefect home of its own, so that the user's profile and database stay."""
    home.mkdir(parents=True, exist_ok=True)
    for name in [name for name in os.environ if name.startswith("PREFECT_")]:
        if not name.startswith("PREFECT_ROLLOUT_"):
            del os.environ[name]
    os.environ["PREFECT_HOME"] = str(home)
    # Prefect also reads prefect.toml, pyproject.toml and .env of the working directory.
    os.chdir(home)
    prepare()


def in_use() -> bool:
    """Whether no Prefect API is configured, so that Prefect embeds one."""
    from prefect.settings import PREFECT_API_URL

    return not PREFECT_API_URL.value()


def api_in_use() -> str:
    """Which Prefect API the process speaks to, for a person to read."""
    from prefect.settings import PREFECT_API_URL, PREFECT_HOME

    return PREFECT_API_URL.value() or f"embedded, in {PREFECT_HOME.value()}"


def reach() -> dict[UUID, str]:
    """Makes sure that the Prefect API answers; an embedded one is started, and ends with this process.

    Left to itself, Prefect starts it inside the flow. Then Ctrl-C, which a terminal sends to every
    process of the command, ends the API first, and the flow waits for it in vain.

    Returns:
        Releases of the embedded API, `{id: name}`, that were killed: they are Crashed from now on.

    Raises:
        ConfigurationError: the configured API does not answer.
    """
    from prefect import get_client

    if in_use():
        # Only here: the import takes seconds.
        from prefect.server.api.server import SubprocessASGIServer

        with _spared_from_ctrl_c():
            server = SubprocessASGIServer()
            server.start()
            if server.server_process:
                end_with_this_process(server.server_process.pid)
        return asyncio.run(_killed())
    with get_client(sync_client=True) as client:
        problem = client.api_healthcheck()
    if problem:
        raise ConfigurationError(
            f"the Prefect API {api_in_use()} does not answer: {one_line(problem, 120)}",
            advice="Start it, or correct PREFECT_API_URL; unset, an embedded API is used.",
        )
    return {}


async def _killed() -> dict[UUID, str]:
    # The embedded API ends with the command: where a release is killed, nothing may be left that waits
    # for its heartbeat. Whatever uses this home runs on this machine, so its processes can be asked for.
    from prefect import get_client

    from prefect_rollout import guard, reaper

    async with get_client() as client:
        killed = await reaper.sweep(client, gone=guard.ended_here)
        # The releases of a batch are gone on with by the batch.
        return {run.id: run.name for run in killed if run.parent_task_run_id is None}


_watches: list[subprocess.Popen[bytes]] = []


def end_with_this_process(pid: int) -> None:
    """Has the process end when this one is killed, which leaves nobody to end it."""
    if os.name == "posix":
        # It reads from a pipe that nobody writes to: the pipe closes when this process is no more.
        watch = ["sh", "-c", 'read -r _; kill "$0" 2>/dev/null', str(pid)]
        _watches.append(
            subprocess.Popen(  # noqa: S603 - nothing of it comes from outside
                watch, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
        )


@contextmanager
def _spared_from_ctrl_c() -> Iterator[None]:
    """Has processes that are started within never see SIGINT: a blocked signal is inherited so."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows, where Ctrl-C goes other ways
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


async def settle(flow_run_id: UUID | None, seconds: float = 10) -> None:
    """Waits, `seconds` at the most, until the embedded API has recorded how the task runs ended.

    Task runs are recorded behind the flow's back; an embedded server that stops with this process
    before that would show them running for ever.
    """
    from prefect import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
    from prefect.events.worker import EventsWorker

    if not in_use() or flow_run_id is None:
        return
    until = time.monotonic() + seconds
    await asyncio.to_thread(EventsWorker.drain_all, timeout=seconds)
    async with get_client() as client:
        tries = (await client.read_flow_run(flow_run_id)).run_count
        while time.monotonic() < until:
            runs = await client.read_task_runs(
                flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[flow_run_id]))
            )
            # Those of an earlier try that was killed never end.
            ours = [run for run in runs if run.flow_run_run_count == tries]
            if ours and all(run.state is not None and run.state.is_final() for run in ours):
                return
            await asyncio.sleep(0.1)
