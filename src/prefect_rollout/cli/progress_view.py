"""Live view of the steps of a release, or of the releases of a batch, on a terminal."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console, RenderableType
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from prefect_rollout.batch.result import BatchResult, Stage, looking_on, row_line
from prefect_rollout.release.progress import (
    ROLL_BACK,
    STEPS_OF,
    WAIT_FOR_ROLLBACK,
    Progress,
    listening,
    steps_with,
)
from prefect_rollout.text import one_line

_MOST_ROWS = 15
_SHORTEST_DETAIL = 24
_ROLLBACK = (ROLL_BACK, WAIT_FOR_ROLLBACK)
_MARKS = {
    "waiting": ("·", "dim"),
    "running": ("●", "cyan"),
    "retrying": ("↻", "yellow"),
    "done": ("✔", "green"),
    "failed": ("✘", "red"),
    "stopped": ("■", "yellow"),
}


def action_of(flow: str, parameters: Mapping[str, Any]) -> str:
    """Return the key of `STEPS_OF` for a run of the flow with these parameters."""
    action = {"deploy-latest-image": "deploy"}.get(flow, flow)
    if parameters.get("dry_run"):
        return {"deploy": "dry run", "rollback": "dry run of a rollback"}.get(action, "dry run of a restart")
    return f"{action} with approval" if parameters.get("approval") == "before-release" else action


class LiveProgress:
    """Progress of a release or a batch: a live table on a terminal, lines elsewhere."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._action = ""
        self._began = time.monotonic()
        self._last: dict[str, Progress] = {}
        self._started: dict[str, float] = {}
        self._took: dict[str, float] = {}
        self._line = ""
        self._batch: BatchResult | None = None
        self._stages: dict[str, Stage] = {}
        self._spinner: RenderableType = Spinner("line")

    @property
    def begun(self) -> bool:
        """True if a step or a release has begun."""
        return bool(self._last or self._batch)

    @contextmanager
    def showing(self, flow: str, parameters: Mapping[str, Any]) -> Iterator[None]:
        """Show the progress of a run of the flow within the context."""
        self._action, self._began = action_of(flow, parameters), time.monotonic()
        with listening(self._note), looking_on(self._note_batch):
            if not self._console.is_terminal:
                yield
                return
            with Live(console=self._console, get_renderable=self._renderable, refresh_per_second=8):
                try:
                    yield
                finally:
                    self._spinner = ""

    def _renderable(self) -> RenderableType:
        if self._batch:
            return self._batch_table(self._batch)
        if self._action in STEPS_OF:
            return self._table()
        # A batch that has read none of its releases yet.
        table = Table.grid(padding=(0, 1))
        table.add_row(self._spinner, Text(f"batch  {time.monotonic() - self._began:.0f} s", style="dim"))
        return table

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
        # Only what needs attention: a batch of hundreds does not fit on a screen.
        bad = [row for row in batch.unreleased if row.stage.ended and row.stage is not Stage.SKIPPED]
        active = [row for row in batch.releases if row.stage is Stage.RUNNING]
        rows = [*bad[:_MOST_ROWS], *active[:_MOST_ROWS]]
        # Names are folded, and never cut; details are cut.
        longest = max((len(one_line(row.name, 600)) for row in rows), default=0)
        name = max(10, min(longest, self._console.width - _SHORTEST_DETAIL - 10))
        table = Table.grid(padding=(0, 1))
        table.add_column()
        table.add_column(overflow="fold", width=name)
        table.add_column(justify="right")
        table.add_column(overflow="ellipsis", no_wrap=True)
        wave = f"wave {batch.wave}" if batch.wave else "batch"
        seconds = f"{time.monotonic() - self._began:.0f} s"
        table.add_row(
            self._spinner, Text(wave, style="bold"), Text(seconds, style="dim"), Text(batch.counted)
        )
        for row in rows:
            mark, style = _MARKS["running" if row.stage is Stage.RUNNING else "failed"]
            took = "" if row.seconds is None else f"{row.seconds:.0f} s"
            detail = f"{row.stage}: {row.why}" if row.stage.ended else row.detail
            table.add_row(
                Text(mark, style=style),
                Text(one_line(row.name, 600)),
                Text(took, style="dim"),
                Text(one_line(detail, self._console.width - name - 10), style=style),
            )
        if len(active) > _MOST_ROWS:
            table.add_row("", Text(f"… and {len(active) - _MOST_ROWS} more", style="dim"), "", "")
        return table

    @property
    def _steps(self) -> tuple[str, ...]:
        return steps_with(self._last, self._action)

    def _number(self, step: str) -> str:
        """Return the step's place among those of its action; a rollback counts its own."""
        steps = tuple(each for each in self._steps if each not in _ROLLBACK)
        if step in _ROLLBACK:
            return f"rollback {_ROLLBACK.index(step) + 1}/{len(_ROLLBACK)}"
        return f"{steps.index(step) + 1}/{len(steps)}"

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
            detail = f": {one_line(progress.detail, 200)}" if progress.detail else ""
            seconds = f" ({progress.seconds:.1f} s)" if progress.seconds else ""
            line = f"{self._number(progress.step)} {progress.step} {progress.state}{detail}"
            if line != self._line:
                self._say(line + seconds)
            self._line = line

    def _table(self) -> Table:
        table = Table.grid(padding=(0, 1))
        cut = max(_SHORTEST_DETAIL, self._console.width - 36)  # the error follows in full
        running = any(progress.state == "running" for progress in self._last.values())
        for name in self._steps:
            progress = self._last.get(name)
            state = progress.state if progress else "waiting"
            mark, style = _MARKS[state]
            most = cut if state == "failed" else 200
            seconds = self._took.get(name)
            if state == "running":
                seconds = time.monotonic() - self._started[name]
            table.add_row(
                self._spinner if state == "running" else Text(mark, style=style),
                Text(name, style="dim" if state == "waiting" else ""),
                Text("" if seconds is None else f"{seconds:.1f} s", style="dim", justify="right"),
                Text(one_line(progress.detail if progress else "", most), style=style),
            )
        if self._spinner and not running and "report release" not in self._last:
            since = time.monotonic() - self._began
            table.add_row(
                self._spinner, Text("Prefect", style="dim"), Text(f"{since:.1f} s", style="dim"), ""
            )
        return table
