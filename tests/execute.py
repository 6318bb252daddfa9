"""Runs a flow run of ours, as `prefect flow-run execute` runs one of a deployment: `execute.py ID`."""

import asyncio
import sys
from typing import Any
from uuid import UUID

from prefect import get_client
from prefect.flow_engine import run_flow

from prefect_rollout.flows import FLOWS


async def execute(run_id: UUID) -> None:
    """Run the flow of the flow run."""
    async with get_client() as client:
        run = await client.read_flow_run(run_id)
        flow = FLOWS[(await client.read_flow(run.flow_id)).name]
    ended: Any = run_flow(flow, flow_run=run, return_type="state")  # of an async flow, to be awaited
    await ended


asyncio.run(execute(UUID(sys.argv[1])))
