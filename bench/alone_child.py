"""Releases as Prefect's process worker runs them, each in a process of its own; prints what it took."""

import asyncio
import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
from prefect import get_client
from prefect.types.entrypoint import EntrypointType
from rig import PREFECT, process

from prefect_rollout.flows import deploy_latest_image
from prefect_rollout.runs.flow_runs import by_id

POOL = "alone"


async def main(count: int, folder: Path) -> None:
    """Releases apps 1 to `count`."""
    create = [PREFECT, "--no-prompt", "work-pool", "create", POOL, "--type", "process"]
    await asyncio.to_thread(subprocess.run, create, check=True, capture_output=True)
    deployment = await deploy_latest_image.ato_deployment(
        POOL, work_pool_name=POOL, entrypoint_type=EntrypointType.MODULE_PATH
    )
    deployment_id = await deployment.aapply()
    environment = {**os.environ, "PREFECT_WORKER_QUERY_SECONDS": "1"}
    async with get_client() as api:
        with process([PREFECT, "worker", "start", "--pool", POOL], environment, folder) as worker:
            while not await api.read_workers_for_work_pool(POOL):
                await asyncio.sleep(0.1)
            began, most = time.monotonic(), 0
            runs = [
                await api.create_flow_run_from_deployment(
                    deployment_id,
                    parameters={"app_id": app, "deployment": "web", "images": {"web": "r/app:2"}},
                )
                for app in range(1, count + 1)
            ]
            while True:
                now = (await by_id(api, [run.id for run in runs])).values()
                if all(run.state is not None and run.state.is_final() for run in now):
                    break
                most = max(most, sum(_own_memory(one) for one in worker.children(recursive=True)))
                await asyncio.sleep(0.5)
            wall = time.monotonic() - began
    if not all(run.state is not None and run.state.is_completed() for run in now):
        raise RuntimeError(f"not all were released: {[run.state for run in now]}")
    print(json.dumps({"wall": wall, "memory": most}))


def _own_memory(one: psutil.Process) -> int:
    """Bytes that end with the process."""
    with suppress(psutil.NoSuchProcess):
        return int(one.memory_full_info().uss)
    return 0


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), Path(sys.argv[2])))
