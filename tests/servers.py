"""Prefect servers of the tests, on copies of one migrated database."""

import hashlib
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from importlib.metadata import version
from pathlib import Path

import httpx
from filelock import FileLock
from prefect.events.worker import EventsWorker

from support import free_port

_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "prefect-rollout-tests"
_BLOCKS = Path(__file__).parent.parent / "blocks"

# The template has the tables and the block types, whose making costs most of a server's start.
FROM_TEMPLATE = {
    "PREFECT_SERVER_DATABASE_MIGRATE_ON_START": "false",
    "PREFECT_SERVER_REGISTER_BLOCKS_ON_START": "false",
}
# Prefect makes so many objects that a fifth of its processor time would go into looking for garbage.
_START = (
    "import gc; gc.set_threshold(100_000, 50, 100); "
    "from prefect_rollout.execution import local_server; local_server.tune_sqlite(); "
    "from prefect.cli import app; app()"
)
# Services that no test on a shared server observes.
_WITHOUT = {
    f"PREFECT_SERVER_SERVICES_{name}_ENABLED": "false"
    for name in ("CLEANUP_RECONCILER", "FOREMAN", "LATE_RUNS", "SCHEDULER")
}


def forget_events() -> None:
    """Send what events this process still has: later ones would wait behind them when the server is gone."""
    EventsWorker.drain_all(timeout=10)


@contextmanager
def prefect_server(
    home: Path, environment: Mapping[str, str] | None = None, log: Path | None = None
) -> Iterator[str]:
    """Serve a Prefect API from `home`, whose database is a copy of the template.

    Args:
        home: its PREFECT_HOME; made if it does not exist.
        environment: variables of the process; those of the tests and without rarely used services if not
            given.
        log: file for its output; `server.log` in `home` if not given.

    Yields:
        The address of the API.
    """
    variables = {**os.environ, **_WITHOUT} if environment is None else {**environment}
    new_prefect_home(home)
    with _serving(home, {**variables, **FROM_TEMPLATE}, log or home / "server.log") as url:
        yield url


def new_prefect_home(home: Path) -> Path:
    """Put a migrated database with registered block types into a PREFECT_HOME, and return the home."""
    home.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(_template(), home / "prefect.db")
    return home


def _template() -> Path:
    """Return the database to copy: made once per machine, Prefect version and set of block types."""
    blocks = b"".join(path.read_bytes() for path in sorted(_BLOCKS.glob("*.py")))
    made = _CACHE / f"prefect-{version('prefect')}-{hashlib.sha256(blocks).hexdigest()[:12]}.db"
    _CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(made.with_suffix(".lock")):
        if not made.exists():
            with tempfile.TemporaryDirectory(dir=_CACHE) as folder:
                home = Path(folder)
                with _serving(home, os.environ, home / "server.log"):
                    pass
                with closing(sqlite3.connect(home / "prefect.db")) as database:
                    database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
                (home / "prefect.db").replace(made)
    return made


@contextmanager
def _serving(home: Path, environment: Mapping[str, str], log: Path) -> Iterator[str]:
    port = free_port()
    url = f"http://127.0.0.1:{port}/api"
    with log.open("wb") as output:
        server = subprocess.Popen(
            [sys.executable, "-c", _START, "server", "start", "--port", str(port)],
            env={**environment, "PREFECT_HOME": str(home)},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            until = time.monotonic() + 300
            while True:
                assert server.poll() is None, log.read_text()
                assert time.monotonic() < until, log.read_text()
                with suppress(httpx.TransportError):
                    if httpx.get(f"{url}/health", timeout=5).is_success:
                        break
                time.sleep(0.1)
            yield url
        finally:
            server.terminate()
            server.wait(30)
