"""The local Prefect server and runner of one user: found, or started, and kept up while it is used.

Whoever finds no Prefect API configured shares them: `attach` connects to the service, which
`prefect_rollout.service` is, and starts it where it does not run. The connection is the lease: when the
last one has closed, be it because its process was killed, the service ends.
"""

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from prefect_rollout.errors import ConfigurationError

HOME = Path.home() / ".prefect-rollout" / "local"
"""Where the service keeps its database, results, password and logs."""

START_SECONDS = 120.0
"""How long a first start may take, which migrates a new database."""

PASSWORD = "password"  # noqa: S105 - the name of a file
"""The file in `HOME` with the password of the server."""

DOOR, _LOG = "service.json", "service.log"

# A service that does not answer at once is about to start, or about to end.
_TRY_AGAIN_SECONDS = 0.1
_SPAWN_AGAIN_SECONDS = 5.0


@dataclass(frozen=True)
class Address:
    """Where the local Prefect server is.

    Attributes:
        api: address of its API.
        password: what its API and its UI ask for; no answer of ours ever holds it.
        home: the folder of the service.
    """

    api: str
    password: str
    home: Path


class Lease:
    """Keeps the service up until it is closed, or this process ends."""

    def __init__(self, address: Address, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.address = address
        self._reader = reader
        self._writer = writer

    @property
    def lost(self) -> bool:
        """Whether the service has ended."""
        return self._reader.at_eof() or self._writer.is_closing()

    def poke(self) -> None:
        """Has the runner look for flow runs at once."""
        self._writer.write(b"\n")

    async def close(self) -> None:
        """Gives the service up; the last one to do so ends it."""
        self._writer.close()
        with suppress(OSError):
            await self._writer.wait_closed()


async def attach(home: Path = HOME, told: Callable[[str], None] = lambda _what: None) -> Lease:
    """A lease of the service, which is started where it does not run; returns when it is ready.

    Args:
        home: the service's folder.
        told: is called with what is waited for.

    Raises:
        ConfigurationError: it did not start, or not in time; its log is named.
    """
    until = time.monotonic() + START_SECONDS
    spawned: subprocess.Popen[bytes] | None = None
    spawned_at = 0.0
    while time.monotonic() < until:
        if lease := await _connect(home, until):
            return lease
        now = time.monotonic()
        if spawned is not None and spawned.poll():
            raise _not_started(home, f"it ended with exit code {spawned.returncode}")
        if now - spawned_at > _SPAWN_AGAIN_SECONDS and (spawned is None or spawned.poll() is not None):
            # Of several that start at once, all but one find the lock taken and end.
            told("starting the local Prefect server")
            spawned, spawned_at = _spawn(home), now
        await asyncio.sleep(_TRY_AGAIN_SECONDS)
    raise _not_started(home, f"it was not ready within {START_SECONDS:.0f} s")


def _not_started(home: Path, why: str) -> ConfigurationError:
    return ConfigurationError(
        f"the local Prefect server did not start: {why}",
        advice=f"Read {home / _LOG} for the cause, or set PREFECT_API_URL to a Prefect server of your own.",
    )


async def _connect(home: Path, until: float) -> Lease | None:
    try:
        door = json.loads((home / DOOR).read_bytes())
        reader, writer = await asyncio.open_connection("127.0.0.1", int(door["port"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    try:
        # It is said once the server answers. Nothing is said where the service ends before.
        async with asyncio.timeout(max(0.1, until - time.monotonic())):
            said = json.loads(await reader.readline())
        if said["service"] == door["service"]:
            password = (home / PASSWORD).read_text(encoding="ascii").strip()
            return Lease(Address(said["api"], password, home), reader, writer)
    except (OSError, ValueError, KeyError, TypeError, TimeoutError):
        pass
    writer.close()
    return None


def _spawn(home: Path) -> subprocess.Popen[bytes]:
    """Starts the service as a process that outlives this one, and hears no Ctrl-C of its terminal."""
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    home.chmod(0o700)
    # No key of this process: the service may serve others too, with keys of their own.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("K8S_")}
    flags = 0
    if sys.platform == "win32":
        flags = subprocess.CREATE_NO_WINDOW | subprocess.CREATE_NEW_PROCESS_GROUP
    with (home / _LOG).open("ab") as log:
        return subprocess.Popen(  # noqa: S603 - nothing of it comes from outside
            [sys.executable, "-m", "prefect_rollout.service", str(home)],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            creationflags=flags,
        )
