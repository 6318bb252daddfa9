"""Releases that a person approves: real Prefect server, simulated clouds over real sockets."""

import asyncio
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from oci_server import Registry
from prefect import flow, get_client
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.responses import OrchestrationResult
from prefect.client.schemas.sorting import FlowRunSort
from prefect.events.filters import EventFilter, EventResourceFilter
from prefect.exceptions import ObjectNotFound, Pause
from prefect.flow_engine import run_flow_async
from prefect.settings import PREFECT_LOCAL_STORAGE_PATH, temporary_settings
from prefect.states import AwaitingRetry, Cancelling, Scheduled

from prefect_rollout.errors import (
    ConfigurationError,
    InputError,
    NotApprovedError,
    PlanChangedError,
    ReleaseCancelledError,
    RolloutError,
)
from prefect_rollout.flows import deploy_latest_image
from prefect_rollout.release.plan import ClusterPlan, ReleasePlan
from prefect_rollout.release.progress import Progress, listening, silence, tell
from prefect_rollout.release.request import Action, ReleaseRequest
from prefect_rollout.release.result import Outcome, ReleaseResult
from prefect_rollout.runs import approval, heartbeat
from prefect_rollout.runs.approval import Decision, question
from prefect_rollout.runs.heartbeat import HEARTBEAT
from support import Cloud, lives, resume, served, shop
from tiny_images import image

HOME: dict[str, Any] = {
    "app_id": 3290,
    "deployment": "qapm-home",
    "poll_seconds": 0.1,
    "poll_attempts": 200,
}
ASKED: dict[str, Any] = {**HOME, "approval": "before-release", "requested_by": "zhangsan"}


@pytest.fixture(autouse=True)
def _quick_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have guards and paused runs look at what became of the run more often than every 3 and 2 s."""
    monkeypatch.setattr(heartbeat, "_TICK_SECONDS", 0.1)
    monkeypatch.setattr(approval, "_LOOK_SECONDS", 0.2)


# ---- helpers ------------------------------------------------------------------------------------


async def created(**parameters: Any) -> FlowRun:
    """A run of a Prefect deployment, to be run by `begun`."""
    async with get_client() as client:
        deployment = await client.create_deployment(
            await client.create_flow(deploy_latest_image), name=f"approval-{uuid4()}"
        )
        return await client.create_flow_run_from_deployment(
            deployment, parameters={**ASKED, **parameters}, state=Scheduled()
        )


async def read(run_id: UUID) -> FlowRun:
    async with get_client() as client:
        return await client.read_flow_run(run_id)


async def begun(run_id: UUID) -> ReleaseResult:
    """Runs the run in this process as it stands, as a worker's process does."""
    run = await read(run_id)
    result: Any = await run_flow_async(deploy_latest_image, flow_run=run, parameters=run.parameters)
    assert isinstance(result, ReleaseResult)
    return result


async def suspended(**parameters: Any) -> UUID:
    """A run that waits for its approval, with no process."""
    run = await created(**parameters)
    with pytest.raises(Pause):
        await begun(run.id)
    assert (await read(run.id)).state_name == "Suspended"
    return run.id


async def answer(run_id: UUID, decision: str, name: str, comment: str = "") -> OrchestrationResult[Any]:
    """What the form in the UI sends."""
    async with get_client() as client:
        return await client.resume_flow_run(
            run_id, run_input={"decision": decision, "name": name, "comment": comment}
        )


async def retried(run_id: UUID) -> ReleaseResult:
    """What Retry in the UI does, and a worker then."""
    async with get_client() as client:
        await client.set_flow_run_state(run_id, AwaitingRetry(), force=True)
    return await begun(run_id)


async def inputs(run_id: UUID, prefix: str) -> dict[str, Any]:
    async with get_client() as client:
        found = await client.filter_flow_run_input(run_id, prefix, limit=100, exclude_keys=set())
    return {each.key: each.decoded_value for each in found}


async def reports(run_id: UUID) -> list[str]:
    async with get_client() as client:
        artifacts = await client.read_artifacts(
            artifact_filter=ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run_id]))
        )
    return [str(artifact.data) for artifact in artifacts if artifact.type == "markdown"]


