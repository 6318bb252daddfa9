"""The steps of a release on a terminal, as they happen."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from prefect_rollout.progress import STEPS_OF, Progress, listening
from prefect_rollout.text import one_line

_MARKS = {
    "waiting": ("·", "dim"),
    "running": ("●", "cyan"),
    "retrying": ("↻", "yellow"),
    "done": ("✔", "green"),
    "failed": ("✘", "red"),
}


class LiveSteps:
    """Shows the progress of one release: a table that lives on a terminal, lines elsewhere."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._last: dict[str, Progress] = {}
        self._started: dict[str, float] = {}
        self._took: dict[str, float] = {}
        self._line = ""

    @contextmanager
    def showing(self) -> Iterator[None]:
        """Shows whatever steps tell within the context."""
        with listening(self._note):
            if not self._console.is_terminal:
                yield
                return
            with Live(console=self._console, get_renderable=self._table, refresh_per_second=8):
                yield

    @property
    def _steps(self) -> tuple[str, ...]:
        """The steps of the action that has all those seen; a deploy's until one differs."""
        return next(steps for steps in STEPS_OF.values() if self._last.keys() <= set(steps))

    def _note(self, progress: Progress) -> None:
        known = self._last.get(progress.step)
        if progress.state == "done" and not progress.detail and known:
            progress = progress._replace(detail=known.detail)
        self._last[progress.step] = progress
        self._started.setdefault(progress.step, time.monotonic())
        if progress.seconds:
            self._took[progress.step] = self._took.get(progress.step, 0) + progress.seconds
        # In lines, a step is told once, at its end, unless it has to be waited for.
        quiet = progress.state == "running" and not progress.aloud
        if not self._console.is_terminal and not quiet:
            number = self._steps.index(progress.step) + 1
            detail = f": {one_line(progress.detail, 200)}" if progress.detail else ""
            seconds = f" ({progress.seconds:.1f} s)" if progress.seconds else ""
            line = f"{number}/{len(self._steps)} {progress.step} {progress.state}{detail}"
            if line != self._line:
                self._console.print(Text(line + seconds), soft_wrap=True)
            self._line = line

    def _table(self) -> Table:
        table = Table.grid(padding=(0, 1))
        for name in self._steps:
            progress = self._last.get(name)
            state = progress.state if progress else "waiting"
            mark, style = _MARKS[state]
            seconds = self._took.get(name)
            if state == "running":
                seconds = time.monotonic() - self._started[name]
            table.add_row(
                Text(mark, style=style),
                Text(name, style="dim" if state == "waiting" else ""),
                Text("" if seconds is None else f"{seconds:.1f} s", style="dim", justify="right"),
                Text(one_line(progress.detail, 200) if progress else "", style=style),
            )
        return table
