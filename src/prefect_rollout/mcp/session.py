"""The session of a server: Prefect and its API, loaded in the background after the handshake."""

import asyncio
import importlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mcp.server.mcpserver.exceptions import ToolError

from prefect_rollout.errors import NotFoundError, RolloutError
from prefect_rollout.mcp.policy import Policy
from prefect_rollout.mcp.untrusted import error_text

if TYPE_CHECKING:
    from prefect_rollout.mcp.connection import Api, Connection

# Below the 60 s after which many clients cut a call: they show an error that says what to do.
_START_SECONDS = 45.0
_LONGEST_SECONDS = 56.0


class Tooling(NamedTuple):
    """The API and the limits of a tool call.

    Attributes:
        api: the Prefect API.
        policy: limits of the client.
        renewed: returns the API, reconnected if the local server was restarted.
    """

    api: "Api"
    policy: Policy
    renewed: Callable[[], Awaitable["Api"]]


class Session:
    """Prefect and its API, for the tools of a server.

    Args:
        policy: limits of the clients.
        home: folder of the local server.
    """

    def __init__(self, policy: Policy, home: Path) -> None:
        self.policy = policy
        self._home = home
        self._ready: asyncio.Task[Connection] | None = None

    def begin(self) -> "asyncio.Task[Connection]":
        """Start to import Prefect and to connect in the background, unless that has started."""
        if self._ready is None or (self._ready.done() and self._ready.exception()):
            self._ready = asyncio.create_task(self._start())
        return self._ready

    async def _start(self) -> "Connection":
        # In a thread: the server answers its client meanwhile.
        await asyncio.to_thread(importlib.import_module, "prefect_rollout.mcp.submit")
        from prefect_rollout.mcp.connection import Connection

        made = Connection(self._home)
        await made.api()
        return made

    async def api(self) -> "Api":
        """Return the API once it answers.

        Raises:
            ConfigurationError: it does not answer, or did not start.
        """
        ready = self.begin()
        return await (await asyncio.shield(ready)).api()

    @asynccontextmanager
    async def tooling(self) -> AsyncIterator[Tooling]:
        """Yield the API for a tool call; errors become tool errors that say what to do.

        Raises:
            ToolError: the API does not answer, did not start, or is still starting.
        """
        api: Api | None = None
        try:
            try:
                async with asyncio.timeout(_START_SECONDS):
                    api = await self.api()
            except TimeoutError:
                raise ToolError(
                    "The local Prefect server is still starting; the first start can take a minute. Nothing "
                    "was submitted: repeat the same call in a few seconds."
                ) from None
            try:
                async with asyncio.timeout(_LONGEST_SECONDS):
                    yield Tooling(api, self.policy, self.api)
            except TimeoutError:
                raise ToolError(
                    "The Prefect API takes too long to answer. Repeat the same call: it finds the run that "
                    "was started."
                ) from None
        except RolloutError as error:
            if isinstance(error, NotFoundError) and self.policy.restrict:
                error.unlist()
            if api is not None and api.local and error.data.get("prefect_api"):
                raise ToolError(
                    "The local Prefect server does not answer; if it ended, it is restarted. Repeat the same "
                    "call in a few seconds: it finds the run that was started."
                ) from error
            raise ToolError(error_text(error)) from error

    async def close(self) -> None:
        """Disconnect from the API."""
        ready, self._ready = self._ready, None
        if ready is None:
            return
        ready.cancel()
        try:
            await (await ready).close()
        except (asyncio.CancelledError, RolloutError):
            logging.getLogger(__name__).info("The Prefect API was never reached")
