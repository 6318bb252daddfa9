"""Find or start the local Prefect server of one user, and keep it running while it is used.

The command line, MCP and `up` share it if no Prefect API is configured: `connect` connects to the `daemon`,
and starts it if it does not run. The daemon ends after its last connection has closed, even if that
connection's process was killed.

Client and daemon prove to each other that they know the token in `service.json`, which only their user can
read. A program that takes the port of a daemon that has ended gets no secret and cannot redirect clients.
"""

import asyncio
import hmac
import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from prefect_rollout.errors import ConfigurationError
from prefect_rollout.execution.sockets import listen
from prefect_rollout.text import one_line

HOME = Path.home() / ".prefect-rollout" / "local"
"""Folder of the daemon: its database, results, password and logs."""

START_SECONDS = 300.0
"""Seconds allowed for a first start, which migrates a new database, on a busy machine."""

PASSWORD = "password"  # noqa: S105 - the name of a file
"""File in `HOME` with the server's password, which is valid for one run of the daemon."""

PREFECT_HOME = "prefect"
"""Folder in `HOME` that is the PREFECT_HOME of the daemon."""

ENDPOINT, PORT, _LOG = "service.json", "port", "service.log"

_SECRET_LENGTH = 16
_LARGEST_LOG = 5 * 2**20

# Seconds to wait for the daemon's proof: another program may listen on the port of one that has ended.
_PROOF_SECONDS = 10.0

# A daemon that does not answer at once is starting or ending.
_TRY_AGAIN_SECONDS = 0.1
_SPAWN_AGAIN_SECONDS = 5.0


@dataclass(frozen=True)
class Address:
    """Address of the local Prefect server.

    Attributes:
        api: address of its API.
        password: password of its API and UI; it appears in no answer, message or log.
        home: folder of the daemon.
    """

    api: str
    password: str
    home: Path


