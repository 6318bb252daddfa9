"""Progress of a release, for listeners in the same process."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Generic, Literal, NamedTuple, TypeVar

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
"""The eight steps of a release, with the names and in the order of the article."""

ROLL_BACK, WAIT_FOR_ROLLBACK = "roll back", "wait for rollback"
"""The steps of a release that fails and is rolled back, before its report."""

STEPS_OF = {
    "deploy": STEPS,
    "rollback": (*STEPS[:2], "choose rollback", *STEPS[5:]),
    "restart": (*STEPS[:2], "restart deployment", *STEPS[6:]),
    "scale": (*STEPS[:2], "scale deployment", *STEPS[6:]),
    "dry run": (*STEPS[:4], "plan release", STEPS[-1]),
    "dry run of a rollback": (*STEPS[:2], "choose rollback", "plan release", STEPS[-1]),
    "dry run of a restart": (*STEPS[:2], "plan release", STEPS[-1]),
    "deploy with approval": (*STEPS[:4], "plan release", "approval", *STEPS[4:]),
}
"""The steps of each action, of its dry run, and of a deploy that a person approves."""


def steps_with(seen: Iterable[str], action: str = "") -> tuple[str, ...]:
    """Return all steps of the run that has these steps; only these if no action has them all.

    Args:
        seen: names of the steps so far, in their order.
        action: the action, if it is known. Otherwise a deploy is assumed until a step differs.
    """
    names = tuple(seen)
    own = set(names) - {ROLL_BACK, WAIT_FOR_ROLLBACK}
    likely = sorted(STEPS_OF, key=lambda name: (name != action, action not in name))
    steps = next((STEPS_OF[name] for name in likely if own <= set(STEPS_OF[name])), None)
    if steps is None:
        return names
    return steps if len(own) == len(names) else (*steps[:-1], ROLL_BACK, WAIT_FOR_ROLLBACK, steps[-1])


class Progress(NamedTuple):
    """One message of a step. At the end of an attempt, `seconds` is its duration.

    Messages marked `aloud` are shown while the step runs, for steps that take long.
    """

    step: str
    state: Literal["running", "done", "retrying", "failed", "stopped"]
    detail: str = ""
    seconds: float = 0
    aloud: bool = False


T = TypeVar("T")


class Listeners(Generic[T]):
    """Callbacks of this process that are called within a context."""

    def __init__(self, name: str) -> None:
        self._current: ContextVar[tuple[Callable[[T], None], ...]] = ContextVar(name, default=())

    @property
    def current(self) -> tuple[Callable[[T], None], ...]:
        """The listeners in this context."""
        return self._current.get()

    @contextmanager
    def listening(self, listener: Callable[[T], None], *, alone: bool = False) -> Iterator[None]:
        """Call `listener` with all messages within the context; if `alone`, the outer listeners get none."""
        token = self._current.set((listener,) if alone else (*self._current.get(), listener))
        try:
            yield
        finally:
            self._current.reset(token)

    def tell(self, message: T) -> None:
        """Pass `message` to the listeners."""
        for listener in self._current.get():
            listener(message)


Listener = Callable[[Progress], None]

_listeners = Listeners[Progress]("listeners")
listening, tell = _listeners.listening, _listeners.tell


@contextmanager
def silence() -> Iterator[None]:
    """Within the context, pass on only progress that is `aloud`."""
    outer = _listeners.current

    def aloud(progress: Progress) -> None:
        for listener in outer if progress.aloud else ():
            listener(progress)

    with listening(aloud, alone=True):
        yield
