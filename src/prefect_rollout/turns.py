"""How many releases of one process speak to the Prefect API at the same time.

Hundreds of releases can run on one event loop, since most of their time they wait for pods. What they
tell Prefect in between comes in bursts, and an API on SQLite answers a burst of fifty with 503. So the
releases of a batch take turns, and give up theirs while they wait.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from contextvars import ContextVar


class Turns:
    """So many turns for what begins, and half as many for what goes on: no end waits behind all starts."""

    def __init__(self, count: int) -> None:
        self.first = asyncio.Semaphore(count)
        self.further = asyncio.Semaphore(max(1, count // 2))


class _Turn:
    def __init__(self, turns: Turns) -> None:
        self.turns = turns
        self.held: asyncio.Semaphore | None = None

    async def take(self, kind: asyncio.Semaphore) -> None:
        await kind.acquire()
        self.held = kind

    def give_up(self) -> None:
        if self.held is not None:
            self.held.release()
            self.held = None


_turn: ContextVar[_Turn | None] = ContextVar("turn", default=None)


@asynccontextmanager
async def taking(turns: Turns) -> AsyncIterator[None]:
    """Holds a turn while the context lasts, but for the times of `resting` within."""
    turn = _Turn(turns)
    token = _turn.set(turn)
    try:
        await turn.take(turns.first)
        yield
    finally:
        _turn.reset(token)
        turn.give_up()


@asynccontextmanager
async def resting() -> AsyncIterator[None]:
    """Gives up the turn while the context lasts. Who is cancelled in it ends without another."""
    turn = _turn.get()
    if turn is None or turn.held is None:
        yield
        return
    turn.give_up()
    try:
        yield
    except asyncio.CancelledError:
        raise
    except BaseException:
        await turn.take(turn.turns.further)
        raise
    await turn.take(turn.turns.further)
