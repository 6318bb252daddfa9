"""The result of a batch: a row for each release, and the page for people. Pure."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, ClassVar

from pydantic import BaseModel, Field

from prefect_rollout.batch.plan import Plan
from prefect_rollout.release.aftermath import NOTHING_TO_UNDO, UNDO_BATCH, Aftermath, listed
from prefect_rollout.release.plan import ReleasePlan
from prefect_rollout.release.plan_words import plan_lines, summary
from prefect_rollout.release.progress import Listeners
from prefect_rollout.release.report import render_plan
from prefect_rollout.release.result import BACK, Outcome, ReleaseResult
from prefect_rollout.release.workload import digest
from prefect_rollout.text import link, markdown, one_line, table
from prefect_rollout.verdict.diagnosis import Diagnosis


class Stage(StrEnum):
    """Stage of one release of a batch."""

    WAITING = "waiting"
    RUNNING = "running"
    RELEASED = "released"
    FAILED = "failed"
    TIMED_OUT = "timed out"
    CANCELLED = "cancelled"
    CRASHED = "crashed"
    SKIPPED = "skipped"
    PLANNED = "planned"

    @property
    def ended(self) -> bool:
        """True if this batch does nothing more with the release."""
        return self not in {Stage.WAITING, Stage.RUNNING}


# Also the order in counts and in the report.
_MARKS = {
    Stage.FAILED: "❌",
    Stage.TIMED_OUT: "⌛",
    Stage.CRASHED: "💥",
    Stage.CANCELLED: "⏹",
    Stage.SKIPPED: "⏭",
    Stage.RUNNING: "🔄",
    Stage.WAITING: "·",
    Stage.PLANNED: "📋",
    Stage.RELEASED: "✅",
}
_TITLES = {
    Outcome.RELEASED: "✅ Batch released",
    Outcome.PLANNED: "📋 Batch planned: nothing was written",
    Outcome.FAILED: "❌ Batch failed",
    Outcome.CANCELLED: "⏹ Batch cancelled",
    Outcome.SKIPPED: "⏭ Batch skipped",
}


class Row(BaseModel):
    """One release of a batch."""

    name: str
    app_id: int | str
    deployment: str
    wave: int
    stage: Stage = Stage.WAITING
    detail: str = Field(default="", description="The step that runs, or why it was not released.")
    template_before: str = Field(default="", description="Ids of the templates that were online before.")
    template: str = Field(default="", description="Ids of the templates to run.")
    notes: list[str] = Field(
        default=[],
        description="Templates that were skipped: why, and how to take them anyway; images with problems.",
    )
    seconds: float | None = Field(default=None, description="From its start in this batch to its end.")
    written: bool | None = Field(
        default=None, description="True if it wrote to a cluster, or may have; null if unknown."
    )
    rolled_back: bool | None = Field(
        default=None, description="True if it was rolled back; null if no rollback was tried."
    )
    may_pass: bool = Field(
        default=False, description="True if the cause of its failure can pass or be removed."
    )
    plan: ReleasePlan | None = Field(default=None, description="Its plan, by a dry run.")
    flow_run_id: str | None = None
    link: str = Field(default="", description="Address of its flow run in the Prefect UI.")
    error: dict[str, Any] | None = None

    @property
    def why(self) -> str:
        """The reason why it was not released, in one sentence: the diagnosis, if there is one.

        After a failed rollback, the error message instead, which begins with the rollback.
        """
        if self.error is None:
            return self.detail
        if self.error.get("cause"):
            return str(self.error["message"])
        return str(Diagnosis.model_validate(self.error["diagnosis"]))

    def note(self, result: ReleaseResult) -> None:
        """Copy templates, plan and notes of the release's result."""
        before = {str(c.template_before) for c in result.clusters if c.template_before is not None}
        after = {str(c.template) for c in result.clusters if c.template is not None}
        self.template_before = ", ".join(sorted(before))
        self.template = ", ".join(sorted(after))
        self.written = result.wrote
        back = {c.rolled_back for c in result.clusters} - {None}
        self.rolled_back = all(back) if back else None
        self.plan = result.plan
        self.notes = result.notes


