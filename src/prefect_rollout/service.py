"""The local service: a Prefect server, its UI, and a runner of the flows here, for one user of a machine.

`python -m prefect_rollout.service <folder>`; `prefect_rollout.local` starts it and says how it is found.
It ends by itself when nobody is connected any more and no flow run is under way.
"""

import asyncio
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
from filelock import FileLock, Timeout

from prefect_rollout import embedded
from prefect_rollout.local import DOOR, PASSWORD, START_SECONDS, log_of, secret_of

if TYPE_CHECKING:
    from prefect_rollout.runner import Runner

LINGER_SECONDS = 10.0
"""How long the service waits for another client before it ends."""

_LOCK, _PORT, _SERVER_LOG = "service.lock", "port", "server.log"


class Service:
    """The service, as its clients find it at its door.

    Args:
        home: its folder.
    """

    def __init__(self, home: Path) -> None:
        self._home = home
        self._name = secrets.token_hex(8)
        self._port = _port_of(home)
        self._api = f"http://127.0.0.1:{self._port}/api"
        self._clients: set[asyncio.StreamWriter] = set()
        self._ready = asyncio.Event()
        self._poked = asyncio.Event()
        self._lonely_since = time.monotonic()

    async def run(self) -> None:
        """Serves until nobody needs it, or the server ends."""
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for name in (signal.SIGINT, signal.SIGTERM):
            with suppress(NotImplementedError):  # Windows
                loop.add_signal_handler(name, stop.set)
        door = await self._open_door()
        try:
            with self._server():
                # Imported while the server starts: both take seconds.
                from prefect import get_client

                from prefect_rollout import guard, reaper
                from prefect_rollout.runner import Runner

                await self._answering()
                async with get_client() as client:
                    runner = await Runner.of(client, self._poked)
                    await reaper.sweep(client, gone=guard.ended_here)
                    await runner.sweep()
                    running = asyncio.create_task(runner.run())
                    self._ready.set()
                    try:
                        while True:
                            await self._needed(runner, running, stop)
                            # Nobody comes in any more; who did meanwhile is served on.
                            door.close()
                            if not self._clients or stop.is_set() or running.done() or self._ended:
                                break
                            door = await self._open_door()
                    finally:
                        self._ready.clear()
                        (self._home / DOOR).unlink(missing_ok=True)
                        await runner.stop()
                        await asyncio.wait([running])
                running.result()  # raises what ended it
        finally:
            door.close()
            (self._home / DOOR).unlink(missing_ok=True)

    async def _open_door(self) -> asyncio.Server:
        door = await asyncio.start_server(self._welcome, "127.0.0.1", 0)
        port = door.sockets[0].getsockname()[1]
        (self._home / DOOR).write_text(json.dumps({"service": self._name, "port": port}), encoding="ascii")
        return door

    async def _needed(self, runner: "Runner", running: asyncio.Task[None], stop: asyncio.Event) -> None:
        """Returns when the service is to end."""
        stopped = asyncio.create_task(stop.wait())
        while not (stop.is_set() or running.done() or self._ended):
            if not (self._clients or runner.busy or not self._lonely):
                break
            await asyncio.wait({running, stopped}, timeout=1, return_when="FIRST_COMPLETED")
        stopped.cancel()

    @property
    def _ended(self) -> bool:
        """Whether the server has ended: clients find another service, which starts another."""
        return self._process.poll() is not None

    @property
    def _lonely(self) -> bool:
        return time.monotonic() - self._lonely_since > LINGER_SECONDS

    async def _welcome(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._clients.add(writer)
        try:
            writer.write(json.dumps({"service": self._name}).encode() + b"\n")
            await self._ready.wait()
            writer.write(json.dumps({"api": self._api}).encode() + b"\n")
            await writer.drain()
            while await reader.read(64):
                self._poked.set()
        except OSError:  # it was killed
            pass
        finally:
            self._clients.discard(writer)
            self._lonely_since = time.monotonic()
            writer.close()

    @contextmanager
    def _server(self) -> Iterator[None]:
        command = ["prefect", "server", "start", "--host", "127.0.0.1", "--port", str(self._port)]
        with log_of(self._home / _SERVER_LOG).open("ab") as log:
            self._process = subprocess.Popen(  # noqa: S603 - nothing of it comes from outside
                [sys.executable, "-m", *command], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        embedded.end_with_this_process(self._process.pid)
        try:
            yield
        finally:
            self._process.terminate()
            try:
                self._process.wait(15)
            except subprocess.TimeoutExpired:
                self._process.kill()

    async def _answering(self) -> None:
        """Returns when the server answers."""
        until = time.monotonic() + START_SECONDS
        async with httpx.AsyncClient(timeout=5) as client:
            while True:
                if self._process.poll() is not None:
                    raise RuntimeError(f"the server ended: see {self._home / _SERVER_LOG}")
                with suppress(httpx.TransportError):
                    if (await client.get(f"{self._api}/health")).is_success:
                        return
                if time.monotonic() > until:
                    raise RuntimeError(f"the server did not start: see {self._home / _SERVER_LOG}")
                await asyncio.sleep(0.1)


def _port_of(home: Path) -> int:
    """The port of the last time, so that addresses that were told stay right; another where it is taken."""
    before = 0
    with suppress(OSError, ValueError):
        before = int((home / _PORT).read_text(encoding="ascii"))
    for port in (before, 0):
        with socket.socket() as probe, suppress(OSError, OverflowError):
            if os.name == "posix":
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            found = int(probe.getsockname()[1])
            (home / _PORT).write_text(str(found), encoding="ascii")
            return found
    raise RuntimeError("no port is free")


def main(home: Path) -> None:
    """Runs the service of that folder, unless it runs already."""
    lock = FileLock(home / _LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return
    with lock:
        embedded.isolate(home / "prefect")
        service = Service(home)
        # Without a password, any program and any web page of this machine could release.
        password = secret_of(home / PASSWORD, "rollout:")
        os.environ |= {
            "PREFECT_API_URL": service._api,
            "PREFECT_API_AUTH_STRING": password,
            "PREFECT_SERVER_API_AUTH_STRING": password,
            "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": service._api.removesuffix("/api"),
            "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "false",
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "WARNING",
            "DO_NOT_TRACK": "1",
        }
        asyncio.run(service.run())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
