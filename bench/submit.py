"""From a request to the release Running: this package's warm runner and worker against Prefect's own.

Each turn submits the same dry run of a restart to the same local Prefect server, one way after the other:
by an MCP tool, which the local service's runner executes; and as runs of deployments for a worker of the
type `rollout`, for Prefect's process worker and for Prefect's `serve`, each with its own settings and with a
look every second or two. So whatever else the machine does meets all of them.
"""

import asyncio
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any
from uuid import UUID

from mcp import Client, StdioServerParameters
from rig import PREFECT, ROLLOUT, Row, clean_environment, simulated, workplace

from prefect_rollout.execution import endpoint

SERVE = (
    "from prefect import serve; from prefect_rollout.flows import restart; "
    "serve(restart.to_deployment({name!r}), query_seconds={seconds}, print_starting_message=False)"
)
MCP = "by MCP"
GOALS = (1.0, 3.0)
POOLS = {  # label: work pool's type, seconds between looks
    "worker of type rollout, 2 s": ("rollout", 2),
    "Prefect's process worker, 2 s": ("process", 2),
    "Prefect's process worker, its default": ("process", 10),
}
SERVED = {"Prefect's serve, 1 s": 1, "Prefect's serve, its default": 10}
RELEASE = {"app_id": "3290", "deployment": "qapm-home"}
LONGEST_SECONDS = 120


def measure(times: int = 10) -> list[Row]:
    """The median and the longest of each way, warm, and the first of each."""
    return asyncio.run(_measure(times))


async def _measure(times: int) -> list[Row]:
    with workplace() as folder, simulated(folder, {}) as cloud:
        variables = {**clean_environment(folder), **cloud.variables}
        server = StdioServerParameters(command=ROLLOUT, args=["mcp"], env=variables)
        async with Client(server) as client:
            began = time.monotonic()
            while (await client.call_tool("list_releases", {})).is_error:
                await asyncio.sleep(0.1)
            first = time.monotonic() - began
            lease = await endpoint.connect(folder / ".prefect-rollout" / "local")
            os.environ |= {
                "PREFECT_API_URL": lease.address.api,
                "PREFECT_API_AUTH_STRING": lease.address.password,
                "PREFECT_HOME": str(folder / "prefect"),
                "PREFECT_LOGGING_LEVEL": "ERROR",
            }
            processes: list[subprocess.Popen[bytes]] = []
            try:
                rows = await _measured(client, times, variables | _prefects(), processes)
            finally:
                for process in processes:
                    process.kill()
                await lease.close()
    return [Row("submit: an assistant's first start, until its server answers", first, "s"), *rows]


def _prefects() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith("PREFECT_")}


async def _measured(
    client: Client, times: int, variables: dict[str, str], processes: list[subprocess.Popen[bytes]]
) -> list[Row]:
    from prefect import get_client
    from prefect.client.orchestration import PrefectClient

    def start(command: list[str], seconds: int) -> None:
        processes.append(
            subprocess.Popen(
                command,
                env={**variables, "PREFECT_WORKER_QUERY_SECONDS": str(seconds)},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        )

    async def by_mcp(api: PrefectClient) -> UUID:
        asked = {**RELEASE, "action": "restart", "wait_seconds": 0}
        answer = await client.call_tool("plan_release", asked)
        assert answer.structured_content, answer
        return UUID(answer.structured_content["flow_run_id"])

    def by(name: str) -> Callable[[PrefectClient], Awaitable[UUID]]:
        async def submit(api: PrefectClient) -> UUID:
            deployment = await api.read_deployment_by_name(f"restart/{name}")
            parameters: dict[str, Any] = {**RELEASE, "dry_run": True}
            return (await api.create_flow_run_from_deployment(deployment.id, parameters=parameters)).id

        return submit

    async with get_client() as api:
        ways: dict[str, Callable[[PrefectClient], Awaitable[UUID]]] = {MCP: by_mcp}
        for label, (kind, seconds) in POOLS.items():
            name = f"{kind}-{seconds}"
            await _pooled(name, kind)
            start([PREFECT, "worker", "start", "--pool", name], seconds)
            ways[label] = by(name)
        for label, seconds in SERVED.items():
            name = f"served-{seconds}"
            start([sys.executable, "-c", SERVE.format(name=name, seconds=seconds)], seconds)
            await _deployed(api, name)
            ways[label] = by(name)
        running: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(times + 1):
            for name, submit in ways.items():
                called = time.time()
                running[name].append(await _running(api, await submit(api)) - called)
                await asyncio.sleep(turn % 5 * 0.7)  # at no fixed phase of anybody's look
    return [row for name, took in running.items() for row in _rows(name, took, running[MCP])]


def _rows(name: str, took: list[float], ours: list[float]) -> list[Row]:
    middle, goals = statistics.median(took[1:]), GOALS if name == MCP else (None, None)
    by = "" if name == MCP else f"×{middle / statistics.median(ours[1:]):.0f} of by MCP"
    return [
        Row(f"submit to Running, {name}: p50", middle, "s", goals[0], by),
        Row(f"submit to Running, {name}: longest", max(took[1:]), "s", goals[1], f"of {len(took) - 1}"),
        Row(f"submit to Running, {name}: the first", took[0], "s"),
    ]


async def _pooled(name: str, kind: str) -> None:
    """A work pool of the type, and a deployment of `restart` for it, as `prefect deploy` makes it."""
    from prefect.types.entrypoint import EntrypointType

    from prefect_rollout.flows import restart

    command = [PREFECT, "--no-prompt", "work-pool", "create", name, "--type", kind]
    await asyncio.to_thread(subprocess.run, command, check=True, capture_output=True)
    deployment = await restart.ato_deployment(
        name, work_pool_name=name, entrypoint_type=EntrypointType.MODULE_PATH
    )
    await deployment.aapply()


async def _deployed(api: Any, name: str) -> None:
    async with asyncio.timeout(LONGEST_SECONDS):
        while not [each for each in await api.read_deployments() if each.name == name]:
            await asyncio.sleep(0.5)


async def _running(api: Any, run_id: UUID) -> float:
    """When the run was Running, once it has ended."""
    async with asyncio.timeout(LONGEST_SECONDS):
        while True:
            states = await api.read_flow_run_states(run_id)
            if any(state.is_final() for state in states):
                break
            await asyncio.sleep(0.1)
    found = {state.name: state.timestamp.timestamp() for state in states}
    assert "Running" in found, [(state.name, state.message) for state in states]
    return float(found["Running"])