async def waiting_here(**parameters: Any) -> tuple[asyncio.Task[Any], UUID]:
    """A release of no Prefect deployment that waits in this process."""
    reason = str(uuid4())
    release = asyncio.create_task(deploy_latest_image(**{**ASKED, "reason": reason, **parameters}))
    async with asyncio.timeout(30), get_client() as client:
        while True:
            for run in await client.read_flow_runs(sort=FlowRunSort.START_TIME_DESC, limit=50):
                ours = run.parameters.get("reason") == reason
                if ours and await inputs(run.id, "paused-release-1-schema"):
                    return release, run.id
            assert not release.done(), await release
            await asyncio.sleep(0.05)


# ---- a Prefect deployment's run -----------------------------------------------------------------


@pytest.mark.promise("Requesters cannot approve their own release")
@pytest.mark.usefixtures("prefect_api")
async def test_a_release_is_suspended_and_released_once_somebody_has_approved(cloud: Cloud) -> None:
    run_id = await suspended(reason="<b>new</b> home")
    assert cloud.record == []
    assert await reports(run_id) == []
    form = await inputs(run_id, "suspended-release-1-")
    told = form["suspended-release-1-description"]
    assert "qapm-home" in told
    assert "zhangsan" in told
    assert "<b>" not in told
    assert set(form["suspended-release-1-schema"]["properties"]) == {"decision", "name", "comment"}

    assert (await answer(run_id, "approve", "lisi\n", "looks [fine](http://x)")).status == "ACCEPT"
    result = await begun(run_id)
    assert (result.outcome, result.approved_by) == (Outcome.RELEASED, "lisi")
    assert cloud.writes == ["template 1343170", "publish 1343170 to pub-bjwdt"]
    run = await read(run_id)
    assert run.run_count == 1
    assert run.labels["rollout.approved-by"] == "lisi"
    (report,) = await reports(run_id)
    assert "**Approved by:** lisi: looks `[fine](http://x)`\n" in report


async def test_a_suspended_release_holds_no_process_and_is_taken_up_again(
    cloud: Cloud, prefect_api: str, tmp_path: Path
) -> None:
    server = served(prefect_api, tmp_path, cloud.environment, "served-approval")
    try:
        async with asyncio.timeout(120), get_client() as client:
            deployment = await _deployed(client, "deploy-latest-image/served-approval")
            run = await client.create_flow_run_from_deployment(deployment, parameters=ASKED)
            await _in_state(run.id, StateType.PAUSED)
            pid = int(str((await read(run.id)).labels["rollout.process"]).rpartition(" ")[2])
            while lives(pid):  # noqa: ASYNC110 - of another process
                await asyncio.sleep(0.1)
            await answer(run.id, "approve", "lisi")
            await _in_state(run.id, StateType.COMPLETED)
        assert cloud.writes == ["template 1343170", "publish 1343170 to pub-bjwdt"]
    finally:
        server.terminate()
        server.wait(60)


async def _deployed(client: PrefectClient, name: str) -> UUID:
    while True:
        with suppress(ObjectNotFound):
            return (await client.read_deployment_by_name(name)).id
        await asyncio.sleep(0.2)


async def _in_state(run_id: UUID, wanted: StateType) -> None:
    while (now := await read(run_id)).state_type is not wanted:
        assert now.state is None or not now.state.is_final(), now.state
        await asyncio.sleep(0.2)


@pytest.mark.promise("Requesters cannot approve their own release")
@pytest.mark.usefixtures("prefect_api")
async def test_a_rejected_release_ends_as_rejected_and_stays_so_when_it_is_retried(cloud: Cloud) -> None:
    run_id = await suspended()
    await answer(run_id, "reject", "lisi", "too risky on a Friday")
    for attempt in (begun, retried):
        with pytest.raises(NotApprovedError, match="lisi rejected it: too risky on a Friday") as caught:
            await attempt(run_id)
        assert caught.value.result is not None
        assert caught.value.result.outcome is Outcome.CANCELLED
        ended = await read(run_id)
        assert (ended.state_type, ended.state_name) == (StateType.CANCELLED, "Rejected")
    assert cloud.record == []
    assert all("was cancelled" in report and "lisi rejected it" in report for report in await reports(run_id))


