"""Release targets: blocks with the address and credentials of a platform."""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import Any, ClassVar, NamedTuple, Self

from prefect.blocks.abstract import CredentialsBlock
from prefect.blocks.core import Block, UnknownBlockType
from pydantic import Field, SecretStr, field_validator

from prefect_rollout.blocks.load import load
from prefect_rollout.errors import ConfigurationError
from prefect_rollout.platforms.port import Platform
from prefect_rollout.release.image_facts import DEFAULT_PLATFORM
from prefect_rollout.release.image_facts import Platform as NodePlatform
from prefect_rollout.release.images import usable_pattern
from prefect_rollout.release.request import DEFAULT_TARGET, ENVIRONMENT
from prefect_rollout.release.result import cloud_words
from prefect_rollout.text import one_line

VARIABLES = "environment variables"
"""Replaces a block's name in output if environment variables describe the platform."""


class TargetBlock(CredentialsBlock, ABC):
    """A block that creates clients of a platform."""

    variables: ClassVar[str] = "the environment variables of its credentials"
    """Environment variables that `from_environment` requires, as text for messages."""

    unsaved_name: ClassVar[str] = VARIABLES
    """Replaces the block's name in output for the block that `unsaved` returns."""

    windows: str = Field(
        default="default",
        pattern=r"^[a-z0-9-]*$",
        title="Release windows",
        description="Name of the release-windows block that applies to its releases; empty for none.",
    )

    allowed_images: list[str] = Field(
        default_factory=list,
        title="Allowed images",
        description="Registries and repositories whose images may be released, such as "
        "harbor.qihoo.net/qdgc-*; all if empty.",
    )

    image_registries: list[str] = Field(
        default_factory=list,
        title="Image registries",
        description="Blocks with credentials of registries, as image-registry/name or "
        "docker-registry-credentials/name; without one for a registry, those of docker login.",
    )

    node_platform: NodePlatform = Field(
        default=DEFAULT_PLATFORM,
        title="Platform of the nodes",
        description="Operating system and architecture that images must be built for.",
    )

    @field_validator("*", mode="before")
    @classmethod
    def _stripped(cls, value: Any) -> Any:
        """Strip text that was pasted, or read from a file that ends with a newline."""
        if isinstance(value, SecretStr):
            return SecretStr(value.get_secret_value().strip())
        return value.strip() if isinstance(value, str) else value

    @field_validator("allowed_images")
    @classmethod
    def _patterns(cls, value: list[str]) -> list[str]:
        return [usable_pattern(each) for each in value]

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Move the shared fields to the end: the block's form shows the fields in this order."""
        super().__pydantic_init_subclass__(**kwargs)
        for name in ("windows", "allowed_images", "image_registries", "node_platform"):
            cls.model_fields[name] = cls.model_fields.pop(name)

    @property
    @abstractmethod
    def address(self) -> str:
        """Address of the platform for display, without user name and password."""

    @property
    def registries(self) -> list[str]:
        """Patterns of the images in the block's own registry."""
        return []

    def environment_says(self) -> str:
        """Return the environment variables that contradict the block, as a clause; empty if none do."""
        return ""

    @abstractmethod
    def get_client(self, *args: Any, **kwargs: Any) -> Platform:
        """Return a client of the platform; the caller enters and closes it."""

    @classmethod
    def from_environment(cls) -> Self | None:
        """Return the block that environment variables describe; `None` if they have no credentials."""
        return None

    @classmethod
    def unsaved(cls) -> Self | None:
        """Return the block that replaces `default` if none is saved: by default that of the environment."""
        return cls.from_environment()


def target_of_environment() -> TargetBlock | None:
    """Return the block of any platform that environment variables describe; `None` if there is none.

    Raises:
        ConfigurationError: the variables describe a block that cannot be used.
    """
    return next((block for kind in TargetBlock.__subclasses__() if (block := kind.from_environment())), None)


class Chosen(NamedTuple):
    """The block of a target, and its name."""

    block: TargetBlock
    name: str  # type-slug/name, or `environment variables`

    @property
    def words(self) -> str:
        """Address and name, such as `https://k8s.qihoo.net (container-cloud/default)`."""
        return cloud_words(self.block.address, self.name)


async def choose_target(target: str) -> Chosen:
    """Return the block of a target.

    `type-slug/name` selects a saved block, and `type-slug` its `default`. If no `default` block is saved, the
    one that `unsaved` returns replaces it. `environment` selects the environment variables. An empty target
    selects the saved block `container-cloud/default`, which the environment variables must not contradict, or
    else the variables.

    Raises:
        ConfigurationError: the block does not exist, is not a target or cannot be used; or the target is
            empty, and the saved block and the environment variables contradict each other.
    """
    if target == ENVIRONMENT:
        if found := target_of_environment():
            return Chosen(found, VARIABLES)
        variables = " or ".join(kind.variables for kind in TargetBlock.__subclasses__())
        raise ConfigurationError(
            "target: no environment variables describe a cloud",
            advice=f"Set {variables}, or name a block as type-slug/name.",
            field="target",
        )
    slug, _, name = (target or DEFAULT_TARGET).partition("/")
    name = name or "default"
    try:
        kind = Block.get_block_class_from_key(slug)
    except UnknownBlockType:
        kind = Block
    if not issubclass(kind, TargetBlock):
        kinds = sorted(known.get_block_type_slug() for known in TargetBlock.__subclasses__())
        raise ConfigurationError(
            f"target: {one_line(target, 120)!r} is not the name of a platform's block",
            advice=f"Give type-slug/name, where the type is one of: {', '.join(kinds)}.",
            field="target",
        )
    if saved := await load(kind, name, field="target"):
        if not target:
            _refuse_two_clouds(saved)
        return Chosen(saved, f"{slug}/{name}")
    if name == "default" and (made := kind.unsaved()):
        return Chosen(made, kind.unsaved_name)
    advice = f"Set {kind.variables}, or run `prefect-rollout configure`." if name == "default" else None
    raise ConfigurationError(
        f"target: there is no block {slug}/{one_line(name, 120)}", advice=advice, field="target"
    )


async def refuse_two_clouds() -> None:
    """Check that an empty target is unambiguous, given the environment of this process.

    Raises:
        ConfigurationError: the default block and the environment variables contradict each other.
    """
    slug, _, name = DEFAULT_TARGET.partition("/")
    saved = await load(Block.get_block_class_from_key(slug), name, field="target")
    if isinstance(saved, TargetBlock):
        _refuse_two_clouds(saved)


def _refuse_two_clouds(saved: TargetBlock) -> None:
    """Check that no environment variable contradicts the default block."""
    if otherwise := saved.environment_says():
        raise ConfigurationError(
            f"target: the saved block {DEFAULT_TARGET} is for {saved.address}, but {otherwise}",
            advice=f"Choose the target: {DEFAULT_TARGET} for the block, or {ENVIRONMENT} for the variables "
            f"(`--target {ENVIRONMENT}`); or unset the variables. Nothing was written.",
            field="target",
        )


class _Open(NamedTuple):
    """The platform of a target, open on an event loop."""

    target: str
    loop: asyncio.AbstractEventLoop
    platform: Platform
    chosen: Chosen


_open: ContextVar[_Open | None] = ContextVar("open", default=None)


@asynccontextmanager
async def open_target(target: str) -> AsyncIterator[Platform]:
    """Open the platform of `target`, with one connection pool for everything that runs inside.

    A step that runs inside a flow's `open_target` shares the flow's client; otherwise it opens its own. A
    client works only on the event loop that opened it.
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
