"""Prefect past one machine, from plain processes, with the settings that `deploy/` ships.

PostgreSQL, Redis, two API replicas behind HAProxy, the background services, and workers.
"""

import os
import random
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Self

import httpx

from support import BIN

ROOT = Path(__file__).parent.parent.parent
DEPLOY = ROOT / "deploy"


def settings(name: str) -> dict[str, str]:
    """The variables of a file in `deploy/`."""
    lines = (DEPLOY / name).read_text(encoding="utf-8").splitlines()
    pairs = [line.partition("=") for line in lines if line and not line.startswith("#")]
    return {key: value for key, _, value in pairs}


def until(condition: Callable[[], bool], what: str, seconds: float = 120) -> None:
    """Returns once the condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.2)


def _free_ports(count: int) -> list[int]:
    """Ports that are free, and that no connection of the processes to each other takes meanwhile."""
    found: list[int] = []
    for port in random.sample(range(12_000, 30_000), 200):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            return found
    raise RuntimeError("no ports are free")


class Process:
    """A process that can be killed and started again."""

    def __init__(
        self, name: str, command: Sequence[object], environment: Mapping[str, str], folder: Path
    ) -> None:
        self._command = [str(part) for part in command]
        self._environment = {**os.environ, **environment}
        self._folder = folder
        self.log = folder / f"{name}.log"
        self.start()

    def start(self) -> None:
        """Starts it."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                env=self._environment,
                cwd=self._folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # A worker's children go with it.
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def kill(self, number: int = signal.SIGKILL, seconds: float = 60) -> None:
        """Ends it and whatever it started."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, number)
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(seconds)


class Topology:
    """All of it, while the context lasts.

    Attributes:
        url: of the API, behind the load balancer.
        processes: by name: postgres, redis, api1, api2, services, haproxy.
        shared: the folder that every worker sees.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stack = ExitStack()
        self.processes: dict[str, Process] = {}
        self.shared = folder / "shared"
        self.shared.mkdir()
        names = ("postgres", "redis", "api1", "api2", "haproxy")
        self._ports = dict(zip(names, _free_ports(len(names)), strict=True))
        self.url = f"http://127.0.0.1:{self._ports['haproxy']}/api"

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def start(self, name: str, command: Sequence[object], environment: Mapping[str, str] = {}) -> Process:
        """Starts a process that ends with the context."""
        process = self.processes[name] = Process(name, command, environment, self._folder)
        self._stack.callback(process.kill, seconds=20)
        return process

    def worker(self, name: str, environment: Mapping[str, str], *options: str) -> Process:
        """Starts a worker of the pool `rollout`, on a machine of its own as far as it can tell.

        What `environment` names with no value, the worker has none of.
        """
        home = self._folder / f"home-{name}"
        home.mkdir(exist_ok=True)
        variables = {
            **settings("worker.env"),
            "PREFECT_API_URL": self.url,
            "PREFECT_HOME": str(home),
            "PREFECT_ROLLOUT_HEARTBEAT_SECONDS": "6",  # a killed one is found soon
            **environment,
        }
        return self.start(
            name,
            [BIN / "prefect", "worker", "start", "--pool", "rollout", "--name", name, *options],
            {key: value for key, value in variables.items() if value},
        )

    def run(self, command: Sequence[object]) -> str:
        """Runs a command with the API's address, from the repository."""
        path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            [str(part) for part in command],
            env={**os.environ, "PREFECT_API_URL": self.url, "PATH": path},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, (shlex.join(str(part) for part in command), done.stdout, done.stderr)
        return done.stdout

    def answers(self, name: str = "haproxy") -> bool:
        """Whether an API answers with what is in the database."""
        try:
            url = f"http://127.0.0.1:{self._ports[name]}/api/flows/count"
            return httpx.post(url, json={}, timeout=5).is_success
        except httpx.TransportError:
            return False

    # ---- the parts ----

    def _start(self) -> None:
        redis = f"redis://127.0.0.1:{self._ports['redis']}"
        self._start_postgres()
        # Locks are leases in Redis: they have to outlast its restart.
        options = ("--appendonly", "yes", "--appendfsync", "everysec", "--save", "")
        (self._folder / "redis").mkdir()
        folder = ("--dir", self._folder / "redis", "--bind", "127.0.0.1")
        self.start("redis", ["redis-server", "--port", self._ports["redis"], *folder, *options])
        server = {
            **settings("server.env"),
            "PREFECT_HOME": str(self._folder / "home-server"),
            "PREFECT_SERVER_DATABASE_CONNECTION_URL": (
                f"postgresql+asyncpg://prefect@127.0.0.1:{self._ports['postgres']}/prefect"
            ),
            "PREFECT_REDIS_MESSAGING_URL": f"{redis}/0",
            "PREFECT_SERVER_DOCKET_URL": f"{redis}/1",
            "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "5",  # a new schedule is due soon
            "PREFECT_LOGGING_SERVER_LEVEL": "WARNING",
            "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "WARNING",
        }
        self._migrate(server)
        for name in ("api1", "api2"):
            port = str(self._ports[name])
            self.start(name, [BIN / "prefect", "server", "start", "--no-services", "--port", port], server)
            # The first one registers the block types: two at once would be in each other's way.
            until(partial(self.answers, name), f"{name} does not answer: see {self.processes[name].log}")
        self.start("services", [BIN / "prefect", "server", "services", "start"], server)
        address = {
            "BIND": f"127.0.0.1:{self._ports['haproxy']}",
            "API1": f"127.0.0.1:{self._ports['api1']}",
            "API2": f"127.0.0.1:{self._ports['api2']}",
        }
        self.start(
            "haproxy", [shutil.which("haproxy") or "/usr/sbin/haproxy", "-f", DEPLOY / "haproxy.cfg"], address
        )
        until(partial(self.answers, "haproxy"), "haproxy does not answer")

    def _migrate(self, environment: Mapping[str, str]) -> None:
        subprocess.run(
            [BIN / "prefect", "server", "database", "upgrade", "-y"],
            env={**os.environ, **environment},
            check=True,
            capture_output=True,
            timeout=300,
        )

    def _start_postgres(self) -> None:
        binaries = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
        tools = binaries[-1] if binaries else Path(shutil.which("initdb") or sys.exit("no PostgreSQL")).parent
        data = self._folder / "postgres"
        data.mkdir()
        as_user: list[str] = []
        if os.geteuid() == 0:  # PostgreSQL refuses to run as root
            shutil.chown(data, "postgres", "postgres")
            as_user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
        initdb: list[str | Path] = [
            *as_user,
            tools / "initdb",
            "-D",
            data,
            "-U",
            "prefect",
            "--auth=trust",
            "-E",
            "UTF8",
        ]
        subprocess.run(initdb, check=True, capture_output=True, cwd="/")
        port = str(self._ports["postgres"])
        # The machine does not lose its power in a test.
        more = ("-c", "listen_addresses=127.0.0.1", "-c", "max_connections=200", "-c", "fsync=off")
        self.start("postgres", [*as_user, tools / "postgres", "-D", data, "-p", port, "-k", "", *more])
        createdb: list[str | Path] = [
            tools / "createdb",
            "-h",
            "127.0.0.1",
            "-p",
            port,
            "-U",
            "prefect",
            "prefect",
        ]

        def made() -> bool:
            return subprocess.run(createdb, capture_output=True, check=False).returncode == 0

        until(made, "PostgreSQL does not start")
