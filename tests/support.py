"""What several test modules use."""

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable, Generator, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar
from uuid import UUID

import httpx
import psutil

import forked
from prefect_rollout.errors import RolloutError
from prefect_rollout.platforms.container_cloud.signing import StarkHmacSigner
from prefect_rollout.simulator import SimulatorServer

BIN = Path(sys.executable).parent


async def eventually(condition: Callable[[], Awaitable[bool]], seconds: float = 60) -> None:
    """Waits for a condition that another process brings about."""
    async with asyncio.timeout(seconds):
        while not await condition():  # noqa: ASYNC110 - it comes true elsewhere
            await asyncio.sleep(0.1)


def kinds(base: type[RolloutError]) -> Iterator[type[RolloutError]]:
    """Yield an error class of this package and all below it."""
    if base.__module__.startswith("prefect_rollout."):
        yield base
    for kind in base.__subclasses__():
        yield from kinds(kind)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def prefect(server: str, *arguments: str) -> None:
    """Prefect's command line, from the repository's folder."""
    ended = subprocess.run(
        [BIN / "prefect", *arguments],
        env={**os.environ, "PREFECT_API_URL": server},
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr


def worker(
    server: str, home: Path, environment: dict[str, str], *options: str, pool: str = "rollout"
) -> subprocess.Popen[bytes]:
    """A worker of the pool; of the repository its machine has nothing but the installed package."""
    return _process(
        [BIN / "prefect", "worker", "start", "--pool", pool, *(options or ("--limit", "1"))],
        home,
        {**environment, "PREFECT_API_URL": server, "PREFECT_WORKER_QUERY_SECONDS": "1"},
    )


def served(
    server: str, home: Path, environment: dict[str, str], name: str = "served"
) -> subprocess.Popen[bytes]:
    """A process that serves the release flow as a Prefect deployment of that name."""
    serve = (
        "from prefect import serve; from prefect_rollout.flows import deploy_latest_image; "
        f"serve(deploy_latest_image.to_deployment({name!r}), query_seconds=1)"
    )
    return _process([sys.executable, "-c", serve], home, {**environment, "PREFECT_API_URL": server})


def _process(command: list[Any], home: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command,
        env={**os.environ, **environment},
        cwd=home,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


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
        # Without `verify=False`, each request would read the system's authorities again, without any TLS.
        answer = httpx.request(method, f"{self.url}/_control/{path}", timeout=30, verify=False, **options)
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

    @property
    def writes(self) -> list[str]:
        """What took effect, such as `["template 1343170", "publish 1343170 to pub-bjwdt"]`."""
        return [
            f"{entry.kind} {entry.template}" + (f" to {entry.cluster}" if entry.cluster else "")
            for entry in self.inside.record()
        ]


# ---- batches -------------------------------------------------------------------------------------

FAST: dict[str, Any] = {"poll_seconds": 0.2, "poll_attempts": 200, "grace_seconds": 3, "lock_wait_seconds": 0}
# A release that is killed between its lease and the label that names it waits for the lease to end.
PATIENT: dict[str, Any] = {**FAST, "lock_wait_seconds": 120}
BAD_IMAGE = {"kind": "image_cannot_be_pulled"}


def web(*behaviour: dict[str, Any]) -> dict[str, Any]:
    """A scenario of `web` with a pod in c1 and two in c2; template 11, of r/web:2, is not online yet."""
    deployment = {
        "id": 1,
        "name": "web",
        "clusters": {"c1": 1, "c2": 2},
        "templates": [{"id": 10, "image": "r/web:1"}, {"id": 11, "image": "r/web:2"}],
        "online": {"c1": 10, "c2": 10},
        "behaviour": list(behaviour),
    }
    return {"apps": [{"id": 1, "name": "shop", "deployments": [deployment]}]}


def shop(
    count: int, behaviours: Mapping[int, Mapping[str, Any]] | None = None, *, image: str = ""
) -> dict[str, Any]:
    """A scenario of apps 1 to `count`, each with a deployment `web` whose template app*10 is online in c1."""
    return {
        "apps": [
            {
                "id": app,
                "name": f"app-{app}",
                "deployments": [
                    {
                        "id": app,
                        "name": "web",
                        "clusters": {"c1": 1},
                        "templates": [{"id": app * 10, "image": image or f"r/app{app}:1"}],
                        "online": {"c1": app * 10},
                        "behaviour": [(behaviours or {})[app]] if app in (behaviours or {}) else [],
                    }
                ],
            }
            for app in range(1, count + 1)
        ]
    }


def plan_of(count: int, waves: int = 1, **more: Any) -> Any:
    """A plan that releases all of `shop`, in waves of the same size."""
    return {
        "defaults": FAST,
        "releases": [
            {
                "app_id": app,
                "deployment": "web",
                "wave": 1 + (app - 1) * waves // count,
                "images": {"web": f"r/app{app}:2"},
            }
            for app in range(1, count + 1)
        ],
        **more,
    }


def written(cloud: Cloud) -> dict[int, list[str]]:
    """What took effect, by app: `{1: ["template", "publish"]}` for one release."""
    found: dict[int, list[str]] = {}
    for entry in cloud.record:
        found.setdefault(entry["app"], []).append(entry["kind"])
    return found


ONCE = ["template", "publish"]


class Zygote(forked.Zygote):
    """Starts processes that run a flow run each."""

    def __init__(self) -> None:
        super().__init__("prefect_rollout.execution.releases")

    def start(self, run_id: object, environment: dict[str, str]) -> int:
        command = [Path(__file__).with_name("execute.py"), str(run_id)]
        return forked.Process(command, {**os.environ, **environment}, stderr=2, zygote=self).pid


async def resume(run_id: UUID) -> Any:
    """Continue a flow run in this process; return the state in which it ends."""
    from prefect import get_client

    from prefect_rollout.execution import releases

    async with get_client() as client:
        return await releases.resume(client, await releases.find(client, str(run_id)))


async def task_runs_of(run_id: UUID, at_least: int = 1) -> list[Any]:
    """The task runs of a flow run, once so many are recorded: Prefect does so behind the flow's back."""
    from prefect import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

    wanted = FlowRunFilter(id=FlowRunFilterId(any_=[run_id]))
    async with asyncio.timeout(30), get_client() as client:
        while len(found := await client.read_task_runs(flow_run_filter=wanted)) < at_least:  # noqa: ASYNC110
            await asyncio.sleep(0.1)
    return found


def kill_tree(pid: int) -> None:
    """Kill a process and all it started: Prefect's worker takes minutes to end at times."""
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        killed = [process, *process.children(recursive=True)]
        for each in killed:
            with suppress(psutil.NoSuchProcess):
                each.kill()
        psutil.wait_procs(killed, 30)


def lives(pid: int) -> bool:
    with suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


class Door:
    """The port of a simulated cloud, watched from the client's side.

    Attributes:
        server: the cloud's.
        nonces: of all requests that were sent, whether or not they arrived.
        passing: called with each request before it takes a connection, so that it can be given a
            fault, or a closed port.
    """

    def __init__(self, server: SimulatorServer) -> None:
        self.server = server
        self.nonces: list[str] = []
        self.passing: Callable[[httpx.Request], None] = lambda _: None
        DoorSigner.doors[server.port] = self


class DoorSigner(StarkHmacSigner):
    """Signs as ever, and tells the door of the request's port.

    The signer is the last of ours that a request passes before it takes a connection: only from here
    a port can be closed right before a given request, as no server sees one that it refuses.
    """

    doors: ClassVar[dict[int | None, Door]] = {}

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        for signed in super().auth_flow(request):
            door = self.doors[signed.url.port]
            door.nonces.append(signed.headers["X-Stark-Nonce"])
            door.passing(signed)
            yield signed


# ---- tables at the end of a run -----------------------------------------------------------------

cells: dict[str, dict[str, dict[str, str]]] = {}
"""What was recorded: `{table: {row: {column: outcome}}}`."""


def record_cell(table: str, row: str, column: str, outcome: str) -> None:
    """Has `outcome` stand in a table that is printed after the last test."""
    cells.setdefault(table, {}).setdefault(str(row), {})[str(column)] = str(outcome)


def tables() -> list[tuple[str, list[str]]]:
    """The recorded tables as titles and lines. Columns are lettered, and the letters explained below."""
    return [(title, _lines(rows)) for title, rows in cells.items()]


def _lines(rows: dict[str, dict[str, str]]) -> list[str]:
    letters = {column: chr(ord("a") + number) for number, column in enumerate(_columns(rows))}
    widths = {column: max(len(row.get(column, "-")) for row in rows.values()) for column in letters}
    label = max(map(len, rows))
    lines = ["  ".join([" " * label, *(letters[column].ljust(widths[column]) for column in letters)])]
    for name, row in rows.items():
        shown = (row.get(column, "-").ljust(widths[column]) for column in letters)
        lines.append("  ".join([name.ljust(label), *shown]).rstrip())
    return [*lines, *(f"{letter}  {column}" for column, letter in letters.items())]


def _columns(rows: dict[str, dict[str, str]]) -> list[str]:
    return list(dict.fromkeys(column for row in rows.values() for column in row))
