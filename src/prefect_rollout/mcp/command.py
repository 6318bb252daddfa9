"""The commands that run the MCP server."""

import contextlib
import os
from dataclasses import dataclass
from typing import Annotated

from cyclopts import Parameter
from cyclopts.validators import Number

from prefect_rollout import prefect_api
from prefect_rollout.console import command_line, say
from prefect_rollout.errors import ConfigurationError
from prefect_rollout.images import usable_pattern
from prefect_rollout.mcp.permits import Permits

app = command_line()
"""The command line where it is started as `prefect-rollout mcp`."""


_ALLOW = "PREFECT_ROLLOUT_MCP_ALLOW_"


def _allow(variable: str, told: str) -> Parameter:
    return Parameter(env_var=_ALLOW + variable, negative="", help=told)


@Parameter(name="*")
@dataclass(kw_only=True)
class Allowing:
    """Limits of MCP clients. Patterns may hold `*`; without any, all is allowed, images excepted."""

    read_only: Annotated[
        bool,
        Parameter(
            env_var="PREFECT_ROLLOUT_MCP_READ_ONLY", negative="", help="Offer only tools that write nothing."
        ),
    ] = False
    allow_app: Annotated[list[str] | None, _allow("APPS", "Only apps of this id; may be repeated.")] = None
    allow_deployment: Annotated[
        list[str] | None, _allow("DEPLOYMENTS", "Only deployments of this name; may be repeated.")
    ] = None
    allow_cluster: Annotated[
        list[str] | None,
        _allow("CLUSTERS", "Only this cluster; may be repeated. Requests then have to name their clusters."),
    ] = None
    allow_target: Annotated[
        list[str] | None, _allow("TARGETS", "Only this block, as type-slug/name; may be repeated.")
    ] = None
    allow_image: Annotated[
        list[str] | None,
        _allow(
            "IMAGES",
            "Only images of this registry or repository, such as harbor.example/team; may be repeated. If "
            "not given, an image that a client names has to come from where the deployment's images came "
            "from before, or from K8S_REGISTRY_URL.",
        ),
    ] = None

    def permits(self) -> Permits:
        """The same for the server."""
        for name, value in os.environ.items():
            # Such as a variable that a compose file passes on, and nobody has set.
            if name.startswith(_ALLOW) and not value.strip():
                raise ConfigurationError(
                    f"{name} is set, and names nothing",
                    advice="Name what is allowed, or unset the variable to allow all.",
                    field=name,
                )
        for pattern in self.allow_image or ():
            try:
                usable_pattern(pattern)
            except ValueError as error:
                raise ConfigurationError(
                    f"allow_image: {error}",
                    advice="Correct --allow-image, or leave it out.",
                    field="allow_image",
                ) from None
        return Permits(
            read_only=self.read_only,
            apps=self.allow_app or (),
            deployments=self.allow_deployment or (),
            clusters=self.allow_cluster or (),
            targets=self.allow_target or (),
            images=self.allow_image or (),
        )


Host = Annotated[
    str, Parameter(help="Address to listen on over HTTP; beyond this machine, put TLS in front.")
]
McpPort = Annotated[int, Parameter(help="Port to listen on over HTTP.", validator=Number(gte=1, lte=65535))]
_MCP_PORT = 8361


def _prepare() -> None:
    prefect_api.prepare()
    # Whoever waits for an answer shall be told soon that the API is away, and not after minutes.
    os.environ.setdefault("PREFECT_CLIENT_MAX_RETRIES", "3")


@app.command
def mcp(
    allowing: Allowing | None = None,
    *,
    http: Annotated[
        bool,
        Parameter(help="Serve over HTTP, to clients that send PREFECT_ROLLOUT_MCP_TOKEN.", negative=""),
    ] = False,
    host: Host = "127.0.0.1",
    port: McpPort = _MCP_PORT,
    allowed_host: Annotated[
        list[str] | None,
        Parameter(
            help="Name by which clients reach it over HTTP, behind a proxy; may be repeated.", negative=""
        ),
    ] = None,
) -> int:
    """Run the MCP server for an assistant: over standard input and output, or over HTTP."""
    _prepare()
    from prefect_rollout.mcp import serve

    permits = (allowing or Allowing()).permits()
    if not http:
        serve.stdio(permits)
        return 0
    token = serve.token_of_environment()
    with contextlib.suppress(KeyboardInterrupt):  # as it is meant to be ended
        serve.http(permits, host=host, port=port, allowed_hosts=allowed_host or (), token=token, said=say)
    return 0


def up(allowing: Allowing | None = None, *, host: Host = "127.0.0.1", port: McpPort = _MCP_PORT) -> int:
    """Run a Prefect server with its UI, a runner and MCP over HTTP, until Ctrl-C."""
    _prepare()
    from prefect_rollout.mcp import serve

    with contextlib.suppress(KeyboardInterrupt):  # as it is meant to be ended
        serve.up((allowing or Allowing()).permits(), host=host, port=port, said=say)
    return 0
