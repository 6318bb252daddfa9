"""The output of a failing release on a terminal of 80 columns and on a pipe."""

import io
import re
import sys
from typing import Any

import pytest
from rich.console import Console

from prefect_rollout.batch.result import BatchResult, Row, Stage, show
from prefect_rollout.cli import output
from prefect_rollout.cli.progress_view import LiveProgress
from prefect_rollout.mcp.types import steps_done, steps_of
from prefect_rollout.release.progress import (
    ROLL_BACK,
    STEPS,
    STEPS_OF,
    WAIT_FOR_ROLLBACK,
    Progress,
    steps_with,
    tell,
)
from prefect_rollout.release.result import Outcome, ReleaseResult

PROBLEM = "after 9 s: 0 of 2 new pods ready in pub-bjwdt; bad-image-5d8f7c9b4-x2x7q: ErrImagePull for 9 s"

ROLLED_BACK = [
    *(Progress(step, "done", "", 0.1) for step in STEPS[:5]),
    Progress("publish deployment", "done", "pub-bjwdt, replicas 2", 0.1),
    Progress("wait for pods", "running", "pub-bjwdt 0/2", aloud=True),
    Progress("wait for pods", "failed", PROBLEM, 9.0),
    Progress(ROLL_BACK, "running", "to what was online before", aloud=True),
    Progress(ROLL_BACK, "running", "pub-bjwdt to template 1343120, replicas 2"),
    Progress(ROLL_BACK, "done", "", 0.1),
    Progress(WAIT_FOR_ROLLBACK, "running", "pub-bjwdt 2/2", aloud=True),
    Progress(WAIT_FOR_ROLLBACK, "done", "", 3.0),
    Progress("report release", "done", "", 0.1),
]


def shown(progress: list[Progress], *, terminal: bool) -> str:
    """Return the final output, with colours if it is a terminal."""
    written = io.StringIO()
    console = Console(file=written, width=80, force_terminal=terminal, color_system="standard")
    with LiveProgress(console).showing("deploy-latest-image", {}):
        for each in progress:
            tell(each)
    return written.getvalue()


@pytest.mark.parametrize(
    ("flow", "parameters", "action"),
    [
        ("deploy-latest-image", {}, "deploy"),
        ("deploy-latest-image", {"dry_run": True}, "dry run"),
        ("deploy-latest-image", {"approval": "before-release"}, "deploy with approval"),
        ("rollback", {}, "rollback"),
        ("rollback", {"dry_run": True}, "dry run of a rollback"),
        ("restart", {"dry_run": True}, "dry run of a restart"),
        ("scale", {}, "scale"),
    ],
)
def test_the_counter_of_steps_never_jumps(flow: str, parameters: dict[str, Any], action: str) -> None:
    written = io.StringIO()
    steps = STEPS_OF[action]
    with LiveProgress(Console(file=written, width=80)).showing(flow, parameters):
        for step in steps:
            tell(Progress(step, "done"))
    numbers = [line.partition(" ")[0] for line in written.getvalue().splitlines()]
    assert numbers == [f"{number}/{len(steps)}" for number in range(1, len(steps) + 1)]


LONG = "3290/a-deployment-with-quite-a-long-name-of-its-own-in-production-beijing-and-more"


def batch_of(*names: str) -> BatchResult:
    rows = [
        Row(name=name, app_id=1, deployment=name, wave=1, stage=Stage.FAILED, detail="no pod " * 60)
        for name in names
    ]
    return BatchResult(batch_id="b", plan_digest="d", releases=rows, wave=1, waves=1)


