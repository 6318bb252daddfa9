"""`prefect.yaml`, as an operator applies it: deploy, a process worker, a run from the API."""

import os
import subprocess
import time
from pathlib import Path

import httpx
import yaml
from prefect import get_client
from prefect.deployments import arun_deployment

from prefect_rollout.models import ReleaseResult
from support import BIN, Cloud, prefect

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

    # The worker's machine has the credentials in its environment, and nothing of this repository but
    # the installed package.
    worker = subprocess.Popen(  # noqa: ASYNC220 - it outlives the call
        [BIN / "prefect", "worker", "start", "--pool", "rollout", "--limit", "1"],
        env={
            **os.environ,
            **cloud.environment,
            "PREFECT_API_URL": prefect_api,
            "PREFECT_WORKER_QUERY_SECONDS": "1",
        },
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        run = await arun_deployment(
            "deploy-latest-image/deploy-latest-image",
            parameters={"app_id": 3290, "deployment": "qapm-home", "poll_seconds": 0.2},
            timeout=120,
            poll_interval=0.5,
        )
    finally:
        worker.terminate()
        worker.wait(30)
    assert run.state is not None
    assert run.state.is_completed(), run.state.message
    result = await run.state.aresult()
    assert isinstance(result, ReleaseResult)
    assert (result.outcome, result.template_id) == ("released", 1343170)
    assert len(cloud.record) == 2


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
