"""Smaller doors: names, locks, values of templates, who asks."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import pytest_asyncio
from mcp import Client
from prefect import get_client, tags
from prefect.states import Cancelled

from prefect_rollout.errors import (
    ClusterNotFoundError,
    DeploymentNotFoundError,
    InputError,
    RolloutError,
)
from prefect_rollout.execution import setup
from prefect_rollout.execution.worker import RolloutWorker
from prefect_rollout.flows import deploy_latest_image
from prefect_rollout.mcp import flow_runs, follow
from prefect_rollout.mcp.connection import Api, opened
from prefect_rollout.mcp.policy import Policy
from prefect_rollout.mcp.server import Server
from prefect_rollout.mcp.session import Session
from prefect_rollout.mcp.untrusted import unlisted
from prefect_rollout.platforms.http import host_of
from prefect_rollout.release import pod_diff
from prefect_rollout.release.images import UNLISTED
from prefect_rollout.runs.lock import lock_name
from support import Cloud


@pytest_asyncio.fixture
async def assistant_api(prefect_api: str) -> AsyncIterator[Api]:
    """The Prefect API as an MCP server speaks to it."""
    assert prefect_api
    async with opened(Path("unused")) as api:
        yield api


# ---- names --------------------------------------------------------------------------------------

OTHERS = ("bad-image", "crash-loop", "qapm-api", "no-quota")


async def failed(parameters: dict[str, Any]) -> tuple[UUID, str]:
    """The id of a run that failed, and all that Prefect keeps of how."""
    state = await deploy_latest_image(**parameters, return_state=True)
    run_id = state.state_details.flow_run_id
    error = await state.aresult(raise_on_failure=False)
    assert run_id is not None
    assert isinstance(error, RolloutError)
    return run_id, f"{state.message} {error} {error.to_dict()}"


@pytest.mark.parametrize(
    ("parameters", "kind", "names"),
    [
        ({"deployment": "qapm-hom"}, DeploymentNotFoundError, ("qapm-home", *OTHERS)),
        ({"deployment": "qapm-home", "clusters": ["pub-x"]}, ClusterNotFoundError, ("pub-bjwdt",)),
    ],
)
async def test_a_run_of_a_restricted_assistant_learns_no_name_that_exists(
    cloud: Cloud, prefect_api: str, parameters: dict[str, Any], kind: type[Exception], names: tuple[str, ...]
) -> None:
    assert prefect_api
    assert cloud.record == []
    asked = {"app_id": 3290, **parameters}
    _, told = await failed(asked)  # a person is shown what there is
    assert all(name in told for name in names)
    with tags(*Policy(deployments=["qapm-ho*"]).tags(None)):
        run_id, told = await failed(asked)
    assert kind.__name__ in told
    assert not [name for name in names if name in told.replace(parameters["deployment"], "")]
    async with get_client() as client:
        run = await client.read_flow_run(run_id)
    assert UNLISTED in run.tags


async def test_nor_does_what_it_asks_directly_or_reads_of_others(
    cloud: Cloud, assistant_api: Api, prefect_api: str
) -> None:
    assert prefect_api
    asked = {"app_id": 3290, "deployment": "qapm-hom"}
    theirs, _ = await failed(asked)
    policy = Policy(deployments=["qapm-hom*"])
    found = await flow_runs.find(assistant_api, policy, str(theirs))
    shown = (await follow.look(assistant_api, found)).model_dump_json()
    assert "there is no deployment" in shown
    assert not [name for name in OTHERS if name in shown]
    everybody = await flow_runs.find(assistant_api, Policy(), str(theirs))
    assert "bad-image" in (await follow.look(assistant_api, everybody)).model_dump_json()


async def test_an_id_of_a_run_that_is_not_allowed_says_nothing_of_it(
    cloud: Cloud, assistant_api: Api, prefect_api: str
) -> None:
    assert prefect_api
    theirs, _ = await failed({"app_id": 3290, "deployment": "qapm-hom", "clusters": ["secret-place"]})
    with pytest.raises(InputError) as caught:
        await flow_runs.find(assistant_api, Policy(deployments=["web"]), str(theirs))
    assert "is a run of a deployment that is not allowed here" in str(caught.value)
    assert "qapm" not in str(caught.value)
    assert "secret-place" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("there is no deployment 'a' in app 1. There are: b, c.", "there is no deployment 'a' in app 1."),
        ("<data>There are: b.d, c.</data> Then plan again.", "<data></data> Then plan again."),
        ("all is well", "all is well"),
    ],
)
def test_names_are_cut_from_what_was_told_to_others(text: str, shown: str) -> None:
    assert unlisted(text) == shown


# ---- locks --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "addresses",
    [
        (
            "http://localhost:8360",
            "http://127.0.0.1:8360/",
            "http://[::1]:8360",
            "http://LOCALHOST.:8360",
            "http://127.0.0.2:8360",
            "http://[0:0:0:0:0:0:0:1]:8360",
            "http://[::ffff:127.0.0.1]:8360",
        ),
        (
            "https://k8s.qihoo.net",
            "https://K8S.QIHOO.NET/",
            "https://k8s.qihoo.net.",
            "https://k8s.qihoo.net:443",
            "https://k8s.qihoo.net.:443/gateway/",
        ),
        ("https://[fd00::1]", "https://[FD00:0:0::1]:443"),
        ("https://bücher.example", "https://xn--bcher-kva.example"),
    ],
)
def test_a_cloud_has_one_lock_however_its_address_is_written(addresses: tuple[str, ...]) -> None:
    assert len({lock_name(host_of(address), 1, "web", "c1") for address in addresses}) == 1


def test_two_clouds_have_two_locks() -> None:
    addresses = ("http://localhost:8360", "http://localhost:8361", "https://localhost", "https://10.0.0.1")
    assert len(set(map(host_of, addresses))) == len(addresses)


# ---- values of templates ------------------------------------------------------------------------


def dressed(shape: Any, value: str) -> Any:
    """A pod template, or a part of one, in which every field that is no image is `value`."""
    if isinstance(shape, dict):
        return {name: dressed(part, value) for name, part in shape.items() if name != "image"}
    if isinstance(shape, pod_diff._Named):
        key = {"containerPort": 80, "mountPath": f"/{value}"}.get(shape.key, "entry")
        return [{**dressed(shape.entry, value), shape.key: key}]
    return {"key": value} if isinstance(shape, pod_diff._Each) else value


@pytest.mark.parametrize("form", ["{}", "/{}", "{}-1", "{}.example", "100{}", "{}Mi"])
def test_a_plan_shows_no_text_of_a_pod_template(form: str) -> None:
    before, after = (dressed(pod_diff._PODS, form.format(secret)) for secret in ("Hunter2a", "Hunter2b"))
    changes = pod_diff.differences(before, after)
    assert len(changes) > 100
    assert {change.path for change in changes} >= {
        "metadata.labels[key]",
        "spec.containers[entry].livenessProbe.httpGet.path",
        "spec.containers[entry].volumeMounts[0]",
        "spec.volumes[entry].hostPath.path",
        "spec.serviceAccountName",
    }
    assert "Hunter2" not in "".join(change.model_dump_json() for change in changes)


# ---- who asks -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("stdio", "verified"), [(True, True), (False, False)])
async def test_over_http_who_asks_is_what_the_client_says(
    cloud: Cloud, assistant_api: Api, stdio: bool, verified: bool
) -> None:
    assert cloud.record == []
    async with get_client() as client:
        async for _ in setup.apply(client, "doors", RolloutWorker.type):
            pass
    server = Server(Session(Policy(deployments=["qapm-*"]), Path("unused")), stdio=stdio)
    async with Client(server, mode="2026-07-28") as client:
        asked = {"app_id": 3290, "deployment": "qapm-home", "wait_seconds": 0}
        planned = (await client.call_tool("plan_release", asked)).structured_content or {}
        run_id = UUID(planned["flow_run_id"])
        release = (await client.call_tool("get_release", {"flow_run_id": str(run_id)})).structured_content
    run = await assistant_api.client.read_flow_run(run_id)
    await assistant_api.client.set_flow_run_state(run_id, Cancelled(), force=True)
    assert run.parameters["requested_by"].endswith(" (unverified)") is not verified
    assert ("(unverified)" in str(release)) is not verified
    assert {"allow-image:(ran before)", UNLISTED, "trigger:mcp"} <= set(run.tags)
