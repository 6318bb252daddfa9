"""What an assistant waits for: the handshake, against the SDK's smallest server, and answers."""

import asyncio
import json
import sqlite3
import statistics
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx2
from mcp import Client
from mcp.client.streamable_http import streamable_http_client
from rig import (
    AT_ONCE,
    ROLLOUT,
    Row,
    answering,
    child,
    clean_environment,
    free_port,
    percentile,
    process,
    served_prefect,
    shop,
    simulated,
    spread,
    workplace,
)

SMALLEST = (
    "from mcp.server import MCPServer\n"
    "server = MCPServer('smallest')\n"
    "@server.tool()\n"
    "def ping(text: str) -> str:\n"
    "    return text\n"
    "server.run()\n"
)
INITIALIZE = {
    "jsonrpc": "2.0",
    "id": 1,
    "method": "initialize",
    "params": {
        "protocolVersion": "2025-06-18",
        "capabilities": {},
        "clientInfo": {"name": "bench", "version": "1"},
    },
}
LIST_TOOLS = (
    {"jsonrpc": "2.0", "method": "notifications/initialized"},
    {"jsonrpc": "2.0", "id": 2, "method": "tools/list"},
)
TOKEN = "a-token-of-the-bench-alone"
GOAL_TIMES_SMALLEST = 1.2


def measure(times: int = 20, runs: int = 10_000, clients: int = 50) -> list[Row]:
    """The handshake; then `get_release` and `list_releases` with that many past runs."""
    return _handshake(times) + asyncio.run(_answers(runs, clients))


# ---- the handshake ------------------------------------------------------------------------------


def _handshake(times: int) -> list[Row]:
    with workplace() as home:
        # A configured API: no local server starts beside the next measurement.
        environment = {**clean_environment(home), "PREFECT_API_URL": "http://127.0.0.1:9/api"}
        commands = {"smallest": [sys.executable, "-c", SMALLEST], "ours": [ROLLOUT, "mcp"]}
        took: dict[str, list[list[float]]] = {name: [] for name in commands}
        for turn in range(times + 1):
            for name, command in commands.items():
                seconds = _greeted(command, environment)
                if turn:  # the first one reads from the disk
                    took[name].append(seconds)
    rows = []
    for place, what in enumerate(("initialize", "tools/list")):
        ours, smallest = ([each[place] for each in took[name]] for name in ("ours", "smallest"))
        middle, least = statistics.median(ours), statistics.median(smallest)
        goal = GOAL_TIMES_SMALLEST if what == "initialize" else None
        rows += [
            Row(f"MCP: spawn to {what} answered", middle, "s", None, spread(ours)),
            Row(f"MCP: {what}, by the SDK's smallest server", least, "s", None, spread(smallest)),
            Row(f"MCP: {what} by that of the smallest", middle / least, "×", goal),
        ]
    return rows


def _greeted(command: list[str], environment: Mapping[str, str]) -> list[float]:
    """Seconds from a server's start until it has answered a handshake, and until it has listed its tools."""
    began = time.perf_counter()
    took, results = [], []
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
    ) as server:
        assert server.stdin
        assert server.stdout
        for messages in ([INITIALIZE], LIST_TOOLS):
            server.stdin.writelines(json.dumps(message).encode() + b"\n" for message in messages)
            server.stdin.flush()
            results.append(json.loads(server.stdout.readline())["result"])
            took.append(time.perf_counter() - began)
        server.stdin.close()
        server.wait(60)
    assert results[0]["serverInfo"], results
    assert results[1]["tools"], results
    return took


# ---- answers ------------------------------------------------------------------------------------


async def _answers(runs: int, clients: int) -> list[Row]:
    with workplace() as folder, simulated(folder, shop(1, AT_ONCE)) as cloud, served_prefect(folder) as api:
        variables = {**api, **cloud.variables}
        run_id = child("release_child.py", [], variables)["run"]
        _multiply(folder / "prefect" / "prefect.db", run_id, runs)
        port = free_port()
        command = [ROLLOUT, "mcp", "--http", "--port", str(port)]
        with process(command, {**variables, "PREFECT_ROLLOUT_MCP_TOKEN": TOKEN}, folder):
            answering(f"http://127.0.0.1:{port}/mcp")
            calls = {"get_release": {"flow_run_id": run_id}, "list_releases": {}}
            rows = []
            for tool, arguments in calls.items():
                rows += await _timed(f"http://127.0.0.1:{port}/mcp", tool, arguments, runs, clients)
            return rows


async def _timed(url: str, tool: str, arguments: dict[str, Any], runs: int, clients: int) -> list[Row]:
    alone = await _called(url, tool, arguments, 40)
    at_once = await asyncio.gather(*(_called(url, tool, arguments, 4) for _ in range(clients)))
    together = [seconds for each in at_once for seconds in each]
    return [
        Row(
            f"MCP: {tool} with {runs:,} runs: p50",
            statistics.median(alone),
            "s",
            None,
            "copies of a run and its state; steps, log and events of one",
        ),
        Row(f"MCP: {tool} with {runs:,} runs: p99", percentile(alone, 0.99), "s"),
        Row(f"MCP: {tool}, {clients} clients at once: p50", statistics.median(together), "s"),
        Row(f"MCP: {tool}, {clients} clients at once: p99", percentile(together, 0.99), "s"),
    ]


async def _called(url: str, tool: str, arguments: dict[str, Any], times: int) -> list[float]:
    took = []
    async with (
        httpx2.AsyncClient(headers={"Authorization": f"Bearer {TOKEN}"}, timeout=120) as http,
        Client(streamable_http_client(url, http_client=http)) as client,
    ):
        for turn in range(times + 1):
            began = time.monotonic()
            answer = await client.call_tool(tool, arguments)
            assert not answer.is_error, answer
            if turn:
                took.append(time.monotonic() - began)
    return took


def _multiply(database: Path, run_id: str, runs: int) -> None:
    """Copies a flow run, with its state, until there are so many: a server with a past."""
    original = uuid.UUID(run_id)
    with sqlite3.connect(database, timeout=60) as connection:
        connection.row_factory = sqlite3.Row
        run = dict(connection.execute("select * from flow_run where id = ?", (str(original),)).fetchone())
        state = dict(
            connection.execute("select * from flow_run_state where id = ?", (run["state_id"],)).fetchone()
        )
        for number in range(runs - 1):
            new, new_state = str(uuid.uuid4()), str(uuid.uuid4())
            _insert(connection, "flow_run_state", state | {"id": new_state, "flow_run_id": new})
            key = {"idempotency_key": f"copy-{number}"} if "idempotency_key" in run else {}
            _insert(connection, "flow_run", run | {"id": new, "state_id": new_state} | key)


def _insert(connection: sqlite3.Connection, table: str, row: dict[str, Any]) -> None:
    places = ", ".join(f":{name}" for name in row)
    connection.execute(f"insert into {table} ({', '.join(row)}) values ({places})", row)
