"""The Prefect API that the tools submit to: the configured one, or the user's local one."""

import hashlib
import hmac
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect.client.orchestration import PrefectClient, get_client
from prefect.context import SettingsContext, get_settings_context
from prefect.settings import PREFECT_API_URL, PREFECT_UI_URL, Settings, temporary_settings
from prefect.utilities.urls import url_for

from prefect_rollout.blocks import TargetBlock, refuse_two_clouds, target_of_environment
from prefect_rollout.blocks.load import load
from prefect_rollout.execution import endpoint, prefect_api
from prefect_rollout.release.request import ENVIRONMENT
from prefect_rollout.runs.prefect_errors import translate_errors
from prefect_rollout.text import address

_NO_RUN = UUID(int=0)

# File in the daemon's folder with the secret by which saved blocks are named.
_KEY = "key"


class Api:
    """A Prefect API that this process uses; `environment` is the block with the environment's credentials.

    Only a local API (`local`) has such a block.
    """

    def __init__(
        self,
        client: PrefectClient,
        environment: str,
        settings: dict[Any, Any],
        daemon: endpoint.Endpoint | None,
    ) -> None:
        self.client = client
        self.environment = environment
        self.local = daemon is not None
        self._settings = settings
        self._daemon = daemon

    @property
    def lost(self) -> bool:
        """True if the local server has ended, so that another one has to be found."""
        return self._daemon is not None and self._daemon.lost

    def notify(self) -> None:
        """Have a local server's worker poll at once."""
        if self._daemon is not None:
            self._daemon.notify()

    def link(self, run_id: Any) -> str:
        """Return the address of a flow run's page in the UI; empty if there is none."""
        return self._page.replace(str(_NO_RUN), str(run_id))

    @cached_property
    def _page(self) -> str:
        with self.in_force():
            return address(url_for("flow-run", obj_id=_NO_RUN) or "")

    async def target_of(self, target: str) -> str:
        """Return the target to submit for the one that is requested.

        Raises:
            ConfigurationError: none is requested, and the default block contradicts the environment.
        """
        if target == "":
            with self.in_force():
                await refuse_two_clouds()
        return (self.environment or target) if target in {"", ENVIRONMENT} else target

    @property
    def ui(self) -> str:
        """Address of the UI."""
        with self.in_force():
            return address(PREFECT_UI_URL.value() or PREFECT_API_URL.value() or "").removesuffix("/api")

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """Have Prefect's own functions, such as those that load blocks, use this API within the context."""
        if not self._settings:
            yield
            return
        with SettingsContext(profile=get_settings_context().profile, settings=self._in_force):
            yield

    @cached_property
    def _in_force(self) -> Settings:
        # Cached: Prefect reads and checks all its settings for it, which takes tens of milliseconds.
        return get_settings_context().settings.copy_with_update(updates=self._settings)


@asynccontextmanager
async def opened(home: Path) -> AsyncIterator[Api]:
    """Open the configured API, or the user's local one, which is started if it does not run.

    Unlike `prefect_api.connected`, this does not change Prefect's settings, which are a task's own: the tools
    run in other tasks. See `Api.in_force`.

    Raises:
        ConfigurationError: the API does not answer, or the local server did not start.
    """
    if prefect_api.configured():
        async with get_client() as client:
            await prefect_api.check_configured(client)
            yield Api(client, "", {}, None)
        return
    daemon = await endpoint.connect(home)
    settings = prefect_api.settings_of(daemon.address)
    try:
        with temporary_settings(settings):
            client = get_client()
            environment = await _save_environment(target_of_environment(), endpoint.secret_of(home / _KEY))
        async with client:
            yield Api(client, environment, settings, daemon)
    finally:
        await daemon.close()


async def _save_environment(block: TargetBlock | None, key: str) -> str:
    """Save the environment's credentials as a block for the daemon; return its name, empty without any.

    Other credentials have another name: clients of the same daemon may have keys of their own.
    """
    if block is None:
        return ""
    content = block.model_dump_json(context={"include_secrets": True})
    digest = hmac.new(key.encode(), content.encode(), hashlib.sha256).hexdigest()[:16]
    name = f"environment-{digest}"
    # The name is a digest of the content: a block that exists need not be saved again.
    if await load(type(block), name, field="target") is None:
        with translate_errors():
            await block.asave(name, overwrite=True)
    return f"{block.get_block_type_slug()}/{name}"
