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
from prefect.context import SettingsContext, get_settings_context
from prefect.settings import PREFECT_API_URL, PREFECT_UI_URL, Settings, temporary_settings
from prefect.utilities.urls import url_for

from prefect_rollout import guard, local, prefect_api
from prefect_rollout.blocks import TargetBlock, refuse_two_clouds, target_of_environment
from prefect_rollout.blocks.load import load
from prefect_rollout.errors import ConfigurationError
from prefect_rollout.models import ENVIRONMENT
from prefect_rollout.text import address

_NO_RUN = UUID(int=0)

# File in the folder of the local service with the secret that names of kept blocks are made with.
_KEY = "key"


class Api:
    """A Prefect API, as this process speaks to it. `opened` makes one.

    Attributes:
        client: of the API, open.
        environment: the block in which the API keeps the credentials of the environment; empty for none.
        local: whether the API is the user's local one, which holds the credentials of the environment.
    """

    def __init__(
        self, client: PrefectClient, environment: str, settings: dict[Any, Any], lease: local.Lease | None
    ) -> None:
        self.client = client
        self.environment = environment
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
        with self.in_force():
            return address(url_for("flow-run", obj_id=_NO_RUN) or "")

    async def target_of(self, target: str) -> str:
        """Return the target to submit for the one that is asked for.

        Raises:
            ConfigurationError: none is asked for, and the default block and the environment are at odds.
        """
        if target == "":
            with self.in_force():
                await refuse_two_clouds()
        return (self.environment or target) if target in {"", ENVIRONMENT} else target

    @property
    def ui(self) -> str:
        """The address of the UI."""
        with self.in_force():
            return address(PREFECT_UI_URL.value() or PREFECT_API_URL.value() or "").removesuffix("/api")

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """Has Prefect's own functions, such as those that load blocks, speak to this API."""
        if not self._settings:
            yield
            return
        with SettingsContext(profile=get_settings_context().profile, settings=self._in_force):
            yield

    @cached_property
    def _in_force(self) -> Settings:
        # Made once: Prefect reads and checks all its settings for it, which takes tens of milliseconds.
        return get_settings_context().settings.copy_with_update(updates=self._settings)


@asynccontextmanager
async def opened(home: Path) -> AsyncIterator[Api]:
    """The API that is configured, or the user's local one, which is started where it does not run.

    Args:
        home: the folder of the local service.

    Raises:
        ConfigurationError: it does not answer, or did not start.
    """
    if prefect_api.configured():
        async with get_client() as client:
            with guard.answering():
                if problem := await client.api_healthcheck():
                    raise ConfigurationError(
                        f"the Prefect API {prefect_api.api_in_use()} does not answer: "
                        f"{type(problem).__name__}",
                        advice="Start it, or correct PREFECT_API_URL; unset, a local server is used.",
                    )
            yield Api(client, "", {}, None)
        return
    lease = await local.attach(home)
    settings = prefect_api.settings_of(lease.address)
    try:
        with temporary_settings(settings):
            client = get_client()
            environment = await _kept(target_of_environment(), local.secret_of(home / _KEY))
        async with client:
            yield Api(client, environment, settings, lease)
    finally:
        await lease.close()


async def _kept(block: TargetBlock | None, key: str) -> str:
    """The name under which the environment's credentials are kept as a block, for the runner; empty for none.

    It is another one for other credentials: clients of the same service may have keys of their own.
    """
    if block is None:
        return ""
    held = block.model_dump_json(context={"include_secrets": True})
    digest = hmac.new(key.encode(), held.encode(), hashlib.sha256).hexdigest()[:16]
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
