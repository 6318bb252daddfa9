"""Measures what users feel, against what they would use instead; `make bench` runs all of it.

    python bench [part ...] [--keep]

Prints a table, and where a figure is worse than the committed one by more than a quarter: those are on the
machine that RESULTS.md describes, so that ratios are what to compare on another.
"""

import math
import os
import platform
import re
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

import assistant
import batch
import installs
import long_run
import one_release
import psutil
import submit
from cyclopts import App, Parameter
from rich.console import Console
from rich.table import Table
from rig import Row

RESULTS = Path(__file__).with_name("RESULTS.md")
WORSE = 1.25
PARTS: dict[str, Callable[[], list[Row]]] = {
    "one": one_release.measure,
    "submit": submit.measure,
    "mcp": assistant.measure,
    "installs": installs.measure,
    "batch": batch.measure,
    "long": long_run.measure,
}
Part = Literal["one", "submit", "mcp", "installs", "batch", "long"]

Keep = Annotated[bool, Parameter(help="Write the figures into RESULTS.md.", negative="")]

app = App(help="Measures what users feel, against what they would use instead.")
console = Console(width=150)


@app.default
def main(
    *parts: Part,
    keep: Annotated[bool, Parameter(help="Write the figures into RESULTS.md.", negative="")] = False,
) -> int:
    """Runs the parts named, or all."""
    before = _committed()
    measured: dict[str, list[Row]] = {}
    for part in parts or PARTS:
        console.print(f"{part} …")
        began = time.monotonic()
        measured[part] = PARTS[part]()
        _show(part, measured[part], time.monotonic() - began)
        if keep:
            _keep(part, measured[part])
    rows = [row for part in measured.values() for row in part]
    worse = [row for row in rows if row.value > before.get(row.name, math.inf) * WORSE + 0.01]
    for row in worse:
        told = f"worse than committed: {row.name}: {_figure(row)}, was {before[row.name]:g}"
        console.print(told, style="yellow")
    if not worse:
        console.print("Nothing is worse than committed by more than a quarter.")
    return 0


def _figure(row: Row) -> str:
    digits = 0 if row.value == int(row.value) or row.value >= 100 else 2
    return f"{row.value:.{digits}f} {row.unit}".strip()


def _goal(row: Row) -> str:
    if row.goal is None:
        return ""
    return f"≤ {row.goal:.3g} {row.unit}".strip() + (": met" if row.value <= row.goal else ": **missed**")


def _show(part: str, rows: list[Row], seconds: float) -> None:
    table = Table("measure", "figure", "goal", "note", title=f"{part}, {seconds:.0f} s", title_justify="left")
    for row in rows:
        table.add_row(row.name, _figure(row), _goal(row).replace("*", ""), row.note)
    console.print(table)


# ---- the committed table ------------------------------------------------------------------------


def _committed() -> dict[str, float]:
    text = RESULTS.read_text(encoding="utf-8") if RESULTS.exists() else ""
    return {
        name.strip(): float(figure)
        for name, figure in re.findall(r"^\| ([^|]+) \| (-?[\d.]+)", text, flags=re.MULTILINE)
    }


def _keep(part: str, rows: list[Row]) -> None:
    """Replaces the part's table in RESULTS.md, with the machine that it was measured on."""
    begin, end = f"<!-- {part} -->\n", f"<!-- end of {part} -->\n"
    lines = ["| measure | figure | goal | note |", "| --- | --- | --- | --- |"]
    lines += [f"| {row.name} | {_figure(row)} | {_goal(row)} | {row.note} |" for row in rows]
    text = RESULTS.read_text(encoding="utf-8")
    head, _, rest = text.partition(begin)
    _, _, tail = rest.partition(end)
    table = "\n".join(lines)
    RESULTS.write_text(f"{head}{begin}{_machine()}\n\n{table}\n{end}{tail}", encoding="utf-8")


def _machine() -> str:
    memory = psutil.virtual_memory().total / 2**30
    versions = ", ".join(f"{name} {version(name)}" for name in ("prefect", "mcp"))
    return (
        f"{datetime.now(UTC):%Y-%m-%d}: {os.cpu_count()} processors ({platform.machine()}), {memory:.0f} GB, "
        f"{platform.system()}, Python {platform.python_version()}, {versions}."
    )


if __name__ == "__main__":
    sys.exit(app())
