"""The process that executes a flow run, and the storage of its results, which a later process needs."""

import os
import socket
from typing import Any, cast

from prefect import Flow
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import FlowRun, State
from prefect.flow_engine import run_flow
from prefect.results import aget_default_result_storage, get_result_store

from prefect_rollout.errors import ConfigurationError
from prefect_rollout.runs.flow_runs import BATCH_TAG, HOST, PROCESS
from prefect_rollout.text import one_line


def this_host() -> str:
    """Return the name of this machine."""
    return one_line(socket.gethostname(), 80)


def this_process(pid: int | None = None) -> str:
    """Return the label of this process, or of the process with that id on this machine."""
    return f"{this_host()} {os.getpid() if pid is None else pid}"


async def claim(client: PrefectClient, run: FlowRun) -> None:
    """Label a run that ran before with this process, so that `has_ended` ignores its earlier process.

    Call it before the run is Running again.
    """
    if run.labels.get(PROCESS) not in {None, this_process()}:
        await client.update_flow_run_labels(run.id, {PROCESS: this_process()})


def has_ended(run: FlowRun) -> bool:
    """Return whether the run's process ran on this machine and has ended; False if that is unknown.

    Only for runs of a local server: containers can share a host's name without its processes.
    """
    pid = str(run.labels.get(PROCESS, "")).rpartition(" ")[2]
    # On Windows os.kill would end the process.
    if os.name != "posix" or not pid.isdecimal() or run.labels[PROCESS] != this_process(int(pid)):
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False


async def execute(client: PrefectClient, flow: Flow[Any, Any], run: FlowRun) -> State[Any]:
    """Execute a pending run of the flow in this process, and return the state in which it ends.

    Raises:
        Pause: it was suspended, and waits for a person.
        Abort: Prefect does not let it begin, or another process has taken it over.
    """
    await claim(client, run)
    ended: Any = run_flow(flow, flow_run=run, return_type="state")  # of an async flow: to be awaited
    return cast(State[Any], await ended)


async def check_result_storage(run: FlowRun) -> None:
    """Write a file to the result storage, or read the file that an earlier attempt of the run wrote.

    A retry on a machine that does not see the results of the first attempt would repeat the steps, and
    would not know what ran before the release.

    Raises:
        ConfigurationError: results cannot be stored, or those of an earlier attempt cannot be read.
    """
    storage = get_result_store().result_storage or await aget_default_result_storage()
    key, host = f"prefect-rollout-{run.id}", run.labels.get(HOST)
    problem = f"results cannot be stored in {storage.get_block_type_slug()}"
    advice = (
        "Store results where every machine that runs releases finds them: set "
        "PREFECT_DEFAULT_RESULT_STORAGE_BLOCK to a storage block that all machines share."
    )
    try:
        if batch := _batch_of(run):
            problem = f"the results of the batch that started this run ({batch}) are out of reach here"
            await storage.read_path(f"prefect-rollout-{batch}")
        if host:
            problem = (
                f"the results of this run on {one_line(host, 80)}, by an earlier attempt, are out of reach"
            )
            advice += " Until then, retry the run on that machine, or start a new release."
            await storage.read_path(key)
        else:
            await storage.write_path(key, content=b"{}")
    except Exception as error:  # a storage block may raise anything, even for a missing file
        raise ConfigurationError(
            f"{problem}: {type(error).__name__} {one_line(error, 120)}", advice=advice
        ) from error


def _batch_of(run: FlowRun) -> str | None:
    """Return the id of the batch run that started this release, which has checked its own results."""
    if run.parent_task_run_id is None:
        return None
    return next((tag.removeprefix(BATCH_TAG) for tag in run.tags if tag.startswith(BATCH_TAG)), None)
