"""Errors of batches."""

from collections.abc import Sequence
from typing import ClassVar, Self, TypedDict

from prefect_rollout.errors import InputError, RolloutError
from prefect_rollout.text import one_line
from prefect_rollout.verdict.diagnosis import Category


class Mistake(TypedDict):
    """One mistake of a plan."""

    line: int | None  # line of the file, from 1; None if there is no file
    field: str  # path such as releases.3.app_id, counted from 0; empty for the whole plan
    problem: str  # a clause


class PlanError(InputError):
    """A plan of releases has mistakes; nothing was started. `data["mistakes"]` has every `Mistake`."""

    advice = "Correct the plan and start again; nothing was started."
    shown: ClassVar[int] = 100  # the most that a screen or log can show; `data` has all

    @classmethod
    def of(cls, mistakes: Sequence[Mistake], plan: str = "the plan") -> Self:
        """Return the error for the mistakes of `plan`, such as `the plan release.yaml`."""
        safe = [
            Mistake(
                line=mistake["line"],
                field=one_line(mistake["field"], 200),
                problem=one_line(mistake["problem"]),
            )
            for mistake in mistakes
        ]
        count = "a mistake" if len(safe) == 1 else f"{len(safe)} mistakes"
        return cls(f"{one_line(plan)} has {count}", mistakes=safe)

    def __str__(self) -> str:
        """Return `problem:`, then one line for each mistake, then the advice."""
        mistakes: list[Mistake] = self.data.get("mistakes", [])
        if not mistakes:
            return super().__str__()
        where = f"{self.step}: " if self.step else ""
        lines = [f"{where}{self.problem}:"]
        for mistake in mistakes[: self.shown]:
            line = f"line {mistake['line']}" if mistake["line"] else ""
            lines.append(
                "  " + ": ".join(part for part in (line, mistake["field"], mistake["problem"]) if part)
            )
        if len(mistakes) > self.shown:
            lines.append(f"  and {len(mistakes) - self.shown} more")
        return "\n".join([*lines, self.advice])


class BatchFailedError(RolloutError):
    """Not all releases of a batch succeeded. `result` has a row for each."""

    category = Category.BATCH
    advice = (
        "Fix the causes that the releases name. A new batch of the same plan with only_failed skips what "
        "was released."
    )

    @property
    def may_pass(self) -> bool:
        """True if any of its releases can end differently."""
        return self.result is not None and self.result.may_pass
