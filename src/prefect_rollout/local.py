"""The local Prefect server of one user: found, or started, and kept up while somebody uses it.

The command line, MCP and `up` share it where no Prefect API is configured: `attach` connects to the service,
which `prefect_rollout.service` is, and starts it if it does not run. The connection is the lease: when the
last one has closed, even because its process was killed, the service ends.

Client and service prove to each other that they know the token in `service.json`, which only their user can
read. A program that listens on the port of a service that has ended learns nothing, and redirects nobody.
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
from urllib.request import getproxies

from prefect_rollout.errors import ConfigurationError
from prefect_rollout.text import one_line

HOME = Path.home() / ".prefect-rollout" / "local"
"""Folder of the service: its database, results, password and logs."""

START_SECONDS = 300.0
"""Seconds that a first start may take, which migrates a new database, on a busy machine."""

PASSWORD = "password"  # noqa: S105 - the name of a file
"""File in `HOME` with the server's password, which is valid for one run of the service."""

PREFECT_HOME = "prefect"
"""Folder in `HOME` that is the PREFECT_HOME of the service."""

ENDPOINT, _LOG = "service.json", "service.log"

_SECRET_LENGTH = 16
_LARGEST_LOG = 5 * 2**20

# How long to wait for the service's proof: another program may listen on the port of one that has ended.
_PROOF_SECONDS = 10.0

# A service that does not answer at once is about to start, or about to end.
_TRY_AGAIN_SECONDS = 0.1
_SPAWN_AGAIN_SECONDS = 5.0


@dataclass(frozen=True)
class Address:
    """Address of the local Prefect server.

    Attributes:
        api: address of its API.
        password: what its API and its UI ask for; it is part of no answer, message or log.
        home: folder of the service.
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
        """Have the runner look for flow runs at once."""
        self._writer.write(b"\n")

    async def close(self) -> None:
        """Give the service up; the last one to do so ends it."""
        self._writer.close()
        with suppress(OSError):
            await self._writer.wait_closed()


async def attach(home: Path = HOME, *, starting: Callable[[], None] = lambda: None) -> Lease:
    """Return a lease of the service once it is ready; start it if it does not run.

    Args:
        home: the service's folder.
        starting: is called once if the service has to be started.

    Raises:
        ConfigurationError: it did not start, or not in time; its log is named.
    """
    from prefect_rollout.settings import local_service

    local_service()  # a variable that cannot be used is named here, not in a log
    until = time.monotonic() + START_SECONDS
    spawned: subprocess.Popen[bytes] | None = None
    spawned_at = 0.0
    try:
        _make_private(home)
        _bypass_proxies()
        while time.monotonic() < until:
            if lease := await _connect(home, until):
                return lease
            now = time.monotonic()
            if spawned is not None and spawned.poll():
                raise _not_started(home, f"it ended with exit code {spawned.returncode}")
            if now - spawned_at > _SPAWN_AGAIN_SECONDS and (spawned is None or spawned.poll() is not None):
                if spawned is None:
                    starting()
                # Of several that start at once, all but one find the lock taken and end.
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
    """Make the folder this user's alone; another user's folder would lead to that user's server."""
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    if os.name == "posix" and home.stat().st_uid != os.geteuid():
        raise PermissionError(f"{home} belongs to another user")
    home.chmod(0o700)


def _bypass_proxies() -> None:
    """Have requests to this machine bypass the user's proxy, which would see the password."""
    proxies = getproxies()
    bypassed = proxies.pop("no", "")
    if proxies and not {"127.0.0.1", "*"} & {host.strip() for host in bypassed.split(",")}:
        # Those of the system settings too: with one variable set, nobody looks at the settings any more.
        os.environ |= {f"{scheme}_proxy": address for scheme, address in proxies.items()}
        os.environ["no_proxy"] = f"{bypassed},127.0.0.1".lstrip(",")


# ---- the endpoint of the service ----------------------------------------------------------------


def proof(token: str, *parts: bytes) -> bytes:
    """Return what only someone who knows the token can say about the parts; the first one says who speaks."""
    return hmac.new(token.encode(), b"\n".join(parts), "sha256").hexdigest().encode()


async def _connect(home: Path, until: float) -> Lease | None:
    try:
        endpoint = json.loads((home / ENDPOINT).read_bytes())
        token = str(endpoint["token"])
        reader, writer = await asyncio.open_connection("127.0.0.1", int(endpoint["port"]))
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return None
    nonce = secrets.token_hex(16).encode()
    lease: Lease | None = None
    try:
        writer.write(nonce + b" " + proof(token, b"client", nonce) + b"\n")
        async with asyncio.timeout(_PROOF_SECONDS):
            known = _same(await reader.readline(), proof(token, b"service", nonce))
        if known:
            # The address follows once the server answers, and nothing if the service ends before.
            async with asyncio.timeout(max(0.1, until - time.monotonic())):
                api, _, proved = (await reader.readline()).partition(b" ")
            if _same(proved, proof(token, b"ready", nonce, api)):
                password = (home / PASSWORD).read_text(encoding="ascii").strip()
                lease = Lease(Address(api.decode("ascii"), password, home), reader, writer)
    except (OSError, ValueError, TimeoutError):
        pass
    finally:
        if lease is None:  # by a cancel, too: a connection that stays open keeps the service up
            writer.close()
    return lease


def _same(line: bytes, expected: bytes) -> bool:
    return hmac.compare_digest(line.rstrip(b"\n"), expected)


# ---- files --------------------------------------------------------------------------------------


def secret_of(path: Path, prefix: str = "") -> str:
    """Return the secret that a file keeps; make a new one if it keeps none.

    Raises:
        OSError: it can neither be read nor made.
    """
    with suppress(OSError, ValueError):
        if len(kept := path.read_text(encoding="ascii").strip()) >= _SECRET_LENGTH:
            return kept
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_private(path, prefix + secrets.token_urlsafe(24))
    return path.read_text(encoding="ascii").strip()


def write_private(path: Path, text: str) -> None:
    """Write a file that only this user can read, all of it or nothing: a part of a secret can be guessed."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, encoding="ascii", delete=False) as file:
        file.write(text)
    Path(file.name).replace(path)  # made with mode 0600


def log_of(path: Path) -> Path:
    """Return the path of a log, emptied if it has grown large."""
    with suppress(OSError):
        if path.stat().st_size > _LARGEST_LOG:
            path.unlink()
    return path


def _spawn(home: Path) -> subprocess.Popen[bytes]:
    """Start the service as a process that outlives this one, and receives no Ctrl-C of its terminal."""
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
            cwd=home,  # Python would import modules from the working directory
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            creationflags=flags,
        )
