"""How a block of ours is had from the Prefect API, and what it is called when that fails."""

from typing import TypeVar

import httpx
from prefect.blocks.core import Block
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from pydantic import ValidationError

from prefect_rollout.errors import ConfigurationError
from prefect_rollout.models import first_mistake
from prefect_rollout.text import one_line

B = TypeVar("B", bound=Block)


async def load(kind: type[B], name: str, *, field: str) -> B | None:
    """The block document of that kind and name; `None` where nobody saved one.

    Args:
        kind: the block's class.
        name: the document's name.
        field: what named it, told by the errors.

    Raises:
        ConfigurationError: it cannot be used, or (retryable) the Prefect API did not give it.
    """
    block = f"{kind.get_block_type_slug()}/{one_line(name, 120)}"
    try:
        return await kind.aload(name)
    except RuntimeError as error:  # Prefect's word for a block that does not fit its type
        mistake = error.__cause__
        what = first_mistake(mistake) if isinstance(mistake, ValidationError) else "it cannot be loaded"
        raise ConfigurationError(
            f"{field}: the block {block} cannot be used: {what}", field=field
        ) from None  # Prefect's own text would show what the block holds
    except (httpx.TransportError, PrefectHTTPStatusError, ValueError) as error:
        # Any other ValueError is of an answer that could not be read, and says nothing of the block.
        if isinstance(error.__cause__, ObjectNotFound):
            return None
        raise ConfigurationError(
            f"{field}: the Prefect API did not give the block {block}: {type(error).__name__}",
            advice="Check PREFECT_API_URL and that the Prefect server runs.",
            retryable=True,
        ) from error
