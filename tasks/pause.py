"""Pause between the clusters of a release."""

import asyncio

from prefect import task
from prefect.cache_policies import INPUTS, RUN_ID

from prefect_rollout.runs.throttle import slot_released


@task(
    name="pause",
    task_run_name="pause {seconds} s after {after}",
    persist_result=True,
    cache_policy=INPUTS + RUN_ID,
)
async def pause(seconds: float, *, after: str) -> str:
    """Wait some seconds after the release of a cluster, named by `after`, before the next write."""
    async with slot_released():
        await asyncio.sleep(seconds)
    return after
