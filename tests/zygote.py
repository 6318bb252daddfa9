"""Runs flow runs in processes of their own that need not import Prefect first: forked from this one.

A line on standard input is an order, `{"run": flow run id, "environment": {...}}`; the answer is the
process's id. Started by `support.Zygote`.
"""

import asyncio
import json
import os
import signal
import sys
from typing import Any
from uuid import UUID

from prefect import get_client
from prefect.flow_engine import run_flow

from prefect_rollout.flows.again import FLOWS


async def execute(run_id: UUID) -> None:
    """The flow run, as `prefect flow-run execute` does."""
    async with get_client() as client:
        run = await client.read_flow_run(run_id)
        flow = FLOWS[(await client.read_flow(run.flow_id)).name]
    ended: Any = run_flow(flow, flow_run=run, return_type="state")  # of an async flow, to be awaited
    await ended


def main() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # whoever ends is gone at once
    for line in sys.stdin:
        order = json.loads(line)
        if pid := os.fork():
            print(pid, flush=True)  # noqa: T201 - the answer
            continue
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.environ.update(order["environment"])
        asyncio.run(execute(UUID(order["run"])))
        return


main()
