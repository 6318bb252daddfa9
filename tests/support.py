"""What several test modules use."""

import socket
import sys
from pathlib import Path
from typing import Any

import httpx

from prefect_rollout.simulator import SimulatorServer

BIN = Path(sys.executable).parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Cloud:
    """A simulated cloud over a real socket, and what it says of itself."""

    def __init__(self, server: SimulatorServer) -> None:
        self.url = server.url
        self.inside = server.cloud
        self.environment = {
            "K8S_API_URL": server.url,
            "K8S_KEY_ID": "demo-key",
            "K8S_SECRET_KEY": "demo-secret",
        }

    def control(self, method: str, path: str, **options: Any) -> Any:
        answer = httpx.request(method, f"{self.url}/_control/{path}", timeout=30, **options)
        answer.raise_for_status()
        return answer.json()

    def faults(self, *faults: dict[str, Any]) -> None:
        self.control("PUT", "faults", json=list(faults))

    def publish(self, *, deployment_id: int, template_id: int, cluster: str) -> None:
        """Publishes as someone else would, past any fault."""
        self.inside.publish(3290, deployment_id, template_id, cluster, 1, user="lisi", key=None)

    @property
    def record(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.control("GET", "record")
        return found

    @property
    def requests(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.control("GET", "requests")
        return found

    def truth(self, deployment: str) -> list[dict[str, Any]]:
        return [each for each in self.control("GET", "truth") if each["deployment"] == deployment]