def test_a_batch_shows_no_steps_before_its_releases_and_never_cuts_a_name() -> None:
    written = io.StringIO()
    console = Console(file=written, width=80, force_terminal=True, color_system=None)
    with LiveProgress(console).showing("deploy-batch", {}):
        pass
    assert not [step for step in STEPS if step in written.getvalue()]
    with LiveProgress(console).showing("deploy-batch", {}):
        show(batch_of("web", LONG))
    last = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", written.getvalue().split("\x1b[2K")[-1])
    assert LONG in "".join(line[2:48].strip() for line in last.splitlines() if "wave" not in line)
    assert max(map(len, last.splitlines())) <= 80


def test_the_spinner_is_for_terminals_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def written(*, terminal: bool, arguments: tuple[str, ...] = ()) -> str:
        file = io.StringIO()
        monkeypatch.setattr(output, "err", Console(file=file, width=80, force_terminal=terminal))
        monkeypatch.setattr(sys, "argv", ["prefect-rollout", *arguments])
        with output.waiting("Connecting to Prefect"):
            pass
        return file.getvalue()

    assert re.search(r"Connecting to Prefect.* 0:00:00|Connecting to Prefect", written(terminal=True))
    assert written(terminal=False) == ""
    assert written(terminal=True, arguments=("--json",)) == ""


def rows(progress: list[Progress]) -> list[str]:
    """Return the rows of the final table, each with its mark."""
    last = shown(progress, terminal=True).split("\x1b[2K")[-1]
    return [line.rstrip() for line in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", last).split("\n")]


def test_on_a_terminal_the_step_that_failed_is_red_and_the_rollback_has_rows_of_its_own() -> None:
    found = rows(ROLLED_BACK)
    marks = [line.split()[0] for line in found if line and line[0] in "✔✘●·↻■"]
    assert marks == ["✔"] * 6 + ["✘"] + ["✔"] * 3
    (failed,) = [line for line in found if line.startswith("✘")]
    assert "wait for pods" in failed
    assert max(map(len, found)) <= 80
    assert "\x1b[31m✘" in shown(ROLLED_BACK, terminal=True)
    names = [line for line in found if ROLL_BACK in line or WAIT_FOR_ROLLBACK in line]
    assert len(names) == 2


def test_in_lines_the_rollback_is_told_after_the_step_that_failed() -> None:
    lines = shown(ROLLED_BACK, terminal=False).splitlines()
    assert f"7/8 wait for pods failed: {PROBLEM} (9.0 s)" in lines
    assert lines[lines.index("rollback 1/2 roll back running: to what was online before") :] == [
        "rollback 1/2 roll back running: to what was online before",
        "rollback 1/2 roll back done: pub-bjwdt to template 1343120, replicas 2 (0.1 s)",
        "rollback 2/2 wait for rollback running: pub-bjwdt 2/2",
        "rollback 2/2 wait for rollback done: pub-bjwdt 2/2 (3.0 s)",
        "8/8 report release done (0.1 s)",
    ]


def test_a_step_that_was_stopped_does_not_look_as_if_it_ran_on() -> None:
    stopped = [*ROLLED_BACK[:7], Progress("wait for pods", "stopped"), ROLLED_BACK[-1]]
    marks = [line.split()[0] for line in rows(stopped) if line and line[0] in "✔✘●·↻■"]
    assert marks == ["✔"] * 6 + ["■", "✔"]


def test_the_steps_of_a_rollback_stand_before_the_report_in_every_kind_of_release() -> None:
    back = [ROLL_BACK, WAIT_FOR_ROLLBACK]
    assert steps_with([*STEPS, ROLL_BACK]) == (*STEPS[:-1], *back, STEPS[-1])
    assert steps_with(["approval", ROLL_BACK])[-4:] == ("wait for pods", *back, STEPS[-1])
    assert steps_with(STEPS) == STEPS


def states_of(result: ReleaseResult) -> dict[str, str]:
    steps = steps_of("deploy", steps_done(result.model_dump(mode="json")))
    return {each.step: each.state for each in steps}


def test_over_mcp_the_step_that_failed_is_failed_and_the_rollback_has_steps_of_its_own() -> None:
    result = ReleaseResult(
        outcome=Outcome.FAILED,
        app_id=1,
        deployment="web",
        release_id="r",
        seconds={"wait for pods": 9, ROLL_BACK: 0.1, WAIT_FOR_ROLLBACK: 3},
        failed_steps=["wait for pods"],
        error={"step": "wait for pods"},
    )
    states = states_of(result)
    assert list(states)[-4:] == ["wait for pods", ROLL_BACK, WAIT_FOR_ROLLBACK, "report release"]
    assert [states[step] for step in list(states)[-4:]] == ["failed", "done", "done", "done"]
    failed = result.model_copy(update={"failed_steps": ["wait for pods", WAIT_FOR_ROLLBACK]})
    states = states_of(failed)
    assert states[WAIT_FOR_ROLLBACK] == states["wait for pods"] == "failed"
