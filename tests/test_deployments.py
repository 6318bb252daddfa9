"""`prefect.yaml`, as an operator applies it: init, a process worker, a run from the API."""

import os
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

import httpx
import pytest
import yaml
from prefect import flow, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    LogFilter,
    LogFilterFlowRunId,
)
from prefect.client.schemas.objects import StateType
from prefect.deployments import arun_deployment
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import AwaitingRetry, Cancelling, Pending
from prefect.types.entrypoint import EntrypointType

import forked
from prefect_rollout.execution.worker import RolloutWorker, _heartbeats
from prefect_rollout.flows import deploy_latest_image
from prefect_rollout.release.result import ReleaseResult
from prefect_rollout.runs import zombies
from support import BIN, Cloud, eventually, kill_tree, served, worker
from tap import tapped


@flow
async def somebody_elses() -> None:
    """A flow that is none of ours."""


ROOT = Path(__file__).parent.parent


def test_every_key_is_one_that_prefect_knows() -> None:
    # Prefect ignores keys that it does not know, so a misspelt one would be missing without a word.
    known = {"name", "description", "entrypoint", "pull", "tags", "parameters", "work_pool", "schedules"}
    for deployment in yaml.safe_load((ROOT / "prefect.yaml").read_text(encoding="utf-8"))["deployments"]:
        assert set(deployment) <= known
        assert deployment["pull"] == []


# Of a cloud whose pods become ready when the test says so.
SLOWEST = 0.01


@pytest.fixture(scope="module")
def applied(prefect_server: str) -> None:
    """Set up the server, as an operator does."""
    command = [BIN / "prefect-rollout", "init", "--type", "process"]
    ended = forked.run(command, {**os.environ, "PREFECT_API_URL": prefect_server})
    assert ended.returncode == 0, ended.stderr


@pytest.mark.usefixtures("applied")
async def test_the_deployment_is_applied(prefect_api: str) -> None:
    async with get_client() as client:
        deployment = await client.read_deployment_by_name("deploy-latest-image/deploy-latest-image")
    assert deployment.pull_steps == []
    assert deployment.work_pool_name == "rollout"
    (schedule,) = deployment.schedules
    assert not schedule.active
    properties = (deployment.parameter_openapi_schema or {})["properties"]
    assert [name for name, field in properties.items() if not field["description"].endswith(".")] == []


@pytest.mark.usefixtures("applied")
@pytest.mark.parametrize(("runner", "name"), [(worker, "deploy-latest-image"), (served, "served")])
async def test_a_release_that_is_cancelled_in_the_ui_stops_before_its_next_write_and_the_next_one_is_done(
    make_cloud: Any, prefect_api: str, tmp_path: Path, runner: Any, name: str
) -> None:
    cloud = make_cloud(SLOWEST)
    parameters: dict[str, Any] = {
        "app_id": 3290,
        "deployment": "qapm-api",
        "poll_seconds": 0.2,
        "poll_attempts": 1000,
    }
    process = runner(prefect_api, tmp_path, cloud.environment)
    try:
        async with get_client() as client:

            async def started(**more: Any) -> UUID:
                asked = {**parameters, **more}
                return (await arun_deployment(f"deploy-latest-image/{name}", parameters=asked, timeout=0)).id

            await eventually(lambda: _deployed(client, f"deploy-latest-image/{name}"))
            cancelled = await started(order="one-by-one")
            await eventually(lambda: _published(cloud), 120)
            # What the UI's Cancel and `prefect flow-run cancel` do.
            await client.set_flow_run_state(cancelled, Cancelling())
            await eventually(lambda: _ended(client, cancelled))
            # The lock is free at once, and the old run writes nothing more.
            released = await started(lock_wait_seconds=0)
            await eventually(lambda: _published(cloud, 3), 120)
            cloud.inside.advance(60)
            await eventually(lambda: _ended(client, released))

            first = (await client.read_flow_run(cancelled)).state
            assert first is not None
            assert first.is_cancelled(), first
            artifacts = await client.read_artifacts(
                artifact_filter=ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[cancelled]))
            )
            (report,) = [str(artifact.data) for artifact in artifacts if artifact.type == "markdown"]
            assert "qapm-api was cancelled" in report
            assert "1343170," in report  # what pub-bjwdt had online by then
            second = (await client.read_flow_run(released)).state
            assert second is not None
            assert second.is_completed(), second.message
            result = await second.aresult()
    finally:
        kill_tree(process.pid)
    assert isinstance(result, ReleaseResult)
    assert (result.outcome, result.template_id) == ("released", 1343171)
    assert [(entry["template"], entry["cluster"]) for entry in cloud.record] == [
        (1343170, None),
        (1343170, "pub-bjwdt"),
        (1343171, None),
        (1343171, "pub-bjwdt"),
        (1343171, "pub-bjyt"),
    ]


async def warm_pool() -> list[str]:
    """Make a pool of the type `rollout`, and deployments for it of a flow of ours and of another one."""
    async with get_client() as client:
        pool = WorkPoolCreate(
            name="warm", type="rollout", base_job_template=RolloutWorker.get_default_base_job_template()
        )
        await client.create_work_pool(pool, overwrite=True)
    names = []
    for each in (deploy_latest_image, somebody_elses):
        deployment = await each.ato_deployment(
            "warm", work_pool_name="warm", entrypoint_type=EntrypointType.MODULE_PATH
        )
        await deployment.aapply()
        names.append(f"{each.name}/warm")
    return names


