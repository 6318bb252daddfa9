"""`prefect.yaml`, as an operator applies it: deploy, a process worker, a run from the API."""

import asyncio
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

import httpx
import pytest
import yaml
from prefect import flow, get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId
from prefect.client.schemas.objects import StateType
from prefect.deployments import arun_deployment
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import AwaitingRetry, Cancelling, Pending
from prefect.types.entrypoint import EntrypointType

from prefect_rollout import reaper
from prefect_rollout.flows import deploy_latest_image
from prefect_rollout.models import ReleaseResult
from prefect_rollout.runner import _heard
from prefect_rollout.worker import RolloutWorker
from support import Cloud, eventually, prefect, served, worker
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


async def test_the_deployment_is_applied_and_a_worker_releases_with_it(
    cloud: Cloud, prefect_api: str, tmp_path: Path
) -> None:
    prefect(prefect_api, "work-pool", "create", "rollout", "--type", "process", "--overwrite")
    prefect(prefect_api, "--no-prompt", "deploy", "--all")

    async with get_client() as client:
        deployment = await client.read_deployment_by_name("deploy-latest-image/deploy-latest-image")
    assert deployment.pull_steps == []
    assert deployment.work_pool_name == "rollout"
    (schedule,) = deployment.schedules
    assert not schedule.active
    properties = (deployment.parameter_openapi_schema or {})["properties"]
    assert [name for name, field in properties.items() if not field["description"].endswith(".")] == []

    process = worker(prefect_api, tmp_path, cloud.environment)
    try:
        run = await arun_deployment(
            "deploy-latest-image/deploy-latest-image",
            parameters={"app_id": 3290, "deployment": "qapm-home", "poll_seconds": 0.2},
            timeout=120,
            poll_interval=0.5,
        )
    finally:
        process.terminate()
        process.wait(30)
    assert run.state is not None
    assert run.state.is_completed(), run.state.message
    result = await run.state.aresult()
    assert isinstance(result, ReleaseResult)
    assert (result.outcome, result.template_id) == ("released", 1343170)
    assert len(cloud.record) == 2


@pytest.mark.parametrize(("runner", "name"), [(worker, "deploy-latest-image"), (served, "served")])
async def test_a_release_that_is_cancelled_in_the_ui_stops_before_its_next_write(
    make_cloud: Any, prefect_api: str, tmp_path: Path, runner: Any, name: str
) -> None:
    cloud = make_cloud(speed=1)
    if runner is worker:
        prefect(prefect_api, "work-pool", "create", "rollout", "--type", "process", "--overwrite")
        prefect(prefect_api, "--no-prompt", "deploy", "--all")
    parameters: dict[str, Any] = {
        "app_id": 3290,
        "deployment": "qapm-api",
        "poll_seconds": 0.2,
        "poll_attempts": 1000,
        "order": "one-by-one",
    }
    process = runner(prefect_api, tmp_path, cloud.environment)
    try:
        async with get_client() as client:
            await eventually(lambda: _deployed(client, f"deploy-latest-image/{name}"))
            run = await arun_deployment(f"deploy-latest-image/{name}", parameters=parameters, timeout=0)
            await eventually(lambda: _published(cloud))
            # What the UI's Cancel and `prefect flow-run cancel` do.
            await client.set_flow_run_state(run.id, Cancelling())
            await eventually(lambda: _ended(client, run.id))
            ended = await client.read_flow_run(run.id)
            assert ended.state is not None
            assert ended.state.is_cancelled(), ended.state
            artifacts = await client.read_artifacts(
                artifact_filter=ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run.id]))
            )
        (report,) = [str(artifact.data) for artifact in artifacts if artifact.type == "markdown"]
        assert "qapm-api was cancelled" in report
        assert "1343170," in report  # what pub-bjwdt has online now
        assert [entry["cluster"] for entry in cloud.record] == [None, "pub-bjwdt"]
        # The lock is free at once, and the old run writes nothing more.
        result = await deploy_latest_image(**{**parameters, "order": "together"}, lock_wait_seconds=0)
        assert result.outcome == "released"
        assert [entry["template"] for entry in cloud.record[2:]] == [1343171] * 3
    finally:
        process.terminate()
        process.wait(60)


async def warm_pool(server: str) -> list[str]:
    """A pool of the type `rollout`, and deployments for it of a flow of ours and of another one."""
    prefect(server, "--no-prompt", "work-pool", "create", "warm", "--type", "rollout", "--overwrite")
    names = []
    for each in (deploy_latest_image, somebody_elses):
        deployment = await each.ato_deployment(
            "warm", work_pool_name="warm", entrypoint_type=EntrypointType.MODULE_PATH
        )
        await deployment.aapply()
        names.append(f"{each.name}/warm")
    return names


