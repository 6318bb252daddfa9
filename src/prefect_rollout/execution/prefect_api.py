"""The Prefect API of this process: the configured one, or that of the user's local server.

Call `prepare` or `isolate` before Prefect is imported: it reads its settings from the environment at import.
"""

import os
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.request import getproxies

from prefect_rollout.errors import ConfigurationError
from prefect_rollout.execution import endpoint
from prefect_rollout.text import one_line, shown_address

if TYPE_CHECKING:
    from prefect.client.orchestration import PrefectClient

# Defaults of this package's processes; variables that are set keep their values.
DEFAULTS = {
    # Otherwise Prefect starts a server without a password, with a database that no other process sees.
    "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "false",
    # With the default of 1, every flow run waits seconds for the records of its task runs.
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_BATCH_SIZE": "200",
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_READ_BATCH_SIZE": "50",
    # Whole seconds: Prefect truncates fractions, and 0 keeps its server busy.
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_FLUSH_INTERVAL": "1",
    # By default leases are in memory, and lost when the server restarts.
    "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
    # The command itself shows the steps; the rest is in the flow run's log.
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
    "PREFECT_CLI_PROMPT": "false",
}

DEMO_HOME = Path.home() / ".prefect-rollout" / "demo"


def prepare() -> None:
    """Set the defaults in this process's environment, for Prefect and for HTTP clients.

    Raises:
        ConfigurationError: a variable would keep every HTTP client from being created.
    """
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    _check_http_variables()
    _bypass_proxies()


def _check_http_variables() -> None:
    for name, value in os.environ.items():
        proxied = name.lower() in {"http_proxy", "https_proxy", "all_proxy"}
        if not value.strip() or not (proxied or name in {"SSL_CERT_FILE", "PREFECT_API_SSL_CERT_FILE"}):
            continue
        import httpx  # only if a variable is set: a command must start fast

        try:
            if proxied:
                proxy = value if "://" in value else f"http://{value}"
                httpx.Client(proxy=proxy, verify=False, trust_env=False).close()  # noqa: S501 - sends nothing
            else:
                ssl.create_default_context(cafile=value)
        except (ImportError, OSError, ValueError, httpx.InvalidURL) as error:
            raise ConfigurationError(
                f"{name} cannot be used: {one_line(error)}",
                advice=f"Correct or unset {name}; nothing was written.",
                field=name,
            ) from None


def _bypass_proxies() -> None:
    """Have requests to this machine bypass the user's proxy, which would see the password."""
    proxies = getproxies()
    bypassed = proxies.pop("no", "")
    if proxies and "*" not in (hosts := [host.strip() for host in bypassed.split(",") if host.strip()]):
        # Those of the system settings too: once one variable is set, the settings are not read.
        os.environ |= {f"{scheme}_proxy": address for scheme, address in proxies.items()}
        os.environ["no_proxy"] = ",".join(dict.fromkeys((*hosts, "127.0.0.1", "localhost", "::1")))


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
    """Return the address of the Prefect API that the process uses, to be shown."""
    from prefect.settings import PREFECT_API_URL

    url = PREFECT_API_URL.value()
    return shown_address(url) if url else "the local server"


async def check_configured(client: "PrefectClient") -> None:
    """Raise a `ConfigurationError` if the API that is configured does not answer this user."""
    from prefect_rollout.runs.prefect_errors import PREFECT_ERRORS

    try:
        await client.read_flows(limit=1)  # /health needs no password, and other servers answer it too
    except PREFECT_ERRORS as error:
        raise problem_of(error) from error


def problem_of(error: Exception) -> ConfigurationError:
    """Return an error of Prefect's client as one that names the variable to correct."""
    import httpx

    from prefect_rollout.runs.prefect_errors import describe

    status = error.response.status_code if isinstance(error, httpx.HTTPStatusError) else None
    if status in {401, 403}:
        problem = f"the Prefect API {api_in_use()} refuses the request: {status}"
        advice = (
            "Set PREFECT_API_AUTH_STRING to the user:password of the server, or PREFECT_API_KEY to a key of "
            "Prefect Cloud."
        )
    elif status in {404, 405} or (status is None and isinstance(error, ValueError)):
        problem = f"{api_in_use()} is not the API of a Prefect server: {describe(error)}"
        advice = "Set PREFECT_API_URL to its address with the final /api, such as http://127.0.0.1:4200/api."
    else:
        problem = f"the Prefect API {api_in_use()} does not answer: {describe(error)}"
        advice = "Start it, or correct PREFECT_API_URL; if it is unset, a local server is used."
    return ConfigurationError(problem, advice=advice)


@asynccontextmanager
async def connected(
    home: Path = endpoint.HOME, *, starting: Callable[[], None] = lambda: None
) -> AsyncIterator[endpoint.Endpoint | None]:
    """Have Prefect's functions use the configured API, or the user's local server, within the context.

    Args:
        home: folder of the local server's daemon.
        starting: called if the local server has to be started, which takes some seconds.

    Yields:
        The connection to the daemon; `None` if an API is configured.

    Raises:
        ConfigurationError: the API does not answer, or the local server did not start.
    """
    from prefect import get_client
    from prefect.settings import temporary_settings

    if configured():
        async with get_client() as client:
            await check_configured(client)
        yield None
        return
    connection = await endpoint.connect(home, starting=starting)
    try:
        with temporary_settings(settings_of(connection.address)):
            yield connection
    finally:
        await connection.close()


def settings_of(address: endpoint.Address) -> dict[Any, Any]:
    """Return the Prefect settings of a process that uses the local server."""
    from prefect import settings

    return {
        settings.PREFECT_API_URL: address.api,
        settings.PREFECT_API_AUTH_STRING: address.password,
        # Settings for another server of the user do not apply to this one.
        settings.PREFECT_API_KEY: None,
        settings.PREFECT_UI_URL: None,
        settings.PREFECT_DEFAULT_RESULT_STORAGE_BLOCK: None,
        # The daemon's storage: each process can continue what another has begun.
        settings.PREFECT_LOCAL_STORAGE_PATH: address.home / endpoint.PREFECT_HOME / "storage",
        settings.PREFECT_SERVER_ALLOW_EPHEMERAL_MODE: False,
    }