class Endpoint:
    """A connection to the daemon, which runs until the connection is closed or this process ends."""

    def __init__(self, address: Address, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.address = address
        self._reader = reader
        self._writer = writer

    @property
    def lost(self) -> bool:
        """True if the daemon has ended."""
        return self._reader.at_eof() or self._writer.is_closing()

    def notify(self) -> None:
        """Have the daemon's worker poll for flow runs at once."""
        self._writer.write(b"\n")

    async def close(self) -> None:
        """Close the connection; the daemon ends after the last one."""
        self._writer.close()
        with suppress(OSError):
            await self._writer.wait_closed()


async def connect(home: Path = HOME, *, starting: Callable[[], None] = lambda: None) -> Endpoint:
    """Connect to the daemon once it is ready; start it if it does not run.

    Args:
        home: the daemon's folder.
        starting: called once if the daemon has to be started.

    Raises:
        ConfigurationError: it did not start in time; the error names its log.
    """
    from prefect_rollout.settings import rollout_settings

    rollout_settings()  # an invalid variable is reported here, not in a log
    until = time.monotonic() + START_SECONDS
    spawned: subprocess.Popen[bytes] | None = None
    spawned_at = 0.0
    try:
        _make_private(home)
        while time.monotonic() < until:
            if connected := await _connect(home, until):
                return connected
            now = time.monotonic()
            if spawned is not None and spawned.poll():
                raise _not_started(home, f"it ended with exit code {spawned.returncode}")
            if now - spawned_at > _SPAWN_AGAIN_SECONDS and (spawned is None or spawned.poll() is not None):
                if spawned is None:
                    starting()
                # Of several that are started at once, all but one find the lock taken and end.
                spawned, spawned_at = _spawn(home), now
            await asyncio.sleep(_TRY_AGAIN_SECONDS)
    except OSError as error:
        raise _not_started(home, one_line(error, 200)) from error
    raise _not_started(home, f"it was not ready within {START_SECONDS:.0f} s")


def _not_started(home: Path, why: str) -> ConfigurationError:
    return ConfigurationError(
        f"the local Prefect server did not start: {why}",
        advice=f"Read {home / _LOG} for the cause, or set PREFECT_API_URL to a Prefect server of your own.",
    )


def _make_private(home: Path) -> None:
    """Make the folder private; another user's folder would lead to that user's server."""
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    if os.name == "posix" and home.stat().st_uid != os.geteuid():
        raise PermissionError(f"{home} belongs to another user")
    home.chmod(0o700)


# ---- the endpoint of the daemon -----------------------------------------------------------------


def proof(token: str, *parts: bytes) -> bytes:
    """Return an HMAC of the parts with the token as its key; the first part names the sender."""
    return hmac.new(token.encode(), b"\n".join(parts), "sha256").hexdigest().encode()


async def _connect(home: Path, until: float) -> Endpoint | None:
    try:
        endpoint = json.loads((home / ENDPOINT).read_bytes())
        token = str(endpoint["token"])
        reader, writer = await asyncio.open_connection("127.0.0.1", int(endpoint["port"]))
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return None
    nonce = secrets.token_hex(16).encode()
    connected: Endpoint | None = None
    try:
        writer.write(nonce + b" " + proof(token, b"client", nonce) + b"\n")
        async with asyncio.timeout(_PROOF_SECONDS):
            known = _same(await reader.readline(), proof(token, b"service", nonce))
        if known:
            # The daemon sends the address once the server answers, or nothing if it ends before that.
            async with asyncio.timeout(max(0.1, until - time.monotonic())):
                api, _, proved = (await reader.readline()).partition(b" ")
            if _same(proved, proof(token, b"ready", nonce, api)):
                password = (home / PASSWORD).read_text(encoding="ascii").strip()
                connected = Endpoint(Address(api.decode("ascii"), password, home), reader, writer)
    except (OSError, ValueError, TimeoutError):
        pass
    finally:
        if connected is None:  # after a cancel, too: an open connection keeps the daemon running
            writer.close()
    return connected


def _same(line: bytes, expected: bytes) -> bool:
    return hmac.compare_digest(line.rstrip(b"\n"), expected)


def prefer_port(home: Path, port: int) -> None:
    """Have the next daemon in that folder serve the UI on the port, if it is free now."""
    with suppress(ConfigurationError), listen("127.0.0.1", port):
        _make_private(home)
        (home / PORT).write_text(str(port), encoding="ascii")


# ---- files --------------------------------------------------------------------------------------


def secret_of(path: Path, prefix: str = "") -> str:
    """Return the secret in a file; create one if there is none.

    Raises:
        OSError: it can neither be read nor created.
    """
    with suppress(OSError, ValueError):
        if len(kept := path.read_text(encoding="ascii").strip()) >= _SECRET_LENGTH:
            return kept
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_private(path, prefix + secrets.token_urlsafe(24))
    return path.read_text(encoding="ascii").strip()


def write_private(path: Path, text: str) -> None:
    """Write a file atomically that only this user can read: a partly written secret can be guessed."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, encoding="ascii", delete=False) as file:
        file.write(text)
    Path(file.name).replace(path)  # created with mode 0600


def log_of(path: Path) -> Path:
    """Return the path of a log; delete the log if it is large."""
    with suppress(OSError):
        if path.stat().st_size > _LARGEST_LOG:
            path.unlink()
    return path


def _spawn(home: Path) -> subprocess.Popen[bytes]:
    """Start the daemon as a process that outlives this one, and receives no Ctrl-C of its terminal."""
    # No key of this process: the daemon may serve others too, with keys of their own.
    foreign = ("K8S_", "PREFECT_ROLLOUT_MCP_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    flags = 0
    if sys.platform == "win32":
        flags = subprocess.CREATE_NO_WINDOW | subprocess.CREATE_NEW_PROCESS_GROUP
    with log_of(home / _LOG).open("ab") as log:
        return subprocess.Popen(  # noqa: S603 - no part of it is input
            [sys.executable, "-m", "prefect_rollout.execution.daemon", str(home)],
            env=environment,
            cwd=home,  # Python imports modules from the working directory
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            creationflags=flags,
        )
