"""What any block is that a release can name as its target, and how a step gets at its platform."""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import Any, ClassVar, NamedTuple, Self

from prefect.blocks.abstract import CredentialsBlock
from prefect.blocks.core import Block, UnknownBlockType
from pydantic import Field, field_validator

from prefect_rollout.blocks.load import load
from prefect_rollout.errors import ConfigurationError
from prefect_rollout.images import usable_pattern
from prefect_rollout.models import DEFAULT_TARGET, ENVIRONMENT, cloud_words
from prefect_rollout.platforms.port import Platform
from prefect_rollout.text import one_line

VARIABLES = "environment variables"
"""Shown in place of a block's name if environment variables describe the platform."""


class TargetBlock(CredentialsBlock, ABC):
    """A block that gives a client of a platform.

    Attributes:
        windows: Name of the release-windows block that its releases obey.
        allowed_images: Registries and repositories whose images may be released; all if empty.
    """

    variables: ClassVar[str] = "the environment variables of its credentials"
    """The environment variables without which `from_environment` makes no block, for a person."""

    windows: str = Field(
        default="default",
        pattern=r"^[a-z0-9-]*$",
        title="Release windows",
        description="Name of the release-windows block that its releases obey; empty for none.",
    )

    allowed_images: list[str] = Field(
        default_factory=list,
        title="Allowed images",
        description="Registries and repositories whose images may be released, such as "
        "harbor.qihoo.net/qdgc-*; all if empty.",
    )

    @field_validator("allowed_images")
    @classmethod
    def _patterns(cls, value: list[str]) -> list[str]:
        return [usable_pattern(each) for each in value]

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Puts what all targets have last: the block's form shows the fields in this order."""
        super().__pydantic_init_subclass__(**kwargs)
        for name in ("windows", "allowed_images"):
            cls.model_fields[name] = cls.model_fields.pop(name)

    @property
    @abstractmethod
    def address(self) -> str:
        """The address of the platform as it may be shown: without user name and password."""

    @property
    def registries(self) -> list[str]:
        """Patterns of the images in the block's own registry."""
        return []

    def environment_says(self) -> str:
        """Return what environment variables that are set say otherwise, as a clause; empty for nothing."""
        return ""

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


class Chosen(NamedTuple):
    """The block that a target means, and its name.

    Attributes:
        block: gives clients of the platform.
        name: of the block, as type-slug/name, or `environment variables`.
    """

    block: TargetBlock
    name: str

    @property
    def words(self) -> str:
        """Return such as `https://k8s.qihoo.net (container-cloud/default)`."""
        return cloud_words(self.block.address, self.name)


async def choose_target(target: str) -> Chosen:
    """Return the block that a target means.

    A name is the block of that name. `environment` is what the environment variables describe. Empty is the
    saved block `container-cloud/default`, or else the environment variables, unless the two are at odds.
    A default block that is named and that nobody saved is made from the variables, too.

    Raises:
        ConfigurationError: there is no such block, it is of another kind, it cannot be used, or an empty
            target could mean one cloud as well as another.
    """
    if target == ENVIRONMENT:
        if found := target_of_environment():
            return Chosen(found, VARIABLES)
        raise ConfigurationError(
            "target: no environment variables describe a cloud",
            advice=f"Set {_variables()}, or name a block as type-slug/name.",
            field="target",
        )
    slug, _, name = (target or DEFAULT_TARGET).partition("/")
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
    if saved := await load(kind, name, field="target"):
        if not target:
            _refuse_two_clouds(saved)
        return Chosen(saved, f"{slug}/{name}")
    if name == "default" and (made := kind.from_environment()):
        return Chosen(made, VARIABLES)
    advice = f"Set {kind.variables}, or run `prefect-rollout configure`." if name == "default" else None
    raise ConfigurationError(
        f"target: there is no block {slug}/{one_line(name, 120)}", advice=advice, field="target"
    )


async def refuse_two_clouds() -> None:
    """Return if an empty target means one cloud alone, as far as that can be seen from here.

    Raises:
        ConfigurationError: the default block and the environment variables are at odds.
    """
    slug, _, name = DEFAULT_TARGET.partition("/")
    saved = await load(Block.get_block_class_from_key(slug), name, field="target")
    if isinstance(saved, TargetBlock):
        _refuse_two_clouds(saved)


def _refuse_two_clouds(saved: TargetBlock) -> None:
    """Return if the environment variables, as far as they are set, say the same as the default block."""
    if otherwise := saved.environment_says():
        raise ConfigurationError(
            f"target: the saved block {DEFAULT_TARGET} is for {saved.address}, but {otherwise}",
            advice=f"Choose the target: {DEFAULT_TARGET} for the block, or {ENVIRONMENT} for the variables "
            f"(`--target {ENVIRONMENT}`); or unset the variables. Nothing was written.",
            field="target",
        )


def _variables() -> str:
    return " or ".join(kind.variables for kind in TargetBlock.__subclasses__())


async def load_target(target: str) -> TargetBlock:
    """Return the block that a target means; see `choose_target`."""
    return (await choose_target(target)).block


class _Open(NamedTuple):
    """The platform of a target, as it is open on an event loop."""

    target: str
    loop: asyncio.AbstractEventLoop
    platform: Platform
    chosen: Chosen


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
    chosen = await choose_target(target)
    async with chosen.block.get_client() as platform:
        token = _open.set(_Open(target, asyncio.get_running_loop(), platform, chosen))
        try:
            yield platform
        finally:
            _open.reset(token)


async def opened_as(target: str) -> Chosen:
    """Return the block that a target is open as, or would be opened as.

    Raises:
        ConfigurationError: see `choose_target`.
    """
    current = _opened(target)
    return current.chosen if current else await choose_target(target)


def _opened(target: str) -> _Open | None:
    current = _open.get()
    return current if current and current[:2] == (target, asyncio.get_running_loop()) else None
