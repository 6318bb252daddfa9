"""What stands behind the tools: Prefect, imported behind the handshake's back, and the API in use."""

import asyncio
import importlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from mcp.server.mcpserver.exceptions import ToolError

from prefect_rollout.errors import NotFoundError, RolloutError
from prefect_rollout.mcp.permits import Permits
from prefect_rollout.mcp.quoting import told

if TYPE_CHECKING:
    from prefect_rollout.mcp.connection import Api, Connection

# A client that cuts calls at 60 s shall read why it has to come back, rather than nothing.
_START_SECONDS = 45.0
_LONGEST_SECONDS = 56.0


class Releases(Protocol):
    """The module `prefect_rollout.mcp.releases`; importing it takes seconds."""

    def __getattr__(self, name: str) -> Any: ...


@dataclass(frozen=True)
class Tooling:
    """What a tool works with.

    Attributes:
        renewed: the API, found again where the local service ended meanwhile.
    """

    releases: Releases
    api: "Api"
    permits: Permits
    renewed: Callable[[], Awaitable["Api"]]


class Work:
    """Prefect and its API, for the tools of a server.

    Args:
        permits: what clients may ask for.
        home: the folder of the local service.
    """

    def __init__(self, permits: Permits, home: Path) -> None:
        self.permits = permits
        self._home = home
        self._ready: asyncio.Task[Connection] | None = None

    def begin(self) -> "asyncio.Task[Connection]":
        """Begins to import Prefect and to connect, in the background, unless that has begun."""
        if self._ready is None or (self._ready.done() and self._ready.exception()):
            self._ready = asyncio.create_task(self._start())
        return self._ready

    async def _start(self) -> "Connection":
        # In a thread: whoever speaks to the server meanwhile is answered.
        await asyncio.to_thread(importlib.import_module, "prefect_rollout.mcp.releases")
        from prefect_rollout.mcp.connection import Connection

        made = Connection(self._home)
        await made.api()
        return made

    async def api(self) -> "Api":
        """The API, once it answers.

        Raises:
            ConfigurationError: it does not, or did not start.
        """
        ready = self.begin()
        return await (await asyncio.shield(ready)).api()

    @asynccontextmanager
    async def tooling(self) -> AsyncIterator[Tooling]:
        """What a tool works with; errors of ours become errors of a tool that say what to do.

        Raises:
            ToolError: the API does not answer, did not start, or does not yet.
        """
        api: Api | None = None
        try:
            try:
                async with asyncio.timeout(_START_SECONDS):
                    api = await self.api()
            except TimeoutError:
                raise ToolError(
                    "The local Prefect server is still starting; a first start takes a minute on a slow "
                    "machine. Nothing was submitted: make the same call again in some seconds."
                ) from None
            from prefect_rollout.mcp import releases

            try:
                async with asyncio.timeout(_LONGEST_SECONDS):
                    yield Tooling(releases, api, self.permits, self.api)
            except TimeoutError:
                raise ToolError(
                    "The Prefect API takes too long to answer. Make the same call again: it finds what was "
                    "started."
                ) from None
        except RolloutError as error:
            if isinstance(error, NotFoundError) and self.permits.restrict:
                error.unlist()
            if api is not None and api.local and error.data.get("prefect_api"):
                raise ToolError(
                    "The local Prefect server does not answer; if it ended, it is started again. Make the "
                    "same call again in some seconds: it finds what was started."
                ) from error
            raise ToolError(told(error)) from error

    async def close(self) -> None:
        """Gives the API up."""
        ready, self._ready = self._ready, None
        if ready is None:
            return
        ready.cancel()
        try:
            await (await ready).close()
        except (asyncio.CancelledError, RolloutError):
            logging.getLogger(__name__).info("The Prefect API was never reached")
