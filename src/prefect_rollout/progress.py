"""What a release is doing, told as it happens to whoever listens in the same process."""

from collections.abc import Callable, Iterable, Iterator
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
"""The eight steps of a release, by the article's names and in its order."""

ROLL_BACK, WAIT_FOR_ROLLBACK = "roll back", "wait for rollback"
"""The steps that a release has besides where it fails and is put back, before its report."""

STEPS_OF = {
    "deploy": STEPS,
    "rollback": (*STEPS[:2], "note what is online", "choose rollback", *STEPS[5:]),
    "restart": (*STEPS[:2], "note what is online", "restart deployment", *STEPS[6:]),
    "scale": (*STEPS[:2], "note what is online", "scale deployment", *STEPS[6:]),
}
STEPS_OF |= {
    "dry run of a restart": (*STEPS[:2], "plan release", STEPS[-1]),
    "dry run": (*STEPS[:4], "plan release", STEPS[-1]),
    "dry run of a rollback": (*STEPS_OF["rollback"][:4], "plan release", STEPS[-1]),
    "deploy as planned": (*STEPS[:4], "check plan", *STEPS[4:]),
    "rollback as planned": (*STEPS_OF["rollback"][:4], "check plan", *STEPS[5:]),
    "restart as planned": (*STEPS_OF["restart"][:3], "check plan", *STEPS_OF["restart"][3:]),
    "scale as planned": (*STEPS_OF["scale"][:3], "check plan", *STEPS_OF["scale"][3:]),
    "deploy with approval": (*STEPS[:4], "plan release", "approval", "check plan", *STEPS[4:]),
}
"""The steps of each action, of its dry run, and of what has to come out as its dry run said."""


def steps_with(seen: Iterable[str], action: str = "") -> tuple[str, ...]:
    """The steps that a run has of which these were seen; those themselves where nothing has them all.

    Args:
        seen: names of steps, in their order.
        action: what it does, where that is known; else it is taken for a deploy until a step differs.
    """
    names = tuple(seen)
    own = set(names) - {ROLL_BACK, WAIT_FOR_ROLLBACK}
    likely = sorted(STEPS_OF, key=lambda name: (name != action, action not in name))
    steps = next((STEPS_OF[name] for name in likely if own <= set(STEPS_OF[name])), None)
    if steps is None:
        return names
    return steps if len(own) == len(names) else (*steps[:-1], ROLL_BACK, WAIT_FOR_ROLLBACK, steps[-1])


class Progress(NamedTuple):
    """One thing that a step has to say. `seconds` is what this try of the step took, at its end.

    What is said `aloud` matters while the step runs, too: it takes long, and somebody waits.
    """

    step: str
    state: Literal["running", "done", "retrying", "failed", "stopped"]
    detail: str = ""
    seconds: float = 0
    aloud: bool = False


Listener = Callable[[Progress], None]

_listeners: ContextVar[tuple[Listener, ...]] = ContextVar("listeners", default=())


@contextmanager
def listening(listener: Listener, *, alone: bool = False) -> Iterator[None]:
    """Calls `listener` with all progress made within the context; `alone`, in place of those before it."""
    token = _listeners.set((listener,) if alone else (*_listeners.get(), listener))
    try:
        yield
    finally:
        _listeners.reset(token)


def tell(progress: Progress) -> None:
    """Passes `progress` to the listeners, if there are any."""
    for listener in _listeners.get():
        listener(progress)
