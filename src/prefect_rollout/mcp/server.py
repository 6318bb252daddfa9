"""The MCP server as it answers the handshake: what its tools are is imported behind its back."""

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

from prefect_rollout.mcp.quoting import RULE
from prefect_rollout.mcp.work import Work
from prefect_rollout.text import one_line

INSTRUCTIONS = f"""\
Releases applications on a container cloud, as Prefect flow runs: each release has an id and a page in the
Prefect UI, goes on when this connection ends, and can be followed, cancelled and retried by its id.

To release: plan_release shows what would change and a plan hash; show that to the user; then call
deploy_latest_image (or rollback, restart, scale, deploy_batch) with confirm=<plan hash>. It answers at once
with a flow_run_id. Follow it with get_release and wait_seconds until `ended` is true. Only the outcome
`released` means that the new version is live everywhere; with any other, tell the user `verdict`, `live`
and `next`. A failed run is gone on with by retry_release, which repeats no write that was done.

The same request within ten minutes is the same release. No tool approves a release that waits for a person.
{RULE}
"""

# What is answered without any tool.
_HANDSHAKE = {"initialize", "notifications/initialized", "server/discover", "ping"}


class Server(MCPServer[None]):
    """The MCP server.

    Args:
        work: what its tools work with.
        stdio: whether it speaks to one client of this machine's user.
        token_verifier: checks bearer tokens, over HTTP.
        auth: goes with it.
    """

    def __init__(
        self,
        work: Work,
        *,
        stdio: bool,
        token_verifier: TokenVerifier | None = None,
        auth: AuthSettings | None = None,
    ) -> None:
        # The SDK's own handler imports a module to show an exception, and fails where no file can be opened.
        logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
        super().__init__(
            "prefect-rollout",
            title="Releases on a container cloud",
            instructions=INSTRUCTIONS,
            version=version("prefect-rollout"),
            lifespan=self._lifespan,
            middleware=[self._behind_the_handshake],
            log_level="WARNING",
            token_verifier=token_verifier,
            auth=auth,
        )
        self._work = work
        self._stdio = stdio
        self._declared: asyncio.Task[None] | None = None

    async def call_tool(
        self, name: str, arguments: dict[str, Any], context: Context[None, Any] | None = None
    ) -> CallToolResult | InputRequiredResult:
        """Calls a tool. Wrong arguments are told in a sentence: the SDK's text is pydantic's.

        An argument that the tool does not have is refused, not ignored: it may be what matters most.
        """
        for tool in await self.list_tools():
            known = tool.input_schema.get("properties", {})
            if tool.name == name and (strange := [each for each in arguments if each not in known]):
                raise ToolError(
                    f"{one_line(strange[0], 80)}: {name} has no such argument; it has "
                    f"{', '.join(known) or 'none'}. Nothing was submitted."
                )
        try:
            return await super().call_tool(name, arguments, context)
        except ToolError as error:
            if isinstance(error.__cause__, ValidationError) and not isinstance(error, UnexpectedToolError):
                from prefect_rollout.models import first_mistake

                mistake = first_mistake(error.__cause__)
                raise ToolError(
                    f"{mistake}. Correct it by the tool's schema; nothing was submitted."
                ) from error
            raise

    @asynccontextmanager
    async def _lifespan(self, _server: MCPServer[None]) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await self._work.close()

    async def _behind_the_handshake(self, ctx: Any, call_next: Any) -> Any:
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
        tools.declare(self, self._work, stdio=self._stdio)
        self._work.begin()
