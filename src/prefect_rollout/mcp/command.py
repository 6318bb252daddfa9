"""The commands that run the MCP server."""

import contextlib
import os
from typing import Annotated

from cyclopts import Parameter
from cyclopts.validators import Number

from prefect_rollout.cli.output import command_line, say
from prefect_rollout.execution import prefect_api
from prefect_rollout.mcp.policy import Policy

app = command_line()
"""The command line of `prefect-rollout mcp`."""


Host = Annotated[
    str,
    Parameter(help="Address to listen on over HTTP. Put TLS in front of it unless it is a loopback address."),
]
McpPort = Annotated[int, Parameter(help="Port to listen on over HTTP.", validator=Number(gte=1, lte=65535))]
_MCP_PORT = 8361


def _prepare(policy: Policy | None) -> Policy:
    prefect_api.prepare()
    # A client gets an error within seconds if the API is down, not after minutes.
    os.environ.setdefault("PREFECT_CLIENT_MAX_RETRIES", "3")
    policy = policy or Policy()
    policy.check_settings(os.environ)
    return policy


@app.command
def mcp(
    policy: Policy | None = None,
    *,
    http: Annotated[
        bool,
        Parameter(
            help="Serve over HTTP to clients that send the token in PREFECT_ROLLOUT_MCP_TOKEN.", negative=""
        ),
    ] = False,
    host: Host = "127.0.0.1",
    port: McpPort = _MCP_PORT,
    allowed_host: Annotated[
        list[str] | None,
        Parameter(help="Host name that clients use over HTTP, behind a proxy; may be repeated.", negative=""),
    ] = None,
) -> int:
    """Run the MCP server for an assistant, over stdio or HTTP."""
    policy = _prepare(policy)
    from prefect_rollout.mcp import serve

    if not http:
        serve.stdio(policy)
        return 0
    token = serve.token_of_environment()
    with contextlib.suppress(KeyboardInterrupt):  # the normal way to stop it
        serve.http(policy, host=host, port=port, allowed_hosts=allowed_host or (), token=token, said=say)
    return 0


def up(policy: Policy | None = None, *, host: Host = "127.0.0.1", port: McpPort = _MCP_PORT) -> int:
    """Run a Prefect server with its UI, a runner and MCP over HTTP, until Ctrl-C."""
    policy = _prepare(policy)
    from prefect_rollout.mcp import serve

    with contextlib.suppress(KeyboardInterrupt):  # the normal way to stop it
        serve.up(policy, host=host, port=port, said=say)
    return 0
