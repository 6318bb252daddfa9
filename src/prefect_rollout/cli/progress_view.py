"""Live view of the steps of a release, or of the releases of a batch, on a terminal."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from prefect_rollout.batch.result import BatchResult, Stage, looking_on, row_line
from prefect_rollout.release.progress import Progress, listening, steps_with
from prefect_rollout.text import one_line

_MOST_ROWS = 15
_MARKS = {
    "waiting": ("·", "dim"),
    "running": ("●", "cyan"),
    "retrying": ("↻", "yellow"),
    "done": ("✔", "green"),
    "failed": ("✘", "red"),
    "stopped": ("■", "yellow"),
}


class LiveProgress:
    """Progress of a release or a batch: a live table on a terminal, lines elsewhere."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._last: dict[str, Progress] = {}
        self._started: dict[str, float] = {}
        self._took: dict[str, float] = {}
        self._line = ""
        self._batch: BatchResult | None = None
        self._stages: dict[str, Stage] = {}

    @contextmanager
    def showing(self) -> Iterator[None]:
        """Show the progress of steps and batches within the context."""
        with listening(self._note), looking_on(self._note_batch):
            if not self._console.is_terminal:
                yield
                return
            with Live(console=self._console, get_renderable=self._renderable, refresh_per_second=8):
                yield

    def _renderable(self) -> Table:
        return self._batch_table(self._batch) if self._batch else self._table()

    def _note_batch(self, batch: BatchResult) -> None:
        wave = self._batch.wave if self._batch else None
        self._batch = batch.model_copy()  # shallow: the rows stay live
        if self._console.is_terminal:
            return
        if batch.wave is not None and batch.wave != wave:
            count = sum(row.wave == batch.wave for row in batch.releases)
            self._say(f"wave {batch.wave}: {count} release{'' if count == 1 else 's'}")
        for row in batch.releases:
            if row.stage.ended and self._stages.get(row.name) is not row.stage:
                self._stages[row.name] = row.stage
                self._say(row_line(row))

    def _say(self, line: str) -> None:
        self._console.print(Text(line), soft_wrap=True)

    def _batch_table(self, batch: BatchResult) -> Table:
        table = Table.grid(padding=(0, 1))
        table.add_column()
        table.add_column(no_wrap=True)
        table.add_column(justify="right")
        table.add_column(overflow="ellipsis", no_wrap=True)
        wave = f"wave {batch.wave}" if batch.wave else "batch"
        table.add_row("", Text(wave, style="bold"), "", Text(batch.counted))
        # Only what needs attention: a batch of hundreds does not fit on a screen.
        bad = [row for row in batch.unreleased if row.stage.ended and row.stage is not Stage.SKIPPED]
        active = [row for row in batch.releases if row.stage is Stage.RUNNING]
        for row in [*bad[:_MOST_ROWS], *active[:_MOST_ROWS]]:
            mark, style = _MARKS["running" if row.stage is Stage.RUNNING else "failed"]
            seconds = "" if row.seconds is None else f"{row.seconds:.0f} s"
            table.add_row(
                Text(mark, style=style),
                Text(one_line(row.name, 60)),
                Text(seconds, style="dim"),
                Text(one_line(row.detail, 200), style=style),
            )
        if len(active) > _MOST_ROWS:
            table.add_row("", Text(f"… and {len(active) - _MOST_ROWS} more", style="dim"), "", "")
        return table

    @property
    def _steps(self) -> tuple[str, ...]:
        """Return the steps of the first action that has all steps seen so far."""
        return steps_with(self._last)

    def _note(self, progress: Progress) -> None:
        known = self._last.get(progress.step)
        if progress.state == "done" and not progress.detail and known:
            progress = progress._replace(detail=known.detail)
        self._last[progress.step] = progress
        self._started.setdefault(progress.step, time.monotonic())
        if progress.seconds:
            self._took[progress.step] = self._took.get(progress.step, 0) + progress.seconds
        # Without a terminal, a step is one line at its end, unless it has to wait for something.
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
