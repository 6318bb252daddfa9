"""Stopped runs: the state that they leave, and the offer of a retry."""

import asyncio
from typing import Any
from uuid import uuid4

import pytest
from prefect.client.schemas.objects import FlowRun
from prefect.states import Failed

from prefect_rollout.batch.errors import BatchFailedError
from prefect_rollout.batch.result import BatchResult, Row, Stage, aftermath_of_batch, row_line
from prefect_rollout.batch.result import render as render_batch
from prefect_rollout.errors import (
    AuthenticationError,
    ConfigurationError,
    ConflictError,
    DeploymentNotFoundError,
    InputError,
    LockedError,
    NotApprovedError,
    OverloadedError,
    PlanChangedError,
    QuotaExceededError,
    RejectedError,
    ReleaseCancelledError,
    ReleaseFailedError,
    ReleaseTimedOutError,
    RollbackFailedError,
    RolloutError,
    UnforeseenError,
    UnreachableError,
    WindowClosedError,
    WorkloadError,
)
from prefect_rollout.mcp.follow import _next
from prefect_rollout.mcp.types import Release, result_fields, rows_of
from prefect_rollout.release.aftermath import aftermath_of_release
from prefect_rollout.release.report import render
from prefect_rollout.release.request import Action
from prefect_rollout.release.result import ClusterResult, Outcome, ReleaseResult
from prefect_rollout.runs.endings import foreseen
from prefect_rollout.verdict.diagnosis import Category, Diagnosis
from prefect_rollout.verdict.verdict import ClusterVerdict, Ending, Verdict
from support import kinds


def cluster(name: str = "c1", **changes: Any) -> ClusterResult:
    fields = {"replicas": 1, "template": 12, "template_before": 10, "published": True}
    return ClusterResult(cluster=name, **{**fields, **changes})


def result(*clusters: ClusterResult, **changes: Any) -> ReleaseResult:
    fields = {
        "outcome": Outcome.CANCELLED,
        "app_id": 1,
        "deployment": "web",
        "release_id": "r",
        "template_id": 12,
    }
    return ReleaseResult(**{**fields, "clusters": list(clusters), **changes})


@pytest.mark.parametrize(
    ("stopped", "left", "undo"),
    [
        (result(template_id=None), "nothing was written", "There is nothing to undo."),
        (
            result(cluster(published=False)),
            "nothing was published; template 12 was created",
            "There is nothing to undo.",
        ),
        (
            result(cluster(), cluster("c2"), cluster("c3", published=False)),
            "template 12 was published to c1, c2, and the cloud continues with it",
            "Roll back to undo it.",
        ),
        (
            result(cluster(), cluster("c2", published=None)),
            (
                "template 12 was published to c1; it is not known whether template 12 was published to c2, "
                "and the cloud continues with it"
            ),
            "Roll back to undo it.",
        ),
        (
            result(cluster(online=12, online_known=True), cluster("c2", online=10, online_known=True)),
            (
                "template 12 was published to c1; template 10 was restored in c2, "
                "and the cloud continues with it"
            ),
            "Roll back to undo it.",
        ),
        (
            result(cluster(template=None, published=None)),
            "an earlier attempt may have published to c1, and the cloud continues with it",
            "Roll back to undo it.",
        ),
        (
            result(cluster(template=10), action=Action.ROLLBACK),
            "template 10 was published to c1, and the cloud continues with it",
            "Roll back again to undo it.",
        ),
        (
            result(cluster(), action=Action.RESTART),
            "the restart was asked for in c1, and the cloud continues with it",
            "A restart cannot be undone.",
        ),
        (
            result(cluster(replicas=3), action=Action.SCALE),
            "3 pods were asked for in c1, and the cloud continues with it",
            "Scale again to undo it.",
        ),
        (result(cluster(published=False), dry_run=True), "nothing was written", "There is nothing to undo."),
    ],
)
def test_a_release_that_is_stopped_says_what_the_cloud_continues_with(
    stopped: ReleaseResult, left: str, undo: str
) -> None:
    assert aftermath_of_release(stopped) == (left, undo)


def test_one_that_was_done_stays() -> None:
    assert (
        aftermath_of_release(result(cluster()), done=True).left
        == "template 12 was published to c1, and it stays"
    )


def batch(*rows: Row, **changes: Any) -> BatchResult:
    return BatchResult(batch_id="b", plan_digest="d", waves=1, releases=list(rows), **changes)


def row(name: str, stage: Stage, **changes: Any) -> Row:
    return Row(name=name, app_id=1, deployment="web", wave=1, stage=stage, **changes)


