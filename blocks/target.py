"""What any block is that a release can name as its target, and how a step gets at its platform."""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import Any, ClassVar, NamedTuple, Self

from prefect.blocks.abstract import CredentialsBlock
from prefect.blocks.core import Block, UnknownBlockType
from pydantic import Field

from prefect_rollout.blocks.load import load
from prefect_rollout.errors import ConfigurationError
from prefect_rollout.platforms.port import Platform
from prefect_rollout.text import one_line


class TargetBlock(CredentialsBlock, ABC):
    """A block that gives a client of a platform.

    Attributes:
        windows: Name of the release-windows block that its releases obey.
    """

    variables: ClassVar[str] = "the environment variables of its credentials"
    """The environment variables without which `from_environment` makes no block, for a person."""

    windows: str = Field(
        default="default",
        pattern=r"^[a-z0-9-]*$",
        title="Release windows",
        description="Name of the release-windows block that its releases obey; empty for none.",
    )

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Puts what all targets have last: the block's form shows the fields in this order."""
        super().__pydantic_init_subclass__(**kwargs)
        cls.model_fields["windows"] = cls.model_fields.pop("windows")

    @abstractmethod
    def get_client(self, *args: Any, **kwargs: Any) -> Platform:
        """A client of the platform, to be entered and closed by the caller."""

    @classmethod
    def from_environment(cls) -> Self | None:
        """The block that environment variables describe, or `None` if they name no credentials."""
        return None


def target_of_environment() -> TargetBlock | None:
    """The block that environment variables describe, of whichever platform; `None` if they name none.

    Raises:
        ConfigurationError: they describe one that cannot be used.
    """
    return next((block for kind in TargetBlock.__subclasses__() if (block := kind.from_environment())), None)


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
    block = await load(kind, name, field="target")
    if block is None and name == "default":
        block = kind.from_environment()
    if block is None:
        advice = f"Set {kind.variables}, or run `prefect-rollout configure`." if name == "default" else None
        raise ConfigurationError(
            f"target: there is no block {one_line(target, 120)}", advice=advice, field="target"
        )
    return block


class _Open(NamedTuple):
    """The platform of a target, as it is open on an event loop."""

    target: str
    loop: asyncio.AbstractEventLoop
    platform: Platform
    windows: str


_open: ContextVar[_Open | None] = ContextVar("open", default=None)


@asynccontextmanager
async def open_target(target: str) -> AsyncIterator[Platform]:
    """The platform of `target`, with one pool of connections for all that runs within.

    A step that is called within a flow's `open_target` shares the flow's client; called by itself,
    it opens its own. A client is never carried to another event loop, where it could not be used.
    """
    if current := _opened(target):
        yield current.platform
        return
    block = await load_target(target)
    async with block.get_client() as platform:
        token = _open.set(_Open(target, asyncio.get_running_loop(), platform, block.windows))
        try:
            yield platform
        finally:
            _open.reset(token)


async def windows_of(target: str) -> str:
    """The name of the release-windows block that releases of `target` obey; empty for none.

    Raises:
        ConfigurationError: the target's block, where it is not open, cannot be loaded.
    """
    current = _opened(target)
    return current.windows if current else (await load_target(target)).windows


def _opened(target: str) -> _Open | None:
    current = _open.get()
    return current if current and current[:2] == (target, asyncio.get_running_loop()) else None
