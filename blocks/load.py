"""Loading of this package's blocks from the Prefect API, and sharing of what was read."""

import asyncio
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import httpx
from prefect.blocks.core import Block
from prefect.client.orchestration import get_client
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from pydantic import ValidationError

from prefect_rollout.errors import ConfigurationError
from prefect_rollout.ids import first_mistake
from prefect_rollout.text import one_line

B = TypeVar("B", bound=Block)
T = TypeVar("T")

_RECENT_SECONDS = 10.0


class _Read:
    """A value that was read; not recent at first."""

    def __init__(self) -> None:
        self.reading = asyncio.Lock()
        self.at = float("-inf")
        self.value: Any = None


_recent: ContextVar[defaultdict[Hashable, _Read] | None] = ContextVar("recent", default=None)


@contextmanager
def sharing_blocks() -> Iterator[None]:
    """Share what is read within the context for some seconds; an outer context includes it."""
    token = _recent.set(defaultdict(_Read) if _recent.get() is None else _recent.get())
    try:
        yield
    finally:
        _recent.reset(token)


def forget_blocks() -> None:
    """Read everything again, because it may have changed during a wait."""
    if (recent := _recent.get()) is not None:
        recent.clear()


async def shared(key: Hashable, seconds: float, read: Callable[[], Awaitable[T]]) -> T:
    """Return what `read` returned for `key` in the last `seconds`, or what it returns now."""
    if (recent := _recent.get()) is None:
        return await read()
    known = recent[key]
    async with known.reading:
        if time.monotonic() - known.at >= seconds:
            known.value = await read()
            known.at = time.monotonic()
        value: T = known.value
        return value


async def load(kind: type[B], name: str, *, field: str) -> B | None:
    """Load a saved block, or return the one that was loaded in the last seconds; see `load_now`."""
    return await shared((kind, name), _RECENT_SECONDS, lambda: load_now(kind, name, field=field))


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
        raise _not_returned(block, field, error) from error


async def load_values(slug: str, name: str, *, field: str) -> Mapping[str, Any] | None:
    """Return the values of a saved block whose package need not be installed; `None` if it does not exist.

    Raises:
        ConfigurationError: (retryable) the Prefect API did not return it.
    """
    try:
        async with get_client() as client:
            return (await client.read_block_document_by_name(name, slug)).data
    except ObjectNotFound:
        return None
    except (httpx.TransportError, PrefectHTTPStatusError) as error:
        raise _not_returned(f"{slug}/{one_line(name, 120)}", field, error) from error


def _not_returned(block: str, field: str, error: Exception) -> ConfigurationError:
    return ConfigurationError(
        f"{field}: the Prefect API did not return the block {block}: {type(error).__name__}",
        advice="Check PREFECT_API_URL and that the Prefect server runs.",
        retryable=True,
    )
