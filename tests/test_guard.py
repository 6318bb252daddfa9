"""One release at a time, and cancelling: real Prefect server, simulated clouds over real sockets."""

import asyncio
import socket
import time
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import prefect.runtime
import pytest
from prefect import get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate, GlobalConcurrencyLimitUpdate
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterTags,
)
from prefect.client.schemas.objects import FlowRun
from prefect.events.actions import ChangeFlowRunState
from prefect.exceptions import Abort
from prefect.filesystems import LocalFileSystem
from prefect.flow_engine import run_flow_async
from prefect.settings import (
    PREFECT_DEFAULT_RESULT_STORAGE_BLOCK,
    PREFECT_LOCAL_STORAGE_PATH,
    temporary_settings,
)
from prefect.states import AwaitingRetry, Cancelled, Cancelling, Crashed

from prefect_rollout.errors import (
    ConfigurationError,
    ConflictError,
    LockedError,
    LockLostError,
    RejectedError,
    ReleaseCancelledError,
    RolloutError,
)
from prefect_rollout.flows import deploy_latest_image
from prefect_rollout.platforms.http import host_of
from prefect_rollout.release.progress import Progress, listening
from prefect_rollout.release.result import Outcome
from prefect_rollout.runs import guard, heartbeat, lock, zombies
from prefect_rollout.runs.lock import lock_name
from support import Cloud

pytestmark = pytest.mark.usefixtures("prefect_api")
FAST: dict[str, Any] = {"app_id": 3290, "poll_seconds": 0.1, "poll_attempts": 200}
# It lasts until somebody ends it.
SLOW: dict[str, Any] = {**FAST, "deployment": "never-ready", "poll_seconds": 0.5, "poll_attempts": 1000}


