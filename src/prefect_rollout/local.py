"""The local Prefect server and runner of one user: found, or started, and kept up while it is used.

Whoever finds no Prefect API configured shares them: `attach` connects to the service, which
`prefect_rollout.service` is, and starts it where it does not run. The connection is the lease: when the
last one has closed, be it because its process was killed, the service ends.
"""

import asyncio
import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from prefect_rollout.errors import ConfigurationError
from prefect_rollout.text import one_line

HOME = Path.home() / ".prefect-rollout" / "local"
"""Where the service keeps its database, results, password and logs."""

START_SECONDS = 120.0
"""How long a first start may take, which migrates a new database."""

PASSWORD = "password"  # noqa: S105 - the name of a file
"""The file in `HOME` with the password of the server."""

DOOR, _LOG = "service.json", "service.log"

_SECRET_LENGTH = 16
_LARGEST_LOG = 5 * 2**20

# How long a door may be silent: it may be that of a service that is no more, and another program's now.
_GREETING_SECONDS = 10.0

# A service that does not answer at once is about to start, or about to end.
_TRY_AGAIN_SECONDS = 0.1
_SPAWN_AGAIN_SECONDS = 5.0


@dataclass(frozen=True)
class Address:
    """Where the local Prefect server is.

    Attributes:
        api: address of its API.
        password: what its API and its UI ask for; no answer of ours ever holds it.
    """

    api: str
    password: str


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


async def attach(home: Path = HOME) -> Lease:
    """A lease of the service, which is started where it does not run; returns when it is ready.

    Args:
        home: the service's folder.

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
            try:
                spawned, spawned_at = _spawn(home), now
            except OSError as error:
                raise _not_started(home, one_line(error, 200)) from error
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
        async with asyncio.timeout(_GREETING_SECONDS):
            greeting = json.loads(await reader.readline())
        # It may be another program's port by now.
        if greeting["service"] == door["service"]:
            # Said once the server answers; nothing is said where the service ends before.
            async with asyncio.timeout(max(0.1, until - time.monotonic())):
                said = json.loads(await reader.readline())
            password = (home / PASSWORD).read_text(encoding="ascii").strip()
            return Lease(Address(said["api"], password), reader, writer)
    except (OSError, ValueError, KeyError, TypeError, TimeoutError):
        pass
    writer.close()
    return None


def secret_of(path: Path, prefix: str = "") -> str:
    """The secret that a file keeps; a new one where it keeps none.

    Raises:
        OSError: it can neither be read nor made.
    """
    with suppress(OSError, ValueError):
        if len(kept := path.read_text(encoding="ascii").strip()) >= _SECRET_LENGTH:
            return kept
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    # All of it or nothing: a file that was cut off would be a secret that everybody knows.
    with tempfile.NamedTemporaryFile("w", dir=path.parent, encoding="ascii", delete=False) as file:
        file.write(prefix + secrets.token_urlsafe(24))
    Path(file.name).replace(path)  # made with mode 0600
    return path.read_text(encoding="ascii").strip()


def log_of(path: Path) -> Path:
    """The path of a log, emptied where it has grown large."""
    with suppress(OSError):
        if path.stat().st_size > _LARGEST_LOG:
            path.unlink()
    return path


def _spawn(home: Path) -> subprocess.Popen[bytes]:
    """Starts the service as a process that outlives this one, and hears no Ctrl-C of its terminal."""
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    home.chmod(0o700)
    # No key of this process: the service may serve others too, with keys of their own.
    foreign = ("K8S_", "PREFECT_ROLLOUT_MCP_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    flags = 0
    if sys.platform == "win32":
        flags = subprocess.CREATE_NO_WINDOW | subprocess.CREATE_NEW_PROCESS_GROUP
    with log_of(home / _LOG).open("ab") as log:
        return subprocess.Popen(  # noqa: S603 - nothing of it comes from outside
            [sys.executable, "-m", "prefect_rollout.service", str(home)],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            creationflags=flags,
        )
