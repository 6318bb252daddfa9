"""The MCP server. It answers the handshake first, then imports the tools and Prefect in the background."""

import asyncio
import importlib
import json
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
from mcp_types import CallToolResult, InputRequiredResult, TextContent, Tool
from pydantic import ValidationError

from prefect_rollout.errors import InputError
from prefect_rollout.ids import first_mistake
from prefect_rollout.mcp.schemas import answer_schema, arguments_schema, given
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


def release_and_watch(app_id: str = "", deployment: str = "") -> str:
    """Release a deployment and follow it."""
    name = f"the deployment {deployment}" if deployment else "the deployment K8S_DEPLOY_NAME"
    of_app = f" of app {app_id}" if app_id else ""
    return (
        f"Release {name}{of_app}.\n"
        "1. Call plan_release and show me what would change.\n"
        "2. Once I agree, call deploy_latest_image with confirm=<plan_hash> and give me the link.\n"
        "3. Call get_release with wait_seconds=30 until it has ended, and report each completed step.\n"
        "4. Report the outcome and what each cluster runs. Unless it is released, add the diagnosis and what "
        "to do next. Do not retry or roll back unless I ask for it."
    )


# Methods that need no tool.
_HANDSHAKE = {"initialize", "notifications/initialized", "server/discover", "ping"}


class Server(MCPServer[None]):
    """The MCP server; with `stdio`, it serves one client of this machine's user."""

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
        self._listed: list[Tool] = []

    async def list_tools(self) -> list[Tool]:
        """List the tools, with short schemas that every client can read."""
        if not self._listed:
            for tool in await super().list_tools():
                schemas = {
                    "input_schema": arguments_schema(tool.input_schema),
                    "output_schema": answer_schema(tool.output_schema or {}),
                }
                self._listed.append(tool.model_copy(update=schemas))
        return self._listed

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
            if tool.name == name:
                try:
                    arguments = given(arguments, known)
                except InputError as error:
                    raise ToolError(f"{error} Nothing was submitted.") from error
        try:
            answer = await super().call_tool(name, arguments, context)
        except ToolError as error:
            if isinstance(error.__cause__, ValidationError) and not isinstance(error, UnexpectedToolError):
                mistake = first_mistake(error.__cause__)
                raise ToolError(f"{mistake}. Check the schema of the tool; nothing was submitted.") from error
            raise
        if isinstance(answer, CallToolResult) and answer.structured_content is not None:
            # The SDK indents it, which costs a model a third more.
            text = json.dumps(answer.structured_content, ensure_ascii=False)
            answer.content = [TextContent(type="text", text=text)]
        return answer

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
