"""Which cloud a release goes to: a saved block or the environment's variables, never one of them silently."""

import json
import os
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import pytest_asyncio
from prefect import get_client
from prefect.flow_engine import run_flow_async
from prefect.states import AwaitingRetry
from pydantic import SecretStr

from prefect_rollout.batch.errors import PlanError
from prefect_rollout.blocks import ContainerCloud, TargetBlock, choose_target
from prefect_rollout.errors import ConfigurationError, InputError, RejectedError
from prefect_rollout.flows import deploy_batch, deploy_latest_image
from prefect_rollout.mcp import deployments, flow_runs, policy, types
from prefect_rollout.mcp.connection import opened
from prefect_rollout.mcp.policy import Policy
from prefect_rollout.mcp.untrusted import unquoted
from prefect_rollout.release.plan import ReleasePlan
from prefect_rollout.release.plan_words import plan_lines
from prefect_rollout.release.report import render, render_plan
from prefect_rollout.release.request import DEFAULT_TARGET, PLATFORMS, Action, ReleaseRequest
from prefect_rollout.release.result import Outcome, ReleaseResult
from prefect_rollout.simulator import Scenario, SimulatorServer
from support import BIN, Cloud

HOME: dict[str, Any] = {"app_id": 3290, "deployment": "qapm-home"}
PRODUCTION = ContainerCloud(
    api_url="https://k8s.example/gate", key_id=SecretStr("prod-key"), secret_key=SecretStr("prod-s3cret")
)


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("K8S_")]:
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({}, ""),
        ({"API_URL": ""}, ""),
        ({"API_URL": "https://K8S.example.:443/gate/"}, ""),
        ({"KEY_ID": "prod-key", "SECRET_KEY": "prod-s3cret", "ENV": "prod"}, ""),
        ({"API_URL": "https://me:s3cret@other.example"}, "K8S_API_URL is https://other.example"),
        ({"API_URL": "https://k8s.example/other"}, "K8S_API_URL is https://k8s.example/other"),
        ({"API_URL": "nonsense"}, "K8S_API_URL is nonsense"),
        ({"KEY_ID": "x"}, "K8S_KEY_ID differs"),
        ({"KEY_ID": "prod-key", "SECRET_KEY": "x"}, "K8S_SECRET_KEY differs"),
        ({"ENV": "test"}, "K8S_ENV is test and not prod"),
        (
            {"API_URL": "http://127.0.0.1:8360", "KEY_ID": "demo-key", "SECRET_KEY": "demo-secret"},
            ("K8S_API_URL is http://127.0.0.1:8360, K8S_KEY_ID differs, K8S_SECRET_KEY differs"),
        ),
    ],
)
def test_the_variables_that_are_set_are_held_against_a_block(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], says: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(f"K8S_{name}", value)
    assert PRODUCTION.environment_says() == says


@pytest.mark.parametrize("target", ["", "environment", "container-cloud/default"])
def test_a_target_is_a_block_or_the_environment_or_left_out(target: str) -> None:
    assert ReleaseRequest.of(**HOME, target=target).target == target
    with pytest.raises(InputError, match="environment for the environment variables"):
        ReleaseRequest.of(**HOME, target="environments")


@pytest.mark.parametrize("kind", PLATFORMS)
def test_a_platform_alone_is_its_default_block(kind: str) -> None:
    assert ReleaseRequest.of(**HOME, target=kind).target == f"{kind}/default"


def test_every_platform_is_known_by_its_type() -> None:
    assert {kind.get_block_type_slug() for kind in TargetBlock.__subclasses__()} == set(PLATFORMS)


def test_what_is_allowed_is_judged_by_the_target_that_an_empty_one_means() -> None:
    assert policy.DEFAULT_TARGET == DEFAULT_TARGET


# ---- against a Prefect API ----------------------------------------------------------------------


@pytest.fixture
def production() -> Iterator[Cloud]:
    """Another cloud, with a key of its own."""
    scenario = Scenario(key_id="prod-key", secret_key="prod-s3cret")
    with SimulatorServer(scenario, speed=20) as server:
        yield Cloud(server)


@pytest_asyncio.fixture
async def saved(production: Cloud, prefect_api: str) -> AsyncIterator[Cloud]:
    """The cloud of the saved default block."""
    assert prefect_api
    block = ContainerCloud(
        api_url=production.url, key_id=SecretStr("prod-key"), secret_key=SecretStr("prod-s3cret")
    )
    await block.asave("default")
    yield production
    await ContainerCloud.adelete("default")


@pytest.mark.promise("A release goes to the intended cloud")
async def test_a_default_block_does_not_silently_beat_the_variables(saved: Cloud, cloud: Cloud) -> None:
    with pytest.raises(ConfigurationError) as caught:
        await deploy_latest_image(**HOME)
    error = str(caught.value)
    assert f"block container-cloud/default is for {saved.url}, but K8S_API_URL is {cloud.url}" in error
    assert "container-cloud/default for the block, or environment for the variables" in error
    assert "`--target environment`" in error
    assert "secret" not in error.lower().replace("k8s_secret_key", "")
    assert saved.requests == cloud.requests == []
    plan: Any = {"releases": [HOME]}
    with pytest.raises(PlanError) as refused:
        await deploy_batch(plan=plan, dry_run=True)
    (mistake,) = refused.value.data["mistakes"]
    assert mistake["field"] == "target"
    assert saved.url in mistake["problem"]
    assert cloud.url in mistake["problem"]