@pytest.mark.parametrize(
    ("back", "words"),
    [
        ([True, True, None], "failed, rolled back"),
        ([True, False], "failed, rollback failed"),
        ([None], "failed"),
    ],
)
def test_a_batch_says_what_was_rolled_back(back: list[bool | None], words: str) -> None:
    failed = row("a", Stage.FAILED, detail="no image")
    failed.note(result(*(cluster(rolled_back=each) for each in back)))
    assert row_line(failed) == f"a {words}: no image"
    assert f"❌ {words} |" in render_batch(batch(failed))
    (listed,) = rows_of([failed.model_dump(mode="json")])["releases"]
    assert listed.state == words


def test_a_batch_that_is_stopped_says_with_what_the_cloud_continues() -> None:
    assert aftermath_of_batch(batch(row("a", Stage.SKIPPED), row("b", Stage.WAITING))) == (
        "nothing was written",
        "There is nothing to undo.",
    )
    stopped = batch(
        row("a", Stage.RELEASED, flow_run_id="1", written=True),
        row("b", Stage.CANCELLED, flow_run_id="2", written=True),
        row("c", Stage.CANCELLED, flow_run_id="3", written=False),
        row("d", Stage.RUNNING, flow_run_id="4"),
        row("e", Stage.SKIPPED),
    )
    assert aftermath_of_batch(stopped) == (
        "what was released stays (1); the cloud continues with what was published of b, d",
        "Roll those deployments back to undo it.",
    )


# ---- retries ------------------------------------------------------------------------------------


def ended(error: RolloutError, of: ReleaseResult | None = None) -> RolloutError:
    error.result = of or result(cluster(published=False), outcome=Outcome.FAILED)
    return error


HALF = result(cluster(), cluster("c2", published=False), outcome=Outcome.FAILED)


