"""What the measurements share: rows of the table, a cloud and a Prefect server of their own, a meter."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import psutil

from prefect_rollout.execution import prefect_api

BIN = Path(sys.executable).parent
ROLLOUT, PREFECT = str(BIN / "prefect-rollout"), str(BIN / "prefect")

_FREE = "import socket; s = socket.socket(); s.bind(('127.0.0.1', 0)); print(s.getsockname()[1])"


class Row(NamedTuple):
    """One figure; less is better.

    Attributes:
        name: what was measured, the same in every run.
        value: the figure.
        unit: such as s, MB, ×.
        goal: the most that it shall be; none where there is no goal.
        note: what it consists of, or is measured against.
    """

    name: str
    value: float
    unit: str
    goal: float | None = None
    note: str = ""


def spread(values: list[float]) -> str:
    """The least and the most."""
    return f"{min(values):.2f} to {max(values):.2f}"


def percentile(values: list[float], part: float) -> float:
    """The value that `part` of all are not above."""
    return sorted(values)[min(len(values) - 1, int(part * len(values)))]


# ---- processes ----------------------------------------------------------------------------------


def clean_environment(home: Path) -> dict[str, str]:
    """This process's environment, less what configures Prefect or a cloud."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "K8S_"))}
    # No registry has the images of the simulated cloud.
    own = {"PREFECT_HOME": str(home / "prefect"), "PREFECT_ROLLOUT_CHECK_IMAGES": "off"}
    return {**kept, "HOME": str(home), **own}


@contextmanager
def workplace() -> Iterator[Path]:
    """An empty folder, which serves as a home."""
    with tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@contextmanager
def process(command: list[str], environment: Mapping[str, str], folder: Path) -> Iterator[psutil.Process]:
    """A process while the context lasts; what it says is in `log.txt` of the folder."""
    with (folder / "log.txt").open("ab") as log:
        started = subprocess.Popen(
            command, env=dict(environment), cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
    try:
        yield psutil.Process(started.pid)
    finally:
        started.terminate()
        try:
            started.wait(10)
        except subprocess.TimeoutExpired:
            started.kill()


def child(script: str, arguments: list[object], environment: Mapping[str, str]) -> Any:
    """What a script of this folder prints as JSON, as its last line."""
    command = [sys.executable, str(Path(__file__).with_name(script)), *map(str, arguments)]
    done = subprocess.run(command, env=dict(environment), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{script} ended with {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def free_port() -> int:
    """A port that nobody listens on."""
    return int(subprocess.check_output([sys.executable, "-c", _FREE]))


def answering(url: str, headers: Mapping[str, str] | None = None, seconds: float = 120) -> None:
    """Returns once something answers there."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        with suppress(httpx.TransportError):
            if httpx.get(url, timeout=5, headers=headers).status_code < 500:
                return
        time.sleep(0.1)
    raise RuntimeError(f"{url} does not answer")


@contextmanager
def served_prefect(folder: Path) -> Iterator[dict[str, str]]:
    """A Prefect server on SQLite with the settings of the local one; the variables that lead to it."""
    port = free_port()
    variables = {
        **clean_environment(folder),
        **prefect_api.DEFAULTS,
        "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    }
    tuned = (
        "from prefect_rollout.execution import local_server; local_server.tune_sqlite(); "
        "from prefect.cli import app; app()"
    )
    start = [sys.executable, "-c", tuned, "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with process(start, variables, folder):
        answering(f"{variables['PREFECT_API_URL']}/health")
        yield variables


# ---- the cloud ----------------------------------------------------------------------------------

AT_ONCE = {"observe": 0, "pull": 0, "start": 0, "terminate": 0}
TWENTY_SECONDS = {"observe": 1, "pull": 8, "start": 8, "terminate": 3}


class Cloud(NamedTuple):
    """A simulated cloud in a process of its own."""

    url: str

    @property
    def variables(self) -> dict[str, str]:
        """What leads releases to it."""
        return {"K8S_API_URL": self.url, "K8S_KEY_ID": "demo-key", "K8S_SECRET_KEY": "demo-secret"}

    def control(self, method: str, path: str, **more: Any) -> Any:
        """Asks its control API."""
        answer = httpx.request(method, f"{self.url}/_control/{path}", timeout=60, **more)
        answer.raise_for_status()
        return answer.json()


@contextmanager
def simulated(folder: Path, scenario: Mapping[str, Any], speed: float = 1) -> Iterator[Cloud]:
    """A simulated cloud of that scenario."""
    file, port = folder / "scenario.json", free_port()
    file.write_text(json.dumps(scenario), encoding="utf-8")
    command = [ROLLOUT, "simulate", "--port", str(port), "--scenario", str(file), "--speed", str(speed)]
    with process(command, clean_environment(folder), folder):
        answering(f"http://127.0.0.1:{port}/_control/record")
        yield Cloud(f"http://127.0.0.1:{port}")


def shop(count: int, timings: Mapping[str, float], **more: Any) -> dict[str, Any]:
    """A scenario of `count` apps from 1 on, each with a deployment `web` in one cluster."""
    deployment = {
        "id": 1,
        "name": "web",
        "clusters": {"c1": 1},
        "templates": [{"id": 1, "image": "r/app:1"}],
        "online": {"c1": 1},
    }
    return {
        "timings": dict(timings),
        "apps": [{"id": 1, "name": "app", "copies": count, "deployments": [deployment]}],
        **more,
    }


# ---- the meter ----------------------------------------------------------------------------------


class Sent(NamedTuple):
    """A request that this process has sent."""

    at: float
    seconds: float
    to_cloud: bool
    request: httpx.Request


@dataclass
class Meter:
    """What this process sends over HTTP: to the cloud, or else to the Prefect API."""

    cloud: str
    sent: list[Sent] = field(default_factory=list)

    @contextmanager
    def reading(self) -> Iterator["Meter"]:
        """Counts while the context lasts."""
        original = httpx.AsyncClient.send

        async def send(client: httpx.AsyncClient, request: httpx.Request, **more: Any) -> httpx.Response:
            began = time.monotonic()
            try:
                return await original(client, request, **more)
            finally:
                to_cloud = str(request.url).startswith(self.cloud)
                self.sent.append(Sent(began, time.monotonic() - began, to_cloud, request))

        httpx.AsyncClient.send = send  # type: ignore[method-assign, assignment]
        try:
            yield self
        finally:
            httpx.AsyncClient.send = original  # type: ignore[method-assign]

    def of(self, *, cloud: bool) -> list[Sent]:
        """The requests that went there."""
        return [one for one in self.sent if one.to_cloud is cloud]

    def peak(self) -> int:
        """The most requests to the cloud that were begun within a second."""
        times = sorted(one.at for one in self.of(cloud=True))
        most = first = 0
        for last, at in enumerate(times):
            while times[first] < at - 1:
                first += 1
            most = max(most, last - first + 1)
        return most
