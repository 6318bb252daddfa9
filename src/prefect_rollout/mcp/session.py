"""The session of a server: Prefect and its API, loaded in the background after the handshake."""

import asyncio
import importlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mcp.server.mcpserver import Context
from mcp.server.mcpserver.exceptions import ToolError

from prefect_rollout.errors import NotFoundError, RolloutError
from prefect_rollout.mcp.policy import Policy
from prefect_rollout.mcp.untrusted import error_text

if TYPE_CHECKING:
    from prefect_rollout.mcp.connection import Api

# Below the 60 s after which many clients cut a call: they show an error that says what to do.
_START_SECONDS = 50.0
_LONGEST_SECONDS = 57.0
_PROGRESS_SECONDS = 2.0


class Tooling(NamedTuple):
    """The API and the limits of a tool call that began at `began`; `renewed` reconnects a lost API."""

    api: "Api"
    policy: Policy
    renewed: Callable[[], Awaitable["Api"]]
    began: float

    def left(self, seconds: float) -> float:
        """Return what is left of the seconds that the call may take."""
        return max(0.0, self.began + seconds - time.monotonic())


class Session:
    """Prefect and its API, for the tools of a server; `home` is the folder of the local server."""

    def __init__(self, policy: Policy, home: Path) -> None:
        self.policy = policy
        self._home = home
        self._opening: asyncio.Task[Api] | None = None
        self._opened = AsyncExitStack()

    def begin(self) -> "asyncio.Task[Api]":
        """Start to import Prefect and to connect in the background, unless that has started."""
        task = self._opening
        if task is None or (task.done() and (task.cancelled() or task.exception() or task.result().lost)):
            task = self._opening = asyncio.create_task(self._open())
        return task

    async def _open(self) -> "Api":
        # In a thread: the server answers its client meanwhile.
        await asyncio.to_thread(importlib.import_module, "prefect_rollout.mcp.submit")
        from prefect_rollout.mcp.connection import opened

        # A lost API stays open: pending calls still use it, and fail because it does not answer.
        return await self._opened.enter_async_context(opened(self._home))

    async def api(self) -> "Api":
        """Return the API once it answers, or raise `ConfigurationError`."""
        return await asyncio.shield(self.begin())

    @asynccontextmanager
    async def tooling(self, ctx: Context | None = None) -> AsyncIterator[Tooling]:
        """Yield the API for a tool call; errors become tool errors that say what to do.

        The first call waits for the API, and reports that to the client of `ctx`.

        Raises:
            ToolError: the API does not answer, did not start, or is still starting.
        """
        began, api = time.monotonic(), None
        try:
            api = await self._started(ctx, began)
            try:
                async with asyncio.timeout(began + _LONGEST_SECONDS - time.monotonic()):
                    yield Tooling(api, self.policy, self.api, began)
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

    async def _started(self, ctx: Context | None, began: float) -> "Api":
        ready = asyncio.ensure_future(self.api())
        while not (await asyncio.wait([ready], timeout=_PROGRESS_SECONDS))[0]:
            waited = time.monotonic() - began
            if waited > _START_SECONDS - _PROGRESS_SECONDS:
                ready.cancel()
                raise ToolError(
                    "The local Prefect server is still starting; the first start can take a minute. Nothing "
                    "was submitted: repeat the same call in a few seconds."
                )
            if ctx is not None:  # less than the first step of a release, because progress only rises
                await ctx.report_progress(
                    waited / _START_SECONDS, None, f"Waiting for the Prefect server to start ({waited:.0f} s)"
                )
        return ready.result()

    async def close(self) -> None:
        """Disconnect from the API."""
        if self._opening is not None:
            self._opening.cancel()
            await asyncio.gather(self._opening, return_exceptions=True)
        self._opening = None
        await self._opened.aclose()