class BatchResult(BaseModel):
    """Result of a batch: the flow returns it and `--json` prints it."""

    wrote: ClassVar[bool] = False  # only its releases write
    rolled_back: ClassVar[bool] = False

    outcome: Outcome = Outcome.FAILED
    batch_id: str
    clouds: list[str] = Field(
        default=[], description="Addresses of the platforms, each with the block that it is reached through."
    )
    plan_digest: str = Field(description="Digest of the plan; batches of the same plan share it.")
    releases: list[Row]
    wave: int | None = Field(default=None, description="The current wave; null before and after all waves.")
    waves: int
    plan_hash: str = Field(default="", description="Hash of the plans that a dry run made, for expect_plan.")
    procedure: str = Field(default="", description="Order and limits of the batch, in words.")
    dry_run: bool = Field(default=False, description="True if it only plans and writes nothing.")
    requested_by: str = ""
    approved_by: str = Field(default="", description="Who approved it or its waves, if asked.")
    waiting: str = Field(default="", description="The part that waits for a person's approval.")
    seconds: float | None = None
    error: dict[str, Any] | None = Field(default=None, description="Why it did not succeed.")
    link: str = Field(default="", description="Address of its flow run in the Prefect UI.")

    @classmethod
    def of(cls, plan: Plan, batch_id: str, *, approval: str = "none", **more: Any) -> "BatchResult":
        """Return the result of a batch that has not started."""
        return cls(
            batch_id=batch_id,
            procedure=procedure_words(plan, approval),
            plan_digest=plan.digest,
            waves=len(plan.waves),
            releases=[
                Row(
                    name=release.name,
                    app_id=release.app_id,
                    deployment=release.deployment,
                    wave=release.wave,
                )
                for wave in plan.waves
                for release in wave
            ],
            **more,
        )

    def row(self, name: str) -> Row:
        """Return the row of the release with that name."""
        return next(row for row in self.releases if row.name == name)

    @property
    def over(self) -> bool:
        """True if a retry of the batch has nothing left to do."""
        return self.dry_run or self.outcome is Outcome.RELEASED

    @property
    def may_pass(self) -> bool:
        """True if a retry can release any of its releases."""
        return any(row.may_pass for row in self.releases)

    @property
    def counted(self) -> str:
        """The releases by stage, such as `2 failed, 1 skipped, 37 released`."""
        counts = Counter(row.stage for row in self.releases)
        return ", ".join(f"{counts[stage]} {stage}" for stage in _MARKS if counts[stage])

    @property
    def progress(self) -> float:
        """Percent of the releases that have ended."""
        return 100 * sum(row.stage.ended for row in self.releases) / len(self.releases)

    @property
    def unreleased(self) -> list[Row]:
        """The rows that did not succeed, the most urgent first."""
        order = list(_MARKS)
        bad = [row for row in self.releases if row.stage not in {Stage.RELEASED, Stage.PLANNED}]
        return sorted(bad, key=lambda row: order.index(row.stage))


def render(result: BatchResult, *, running: bool = False) -> str:
    """Return the batch as markdown: its state, its problems, and a row for each release."""
    title = _TITLES[result.outcome]
    if result.outcome is Outcome.FAILED:
        released = sum(row.stage is Stage.RELEASED for row in result.releases)
        title += f": {released} of {_number(len(result.releases), 'app')} released"
    if running:
        title = f"🔄 Releasing, wave {result.wave or 1}"
    if running and result.waiting:
        title = f"⏸ Waiting for approval of {result.waiting}"
    facts = [
        ("Releases", f"{len(result.releases)} in {_number(result.waves, 'wave')}: {result.counted}"),
        ("Cloud", markdown(", ".join(result.clouds), 1000)),
        ("Requested by", markdown(result.requested_by)),
        ("Approved by", markdown(result.approved_by)),
        ("Procedure", markdown(result.procedure)),
        ("Plan hash", f"`{result.plan_hash}`" if result.plan_hash else ""),
        ("Plan", f"`{result.plan_digest}`"),
    ]
    parts = [f"# {title}"]
    if result.error:
        todo = f"{result.error.get('advice', '')} {result.error.get('next_step', '')}"
        parts.append(
            f"> {markdown(result.error.get('message', ''), 2000)}\n>\n"
            f"> **What to do:** {markdown(todo, 1000)}"
        )
    parts.append("\n".join(f"- **{name}:** {value}" for name, value in facts if value))
    bad = [row for row in result.unreleased if row.stage.ended]
    if bad:
        # Not a table: table cells are not wrapped.
        parts += [
            "## Not released",
            "\n".join(f"- {_stage(row)} {_name(row)}: {_advice(row)}" for row in bad),
        ]
    parts += [
        "## Releases",
        table(
            ("Wave", "Release", "State", "Template before → after", "Seconds", ""),
            [
                (
                    str(row.wave),
                    _name(row),
                    _stage(row),
                    _templates(row),
                    "" if row.seconds is None else f"{row.seconds:.0f}",
                    markdown(row.detail, 80) if row.stage is Stage.RUNNING else "",
                )
                for row in result.releases
            ],
        ),
    ]
    notes = [f"- {_name(row)}: {markdown(note, 400)}" for row in result.releases for note in row.notes]
    if notes and result.outcome is not Outcome.PLANNED:
        parts += ["## Notes", "\n".join(notes)]
    if result.outcome is Outcome.PLANNED:
        parts += [part for row in result.releases if row.plan for part in _plan(row, row.plan)]
        parts.append(
            "Nothing was written. To do exactly this, start the plan again with "
            f"`expect_plan={result.plan_hash}` and without `dry_run`. The batch is refused if any of this "
            "has changed in the meantime."
        )
    if result.link:
        parts.append(link("Flow run", result.link))
    at = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    parts.append(f"_{'As of' if running else 'Ended'} {at}_")
    return "\n\n".join(parts) + "\n"


