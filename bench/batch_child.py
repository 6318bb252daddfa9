"""A batch in this process with a local server, as a person starts it; prints what it took as JSON."""

import asyncio
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from rig import Meter

from prefect_rollout.execution import endpoint, prefect_api

if TYPE_CHECKING:  # Prefect reads its settings when it is imported
    from prefect.client.schemas.objects import State


def main(count: int, home: Path) -> None:
    """Releases apps 1 to `count`, all in one wave, as many at once as a plan allows."""
    prefect_api.isolate(home / endpoint.PREFECT_HOME)
    asyncio.run(released(count, home))


async def released(count: int, home: Path) -> None:
    """The same, once the server answers."""
    async with prefect_api.connected(home):
        await measured(count)


async def measured(count: int) -> None:
    """The same, with the server that is in use."""
    from prefect_rollout.batch.plan import Plan
    from prefect_rollout.flows import deploy_batch

    plan = Plan.model_validate(
        {
            "max_parallel": min(count, 500),  # more than a plan may have at once
            "releases": [
                {"app_id": app, "deployment": "web", "images": {"web": "r/app:2"}}
                for app in range(1, count + 1)
            ],
        }
    )
    this = psutil.Process()
    watched = [
        this,
        *(
            one
            for one in this.children(recursive=True)
            if "prefect_rollout.execution.local_server" in one.cmdline()
        ),
    ]
    memory, before, began = this.memory_info().rss, [_seconds(one) for one in watched], time.monotonic()
    with Meter(os.environ["K8S_API_URL"]).reading() as meter:
        state = await _ended(deploy_batch(plan=plan, return_state=True))
    wall = time.monotonic() - began
    _settle(watched[-1])
    ours, server = (_seconds(one) - earlier for one, earlier in zip(watched, before, strict=True))
    figures = {
        "state": f"{state.name}: {state.message}",
        "wall": wall,
        "cpu": ours,
        "server_cpu": server,
        "memory": _most_memory() - memory,
        "to_cloud": len(meter.of(cloud=True)),
        "to_prefect": len(meter.of(cloud=False)),
        "peak": meter.peak(),
    }
    print(json.dumps(figures))


async def _ended(batch: Any) -> "State[Any]":
    state: State[Any] = await batch
    return state


def _settle(server: psutil.Process) -> None:
    """Returns once the server has nothing left to do: it records events behind the flow's back."""
    for _ in range(300):
        if server.cpu_percent(interval=1) < 10:
            return
    raise RuntimeError("the Prefect server does not come to rest")


def _most_memory() -> int:
    """The most bytes that this process has had at once; of Linux, where those of its parent do not count."""
    status = Path("/proc/self/status")
    if not status.exists():
        return psutil.Process().memory_info().rss
    (kilobytes,) = re.findall(r"^VmHWM:\s+(\d+) kB$", status.read_text(), re.MULTILINE)
    return int(kilobytes) * 1024


def _seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