@pytest.fixture(autouse=True)
def _quick_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have guards look at their runs more often than every 3 s."""
    monkeypatch.setattr(heartbeat, "_TICK_SECONDS", 0.3)


async def until(cloud: Cloud, call: str, number: int = 1) -> None:
    """Waits until the cloud has seen so many requests of a kind."""
    for _ in range(600):
        if len([seen for seen in cloud.requests if seen["call"] == call]) >= number:
            return
        await asyncio.sleep(0.05)
    raise AssertionError(f"the cloud has not seen {number} of {call}")


async def run_of(deployment: str, tag: str) -> FlowRun:
    """The newest flow run of a deployment that is tagged so."""
    async with get_client() as client:
        runs = await client.read_flow_runs(
            flow_filter=FlowFilter(name=FlowFilterName(any_=["deploy-latest-image"])),
            flow_run_filter=FlowRunFilter(tags=FlowRunFilterTags(all_=[f"deployment:{deployment}", tag])),
        )
    return max(runs, key=lambda run: run.created or 0)


async def report_of(run_id: UUID) -> str:
    async with get_client() as client:
        artifacts = await client.read_artifacts(
            artifact_filter=ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run_id]))
        )
    return "\n".join(str(artifact.data) for artifact in artifacts if artifact.type == "markdown")


async def set_state(run_id: UUID, state: Any) -> None:
    async with get_client() as client:
        await client.set_flow_run_state(run_id, state, force=True)


async def end(release: asyncio.Task[Any]) -> BaseException:
    with pytest.raises(BaseException) as caught:  # noqa: PT011 - the caller looks at its type
        await asyncio.wait_for(release, 30)
    return caught.value


# ---- the lock -----------------------------------------------------------------------------------


@pytest.mark.promise("One release at a time")
async def test_a_second_release_of_a_deployment_is_refused_and_told_who_holds_it(cloud: Cloud) -> None:
    first = asyncio.create_task(deploy_latest_image(**SLOW))
    await until(cloud, "publish")
    holder = await run_of("never-ready", "app:3290")
    with pytest.raises(LockedError) as caught:
        await deploy_latest_image(**{**SLOW, "lock_wait_seconds": 0})
    assert str(holder.id) in str(caught.value)
    assert "since 20" in str(caught.value)
    assert len(cloud.record) == 2  # the first one's
    await set_state(holder.id, Cancelling())
    assert isinstance(await end(first), ReleaseCancelledError)


async def test_another_deployment_and_another_cluster_are_not_held_up(cloud: Cloud) -> None:
    first = asyncio.create_task(deploy_latest_image(**SLOW))
    await until(cloud, "publish")
    quick: dict[str, Any] = {
        "app_id": 3290,
        "poll_seconds": 0.1,
        "poll_attempts": 100,
        "lock_wait_seconds": 0,
    }
    await deploy_latest_image(deployment="qapm-home", **quick)
    await deploy_latest_image(deployment="qapm-api", clusters=["pub-bjwdt"], **quick)
    assert not first.done()
    await set_state((await run_of("never-ready", "app:3290")).id, Cancelling())
    await end(first)


@pytest.mark.promise("One release at a time")
async def test_a_second_release_waits_for_the_first_and_then_runs(make_cloud: Any) -> None:
    cloud = make_cloud(speed=5)
    home: dict[str, Any] = {
        "app_id": 3290,
        "deployment": "qapm-home",
        "poll_seconds": 0.1,
        "poll_attempts": 200,
    }
    first = asyncio.create_task(deploy_latest_image(**home))
    await until(cloud, "publish")
    second = asyncio.create_task(deploy_latest_image(**home))
    one, two = await asyncio.gather(first, second)
    assert (one.outcome, two.outcome) == (Outcome.RELEASED, Outcome.RELEASED)
    assert [(entry["kind"], entry["template"]) for entry in cloud.record] == [
        ("template", 1343170),
        ("publish", 1343170),
        ("template", 1343171),
        ("publish", 1343171),
    ]
    assert two.clusters[0].template_before == 1343170


async def test_a_crashed_holder_frees_the_lock_at_once_and_cannot_write_any_more(make_cloud: Any) -> None:
    cloud = make_cloud(faults=[{"call": "publish", "nth": 1, "kind": "delay", "seconds": 25}])
    api: dict[str, Any] = {
        "app_id": 3290,
        "deployment": "qapm-api",
        "poll_seconds": 0.1,
        "poll_attempts": 100,
    }
    zombie = asyncio.create_task(deploy_latest_image(**api))
    # Given up for dead while it only hangs in its first publish.
    await until(cloud, "publish")
    await set_state((await run_of("qapm-api", "app:3290")).id, Crashed())
    heir = await deploy_latest_image(**api, lock_wait_seconds=20)
    assert heir.outcome is Outcome.RELEASED
    cloud.faults()
    failure = await end(zombie)
    assert isinstance(failure, LockLostError | ConflictError | Abort)
    published = [(e["template"], e["cluster"]) for e in cloud.record if e["kind"] == "publish"]
    assert (1343170, "pub-bjyt") not in published


async def test_a_release_that_was_given_up_and_lives_goes_on(make_cloud: Any) -> None:
    cloud = make_cloud(faults=[{"call": "publish", "nth": 1, "kind": "delay", "seconds": 25}])
    api: dict[str, Any] = {**FAST, "deployment": "qapm-api"}
    release = asyncio.create_task(deploy_latest_image(**api))
    await until(cloud, "publish")
    run = await run_of("qapm-api", "app:3290")
    (action,) = zombies.automation(within_seconds=90).actions
    assert isinstance(action, ChangeFlowRunState)
    await set_state(run.id, Crashed(message=action.message))  # its heartbeats were seen too late
    cloud.faults()
    result = await asyncio.wait_for(release, 60)
    assert result.outcome is Outcome.RELEASED
    async with get_client() as client:
        ended = await client.read_flow_run(run.id)
    assert ended.state is not None
    assert ended.state.is_completed()
    assert cloud.writes == [
        "template 1343170",
        "publish 1343170 to pub-bjwdt",
        "publish 1343170 to pub-bjyt",
    ]


@pytest.mark.promise("One release at a time")
async def test_a_lost_lease_stops_the_release_before_its_next_write(make_cloud: Any) -> None:
    cloud = make_cloud(faults=[{"call": "templates", "nth": 1, "kind": "delay", "seconds": 25}])
    release = asyncio.create_task(
        deploy_latest_image(app_id=3290, deployment="qapm-home", poll_seconds=0.1, poll_attempts=50)
    )
    await until(cloud, "templates")
    run = await run_of("qapm-home", "app:3290")
    async with get_client() as client:
        labels = (await client.read_flow_run(run.id)).labels
        await client.release_concurrency_slots_with_lease(UUID(str(labels["rollout.lease"])))
    cloud.faults()
    failure = await end(release)
    assert isinstance(failure, LockLostError)
    assert "lost its lock" in str(failure)
    assert cloud.record == []


@pytest.mark.promise("One release at a time")
async def test_a_zombie_leaves_its_successors_run_alone(make_cloud: Any) -> None:
    cloud = make_cloud(faults=[{"call": "publish", "nth": 1, "kind": "delay", "seconds": 25}])
    api: dict[str, Any] = {**FAST, "deployment": "qapm-api", "on_failure": "rollback"}
    zombie = asyncio.create_task(deploy_latest_image(**api))
    await until(cloud, "publish")
    run = await run_of("qapm-api", "app:3290")
    await set_state(run.id, Crashed())
    heir = await again(str(run.id), api)
    assert heir.outcome is Outcome.RELEASED
    cloud.faults()
    assert isinstance(await end(zombie), Abort)
    assert cloud.writes == [
        "template 1343170",
        "publish 1343170 to pub-bjwdt",
        "publish 1343170 to pub-bjyt",
    ]
    async with get_client() as client:
        ended = await client.read_flow_run(run.id)
    assert ended.state is not None
    assert ended.state.is_completed()
    assert "ROLLBACK" not in await report_of(run.id)


async def test_a_limit_that_does_not_admit_one_at_a_time_is_named(cloud: Cloud) -> None:
    home: dict[str, Any] = {**FAST, "deployment": "qapm-home"}
    name = lock_name(host_of(cloud.url), 3290, "qapm-home", "pub-bjwdt")
    right = {"limit": 1, "active": True, "active_slots": 0}
    async with get_client() as client:
        await client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=name, limit=1))
        for change in ({"limit": 0}, {"limit": 2}, {"active": False}):
            await client.update_global_concurrency_limit(
                name, GlobalConcurrencyLimitUpdate(**{**right, **change})
            )
            with pytest.raises(ConfigurationError, match=name):
                await deploy_latest_image(**home)
        await client.update_global_concurrency_limit(name, GlobalConcurrencyLimitUpdate(**right))
    assert cloud.record == []
    assert (await deploy_latest_image(**home)).outcome is Outcome.RELEASED


async def test_a_lease_is_renewed_by_its_own_length_however_long_the_next_are(
    cloud: Cloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = asyncio.create_task(deploy_latest_image(**SLOW))
    await until(cloud, "status", 3)
    (holder,) = guard._running
    monkeypatch.setattr(lock, "LEASE_SECONDS", 300.0)  # as where hundreds have joined it since
    assert holder._lock._renew_at <= time.monotonic() + 60 / 4
    holder._lock._renew_at = 0
    await holder.check(None, time.monotonic())
    assert time.monotonic() + 60 < holder._lock._renew_at <= time.monotonic() + 300 / 4
    assert guard.cancel_all("enough")
    assert isinstance(await end(release), ReleaseCancelledError)


async def test_an_answer_older_than_the_lock_is_no_sign_of_another_process(
    cloud: Cloud, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    send = httpx.AsyncHTTPTransport.handle_async_request

    async def late(transport: httpx.AsyncHTTPTransport, request: httpx.Request) -> httpx.Response:
        answer = await send(transport, request)
        if request.url.path.endswith("/flow_runs/filter"):
            await answer.aread()
            await asyncio.sleep(0.5)
        return answer

    monkeypatch.setattr(httpx.AsyncHTTPTransport, "handle_async_request", late)
    result = await deploy_latest_image(**FAST, deployment="qapm-home")
    assert result.outcome is Outcome.RELEASED
    assert [entry.message for entry in caplog.records if "cannot be confirmed" in entry.message] == []


# ---- cancel -------------------------------------------------------------------------------------


@pytest.mark.promise("A cancel stops before the next write")
@pytest.mark.parametrize("state", [Cancelling, Cancelled])
async def test_a_cancelled_release_stops_and_says_what_is_live(cloud: Cloud, state: Any) -> None:
    release = asyncio.create_task(deploy_latest_image(**SLOW))
    await until(cloud, "status", 3)
    run = await run_of("never-ready", "app:3290")
    await set_state(run.id, state())
    failure = await end(release)
    assert isinstance(failure, ReleaseCancelledError)
    assert failure.result is not None
    assert failure.result.outcome is Outcome.CANCELLED
    async with get_client() as client:
        ended = await client.read_flow_run(run.id)
    assert ended.state is not None
    assert ended.state.is_cancelled()
    assert "pub-bjwdt has template 1343170 online" in (ended.state.message or "")
    left = "template 1343170 was published to pub-bjwdt, and the cloud continues with it"
    assert f"cancelled in Prefect: {left}. Roll back to undo it." in (ended.state.message or "")
    report = await report_of(run.id)
    assert "was cancelled" in report
    assert left in report
    # The lock is free.
    with pytest.raises(BaseException, match="after"):
        await deploy_latest_image(**{**SLOW, "lock_wait_seconds": 0, "poll_attempts": 2})


@pytest.mark.promise("A cancel stops before the next write")
async def test_a_release_cancelled_before_a_write_writes_nothing(make_cloud: Any) -> None:
    cloud = make_cloud(faults=[{"call": "templates", "nth": 1, "kind": "delay", "seconds": 25}])
    release = asyncio.create_task(deploy_latest_image(**SLOW))
    await until(cloud, "templates")
    run = await run_of("never-ready", "app:3290")
    await set_state(run.id, Cancelling())
    cloud.faults()
    assert isinstance(await end(release), ReleaseCancelledError)
    assert cloud.record == []
    async with get_client() as client:
        ended = await client.read_flow_run(run.id)
    assert ended.state is not None
    assert "no cluster was written to" in (ended.state.message or "")
    assert "cancelled in Prefect: nothing was written." in (ended.state.message or "")


@pytest.mark.promise("A cancel stops before the next write")
async def test_a_write_that_is_on_its_way_is_heard_out_before_the_end(make_cloud: Any) -> None:
    cloud = make_cloud(faults=[{"call": "publish", "nth": 1, "kind": "delay", "seconds": 25}])
    release = asyncio.create_task(deploy_latest_image(**SLOW))
    await until(cloud, "publish")  # it is being answered
    assert guard.cancel_all("Ctrl-C")
    cloud.faults()
    failure = await end(release)
    assert isinstance(failure, ReleaseCancelledError)
    assert failure.result is not None
    (cluster,) = failure.result.clusters
    assert (cluster.published, cluster.online) == (True, 1343170)
    assert cloud.writes == ["template 1343170", "publish 1343170 to pub-bjwdt"]


async def test_a_write_that_was_never_answered_is_told_as_unknown_and_keeps_the_lock(make_cloud: Any) -> None:
    cloud = make_cloud(faults=[{"call": "publish", "nth": 1, "kind": "never", "takes_effect": False}])
    release = asyncio.create_task(deploy_latest_image(**SLOW))
    await until(cloud, "publish")
    assert guard.cancel_all("Ctrl-C")
    failure = await end(release)
    assert isinstance(failure, ReleaseCancelledError)
    assert failure.result is not None
    assert failure.result.clusters[0].published is None
    with pytest.raises(LockedError):
        await deploy_latest_image(**{**SLOW, "lock_wait_seconds": 0})


async def test_ctrl_c_cancels_every_release_of_the_process(cloud: Cloud) -> None:
    release = asyncio.create_task(deploy_latest_image(**SLOW))
    await until(cloud, "status", 3)
    assert guard.cancel_all("Ctrl-C")
    assert isinstance(await end(release), ReleaseCancelledError)
    assert not guard.cancel_all("Ctrl-C")


@pytest.mark.promise("A cancel stops before the next write")
@pytest.mark.parametrize(
    ("deployment", "last", "outcome", "says", "left"),
    [
        (
            "qapm-home",
            ("wait for pods", "done"),
            Outcome.RELEASED,
            "the cancel arrived after the release finished",
            "template 1343170 was published to pub-bjwdt, and it stays. Roll back to undo it.",
        ),
        (
            "no-quota",
            ("publish deployment", "failed"),
            Outcome.FAILED,
            "配额不足",
            "the run was also cancelled: nothing was published; template 1343170 was created",
        ),
    ],
)
async def test_a_cancel_that_comes_too_late_leaves_the_run_cancelled_and_the_truth_told(
    cloud: Cloud, deployment: str, last: tuple[str, str], outcome: Outcome, says: str, left: str
) -> None:
    def cancel(progress: Progress) -> None:
        if (progress.step, progress.state) == last:
            with get_client(sync_client=True) as client:
                client.set_flow_run_state(prefect.runtime.flow_run.id, Cancelling())

    with listening(cancel), pytest.raises(RolloutError, match=says) as caught:
        await deploy_latest_image(**{**FAST, "deployment": deployment})
    assert caught.value.result is not None
    assert caught.value.result.outcome is outcome
    async with get_client() as client:
        ended = await client.read_flow_run(UUID(caught.value.result.release_id))
    assert ended.state is not None
    assert ended.state.is_cancelled()
    assert left in (ended.state.message or "")
    assert left.split(". ", maxsplit=1)[0] in (await report_of(ended.id)).replace("\\", "")


@pytest.mark.promise("A cancel stops before the next write")
async def test_a_cancel_does_not_hide_the_error_that_ended_the_run_before_it(cloud: Cloud) -> None:
    def cancel(progress: Progress) -> None:
        if progress.state == "failed":
            asyncio.get_running_loop().call_soon(guard.cancel_all, "Ctrl-C")

    with listening(cancel), pytest.raises(RolloutError, match="配额不足") as caught:
        await deploy_latest_image(**{**FAST, "deployment": "no-quota"})
    assert caught.value.result is not None
    assert caught.value.result.outcome is Outcome.FAILED


# ---- results ------------------------------------------------------------------------------------


async def again(run_id: str, parameters: dict[str, Any]) -> Any:
    """Retries a flow run in this process, as if a worker had picked it up."""
    async with get_client() as client:
        await client.set_flow_run_state(UUID(run_id), AwaitingRetry(), force=True)
        run = await client.read_flow_run(UUID(run_id))
    return await run_flow_async(deploy_latest_image, flow_run=run, parameters=parameters)


async def test_a_retry_where_the_results_are_out_of_reach_is_refused(cloud: Cloud, tmp_path: Path) -> None:
    home: dict[str, Any] = {**FAST, "deployment": "qapm-home"}
    cloud.faults({"call": "publish", "kind": "status", "status": 400})
    with pytest.raises(RejectedError) as first:
        await deploy_latest_image(**home)
    assert first.value.result is not None
    cloud.faults()
    seen = len(cloud.requests)
    elsewhere = {PREFECT_LOCAL_STORAGE_PATH: tmp_path / "another machine"}
    with temporary_settings(elsewhere), pytest.raises(ConfigurationError) as second:
        await again(first.value.result.release_id, home)
    assert socket.gethostname() in str(second.value)
    assert "PREFECT_DEFAULT_RESULT_STORAGE_BLOCK" in str(second.value)
    assert len(cloud.requests) == seen
    third = await again(first.value.result.release_id, home)
    assert third.outcome is Outcome.RELEASED
    assert len(cloud.record) == 2


async def test_a_storage_block_that_machines_share_keeps_the_results(cloud: Cloud, tmp_path: Path) -> None:
    await LocalFileSystem(basepath=str(tmp_path / "shared")).asave("shared", overwrite=True)
    home: dict[str, Any] = {**FAST, "deployment": "qapm-home"}
    cloud.faults({"call": "publish", "kind": "status", "status": 400})
    shared = {PREFECT_DEFAULT_RESULT_STORAGE_BLOCK: "local-file-system/shared"}
    one = {**shared, PREFECT_LOCAL_STORAGE_PATH: tmp_path / "one"}
    with temporary_settings(one), pytest.raises(RejectedError) as first:
        await deploy_latest_image(**home)
    cloud.faults()
    assert first.value.result is not None
    with temporary_settings({**shared, PREFECT_LOCAL_STORAGE_PATH: tmp_path / "two"}):
        await again(first.value.result.release_id, home)
    assert [entry["kind"] for entry in cloud.record] == ["template", "publish"]


async def test_a_storage_that_cannot_be_written_is_named_before_anything_is_asked(
    cloud: Cloud, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("no folder")
    unusable = temporary_settings({PREFECT_LOCAL_STORAGE_PATH: tmp_path / "file"})
    with unusable, pytest.raises(ConfigurationError, match="results cannot be stored"):
        await deploy_latest_image(**FAST, deployment="qapm-home")
    assert cloud.requests == []


# ---- names --------------------------------------------------------------------------------------


def test_a_locks_name_holds_nothing_that_prefect_refuses() -> None:
    name = lock_name("k8s.example:8443", 3290, "a/b%c&<d>", "pub-bjwdt")
    assert name == "release:k8s.example:8443:3290:a_b_c__d_:pub-bjwdt"
