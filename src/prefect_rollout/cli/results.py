"""Results of a command, for a person and as JSON."""

from collections.abc import Iterator
from typing import Any

from prefect_rollout.batch.result import BatchResult, plan_of_all
from prefect_rollout.cli.output import WRONG_USE, Ended, label, program, say
from prefect_rollout.errors import (
    ConfigurationError,
    InputError,
    ReleaseCancelledError,
    ReleaseTimedOutError,
    RollbackFailedError,
    RolloutError,
)
from prefect_rollout.release.plan_words import plan_lines
from prefect_rollout.release.request import Action
from prefect_rollout.release.result import Outcome, ReleaseResult
from prefect_rollout.text import number, one_line, when
from prefect_rollout.verdict.diagnosis import Diagnosis

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


def end(result: ReleaseResult | BatchResult | None, error: RolloutError | None = None) -> Ended:
    """Show the result or the error to a person; return the exit code and the JSON."""
    outcome = result.outcome if result else Outcome.FAILED
    document: dict[str, Any] = result.model_dump(mode="json") if result else {"outcome": outcome.value}
    if result and outcome is not Outcome.PLANNED:
        for note in _notes(result):
            say(f"{one_line(note, 500)}.", style="yellow")
    if error:
        complain(error)
        document["error"] = error.to_dict()
        if result and error.retry_helps:
            run_id = result.release_id if isinstance(result, ReleaseResult) else result.batch_id
            say(f"Continue it: {program('prefect-rollout')} retry {run_id}")
    elif result and outcome is Outcome.PLANNED:
        for line in _planned(result):
            say(line)
    elif result:
        done = _released(result) if isinstance(result, ReleaseResult) else f"Done: {result.counted}."
        say(done, style="green")
    wrong_use = isinstance(error, InputError | ConfigurationError) and not (result and result.wrote)
    return Ended(WRONG_USE if wrong_use else EXIT_CODES[outcome], document)


def complain(error: RolloutError) -> None:
    """Print the error that a command ended with: of a run, line by line; else in a sentence."""
    kind = "Failed"
    if isinstance(error, ReleaseTimedOutError):
        kind = "Timed out"
    elif isinstance(error, ReleaseCancelledError):
        kind = "Cancelled"
    if error.result is None:
        say(f"{kind}: {error}", style="red")
        return
    say(f"{kind}: {error.step or error.problem}", style="red")
    for name, text in _parts(error):
        if text:
            label(name, text)


def _parts(error: RolloutError) -> Iterator[tuple[str, str]]:
    found = error.diagnosis
    if error.step:
        yield "what", error.problem
    if isinstance(error.result, BatchResult):
        for row in error.result.unreleased:
            if row.stage.ended:
                yield str(row.stage), f"{row.name}: {row.why}"
    pod = f"pod {found.pod}" if found.pod else ""
    container = f"container {found.container}" if found.container else ""
    yield "where", ", ".join(filter(None, (found.cluster, pod, container)))
    seconds = f" for {found.seconds:.0f} s" if found.seconds else ""
    yield (
        "reported",
        f"{found.category}{seconds}: {found.reported}" if found.reported else error.circumstances,
    )
    if isinstance(error, RollbackFailedError) and error.cause:
        yield "release", str(Diagnosis.model_validate(error.cause["diagnosis"]))
    for command in found.commands:
        yield "see more", command
    yield "to do", f"{error.advice} {error.next_step}".rstrip()
    yield "live now", f"{when(error.live_at)}: {error.live}" if error.live else ""


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
    ready = ", ".join(f"{c.cluster} {number(c.ready)}/{number(c.wanted)}" for c in result.clusters)
    deployment = one_line(result.deployment)
    notes = "".join(f" {one_line(c.cluster, 80)}: {one_line(c.note)}." for c in result.clusters if c.note)
    return f"{_DONE[result.action]}: {deployment} runs {_template(result)} in {one_line(ready)}.{notes}"


def _template(result: ReleaseResult) -> str:
    ids = sorted({str(cluster.template) for cluster in result.clusters})
    images = f" ({one_line(', '.join(result.images.values()))})" if result.images else ""
    return f"template {one_line(', '.join(ids))}{images}"
