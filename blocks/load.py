"""Loading of this package's blocks from the Prefect API."""

import asyncio
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar, cast

import httpx
from prefect.blocks.core import Block
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from pydantic import ValidationError

from prefect_rollout.errors import ConfigurationError
from prefect_rollout.ids import first_mistake
from prefect_rollout.text import one_line

B = TypeVar("B", bound=Block)

_RECENT_SECONDS = 10.0


class _Loaded:
    """A block that was loaded; not recent at first."""

    def __init__(self) -> None:
        self.loading = asyncio.Lock()
        self.at = -_RECENT_SECONDS
        self.block: Block | None = None


_recent: ContextVar[defaultdict[tuple[type[Block], str], _Loaded] | None] = ContextVar("recent", default=None)


@contextmanager
def sharing_blocks() -> Iterator[None]:
    """Share the blocks that are loaded within the context, for some seconds; an outer context includes it."""
    token = _recent.set(defaultdict(_Loaded) if _recent.get() is None else _recent.get())
    try:
        yield
    finally:
        _recent.reset(token)


def forget_blocks() -> None:
    """Load each block again, because it may have changed during a wait."""
    if (recent := _recent.get()) is not None:
        recent.clear()


async def load(kind: type[B], name: str, *, field: str) -> B | None:
    """Load a saved block, or return the one that was loaded in the last seconds; see `load_now`."""
    if (recent := _recent.get()) is None:
        return await load_now(kind, name, field=field)
    loaded = recent[kind, name]
    async with loaded.loading:
        if time.monotonic() - loaded.at >= _RECENT_SECONDS:
            loaded.block = await load_now(kind, name, field=field)
            loaded.at = time.monotonic()
        return cast("B | None", loaded.block)


async def load_now(kind: type[B], name: str, *, field: str) -> B | None:
    """Load a saved block; return `None` if it does not exist.

    Args:
        kind: the block's class.
        name: name of the block document.
        field: parameter that names the block, for error messages.

    Raises:
        ConfigurationError: the block cannot be used, or (retryable) the Prefect API did not return it.
    """
    block = f"{kind.get_block_type_slug()}/{one_line(name, 120)}"
    try:
        return await kind.aload(name)
    except RuntimeError as error:  # raised by Prefect if a block does not fit its type
        mistake = error.__cause__
        what = first_mistake(mistake) if isinstance(mistake, ValidationError) else "it cannot be loaded"
        raise ConfigurationError(
            f"{field}: the block {block} cannot be used: {what}", field=field
        ) from None  # Prefect's message shows the block's values
    except (httpx.TransportError, PrefectHTTPStatusError, ValueError) as error:
        # Any other ValueError means an unreadable response, not a problem of the block.
        if isinstance(error.__cause__, ObjectNotFound):
            return None
        raise ConfigurationError(
            f"{field}: the Prefect API did not return the block {block}: {type(error).__name__}",
            advice="Check PREFECT_API_URL and that the Prefect server runs.",
            retryable=True,
        ) from error