async def test_a_worker_of_our_own_type_runs_releases_in_its_process_and_nothing_else(
    cloud: Cloud, prefect_api: str, tmp_path: Path
) -> None:
    names = await warm_pool(prefect_api)
    process = worker(prefect_api, tmp_path, cloud.environment, pool="warm")
    try:
        asked = {"app_id": 3290, "deployment": "qapm-home", "poll_seconds": 0.2}
        released = await arun_deployment(names[0], parameters=asked, timeout=120, poll_interval=0.2)
        other = await arun_deployment(names[1], timeout=60, poll_interval=0.2)
    finally:
        process.kill()
        process.wait(30)
    assert released.state is not None
    assert released.state.is_completed(), released.state
    assert len(cloud.record) == 2
    assert str(released.infrastructure_pid).endswith(f" {process.pid}")
    assert released.labels["rollout.process"] == released.infrastructure_pid
    assert other.state is not None
    assert other.state.is_crashed()
    assert "Only deploy-latest-image, " in str(other.state.message)
    assert "not somebody-elses" in str(other.state.message)


async def test_a_worker_of_our_own_type_that_is_told_to_end_leaves_its_release_to_the_next_one(
    make_cloud: Any, prefect_api: str, tmp_path: Path
) -> None:
    cloud = make_cloud(speed=1)
    name, _ = await warm_pool(prefect_api)
    asked = {"app_id": 3290, "deployment": "qapm-home", "poll_seconds": 0.2, "poll_attempts": 1000}
    first = worker(prefect_api, tmp_path, cloud.environment, pool="warm")
    run = await arun_deployment(name, parameters=asked, timeout=0)
    try:
        await eventually(lambda: _published(cloud))
    finally:
        first.terminate()
    async with get_client() as client:
        await eventually(lambda: _ended(client, run.id))
        state = (await client.read_flow_run(run.id)).state
        assert state is not None
        # Not for lack of heartbeats, which would take a minute and a half.
        assert state.is_crashed(), state
        assert "No sign of life" not in str(state.message)
        assert first.wait(60) is not None
        artifacts = await client.read_artifacts(
            artifact_filter=ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run.id]))
        )
        # It said what it leaves behind.
        assert ["1343170" in str(artifact.data) for artifact in artifacts if artifact.type == "markdown"] == [
            True
        ]
        await client.set_flow_run_state(run.id, AwaitingRetry(), force=True)
        second = worker(prefect_api, tmp_path, cloud.environment, pool="warm")
        try:
            await eventually(lambda: _released(client, run.id))
        finally:
            second.kill()
            second.wait(30)
    assert [entry["kind"] for entry in cloud.record] == ["template", "publish"]


async def test_what_a_killed_worker_had_taken_and_not_begun_is_found_by_another(
    prefect_api: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, _ = await warm_pool(prefect_api)
    async with get_client() as client:
        await reaper.ensure(client)
        deployment = await client.read_deployment_by_name(name)
        asked = {"app_id": 3290, "deployment": "qapm-home"}
        taken, waits = [
            await client.create_flow_run_from_deployment(deployment.id, parameters=asked, state=Pending())
            for _ in range(2)
        ]
        moment = datetime.now(UTC)
        await asyncio.sleep(3)
        async with _heard(client, waits.id):  # by the worker that has taken it
            mine, others = (reaper.Lookout(client, pool) for pool in ("warm", "another"))

            async def found() -> bool:
                # As if that had been long ago, and the heartbeats as many.
                monkeypatch.setattr(reaper, "_BUFFER", datetime.now(UTC) - moment - timedelta(seconds=90))
                assert await others.look(spared=()) == []
                killed = await mine.look(spared=())
                if not killed:
                    await asyncio.sleep(7)  # the server records events every five seconds
                return [run.id for run in killed] == [taken.id]

            await eventually(found)
        assert (await client.read_flow_run(waits.id)).state_type is StateType.PENDING
        for run in (taken, waits):
            await client.delete_flow_run(run.id)


async def test_a_worker_of_our_own_type_outlives_a_look_for_killed_releases_that_fails(
    prefect_api: str, caplog: pytest.LogCaptureFixture
) -> None:
    await warm_pool(prefect_api)
    api = urlsplit(prefect_api)
    spoilt = tapped(
        f"http://{api.netloc}", lambda path, body: b'{"x": 1}' if path.endswith("/events/filter") else body
    )
    with spoilt as tap, temporary_settings({PREFECT_API_URL: f"{tap.url}{api.path}"}):
        async with RolloutWorker("warm") as started:
            for _ in range(2):  # the second looks whether the first was recorded
                started._looked = -60.0
                await started.sync_with_backend()
    assert "Could not look for releases that were killed" in caplog.text


async def _published(cloud: Cloud) -> bool:
    return any(entry["kind"] == "publish" for entry in cloud.record)


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


def test_the_server_takes_only_parameters_that_fit(prefect_server: str) -> None:
    with httpx.Client(base_url=prefect_server, timeout=30) as api:
        until = time.monotonic() + 30
        while not (found := api.get("/deployments/name/deploy-latest-image/deploy-latest-image")).is_success:
            prefect(prefect_server, "work-pool", "create", "rollout", "--type", "process", "--overwrite")
            prefect(prefect_server, "--no-prompt", "deploy", "--all")
            assert time.monotonic() < until
        refused = api.post(
            f"/deployments/{found.json()['id']}/create_flow_run",
            json={"parameters": {"app_id": 3290, "deployment": "x", "poll_seconds": 0}},
        )
    assert refused.status_code == 409
    assert "poll_seconds" in refused.text