@pytest.mark.promise("Requesters cannot approve their own release")
@pytest.mark.usefixtures("prefect_api")
async def test_who_asked_for_a_release_cannot_approve_it(
    cloud: Cloud, caplog: pytest.LogCaptureFixture
) -> None:
    run_id = await suspended()
    await answer(run_id, "approve", " Ｚhang\u0053an ")
    with pytest.raises(Pause):
        await begun(run_id)
    again = await inputs(run_id, "suspended-release-2-description")
    refusal = "has asked for it and cannot approve it, somebody else has to"
    assert refusal in again["suspended-release-2-description"]
    (logged,) = [entry.message for entry in caplog.records if "is refused" in entry.message]
    assert logged.startswith("Approval 1 of 5 is refused: Ｚhang")
    assert logged.endswith(refusal)
    await answer(run_id, "approve", "lisi")
    assert (await begun(run_id)).approved_by == "lisi"
    assert len(cloud.record) == 2


@pytest.mark.usefixtures("prefect_api")
async def test_who_asked_is_not_asked_for_ever(cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(approval, "_TRIES", 2)
    run_id = await suspended()
    await answer(run_id, "approve", "zhangsan")
    with pytest.raises(Pause):
        await begun(run_id)
    await answer(run_id, "approve", "zhangsan")
    with pytest.raises(NotApprovedError, match="2 times"):
        await begun(run_id)
    assert cloud.record == []


@pytest.mark.usefixtures("prefect_api")
async def test_a_form_that_is_not_filled_in_leaves_the_run_suspended(cloud: Cloud) -> None:
    run_id = await suspended()
    wrong: list[dict[str, Any]] = [
        {},
        {"decision": "approve"},
        {"decision": "approve", "name": ""},
        {"decision": "approve", "name": "  "},
        {"decision": "perhaps", "name": "lisi"},
        {"decision": "approve", "name": "lisi", "force": True},
    ]
    async with get_client() as client:
        for run_input in wrong:
            refused = await client.resume_flow_run(run_id, run_input=run_input)
            assert refused.status == "REJECT", run_input
            assert (await read(run_id)).state_name == "Suspended"
    assert cloud.record == []


@pytest.mark.usefixtures("prefect_api")
async def test_a_run_that_is_resumed_past_the_form_is_asked_again(cloud: Cloud) -> None:
    run_id = await suspended()
    async with get_client() as client:
        await client.set_flow_run_state(run_id, Scheduled(), force=True)
    with pytest.raises(Pause):
        await begun(run_id)
    assert await inputs(run_id, "suspended-release-2-schema")
    assert cloud.record == []


@pytest.mark.usefixtures("prefect_api")
async def test_an_approval_that_comes_too_late_releases_nothing_and_a_retry_asks_again(cloud: Cloud) -> None:
    run_id = await suspended(approval_seconds=1)
    await asyncio.sleep(1.1)
    assert (await answer(run_id, "approve", "lisi")).status != "ACCEPT"
    async with asyncio.timeout(30):
        await _in_state(run_id, StateType.FAILED)
    assert await inputs(run_id, "suspended-release-1-response") == {}
    async with get_client() as client:  # time enough for the answer to the second question
        await client.update_flow_run(run_id, parameters={**ASKED, "approval_seconds": 600})
    with pytest.raises(Pause):
        await retried(run_id)
    await answer(run_id, "approve", "lisi")
    assert (await begun(run_id)).outcome is Outcome.RELEASED
    assert len(cloud.record) == 2


@pytest.mark.usefixtures("prefect_api")
async def test_a_suspended_release_can_be_cancelled(cloud: Cloud) -> None:
    run_id = await suspended()
    async with get_client() as client:
        await client.set_flow_run_state(run_id, Cancelling())
    assert (await read(run_id)).state_type is StateType.CANCELLED
    assert (await answer(run_id, "approve", "lisi")).status == "ABORT"
    assert cloud.record == []


@pytest.mark.usefixtures("prefect_api")
async def test_a_retry_after_the_approval_does_not_ask_again(cloud: Cloud) -> None:
    cloud.faults({"call": "publish", "kind": "status", "status": 400})
    run_id = await suspended()
    await answer(run_id, "approve", "lisi")
    with pytest.raises(RolloutError):
        await begun(run_id)
    cloud.faults()
    result = await retried(run_id)
    assert (result.outcome, result.approved_by) == (Outcome.RELEASED, "lisi")
    assert cloud.writes == ["template 1343170", "publish 1343170 to pub-bjwdt"]


@pytest.mark.promise("What was planned is what is done")
@pytest.mark.usefixtures("prefect_api")
async def test_what_changed_while_somebody_thought_it_over_is_not_what_was_approved(cloud: Cloud) -> None:
    run_id = await suspended()
    await deploy_latest_image(**HOME, lock_wait_seconds=0)  # nothing holds the deployment meanwhile
    await answer(run_id, "approve", "lisi")
    for attempt in (begun, retried):
        with pytest.raises(PlanChangedError, match=r"and [0-9a-f]{16} was expected"):
            await attempt(run_id)
    assert cloud.writes == ["template 1343170", "publish 1343170 to pub-bjwdt"]


@pytest.mark.usefixtures("prefect_api")
async def test_a_tag_that_moved_while_somebody_thought_it_over_is_not_released(
    make_cloud: Any, registry: Registry
) -> None:
    cloud: Cloud = make_cloud(**shop(1, image=f"{registry.host}/shop/web:1.2.0"))
    run_id = await suspended(app_id=1, deployment="web", check_images="auto")
    moved = registry.put("shop/web", image(text="moved"), "1.2.0")
    await answer(run_id, "approve", "lisi")
    with pytest.raises(PlanChangedError, match=f"web is {moved[:19]}"):
        await begun(run_id)
    assert cloud.record == []


@pytest.mark.usefixtures("prefect_api")
async def test_nobody_is_asked_about_a_plan_that_was_not_expected(cloud: Cloud) -> None:
    run = await created(expect_plan="0" * 16)
    with pytest.raises(PlanChangedError):
        await begun(run.id)
    assert await inputs(run.id, "suspended-") == {}
    assert cloud.record == []


@pytest.mark.usefixtures("prefect_api")
async def test_a_dry_run_asks_nobody(cloud: Cloud) -> None:
    result = await deploy_latest_image(**ASKED, dry_run=True)
    assert result.outcome is Outcome.PLANNED
    assert cloud.record == []


@pytest.mark.usefixtures("prefect_api")
async def test_no_heartbeat_follows_a_suspension(cloud: Cloud) -> None:
    run_id = await suspended()
    wanted = EventFilter(resource=EventResourceFilter(id=[f"prefect.flow-run.{run_id}"]))
    async with asyncio.timeout(30), get_client() as client:
        while True:
            events = (await client.read_events(wanted, limit=50)).events
            names = [event.event for event in sorted(events, key=lambda event: event.occurred)]
            if "prefect.flow-run.Suspended" in names:
                break
            await asyncio.sleep(0.1)
    # The automation that finds killed releases waits from one heartbeat for the next.
    assert HEARTBEAT in names
    assert HEARTBEAT not in names[names.index("prefect.flow-run.Suspended") :]
    assert cloud.record == []


@pytest.mark.usefixtures("prefect_api")
async def test_an_approved_release_goes_on_only_where_it_sees_what_was_approved(
    cloud: Cloud, tmp_path: Path
) -> None:
    run_id = await suspended()
    await answer(run_id, "approve", "lisi")
    elsewhere = temporary_settings({PREFECT_LOCAL_STORAGE_PATH: tmp_path / "another machine"})
    with elsewhere, pytest.raises(ConfigurationError, match=socket.gethostname()):
        await begun(run_id)
    assert cloud.record == []


# ---- a run of this process ----------------------------------------------------------------------


@pytest.mark.usefixtures("prefect_api")
async def test_a_release_of_no_prefect_deployment_waits_in_its_process(
    cloud: Cloud, caplog: pytest.LogCaptureFixture
) -> None:
    release, run_id = await waiting_here()
    await asyncio.sleep(1)  # the guard looks at the run while it is paused
    assert (await answer(run_id, "approve", "zhangsan")).status == "ACCEPT"
    async with asyncio.timeout(30):
        while not await inputs(run_id, "paused-release-2-schema"):  # noqa: ASYNC110 - by the release
            await asyncio.sleep(0.1)
    await answer(run_id, "approve", "lisi", "fine")
    result = await release
    assert (result.outcome, result.approved_by, result.approval_comment) == (Outcome.RELEASED, "lisi", "fine")
    assert len(cloud.record) == 2
    assert [entry.message for entry in caplog.records if "Not sure" in entry.message] == []


@pytest.mark.usefixtures("prefect_api")
async def test_a_release_that_waits_in_its_process_can_be_cancelled(cloud: Cloud) -> None:
    release, run_id = await waiting_here()
    async with get_client() as client:
        await client.set_flow_run_state(run_id, Cancelling())
    with pytest.raises(ReleaseCancelledError, match="cancelled in Prefect"):
        await asyncio.wait_for(release, 30)
    assert (await read(run_id)).state_type is StateType.CANCELLED
    assert cloud.record == []


@pytest.mark.usefixtures("prefect_api")
async def test_a_release_that_nobody_approves_in_time_fails(cloud: Cloud) -> None:
    with pytest.raises(NotApprovedError, match="nobody approved it within 1 s") as caught:
        await deploy_latest_image(**ASKED, approval_seconds=1)
    assert caught.value.result is not None
    assert caught.value.result.outcome is Outcome.FAILED
    assert (await read(UUID(caught.value.result.release_id))).state_type is StateType.FAILED
    assert cloud.record == []


@pytest.mark.usefixtures("prefect_api")
async def test_a_run_that_is_gone_on_with_here_waits_here(cloud: Cloud) -> None:
    run_id = await suspended()
    async with get_client() as client:
        await client.set_flow_run_state(run_id, Cancelling())
    retry = asyncio.create_task(resume(run_id))
    async with asyncio.timeout(30):
        while not await inputs(run_id, "paused-release-2-schema"):
            assert not retry.done(), retry.result()
            await asyncio.sleep(0.1)
    await answer(run_id, "approve", "lisi")
    state = await asyncio.wait_for(retry, 60)
    assert state.is_completed()
    assert len(cloud.record) == 2


# ---- who cannot ask -----------------------------------------------------------------------------


@pytest.mark.usefixtures("prefect_api")
async def test_a_run_that_another_run_started_asks_nobody(cloud: Cloud) -> None:
    @flow
    async def parent() -> None:
        await deploy_latest_image(**ASKED)

    with pytest.raises(InputError, match="approval: a run that another flow run started"):
        await parent()
    assert [seen["call"] for seen in cloud.requests] == []


# ---- the question -------------------------------------------------------------------------------


def test_the_question_says_what_changes_where() -> None:
    result = ReleaseResult(
        outcome=Outcome.FAILED, app_id=3290, app="qapm", deployment="qapm-home", release_id="r"
    )
    plan = ReleasePlan(
        action=Action.DEPLOY,
        plan_hash="0123456789abcdef",
        app_id=3290,
        deployment="qapm-home",
        base_template_id=7,
        clusters=[
            ClusterPlan(
                cluster="a",
                template_before=5,
                images_before={"home": "r/home:1"},
                images={"home": "r/home:2"},
                pods=2,
                replicas=2,
                changes=[],
            )
        ],
    )
    request = ReleaseRequest.of(app_id=3290, deployment="qapm-home", requested_by="zhangsan")
    asked = question(request, result, plan)
    assert asked.startswith("**Release qapm-home** of app qapm (3290)\n\n- **Requested by:** zhangsan\n\n")
    for told in (
        "| a | 5 → ",
        "- **home** before: r/home:1\n",
        "- **home** after: r/home:2\n",
        "`0123456789abcdef`",
    ):
        assert told in asked


def test_a_wait_for_the_lock_after_the_approval_is_told() -> None:
    told: list[str] = []
    with listening(lambda progress: told.append(progress.detail)), silence():
        tell(Progress("parse metadata", "running", "replicas: c1 1"))
        tell(Progress("parse metadata", "running", "waiting for its lock", aloud=True))
    assert told == ["waiting for its lock"]


def test_a_form_that_prefect_let_through_is_still_read_with_care() -> None:
    decision = Decision(decision="approve", name="\x1b[31mlisi\n", comment="")
    assert decision.name == "�[31mlisi"
