"""Observations of a rollout, by polling."""

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Awaitable, Callable

from prefect_rollout.errors import PlatformError
from prefect_rollout.verdict.status import Observation, Status


async def polled(
    status: Callable[[], Awaitable[dict[str, Status]]], every_seconds: float
) -> AsyncGenerator[Observation]:
    """Poll `status` at once, then on every tick of `every_seconds` since the first poll.

    A tick that passes during a slow poll is skipped. After an error with a `Retry-After`, the next poll is on
    the first tick after that time.
    """
    started = time.monotonic()
    tick = 0
    while True:
        error: PlatformError | None = None
        try:
            clusters = await status()
        except PlatformError as unanswered:
            clusters, error = None, unanswered
        at = time.monotonic()
        yield Observation(at, clusters, error)
        wait = (error.retry_after or 0) if error else 0
        tick = max(tick + 1, math.ceil((at - started + wait) / every_seconds))
        await asyncio.sleep(max(0.0, started + tick * every_seconds - time.monotonic()))
