"""The process that executes a flow run, stored in a label of the run."""

import os
import socket
from typing import Any, cast

from prefect import Flow
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import FlowRun, State
from prefect.flow_engine import run_flow

from prefect_rollout.runs.labels import PROCESS
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
    if PROCESS in run.labels:
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