def _plan(row: Row, plan: ReleasePlan) -> Iterator[str]:
    yield f"# {markdown(row.name)}"
    yield render_plan(plan)


def plan_of_all(result: BatchResult) -> list[str]:
    """Return the plans of a batch's releases as lines that are safe for a terminal."""
    lines = [line for row in result.releases if row.plan for line in plan_lines(row.plan)]
    return [f"Batch: {result.procedure}", *lines, f"Plan hash of the batch: {result.plan_hash}"]


def plans_in_words(result: BatchResult) -> str:
    """Return the effect of a batch as markdown, a line for each release, for an approval."""
    lines = [
        f"- **{markdown(row.name)}:** {markdown(summary(row.plan))}" for row in result.releases if row.plan
    ]
    return "\n".join([*lines, f"\n{markdown(result.procedure)}\n\nPlan hash: `{result.plan_hash}`\n"])


def hash_of(plan: Plan, approval: str, releases: Mapping[str, str]) -> str:
    """Return the hash of everything that decides what a batch writes; `releases` is `{name: plan hash}`."""
    return digest([plan.procedure, approval, sorted(releases.items())])[:16]


def procedure_words(plan: Plan, approval: str) -> str:
    """Return the order and limits of a plan, such as `2 waves of 1 and 3 releases; …`; safe for a log."""
    sizes = [str(len(wave)) for wave in plan.waves]
    waves = " and ".join([", ".join(sizes[:-1]), sizes[-1]] if sizes[1:] else sizes)
    releases = "release" if waves == "1" else "releases"
    approvals = {
        "before-release": "only after a person's approval",
        "between-waves": "each wave after the first only after a person's approval",
    }
    parts = [
        f"{_number(len(sizes), 'wave')} of {waves} {releases}",
        f"at most {plan.max_parallel} at once",
        f"no new one when more than {plan.failure_budget} have failed",
        f"{plan.soak_seconds:g} s between waves" if plan.soak_seconds else "",
        approvals.get(approval, "no approval"),
    ]
    return "; ".join(part for part in parts if part)


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _stage(row: Row) -> str:
    return f"{_MARKS[row.stage]} {row.stage}{BACK[row.rolled_back]}"


def _name(row: Row) -> str:
    return link(row.name, row.link) if row.link else markdown(row.name)


def _advice(row: Row) -> str:
    advice = f" {markdown(row.error['diagnosis']['resolution'], 600)}" if row.error else ""
    return f"{markdown(row.why, 600)}{'' if row.why.endswith('.') else '.'}{advice}"


def _templates(row: Row) -> str:
    if not (row.template_before or row.template):
        return ""
    return f"{markdown(row.template_before or 'none')} → {markdown(row.template or '?')}"


def row_line(row: Row) -> str:
    """Return one line about a release of the batch."""
    templates = f" (template {one_line(row.template_before or 'none', 80)} → {one_line(row.template, 80)})"
    seconds = "" if row.seconds is None else f" in {row.seconds:.0f} s"
    detail = f": {one_line(row.why, 400)}" if row.why else ""
    return (
        f"{one_line(row.name, 507)} {row.stage}{BACK[row.rolled_back]}"
        f"{templates if row.template and row.stage is Stage.RELEASED else ''}{seconds}{detail}"
    )


def aftermath_of_batch(result: BatchResult) -> Aftermath:
    """Return the state in which a stopped batch leaves its releases."""
    released = [row.name for row in result.releases if row.stage is Stage.RELEASED and row.flow_run_id]
    others = [
        row.name for row in result.releases if row.stage is not Stage.RELEASED and _may_have_written(row)
    ]
    parts = [
        f"what was released stays ({len(released)})" if released else "",
        f"the cloud continues with what was published of {listed(others)}" if others else "",
    ]
    left = "; ".join(part for part in parts if part)
    return Aftermath(left, UNDO_BATCH) if left else Aftermath("nothing was written", NOTHING_TO_UNDO)


def _may_have_written(row: Row) -> bool:
    begun = row.flow_run_id is not None and row.stage is not Stage.PLANNED
    return begun if row.written is None else row.written


Onlooker = Callable[[BatchResult], None]

_onlookers = Listeners[BatchResult]("onlookers")
looking_on, show = _onlookers.listening, _onlookers.tell
