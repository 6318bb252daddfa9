"""What any block is that a release can name as its target, and how a step gets at its platform."""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import Any, Self

import httpx
from prefect.blocks.abstract import CredentialsBlock
from prefect.blocks.core import Block, UnknownBlockType
from prefect.exceptions import PrefectHTTPStatusError
from pydantic import ValidationError

from prefect_rollout.errors import ConfigurationError
from prefect_rollout.models import first_mistake
from prefect_rollout.platforms.port import Platform
from prefect_rollout.text import one_line


class TargetBlock(CredentialsBlock, ABC):
    """A block that gives a client of a platform."""

    @abstractmethod
    def get_client(self, *args: Any, **kwargs: Any) -> Platform:
        """A client of the platform, to be entered and closed by the caller."""

    @classmethod
    def from_environment(cls) -> Self | None:
        """The block that environment variables describe, or `None` if they name no credentials."""
        return None


async def load_target(target: str) -> TargetBlock:
    """The block document `type-slug/name`.

    `…/default` that nobody saved is made from the environment, where its variables are set.

    Raises:
        ConfigurationError: there is no such block, it is of another kind, or it cannot be used.
    """
    slug, _, name = target.partition("/")
    try:
        kind = Block.get_block_class_from_key(slug)
    except UnknownBlockType:
        kind = Block
    if not issubclass(kind, TargetBlock) or not name:
        kinds = sorted(known.get_block_type_slug() for known in TargetBlock.__subclasses__())
        raise ConfigurationError(
            f"target: {one_line(target, 120)!r} names no platform",
            advice=f"Give type-slug/name, where the type is one of: {', '.join(kinds)}.",
            field="target",
        )
    try:
        return await kind.aload(name)
    except RuntimeError as error:  # Prefect's word for a block that does not fit its type
        mistake = error.__cause__
        what = first_mistake(mistake) if isinstance(mistake, ValidationError) else "it cannot be loaded"
        raise ConfigurationError(
            f"target: the block {target} cannot be used: {what}", field="target"
        ) from None  # Prefect's own text would show what the block holds
    except ValueError as error:
        made = kind.from_environment() if name == "default" else None
        if made is None:
            raise ConfigurationError(
                f"target: there is no block {one_line(target, 120)}", field="target"
            ) from error
        return made
    except (httpx.TransportError, PrefectHTTPStatusError) as error:
        raise ConfigurationError(
            f"target: the Prefect API did not give the block {target}: {type(error).__name__}",
            advice="Check PREFECT_API_URL and that the Prefect server runs.",
            retryable=True,
        ) from error


_open: ContextVar[tuple[str, asyncio.AbstractEventLoop, Platform] | None] = ContextVar("open", default=None)


@asynccontextmanager
async def open_target(target: str) -> AsyncIterator[Platform]:
    """The platform of `target`, with one pool of connections for all that runs within.

    A step that is called within a flow's `open_target` shares the flow's client; called by itself,
    it opens its own. A client is never carried to another event loop, where it could not be used.
    """
    loop = asyncio.get_running_loop()
    current = _open.get()
    if current and current[:2] == (target, loop):
        yield current[2]
        return
    async with (await load_target(target)).get_client() as platform:
        token = _open.set((target, loop, platform))
        try:
            yield platform
        finally:
            _open.reset(token)
