"""Limit the number of releases of one process that call the Prefect API at the same time.

Hundreds of releases can run on one event loop: most of the time they wait for pods. Their requests to
Prefect come in bursts, and an API on SQLite answers a burst of fifty with 503. So each release holds a
slot, and releases it while it waits.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from contextvars import ContextVar


class Throttle:
    """`count` slots for releases that begin, and half as many for those that continue after a wait.

    They are separate, so that releases that could end do not wait behind all those that begin.
    """

    def __init__(self, count: int) -> None:
        self.beginning = asyncio.Semaphore(count)
        self.continuing = asyncio.Semaphore(max(1, count // 2))


class _Slot:
    def __init__(self, throttle: Throttle) -> None:
        self.throttle = throttle
        self.held: asyncio.Semaphore | None = None

    async def acquire(self, kind: asyncio.Semaphore) -> None:
        await kind.acquire()
        self.held = kind

    def release(self) -> None:
        if self.held is not None:
            self.held.release()
            self.held = None


_slot: ContextVar[_Slot | None] = ContextVar("slot", default=None)


@asynccontextmanager
async def slot(throttle: Throttle) -> AsyncIterator[None]:
    """Hold a slot within the context, except in `slot_released`."""
    held = _Slot(throttle)
    token = _slot.set(held)
    try:
        await held.acquire(throttle.beginning)
        yield
    finally:
        _slot.reset(token)
        held.release()


@asynccontextmanager
async def slot_released() -> AsyncIterator[None]:
    """Release the slot within the context. If it is cancelled, the slot is not acquired again."""
    held = _slot.get()
    if held is None or held.held is None:
        yield
        return
    held.release()
    try:
        yield
    except asyncio.CancelledError:
        raise
    except BaseException:
        await held.acquire(held.throttle.continuing)
        raise
    await held.acquire(held.throttle.continuing)
