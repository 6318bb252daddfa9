"""Loading of this package's blocks from the Prefect API."""

from typing import TypeVar

import httpx
from prefect.blocks.core import Block
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from pydantic import ValidationError

from prefect_rollout.errors import ConfigurationError
from prefect_rollout.ids import first_mistake
from prefect_rollout.text import one_line

B = TypeVar("B", bound=Block)


async def load(kind: type[B], name: str, *, field: str) -> B | None:
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
