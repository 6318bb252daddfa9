"""Run the MCP server: over stdio for one client, or over HTTP for clients that know its token."""

import asyncio
import hmac
import os
import signal
from collections.abc import Awaitable, Callable, Sequence
from ipaddress import ip_address

from mcp.server.auth.provider import AccessToken
from mcp.server.auth.settings import AuthSettings
from mcp.server.transport_security import TransportSecuritySettings
from pydantic import AnyHttpUrl, ValidationError

from prefect_rollout.errors import ConfigurationError
from prefect_rollout.execution import prefect_api
from prefect_rollout.execution.endpoint import HOME, PASSWORD, prefer_port, secret_of
from prefect_rollout.execution.sockets import listen
from prefect_rollout.mcp.policy import Policy
from prefect_rollout.mcp.server import Server
from prefect_rollout.mcp.session import Session
from prefect_rollout.text import one_line

TOKEN = "PREFECT_ROLLOUT_MCP_TOKEN"  # noqa: S105 - the name of a variable
_SHORTEST_TOKEN = 16
_UI_PORT = 4200
_TOKEN_FILE = "mcp-token"  # noqa: S105 - the name of a file


def stdio(permits: Policy) -> None:
    """Serve the client that started this process, until it disconnects or ends this process."""
    # Releases run elsewhere. At once: an import in the background would fail in an interpreter that ends.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: os._exit(0))

    async def serve() -> None:
        await Server(Session(permits, HOME), stdio=True).run_stdio_async()
        os._exit(0)

    asyncio.run(serve())


class _Bearer:
    """Verifier of one token, in constant time."""

    def __init__(self, token: str) -> None:
        self._token = token.encode()

    async def verify_token(self, token: str) -> AccessToken | None:
        """Return the access of a client that sent the right token, else `None`."""
        if not hmac.compare_digest(token.encode("utf-8", "surrogateescape"), self._token):
            return None
        return AccessToken(token=token, client_id="bearer", scopes=[])


def http(
    permits: Policy,
    *,
    host: str,
    port: int,
    allowed_hosts: Sequence[str],
    token: str,
    said: Callable[[str], None],
    beside: Callable[[Session], Awaitable[None]] | None = None,
) -> None:
    """Serve the clients that send the token, until Ctrl-C.

    `allowed_hosts` are more names of it. `beside` runs with its session; if it fails, the server ends.

    Raises:
        ConfigurationError: it cannot listen there.
    """
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    try:
        url = AnyHttpUrl(f"{address}/mcp")
    except ValidationError:
        raise ConfigurationError(
            f"host: {one_line(host, 80)!r} is no address or name", advice="Name one, such as 127.0.0.1."
        ) from None
    work = Session(permits, HOME)
    server = Server(
        work,
        stdio=False,
        token_verifier=_Bearer(token),
        auth=AuthSettings(
            issuer_url=AnyHttpUrl(address), resource_server_url=url, validate_token_resource=False
        ),
    )
    names = [*_names(host), *allowed_hosts]
    hosts = [name if ":" in name.rpartition("]")[2] else f"{name}:{port}" for name in names]
    security = TransportSecuritySettings(
        # Refuse browser pages that reach this address under another name (DNS rebinding).
        allowed_hosts=[*hosts, *allowed_hosts],
        allowed_origins=[f"{scheme}://{name}" for name in hosts for scheme in ("http", "https")],
    )

    from prefect_rollout.execution.listener import serve

    listening = listen(host, port)

    async def run() -> None:
        said(f"MCP over HTTP: {url}")
        for warning in warnings_of(host):
            said(warning)
        served = serve(server.streamable_http_app(host=host, transport_security=security), listening)
        await asyncio.gather(served, *([beside(work)] if beside else []))

    asyncio.run(run())


def warnings_of(host: str) -> list[str]:
    """Return the warnings about an address to listen on."""
    try:
        local = ip_address(host).is_loopback
    except ValueError:
        local = host == "localhost"
    if local:
        return []
    warning = f"Warning: other machines reach {one_line(host, 80)} over plain HTTP, which exposes the token."
    return [f"{warning} Put a proxy with TLS in front of it."]


def _names(host: str) -> list[str]:
    try:
        address = ip_address(host)
    except ValueError:
        return [host]
    if address.is_loopback or address.is_unspecified:
        return ["127.0.0.1", "localhost", "[::1]"]
    return [f"[{host}]" if address.version == 6 else host]


def token_of_environment() -> str:
    """Return the token in `PREFECT_ROLLOUT_MCP_TOKEN`.

    Raises:
        ConfigurationError: it is not set, or too short.
    """
    token = os.environ.get(TOKEN, "").strip()
    if len(token) < _SHORTEST_TOKEN or not (token.isascii() and token.isprintable()) or " " in token:
        raise ConfigurationError(
            f"{TOKEN} is {'too short' if token else 'not set'}, and over HTTP every client needs a token",
            advice=f"Set it to {_SHORTEST_TOKEN} or more random letters and digits, and have "
            "the clients send them as `Authorization: Bearer …`.",
            field=TOKEN,
        )
    return token


def up(permits: Policy, *, host: str, port: int, said: Callable[[str], None]) -> None:
    """Run the local Prefect server with its UI and worker, and MCP over HTTP, until Ctrl-C.

    Raises:
        ConfigurationError: a Prefect API is configured, or the local one did not start.
    """
    if prefect_api.configured():
        raise ConfigurationError(
            f"a Prefect API is configured ({prefect_api.api_in_use()}), and `up` starts one of its own",
            advice="Unset PREFECT_API_URL, or serve that API with `prefect-rollout mcp --http`.",
        )
    token = token_of_environment() if os.environ.get(TOKEN) else secret_of(HOME / _TOKEN_FILE)

    async def beside(work: Session) -> None:
        said(f"  its bearer token: in {TOKEN if os.environ.get(TOKEN) else HOME / _TOKEN_FILE}")
        said("Starting the Prefect server and its worker …")
        prefer_port(HOME, _UI_PORT)
        said(f"Prefect UI: {(await work.api()).ui}")
        said(f"  its password, which changes with each start: in {HOME / PASSWORD}")
        said("Ctrl-C disconnects: the server ends once nothing else uses it and no release is running.")

    http(permits, host=host, port=port, allowed_hosts=(), token=token, said=said, beside=beside)