@pytest.mark.promise("A release goes to the intended cloud")
async def test_a_target_that_is_named_wins_and_every_telling_names_it(
    saved: Cloud, cloud: Cloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = {}
    for target, words in (
        ("container-cloud/default", f"{saved.url} (container-cloud/default)"),
        ("environment", f"{cloud.url} (environment variables)"),
    ):
        result = await deploy_latest_image(**HOME, target=target, dry_run=True)
        assert f"{result.cloud} ({result.target})" == words
        assert result.plan is not None
        assert plan_lines(result.plan)[0].startswith(f"Plan of qapm-home on {words}, by RollingUpdate")
        assert words in unquoted(types.plan_of(result.plan.model_dump()).lines[0])
        assert (await choose_target(target)).words == words
        planned[target] = result.plan.plan_hash
        async with opened(Path("unused")) as api:
            assert unquoted((await deployments.live(api, target, 3290, "qapm-home", None)).cloud) == words
            assert (
                unquoted((await deployments.templates(api, Policy(), target, 3290, "qapm-home", 1)).cloud)
                == words
            )
            run = await api.client.read_flow_run(UUID(result.release_id))
            assert unquoted(flow_runs.fields_of(api, run, "deploy-latest-image", reason=10)["cloud"]) == words
    # The address is part of the hash: a plan for one cloud is none for the other.
    assert planned["environment"] != planned["container-cloud/default"]
    # Once they say the same there is nothing to choose.
    for name, value in {"API_URL": saved.url, "KEY_ID": "prod-key", "SECRET_KEY": "prod-s3cret"}.items():
        monkeypatch.setenv(f"K8S_{name}", value)
    assert (await choose_target("")).words == f"{saved.url} (container-cloud/default)"


@pytest.mark.promise("A release goes to the intended cloud")
async def test_an_assistant_has_to_have_it_chosen(saved: Cloud, cloud: Cloud) -> None:
    async with opened(Path("unused")) as api:
        with pytest.raises(ConfigurationError, match="the saved block container-cloud/default") as caught:
            await api.target_of("")
        assert cloud.url in str(caught.value)
        assert await api.target_of("environment") == "environment"
        assert await api.target_of(DEFAULT_TARGET) == DEFAULT_TARGET
    assert saved.requests == cloud.requests == []


async def test_without_a_saved_block_the_variables_count(cloud: Cloud, prefect_api: str) -> None:
    assert prefect_api
    for target in ("", "environment", "container-cloud/default"):
        assert (await choose_target(target)).words == f"{cloud.url} (environment variables)"


async def test_without_variables_there_is_no_environment_to_choose() -> None:
    with pytest.raises(ConfigurationError, match="no environment variables describe a cloud") as caught:
        await choose_target("environment")
    assert "K8S_KEY_ID and K8S_SECRET_KEY" in str(caught.value)


@pytest.mark.promise("A release goes to the intended cloud")
async def test_a_run_does_not_go_on_in_another_cloud(
    production: Cloud, cloud: Cloud, prefect_api: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert prefect_api
    cloud.faults({"call": "templates", "kind": "status", "status": 400})
    with pytest.raises(RejectedError) as failed:
        await deploy_latest_image(**HOME)
    assert failed.value.result is not None
    run_id = UUID(failed.value.result.release_id)
    for name, value in {"API_URL": production.url, "KEY_ID": "prod-key", "SECRET_KEY": "prod-s3cret"}.items():
        monkeypatch.setenv(f"K8S_{name}", value)
    async with get_client() as client:
        await client.set_flow_run_state(run_id, AwaitingRetry(), force=True)
        run = await client.read_flow_run(run_id)
    with pytest.raises(ConfigurationError, match=r"began on the cloud localhost:\d+, and its target is loc"):
        await run_flow_async(deploy_latest_image, flow_run=run, parameters=HOME)
    assert production.record == []


def test_the_command_line_refuses_and_names_what_it_chose(
    saved: Cloud, cloud: Cloud, prefect_server: str, tmp_path: Path
) -> None:
    def ended(*arguments: str) -> tuple[int, dict[str, Any], list[str]]:
        process = subprocess.run(
            [
                *(BIN / "prefect-rollout", "deploy", "--app-id", "3290", "--deployment", "qapm-home"),
                *("--dry-run", "--json", *arguments),
            ],
            env={**os.environ, **cloud.environment, "HOME": str(tmp_path), "PREFECT_API_URL": prefect_server},
            capture_output=True,
            text=True,
            check=False,
        )
        return process.returncode, json.loads(process.stdout), process.stderr.splitlines()

    code, document, said = ended()
    error = document["error"]
    assert (code, error["type"], error["field"]) == (2, "ConfigurationError", "target")
    assert f"container-cloud/default is for {saved.url}, but K8S_API_URL is {cloud.url}" in "\n".join(said)
    assert cloud.requests == []
    code, document, said = ended("--target", "environment")
    assert (code, document["cloud"], document["target"]) == (0, cloud.url, "environment variables")
    assert f"Cloud: {cloud.url} (environment variables)" in said
    assert saved.requests == []


# ---- in words -----------------------------------------------------------------------------------


def test_a_report_and_a_form_name_the_cloud() -> None:
    where = {"cloud": "https://k8s.example", "target": "container-cloud/default"}
    common: dict[str, Any] = {"app_id": 1, "deployment": "web", "clusters": []}
    result = ReleaseResult(outcome=Outcome.RELEASED, release_id="r", **common, **where)
    assert "- **Cloud:** `https://k8s.example` \\(container-cloud/default\\)" in render(result)
    plan = ReleasePlan(action=Action.DEPLOY, plan_hash="0" * 16, **common, **where)
    assert "Cloud: `https://k8s.example` \\(container-cloud/default\\)" in render_plan(plan)
