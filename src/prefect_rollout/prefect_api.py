"""The Prefect API of this process: the one that is configured, or that of the user's local server.

Call `prepare` or `isolate` before Prefect is imported: it reads its settings from the environment then.
"""

import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from prefect_rollout import local
from prefect_rollout.errors import ConfigurationError
from prefect_rollout.text import one_line, shown_address

# Defaults of this package's processes; a variable that is set keeps its value.
DEFAULTS = {
    # Prefect would start a server without a password, with a database that nobody else sees.
    "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "false",
    # With the default of 1 every flow run waits seconds behind the records of its task runs.
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_BATCH_SIZE": "200",
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_READ_BATCH_SIZE": "50",
    # Whole seconds: Prefect cuts fractions off, and with 0 its server would never rest.
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_FLUSH_INTERVAL": "1",
    # By default leases live in memory, and a server that restarts forgets who holds what.
    "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
    # The steps are shown by the command itself; the flow run's log holds the rest.
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
    "PREFECT_CLI_PROMPT": "false",
}

DEMO_HOME = Path.home() / ".prefect-rollout" / "demo"


def prepare() -> None:
    """Set defaults for this process."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)


def isolate(home: Path) -> None:
    """Give this process a Prefect home of its own, without the user's profile and variables."""
    home.mkdir(parents=True, exist_ok=True)
    for name in [name for name in os.environ if name.startswith("PREFECT_")]:
        if not name.startswith("PREFECT_ROLLOUT_"):
            del os.environ[name]
    os.environ["PREFECT_HOME"] = str(home)
    # Prefect also reads prefect.toml, pyproject.toml and .env of the working directory.
    os.chdir(home)
    prepare()


def configured() -> bool:
    """Return whether a Prefect API is configured; if not, the user's local server is used."""
    from prefect.settings import PREFECT_API_URL

    return bool(PREFECT_API_URL.value())


def api_in_use() -> str:
    """Return the address of the Prefect API that the process uses, for a person to read."""
    from prefect.settings import PREFECT_API_URL

    url = PREFECT_API_URL.value()
    return shown_address(url) if url else "the local server"


@asynccontextmanager
async def reached(
    home: Path = local.HOME, *, starting: Callable[[], None] = lambda: None
) -> AsyncIterator[local.Lease | None]:
    """Have Prefect's functions use the configured API, or the user's local server, within the context.

    Args:
        home: folder of the local service.
        starting: is called if the local server has to be started, which takes some seconds.

    Yields:
        The lease of the local server; `None` if an API is configured.

    Raises:
        ConfigurationError: the API does not answer, or the local server did not start.
    """
    from prefect import get_client
    from prefect.settings import temporary_settings

    if configured():
        async with get_client() as client:
            problem = await client.api_healthcheck()
        if problem:
            raise ConfigurationError(
                f"the Prefect API {api_in_use()} does not answer: {one_line(problem, 120)}",
                advice="Start it, or correct PREFECT_API_URL; unset, a local server is used.",
            )
        yield None
        return
    lease = await local.attach(home, starting=starting)
    try:
        with temporary_settings(settings_of(lease.address)):
            yield lease
    finally:
        await lease.close()


def settings_of(address: local.Address) -> dict[Any, Any]:
    """Return the Prefect settings of a process that uses the local server."""
    from prefect import settings

    return {
        settings.PREFECT_API_URL: address.api,
        settings.PREFECT_API_AUTH_STRING: address.password,
        # Whatever is set for a server of the user's own: nothing of it concerns this one.
        settings.PREFECT_API_KEY: None,
        settings.PREFECT_UI_URL: None,
        settings.PREFECT_DEFAULT_RESULT_STORAGE_BLOCK: None,
        # Where the service keeps its own: each can go on with what the other has begun.
        settings.PREFECT_LOCAL_STORAGE_PATH: address.home / local.PREFECT_HOME / "storage",
        settings.PREFECT_SERVER_ALLOW_EPHEMERAL_MODE: False,
    }
