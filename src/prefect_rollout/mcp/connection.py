"""The Prefect API that the tools submit to: the one that is configured, or the user's local one."""

import asyncio
import hashlib
import hmac
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect.client.orchestration import PrefectClient, get_client
from prefect.settings import (
    PREFECT_API_AUTH_STRING,
    PREFECT_API_URL,
    PREFECT_SERVER_ALLOW_EPHEMERAL_MODE,
    PREFECT_UI_URL,
    temporary_settings,
)
from prefect.utilities.urls import url_for

from prefect_rollout import guard, local
from prefect_rollout.blocks import TargetBlock, target_of_environment
from prefect_rollout.blocks.load import load
from prefect_rollout.embedded import in_use
from prefect_rollout.errors import ConfigurationError
from prefect_rollout.mcp.permits import DEFAULT_TARGET

_NO_RUN = UUID(int=0)


class Api:
    """A Prefect API, as this process speaks to it. `opened` makes one.

    Attributes:
        client: of the API, open.
        target: the block that a release is submitted with where it names none.
        local: whether the API is the user's local one, which holds the credentials of the environment.
    """

    def __init__(
        self, client: PrefectClient, target: str, settings: dict[Any, Any], lease: local.Lease | None
    ) -> None:
        self.client = client
        self.target = target
        self.local = lease is not None
        self._settings = settings
        self._lease = lease

    @property
    def lost(self) -> bool:
        """Whether the local service has ended, so that another one has to be found."""
        return self._lease is not None and self._lease.lost

    def poke(self) -> None:
        """Tells a local runner that there is something to do."""
        if self._lease is not None:
            self._lease.poke()

    def link(self, run_id: Any) -> str:
        """The address of a flow run's page in the UI; empty where there is none."""
        return self._page.replace(str(_NO_RUN), str(run_id))

    @cached_property
    def _page(self) -> str:
        # Made once: to put settings in force takes tens of milliseconds.
        with temporary_settings(self._settings):
            return url_for("flow-run", obj_id=_NO_RUN) or ""

    @property
    def ui(self) -> str:
        """The address of the UI."""
        with temporary_settings(self._settings):
            return (PREFECT_UI_URL.value() or PREFECT_API_URL.value() or "").removesuffix("/api")

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """Has Prefect's own functions, such as those that load blocks, speak to this API."""
        with temporary_settings(self._settings):
            yield


@asynccontextmanager
async def opened(home: Path) -> AsyncIterator[Api]:
    """The API that is configured, or the user's local one, which is started where it does not run.

    Args:
        home: the folder of the local service.

    Raises:
        ConfigurationError: it does not answer, or did not start.
    """
    if not in_use():
        async with get_client() as client:
            with guard.answering():
                if problem := await client.api_healthcheck():
                    url, kind = PREFECT_API_URL.value(), type(problem).__name__
                    raise ConfigurationError(
                        f"the Prefect API {url} does not answer: {kind}",
                        advice="Start it, or correct PREFECT_API_URL; unset, a local server is used.",
                    )
            yield Api(client, DEFAULT_TARGET, {}, None)
        return
    lease = await local.attach(home)
    settings = {
        PREFECT_API_URL: lease.address.api,
        PREFECT_API_AUTH_STRING: lease.address.password,
        PREFECT_SERVER_ALLOW_EPHEMERAL_MODE: False,
    }
    try:
        with temporary_settings(settings):
            client = get_client()
            target = await _kept(target_of_environment(), lease.address.password)
        async with client:
            yield Api(client, target, settings, lease)
    finally:
        await lease.close()


async def _kept(block: TargetBlock | None, password: str) -> str:
    """The name under which the environment's credentials are kept as a block, for the runner.

    It is another one for other credentials: clients of the same service may have keys of their own.
    """
    if block is None:
        return DEFAULT_TARGET
    held = block.model_dump_json(context={"include_secrets": True})
    digest = hmac.new(password.encode(), held.encode(), hashlib.sha256).hexdigest()[:16]
    name = f"environment-{digest}"
    # Its name stands for all that it holds: where it is saved, it is saved right.
    if await load(type(block), name, field="target") is None:
        with guard.answering():
            await block.asave(name, overwrite=True)
    return f"{block.get_block_type_slug()}/{name}"


class Connection:
    """The API of this process: opened when it is first needed, and anew where it was lost."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._lock = asyncio.Lock()
        self._opened: list[AbstractAsyncContextManager[Api]] = []
        self._api: Api | None = None

    async def api(self) -> Api:
        """The API.

        Raises:
            ConfigurationError: see `opened`.
        """
        async with self._lock:
            if self._api is not None and not self._api.lost:
                return self._api
            found = opened(self._home)
            self._api = await found.__aenter__()
            # The one that was lost stays open: calls may still wait with it, and shall fail by its silence.
            self._opened.append(found)
            return self._api

    async def close(self) -> None:
        """Closes whatever was opened."""
        while self._opened:
            await self._opened.pop().__aexit__(None, None, None)