@pytest.mark.parametrize(
    "error",
    [
        ended(OverloadedError("x")),
        ended(UnreachableError("x")),
        ended(QuotaExceededError("x")),
        ended(LockedError("x")),
        ended(WindowClosedError("x")),
        ended(UnforeseenError("x")),
        ended(ConflictError("x", retryable=True)),
        ended(ConfigurationError("x", prefect_api=True)),
        ended(ReleaseFailedError("x")),
        ended(ReleaseTimedOutError("x")),
        ended(ReleaseCancelledError("x")),
        ended(NotApprovedError("nobody approved it within 1 s")),
        ended(RejectedError("x"), HALF),
        ended(AuthenticationError("x"), HALF),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_retry_is_offered_where_it_can_help(error: RolloutError) -> None:
    assert error.retry_helps
    assert "Retry the run to continue where it stopped." in str(error)
    assert error.to_dict()["retry_helps"] is True


INVALID_NAME = ReleaseFailedError("x")
INVALID_NAME.verdict = Verdict(
    ending=Ending.FAILED,
    at=0,
    clusters=[ClusterVerdict(cluster="c1", wanted=1)],
    diagnosis=Diagnosis.of(Category.INVALID_IMAGE_NAME),
)


@pytest.mark.parametrize(
    "error",
    [
        ended(DeploymentNotFoundError("x")),
        ended(PlanChangedError("x")),
        ended(ConfigurationError("x")),
        ended(InputError("x")),
        ended(WorkloadError("x")),
        ended(RejectedError("x")),
        ended(AuthenticationError("x")),
        ended(ConflictError("another release was published")),
        ended(NotApprovedError("lisi rejected it", rejected_by="lisi")),
        ended(NotApprovedError("only who has asked for it tried to approve it", refused=5)),
        ended(INVALID_NAME),
        ended(RollbackFailedError("x"), result(cluster(rolled_back=False))),
        ended(ReleaseFailedError("x"), result(cluster(rolled_back=True))),
        ended(ReleaseCancelledError("too late"), result(cluster(), outcome=Outcome.RELEASED)),
        ended(OverloadedError("x"), result(dry_run=True)),
        OverloadedError("of no run"),
    ],
    ids=lambda error: f"{type(error).__name__} {error.problem}",
)
def test_no_retry_is_offered_where_none_can_help(error: RolloutError) -> None:
    assert not error.retry_helps
    assert "etry" not in str(error)
    assert error.to_dict()["retry_helps"] is False


def test_no_advice_speaks_of_a_retry_by_itself() -> None:
    for kind in kinds(RolloutError):
        assert "etry" not in kind.advice, kind
    assert [each for each in Category if "etry" in Diagnosis.of(each).resolution] == []


def test_a_run_that_was_rolled_back_says_that_it_is_over() -> None:
    error = ended(ReleaseFailedError("x; rolled back"), result(cluster(rolled_back=True)))
    assert "This run is over: start a new release once that is fixed." in str(error)


def test_the_report_offers_a_retry_only_where_it_helps() -> None:
    for error, offered in ((ended(OverloadedError("x")), True), (ended(PlanChangedError("x")), False)):
        assert error.result is not None
        error.result.error = error.to_dict()
        assert ("Retry the run" in render(error.result)) is offered


@pytest.mark.parametrize(("token", "offered"), [("t0ken", True), ("", False)])
def test_an_assistant_is_told_to_retry_only_where_that_helps(token: str, offered: bool) -> None:
    run = FlowRun(flow_id=uuid4(), state=Failed())
    release = Release(
        flow_run_id=str(run.id),
        name="web",
        flow="rollback",
        state="Failed",
        ended=True,
        ui_link="",
        next="",
        outcome=Outcome.FAILED,
        confirm_retry=token,
    )
    told = _next(release, run, "Look it up.")
    assert told.startswith("Look it up. ")
    assert ("retry_release with confirm=t0ken" in told) is offered
    assert ("A retry does not help" in told) is not offered


def test_a_batch_can_be_retried_where_one_of_its_releases_can() -> None:
    def helps(of: BatchResult) -> bool:
        failed = BatchFailedError("1 failed")
        failed.result = of
        return failed.retry_helps

    hopeless = row("a", Stage.FAILED, may_pass=False)
    assert not helps(batch(hopeless, row("b", Stage.SKIPPED)))
    assert helps(batch(hopeless, row("b", Stage.TIMED_OUT, may_pass=True)))
    assert not helps(batch(row("b", Stage.TIMED_OUT, may_pass=True), dry_run=True))


# ---- a rollback that failed ---------------------------------------------------------------------


def failed_rollback() -> RollbackFailedError:
    error = RollbackFailedError("ROLLBACK FAILED: after 5 s: 0 of 1 new pods ready in c1")
    error.found = Diagnosis.of(
        Category.IMAGE_PULL_ERROR, cluster="c1", pod="web-1", reported="not found", seconds=5
    )
    first = ReleaseTimedOutError("after 9 s: 0 of 1 new pods ready in c1")
    first.verdict = Verdict(
        ending=Ending.TIMED_OUT,
        at=9,
        clusters=[ClusterVerdict(cluster="c1", wanted=1)],
        diagnosis=Diagnosis.of(Category.CRASH_LOOP_BACK_OFF, cluster="c1", pod="web-2"),
    )
    error.cause = first.to_dict()
    error.result = result(cluster(rolled_back=False), outcome=Outcome.FAILED)
    error.result.error = error.to_dict()
    return error


def test_a_rollback_that_failed_keeps_its_diagnosis_and_that_of_the_release() -> None:
    error = failed_rollback()
    told = error.to_dict()
    assert (told["diagnosis"]["category"], told["diagnosis"]["pod"]) == ("ImagePullError", "web-1")
    assert told["cause"]["type"] == "ReleaseTimedOutError"
    assert told["cause"]["diagnosis"]["pod"] == "web-2"
    assert "Rollback: ImagePullError: web-1 in c1 for 5 s: not found. Release: CrashLoop" in str(error)


def test_a_rollback_that_failed_is_told_in_the_report_over_mcp_and_in_a_batch() -> None:
    error = failed_rollback()
    assert error.result is not None
    page = render(error.result)
    assert "**Diagnosis:** ImagePullError: web-1 in c1" in page
    assert "**The release failed first:** CrashLoopBackOff: web-2 in c1" in page
    fields = result_fields(error.result.model_dump(mode="json"))
    assert "ImagePullError" in fields["diagnosis"].category
    assert "CrashLoopBackOff" in fields["cause"].category
    assert row("a", Stage.FAILED, error=error.to_dict()).why.startswith("ROLLBACK FAILED: after 5 s")


async def test_an_error_that_hides_a_cancellation_is_that_cancellation() -> None:
    async def cancelled() -> None:
        try:
            raise asyncio.CancelledError  # noqa: TRY301
        except asyncio.CancelledError:
            raise ValueError("Task run is not set")  # noqa: B904 - as Prefect raises it

    async def broken() -> None:
        raise ValueError("Task run is not set")

    with pytest.raises(asyncio.CancelledError):
        await foreseen(cancelled())
    with pytest.raises(UnforeseenError):
        await foreseen(broken())
