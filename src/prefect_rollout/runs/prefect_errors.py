"""Errors of Prefect's client, as errors of this package."""

from collections.abc import Iterator
from contextlib import contextmanager

import httpx
from prefect.exceptions import PrefectException

from prefect_rollout.errors import ConfigurationError
from prefect_rollout.text import one_line

PREFECT_ERRORS = (httpx.HTTPError, PrefectException, ValueError)
"""Errors that Prefect's client raises if its API does not answer, or answers something unexpected."""


@contextmanager
def translate_errors(*, retryable: bool = False) -> Iterator[None]:
    """Translate what Prefect's client raises into a `ConfigurationError`, `retryable` or not."""
    try:
        yield
    except PREFECT_ERRORS as error:
        raise ConfigurationError(
            f"the Prefect API did not answer: {describe(error)}",
            advice="Check PREFECT_API_URL and that the Prefect server runs.",
            retryable=retryable,
            prefect_api=True,
        ) from error


def describe(error: Exception) -> str:
    """Return the type of an error and its message, on one line."""
    return f"{type(error).__name__} {one_line(error, 120)}".rstrip()
