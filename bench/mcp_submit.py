"""From an assistant's call to the release Running: the warm runner against Prefect's own.

    python bench/mcp_submit.py [times]

Each turn submits the same dry run three ways to the same local Prefect server: by an MCP tool, which the
warm runner of the local service executes; and as runs of a deployment that Prefect's `serve` executes, with
its own settings and with a look a second. So whatever else the machine does meets all of them.
"""

import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from uuid import UUID

from mcp import Client, StdioServerParameters

from prefect_rollout import local
from prefect_rollout.simulator import Scenario, SimulatorServer

BIN = Path(sys.executable).parent
SERVE = (
    "from prefect_rollout.flows import restart; "
    "restart.serve(name={name!r}, query_seconds={seconds}, print_starting_message=False)"
)
OURS, DEFAULT, QUICK = (
    "MCP, warm runner",
    "Prefect's serve, a look in 10 s",
    "Prefect's serve, a look a second",
)
RELEASE = {"app_id": "3290", "deployment": "qapm-home"}


async def main(times: int) -> None:
    """Prints the medians, and where the time goes."""
    with tempfile.TemporaryDirectory() as folder, SimulatorServer(Scenario()) as cloud:
        variables = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")} | {
            "HOME": folder,
            "K8S_API_URL": cloud.url,
            "K8S_KEY_ID": "demo-key",
            "K8S_SECRET_KEY": "demo-secret",
        }
        server = StdioServerParameters(command=str(BIN / "prefect-rollout"), args=["mcp"], env=variables)
        async with Client(server) as client:
            started = time.monotonic()
            while (await client.call_tool("list_releases", {})).is_error:
                pass
            print(f"a first start, until the local server answers: {time.monotonic() - started:.1f} s")
            lease = await local.attach(Path(folder) / ".prefect-rollout" / "local")
            api = {
                "PREFECT_API_URL": lease.address.api,
                "PREFECT_API_AUTH_STRING": lease.address.password,
                "PREFECT_HOME": folder,
            }
            os.environ |= api
            served = [
                subprocess.Popen(
                    [sys.executable, "-c", SERVE.format(name=name, seconds=seconds)],
                    env=variables | api,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
                for name, seconds in (("served-10", 10), ("served-1", 1))
            ]
            try:
                await _measured(client, times)
            finally:
                for process in served:
                    process.terminate()
                for process in served:
                    process.wait(30)
                await lease.close()


async def _measured(client: Client, times: int) -> None:
    from prefect import get_client

    async with get_client() as api:

        async def by_mcp() -> UUID:
            answer = await client.call_tool(
                "plan_release", {"action": "restart", **RELEASE, "wait_seconds": 0}
            )
            assert answer.structured_content, answer
            return UUID(answer.structured_content["flow_run_id"])

        def by(name: str) -> Callable[[], Awaitable[UUID]]:
            async def submit() -> UUID:
                deployment = await api.read_deployment_by_name(f"restart/{name}")
                parameters: dict[str, Any] = {**RELEASE, "dry_run": True}
                run = await api.create_flow_run_from_deployment(deployment.id, parameters=parameters)
                return run.id

            return submit

        for name in ("served-10", "served-1"):
            while not [each for each in await api.read_deployments() if each.name == name]:
                await asyncio.sleep(0.5)
        ways = {OURS: by_mcp, DEFAULT: by("served-10"), QUICK: by("served-1")}
        pending: dict[str, list[float]] = {name: [] for name in ways}
        running: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(times + 1):
            for name, submit in ways.items():
                called = time.time()
                run_id = await submit()
                while True:
                    states = {state.name: state for state in await api.read_flow_run_states(run_id)}
                    if any(state.is_final() for state in states.values()):
                        break
                    await asyncio.sleep(0.1)
                if turn and "Running" in states:  # the first is cold
                    pending[name].append(states["Pending"].timestamp.timestamp() - called)
                    running[name].append(states["Running"].timestamp.timestamp() - called)
                await asyncio.sleep(turn % 5 * 0.7)  # at no fixed phase of anybody's look
    base = statistics.median(running[OURS])
    print(f"{'':34} {'taken up':>9} {'Running':>9} {'at most':>9}")
    for name in ways:
        middle = statistics.median(running[name])
        taken = statistics.median(pending[name])
        print(f"{name:34} {taken:7.2f} s {middle:7.2f} s {max(running[name]):7.2f} s  ×{middle / base:.1f}")


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]) if len(sys.argv) > 1 else 10))
