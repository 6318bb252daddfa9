"""What a release is doing, told as it happens to whoever listens in the same process."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal, NamedTuple

STEPS = (
    "check deployment",
    "parse metadata",
    "get template",
    "build image list",
    "upgrade deployment",
    "publish deployment",
    "wait for pods",
    "report release",
)
"""The eight steps, by the article's names and in its order."""


class Progress(NamedTuple):
    """One thing that a step has to say. `seconds` is what this try of the step took, at its end."""

    step: str
    state: Literal["running", "done", "retrying", "failed"]
    detail: str = ""
    seconds: float = 0


Listener = Callable[[Progress], None]

_listeners: ContextVar[tuple[Listener, ...]] = ContextVar("listeners", default=())


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Calls `listener` with all progress made within the context."""
    token = _listeners.set((*_listeners.get(), listener))
    try:
        yield
    finally:
        _listeners.reset(token)


def tell(progress: Progress) -> None:
    """Passes `progress` to the listeners, if there are any."""
    for listener in _listeners.get():
        listener(progress)
