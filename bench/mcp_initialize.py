"""From the start of an MCP server to its answer to `initialize`: ours against the SDK's smallest.

    python bench/mcp_initialize.py [times]

Both are started turn by turn, so that whatever else the machine does meets both.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

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


def seconds(command: list[str], environment: dict[str, str]) -> float:
    """How long the command takes from its start to the answer."""
    started = time.perf_counter()
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
    ) as process:
        assert process.stdin
        assert process.stdout
        process.stdin.write(json.dumps(INITIALIZE).encode() + b"\n")
        process.stdin.flush()
        answer = json.loads(process.stdout.readline())
        took = time.perf_counter() - started
        process.stdin.close()
        process.wait(60)
    assert answer["result"]["serverInfo"], answer
    return took


def main(times: int) -> None:
    """Prints the medians and their ratio."""
    with tempfile.TemporaryDirectory() as home:
        # A configured API: no local server starts beside the next measurement.
        environment = {**os.environ, "HOME": home, "PREFECT_API_URL": "http://127.0.0.1:9/api"}
        commands = {
            "smallest server of the SDK": [sys.executable, "-c", SMALLEST],
            "prefect-rollout mcp": [str(Path(sys.executable).with_name("prefect-rollout")), "mcp"],
        }
        took: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(times + 1):
            for name, command in commands.items():
                took[name].append(seconds(command, environment))
        medians = {name: statistics.median(each[1:]) for name, each in took.items()}  # the first compiles
    base = medians["smallest server of the SDK"]
    for name, median in medians.items():
        low, high = min(took[name][1:]), max(took[name][1:])
        print(f"{name:28} {median:6.2f} s  ({low:.2f} to {high:.2f})  ×{median / base:.2f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10)