async def test_a_worker_of_our_own_type_runs_nothing_but_releases_and_leaves_them_to_the_next_one(
    make_cloud: Any, prefect_api: str, tmp_path: Path
) -> None:
    cloud = make_cloud(SLOWEST)
    ours, others = await warm_pool()
    asked = {"app_id": 3290, "deployment": "qapm-home", "poll_seconds": 0.2, "poll_attempts": 1000}
    first = worker(prefect_api, tmp_path, cloud.environment, pool="warm")
    run = await arun_deployment(ours, parameters=asked, timeout=0)
    try:
        await eventually(lambda: _published(cloud))
    finally:
        first.terminate()
    async with get_client() as client:
        await eventually(lambda: _ended(client, run.id))
        state = (await client.read_flow_run(run.id)).state
        assert state is not None
        # Not for lack of heartbeats, which would take a minute and a half.
        logs = await client.read_logs(LogFilter(flow_run_id=LogFilterFlowRunId(any_=[run.id])))
        assert state.is_crashed(), (state, [log.message for log in logs])
        assert "No sign of life" not in str(state.message)
        assert first.wait(180) is not None
        artifacts = await client.read_artifacts(
            artifact_filter=ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run.id]))
        )
        # It said what it leaves behind.
        assert ["1343170" in str(artifact.data) for artifact in artifacts if artifact.type == "markdown"] == [
            True
        ]
        cloud.inside.advance(60)
        await client.set_flow_run_state(run.id, AwaitingRetry(), force=True)
        second = worker(prefect_api, tmp_path, cloud.environment, pool="warm")
        try:
            await eventually(lambda: _released(client, run.id))
            other = await arun_deployment(others, timeout=60, poll_interval=0.2)
        finally:
            second.kill()
            second.wait(30)
        run = await client.read_flow_run(run.id)
    assert [entry["kind"] for entry in cloud.record] == ["template", "publish"]
    # In the worker's own process:
    assert str(run.infrastructure_pid).endswith(f" {second.pid}")
    assert run.labels["rollout.process"] == run.infrastructure_pid
    assert other.state is not None
    assert other.state.is_crashed()
    assert "Only deploy-latest-image, " in str(other.state.message)
    assert "not somebody-elses" in str(other.state.message)


class Since:
    """A time span back to a given moment, whichever moment it is subtracted from."""

    def __init__(self, moment: datetime) -> None:
        self.moment = moment

    def __rsub__(self, _: datetime) -> datetime:
        return self.moment


async def test_what_a_killed_worker_had_taken_and_not_begun_is_found_by_another(
    prefect_api: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, _ = await warm_pool()
    async with get_client() as client:
        await zombies.ensure(client)
        deployment = await client.read_deployment_by_name(name)
        asked = {"app_id": 3290, "deployment": "qapm-home"}
        taken, waits = [
            await client.create_flow_run_from_deployment(deployment.id, parameters=asked, state=Pending())
            for _ in range(2)
        ]
        moment = datetime.now(UTC)
        # As if that had been long ago.
        monkeypatch.setattr(zombies, "_BUFFER", Since(moment))
        heard = zombies._heartbeat_since
        mine, others = (zombies.ZombieDetector(client, pool) for pool in ("warm", "another"))
        async with _heartbeats(client, waits.id):  # by the worker that has taken it
            for detector in (mine, others):
                assert await detector.detect(alive=()) == []
            await eventually(partial(heard, client, f"prefect.flow-run.{waits.id}", moment))
            for detector in (mine, others):
                assert detector._sent
                await eventually(partial(heard, client, detector._resource, detector._sent))
            assert await others.detect(alive=()) == []
            killed = {run.id for run in await mine.detect(alive=())}
        assert killed & {taken.id, waits.id} == {taken.id}
        assert (await client.read_flow_run(waits.id)).state_type is StateType.PENDING
        for run in (taken, waits):
            await client.delete_flow_run(run.id)


async def test_a_worker_of_our_own_type_outlives_a_look_for_killed_releases_that_fails(
    prefect_api: str, caplog: pytest.LogCaptureFixture
) -> None:
    await warm_pool()
    api = urlsplit(prefect_api)
    spoilt = tapped(
        f"http://{api.netloc}", lambda path, body: b'{"x": 1}' if path.endswith("/events/filter") else body
    )
    with spoilt as tap, temporary_settings({PREFECT_API_URL: f"{tap.url}{api.path}"}):
        async with RolloutWorker("warm") as started:
            for _ in range(2):  # the second looks whether the first was recorded
                started._detected_at = -60.0
                await started.sync_with_backend()
    assert "Killed releases could not be detected" in caplog.text


async def _published(cloud: Cloud, times: int = 1) -> bool:
    return [entry["kind"] for entry in cloud.record].count("publish") == times


async def _released(client: Any, run_id: UUID) -> bool:
    state = (await client.read_flow_run(run_id)).state
    return state is not None and state.is_completed()


async def _ended(client: Any, run_id: UUID) -> bool:
    state = (await client.read_flow_run(run_id)).state
    return state is not None and state.is_final()


async def _deployed(client: Any, name: str) -> bool:
    try:
        await client.read_deployment_by_name(name)
    except ObjectNotFound:
        return False
    return True


@pytest.mark.usefixtures("applied")
def test_the_server_takes_only_parameters_that_fit(prefect_server: str) -> None:
    with httpx.Client(base_url=prefect_server, timeout=30) as api:
        found = api.get("/deployments/name/deploy-latest-image/deploy-latest-image")
        refused = api.post(
            f"/deployments/{found.json()['id']}/create_flow_run",
            json={"parameters": {"app_id": 3290, "deployment": "x", "poll_seconds": 0}},
        )
    assert refused.status_code == 409
    assert "poll_seconds" in refused.text
