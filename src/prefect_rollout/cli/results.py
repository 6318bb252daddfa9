"""Results of a command, for a person and as JSON."""

import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from prefect_rollout.batch.result import BatchResult, plan_of_all
from prefect_rollout.cli.output import WRONG_USE, complain, say
from prefect_rollout.errors import ConfigurationError, InputError, RolloutError
from prefect_rollout.release.plan_words import plan_lines
from prefect_rollout.release.request import Action
from prefect_rollout.release.result import Outcome, ReleaseResult, cloud_words
from prefect_rollout.text import json_line, one_line

if TYPE_CHECKING:
    from prefect_rollout.runs.history import Change

EXIT_CODES = {
    Outcome.RELEASED: 0,
    Outcome.PLANNED: 0,
    Outcome.FAILED: 1,
    Outcome.TIMED_OUT: 3,
    Outcome.SKIPPED: 4,
    Outcome.CANCELLED: 130,
}

_DONE = {
    Action.DEPLOY: "Released",
    Action.ROLLBACK: "Rolled back",
    Action.RESTART: "Restarted",
    Action.SCALE: "Scaled",
}


def program(name: str) -> str:
    """Return how this shell calls a program: its name if that is on the path, else its file beside Python."""
    return name if shutil.which(name) else shlex.quote(str(Path(sys.executable).with_name(name)))


@contextmanager
def stdout_for_json(wanted: bool) -> Iterator[TextIO | None]:
    """Reserve standard output for the JSON result; anything else that writes there goes to stderr."""
    if not wanted:
        yield None
        return
    sys.stdout.flush()
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as stdout:
        os.dup2(2, 1)
        try:
            yield stdout
        finally:
            sys.stdout.flush()
            os.dup2(stdout.fileno(), 1)


def end(result: ReleaseResult | BatchResult | None, error: RolloutError | None, stdout: TextIO | None) -> int:
    """Show the result to a person and, if `stdout` is given, write it there as JSON; return the exit code."""
    outcome = result.outcome if result else Outcome.FAILED
    if result and outcome is not Outcome.PLANNED:
        for note in _notes(result):
            say(f"{one_line(note, 500)}.", style="yellow")
    if error:
        complain(error)
    elif result and outcome is Outcome.PLANNED:
        for line in _planned(result):
            say(line)
    elif result:
        done = _released(result) if isinstance(result, ReleaseResult) else f"Done: {result.counted}."
        say(done, style="green")
    if error and result and error.retry_helps:
        run_id = result.release_id if isinstance(result, ReleaseResult) else result.batch_id
        say(f"Continue it: {program('prefect-rollout')} retry {run_id}")
    if stdout:
        document: dict[str, Any] = result.model_dump(mode="json") if result else {"outcome": outcome.value}
        if error:
            document["error"] = error.to_dict()
        stdout.write(json_line(document) + "\n")
    if isinstance(error, InputError | ConfigurationError):
        return WRONG_USE
    return EXIT_CODES[outcome]


def _notes(result: ReleaseResult | BatchResult) -> list[str]:
    """Return the notes of a release, or of all releases of a batch with their names."""
    if isinstance(result, ReleaseResult):
        return result.notes
    return [f"{one_line(row.name, 120)}: {note}" for row in result.releases for note in row.notes]


def _planned(result: ReleaseResult | BatchResult) -> Iterator[str]:
    if isinstance(result, ReleaseResult):
        lines = plan_lines(result.plan) if result.plan else []
        plan_hash = result.plan.plan_hash if result.plan else ""
    else:
        lines, plan_hash = plan_of_all(result), result.plan_hash
    yield from lines
    yield (
        "Nothing was written. To apply exactly this plan, run the same command with "
        f"--expect-plan {plan_hash} instead of --dry-run."
    )


def _released(result: ReleaseResult) -> str:
    ready = ", ".join(f"{c.cluster} {c.ready}/{c.replicas}" for c in result.clusters)
    deployment = one_line(result.deployment)
    notes = "".join(f" {one_line(c.cluster, 80)}: {one_line(c.note)}." for c in result.clusters if c.note)
    return f"{_DONE[result.action]}: {deployment} runs {_template(result)} in {one_line(ready)}.{notes}"


def _template(result: ReleaseResult) -> str:
    ids = sorted({str(cluster.template) for cluster in result.clusters})
    images = f" ({one_line(', '.join(result.images.values()))})" if result.images else ""
    return f"template {one_line(', '.join(ids))}{images}"


def history_table(found: "Sequence[Change]") -> Table:
    """Return the changes as a table; markup in them is shown as text."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("When (UTC)", no_wrap=True)
    for head in (
        *("Deployment (app)", "What", "Cloud (block)", "Cluster", "Before → after"),
        *("Who (trigger)", "Why"),
    ):
        table.add_column(head, overflow="fold")
    table.add_column("Flow run", no_wrap=True)
    for change in found:
        who = f"{change.who} ({change.trigger})" if change.trigger else change.who
        if change.approved_by:
            who += f", approved by {change.approved_by}"
        why = f"{change.why} [break glass: {change.break_glass}]" if change.break_glass else change.why
        cells = (
            *(f"{change.when.astimezone(UTC):%Y-%m-%d %H:%M}", f"{change.deployment} ({change.app_id})"),
            *(f"{change.action}: {change.outcome}", cloud_words(change.cloud, change.target)),
            *(change.cluster, f"{change.before} → {change.after}"),
            *(who, why, change.run_id),
        )
        table.add_row(*(Text(one_line(cell, 1000)) for cell in cells))
    return table
