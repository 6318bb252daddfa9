"""The MCP server. It answers the handshake first, then imports the tools and Prefect in the background."""

import asyncio
import importlib
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

from mcp.server import MCPServer
from mcp.server.auth.provider import TokenVerifier
from mcp.server.auth.settings import AuthSettings
from mcp.server.mcpserver import Context
from mcp.server.mcpserver.exceptions import ToolError, UnexpectedToolError
from mcp_types import CallToolResult, InputRequiredResult
from pydantic import ValidationError

from prefect_rollout.mcp.session import Session
from prefect_rollout.mcp.untrusted import RULE
from prefect_rollout.text import one_line

INSTRUCTIONS = f"""\
Releases applications on a container cloud as Prefect flow runs. Each release has a flow_run_id and a page in
the Prefect UI, continues if this connection ends, and can be followed, cancelled and retried by its ID.

To release: call plan_release and show the plan to the user. Then call deploy_latest_image (or rollback,
restart, scale, deploy_batch) with the same arguments and confirm=<plan_hash>. It returns a flow_run_id at
once. Call get_release with wait_seconds until `ended` is true. Only the outcome `released` means that every
cluster runs the new version; for any other outcome, report `verdict`, `live` and `next` to the user.
retry_release continues a failed run and repeats no write that succeeded.

Repeating a request within ten minutes returns the same release. No tool can approve a release that waits
for a person.
{RULE}
"""

# Methods that need no tool.
_HANDSHAKE = {"initialize", "notifications/initialized", "server/discover", "ping"}


class Server(MCPServer[None]):
    """The MCP server.

    Args:
        session: Prefect and its API.
        stdio: the server serves one client of this machine's user.
        token_verifier: verifies bearer tokens, over HTTP.
        auth: settings of the verification.
    """

    def __init__(
        self,
        session: Session,
        *,
        stdio: bool,
        token_verifier: TokenVerifier | None = None,
        auth: AuthSettings | None = None,
    ) -> None:
        # The SDK's handler imports a module to show an exception, which fails without free file descriptors.
        logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
        super().__init__(
            "prefect-rollout",
            title="Releases on a container cloud",
            instructions=INSTRUCTIONS,
            version=version("prefect-rollout"),
            lifespan=self._lifespan,
            middleware=[self._after_the_handshake],
            log_level="WARNING",
            token_verifier=token_verifier,
            auth=auth,
        )
        self._session = session
        self._stdio = stdio
        self._declared: asyncio.Task[None] | None = None

    async def call_tool(
        self, name: str, arguments: dict[str, Any], context: Context[None, Any] | None = None
    ) -> CallToolResult | InputRequiredResult:
        """Call a tool. Errors describe an invalid argument in one sentence, instead of pydantic's text.

        An unknown argument is an error: ignoring it could start another release than the one intended.
        """
        for tool in await self.list_tools():
            known = tool.input_schema.get("properties", {})
            if tool.name == name and (strange := [each for each in arguments if each not in known]):
                raise ToolError(
                    f"{one_line(strange[0], 80)}: {name} has no such argument. Arguments: "
                    f"{', '.join(known) or 'none'}. Nothing was submitted."
                )
        try:
            return await super().call_tool(name, arguments, context)
        except ToolError as error:
            if isinstance(error.__cause__, ValidationError) and not isinstance(error, UnexpectedToolError):
                from prefect_rollout.ids import first_mistake

                mistake = first_mistake(error.__cause__)
                raise ToolError(f"{mistake}. Check the schema of the tool; nothing was submitted.") from error
            raise

    @asynccontextmanager
    async def _lifespan(self, _server: MCPServer[None]) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await self._session.close()

    async def _after_the_handshake(self, ctx: Any, call_next: Any) -> Any:
        if ctx.method not in _HANDSHAKE:
            await asyncio.shield(self._declaring())
            return await call_next(ctx)
        answer = await call_next(ctx)
        self._declaring()
        return answer

    def _declaring(self) -> "asyncio.Task[None]":
        if self._declared is None or (self._declared.done() and self._declared.exception()):
            self._declared = asyncio.create_task(self._declare())
        return self._declared

    async def _declare(self) -> None:
        tools = await asyncio.to_thread(importlib.import_module, "prefect_rollout.mcp.tools")
        tools.declare(self, self._session, stdio=self._stdio)
        self._session.begin()
