"""The daemon of the local Prefect server: the server, its UI and a worker, for one user of a machine.

`python -m prefect_rollout.execution.daemon <folder>`; `endpoint` starts it and connects to it.
It ends by itself once no client is connected and no flow run is executed.
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

from prefect_rollout.errors import ConfigurationError
from prefect_rollout.execution import local_server, prefect_api, sockets
from prefect_rollout.execution.endpoint import (
    ENDPOINT,
    PASSWORD,
    PORT,
    PREFECT_HOME,
    START_SECONDS,
    log_of,
    proof,
    secret_of,
    write_private,
)
from prefect_rollout.settings import rollout_settings

if TYPE_CHECKING:
    from prefect_rollout.execution.worker import RolloutWorker

_LOCK, _SERVER_LOG = "service.lock", "server.log"

POOL = "local"
_MOST_RUNS = 100

# Limits of connections that have not proved that they know the token: seconds of each, and their number.
_UNPROVED_SECONDS = 5.0
_MOST_UNPROVED = 16
_LONGEST_LINE = 1024


class Daemon:
    """The daemon, in the folder `home`, to which clients connect; its server listens on `listener`."""

    def __init__(self, home: Path, listener: socket.socket) -> None:
        self._home = home
        self._listener = listener
        self._api = api_at(listener)
        self._token = secrets.token_hex(32)
        self._unproved: dict[asyncio.StreamWriter, None] = {}
        self._clients: set[asyncio.StreamWriter] = set()
        self._ready = asyncio.Event()
        self._notified = asyncio.Event()
        self._idle_since = time.monotonic()
        self._linger_seconds = rollout_settings().linger_seconds

    async def run(self) -> None:
        """Serve until no client and no run needs it, or the server ends."""
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for name in (signal.SIGINT, signal.SIGTERM):
            with suppress(NotImplementedError):  # Windows
                loop.add_signal_handler(name, stop.set)
        endpoint = await self._open_endpoint()
        try:
            with self._server():
                answering = asyncio.create_task(self._wait_for_server())
                # Imported while the server starts: both take seconds.
                from prefect import get_client

                from prefect_rollout.execution import setup
                from prefect_rollout.execution.worker import RolloutWorker
                from prefect_rollout.runs import processes, zombies

                await answering
                async with get_client() as client:
                    await zombies.sweep(client, ended=processes.has_ended)
                    async for _ in setup.apply(client, POOL, RolloutWorker.type):
                        pass
                worker = RolloutWorker(POOL, name=POOL, limit=_MOST_RUNS, prefetch_seconds=0)
                serving = asyncio.create_task(worker.serve(self._notified, self._ready.set))
                try:
                    while True:
                        await self._wait_until_unneeded(worker, serving, stop)
                        # No client can connect any more; one that connected meanwhile is still served.
                        endpoint.close()
                        if not self._clients or stop.is_set() or serving.done() or self._ended:
                            break
                        endpoint = await self._open_endpoint()
                finally:
                    self._ready.clear()
                    (self._home / ENDPOINT).unlink(missing_ok=True)
                    if self._ended:
                        # Clients would wait in the queue of the socket for a server that has ended.
                        self._listener.close()
                    serving.cancel()
                    await asyncio.wait([serving])
                if not serving.cancelled():
                    serving.result()  # raises the error that ended it
        finally:
            endpoint.close()
            clients = list(self._clients)
            for writer in clients:
                writer.close()
            await asyncio.gather(*(each.wait_closed() for each in clients), return_exceptions=True)
            await asyncio.sleep(0)  # their tasks end by themselves
            (self._home / ENDPOINT).unlink(missing_ok=True)

    async def _open_endpoint(self) -> asyncio.Server:
        endpoint = await asyncio.start_server(self._handle, "127.0.0.1", 0, limit=_LONGEST_LINE)
        port = endpoint.sockets[0].getsockname()[1]
        write_private(self._home / ENDPOINT, json.dumps({"port": port, "token": self._token}))
        return endpoint

    async def _wait_until_unneeded(
        self, worker: "RolloutWorker", serving: asyncio.Task[None], stop: asyncio.Event
    ) -> None:
        stopped = asyncio.create_task(stop.wait())
        while not (stop.is_set() or serving.done() or self._ended):
            lingered = time.monotonic() - self._idle_since > self._linger_seconds
            if self._ready.is_set() and lingered and not self._clients and not worker.busy:
                break
            await asyncio.wait({serving, stopped}, timeout=1, return_when="FIRST_COMPLETED")
        stopped.cancel()

    @property
    def _ended(self) -> bool:
        """True if the server has ended: clients find another daemon, or start one."""
        return self._process.poll() is not None

    async def _handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if (nonce := await self._authenticate(reader, writer)) is None:
                return  # without an answer
            self._clients.add(writer)
            writer.write(proof(self._token, b"service", nonce) + b"\n")
            await self._ready.wait()
            api = self._api.encode()
            writer.write(api + b" " + proof(self._token, b"ready", nonce, api) + b"\n")
            await writer.drain()
            while await reader.read(64):
                self._notified.set()
        except OSError:  # the client was killed
            pass
        finally:
            if writer in self._clients:
                self._clients.discard(writer)
                self._idle_since = time.monotonic()
            writer.close()

    async def _authenticate(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes | None:
        """Return the nonce of a client that proves that it knows the token, else `None`."""
        self._unproved[writer] = None
        if len(self._unproved) > _MOST_UNPROVED:
            # Close the oldest: a client that knows the token proves it at once.
            oldest = next(iter(self._unproved))
            del self._unproved[oldest]
            oldest.transport.abort()
        try:
            async with asyncio.timeout(_UNPROVED_SECONDS):
                nonce, _, given = (await reader.readline()).rstrip(b"\n").partition(b" ")
        except (TimeoutError, ValueError):  # silent, or too long
            return None
        finally:
            self._unproved.pop(writer, None)
        expected = proof(self._token, b"client", nonce)
        return nonce if secrets.compare_digest(given, expected) else None

    @contextmanager
    def _server(self) -> Iterator[None]:
        with log_of(self._home / _SERVER_LOG).open("ab") as log:
            self._process = local_server.start(self._listener, log)
        try:
            yield
        finally:
            self._process.terminate()
            try:
                self._process.wait(15)
            except subprocess.TimeoutExpired:
                self._process.kill()

    async def _wait_for_server(self) -> None:
        """Return when the server answers a request that needs no password.

        Raises:
            RuntimeError: it ended, or does not answer in time.
        """
        async with httpx.AsyncClient(timeout=START_SECONDS, trust_env=False) as client:
            # A connection made before the server accepts waits in the queue of the socket.
            answer = asyncio.create_task(client.get(f"{self._api}/health"))
            while not answer.done() and not self._ended:
                await asyncio.wait([answer], timeout=0.5)
            answer.cancel()
            with suppress(httpx.TransportError, asyncio.CancelledError):
                if (await answer).is_success and not self._ended:
                    return
        raise RuntimeError(f"the server did not start: see {self._home / _SERVER_LOG}")


def api_at(listener: socket.socket) -> str:
    """Return the address of the API of a server that listens on the socket."""
    host, port = listener.getsockname()
    return f"http://{host}:{port}/api"


def listen(home: Path) -> socket.socket:
    """Return a socket that listens on the port of the last run, so that links stay valid; else on another.

    Raises:
        RuntimeError: no port is free.
    """
    last = 0
    with suppress(OSError, ValueError):
        last = int((home / PORT).read_text(encoding="ascii"))
    for port in (last, 0):
        # It listens at once: before that, another program can bind the port too.
        with suppress(ConfigurationError):
            listener = sockets.listen("127.0.0.1", port)
            (home / PORT).write_text(str(listener.getsockname()[1]), encoding="ascii")
            return listener
    raise RuntimeError("no port is free")


def main(home: Path) -> None:
    """Run the daemon of that folder, unless it runs already."""
    lock = FileLock(home / _LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return
    with lock, listen(home) as listener:
        prefect_api.isolate(home / PREFECT_HOME)
        api = api_at(listener)
        # Valid for this run only: a page that is left open in a browser sends the password to any program
        # that takes the port after the daemon has ended.
        (home / PASSWORD).unlink(missing_ok=True)
        password = secret_of(home / PASSWORD, "rollout:")
        os.environ |= {
            "PREFECT_API_URL": api,
            "PREFECT_API_AUTH_STRING": password,
            "PREFECT_SERVER_API_AUTH_STRING": password,
            "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": api.removesuffix("/api"),
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "WARNING",
            "DO_NOT_TRACK": "1",
        }
        asyncio.run(Daemon(home, listener).run())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
