"""Releases on a real control plane: names of workloads, reports, errors and consent."""

import asyncio
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.blocks.core import Block

import control_plane
from control_plane import ControlPlane, Namespace
from prefect_rollout.blocks import Kubernetes
from prefect_rollout.errors import InputError, ReleaseFailedError, RollbackFailedError
from prefect_rollout.flows import deploy_latest_image, rollback, scale
from prefect_rollout.release.report import render
from prefect_rollout.verdict.diagnosis import Category
from support import BIN

pytestmark = pytest.mark.usefixtures("prefect_api")


@pytest.fixture
def second_plane(tmp_path: Path) -> Iterator[ControlPlane]:
    with control_plane.control_plane(tmp_path / "second") as made:
        yield made


FAST: dict[str, Any] = {"poll_seconds": 0.5, "poll_attempts": 120, "grace_seconds": 2}
WEB2 = {"app": "shop/web:2"}


def web(space: Namespace, target: str, deployment: str = "web") -> dict[str, Any]:
    return {"app_id": space.name, "deployment": deployment, "target": target, **FAST}


async def test_a_release_names_an_image_or_a_revision(space: Namespace, target: str) -> None:
    await space.deploy(replicas=1)
    with pytest.raises(InputError, match="names no image") as caught:
        await deploy_latest_image(**web(space, target))
    assert "--image app=shop/web:NEW-TAG" in caught.value.advice
    assert space.writes() == []


async def test_what_is_live_is_nothing_to_release(space: Namespace, target: str) -> None:
    await space.deploy(replicas=1)
    result = await deploy_latest_image(images={"app": "shop/web:1"}, **web(space, target))
    assert result.outcome == "released"
    assert "nothing to release" in result.clusters[0].note
    assert space.writes() == []


async def test_the_report_has_replica_sets_and_commands_to_copy(space: Namespace, target: str) -> None:
    await space.deploy(replicas=1)
    result = await deploy_latest_image(images=WEB2, requested_by="ada", **web(space, target))
    (cluster,) = result.clusters
    names = {f"ReplicaSet {each['metadata']['name']}" for each in space.items("replicasets")}
    assert {cluster.object, cluster.object_before} == names
    page = render(result)
    assert f"-n {space.name} describe deployment/web" in page
    assert cluster.object in page.replace("\\", "")
    notes = space.get("deployments", "web")["metadata"]["annotations"]
    assert notes["prefect-rollout/requested-by"] == "ada"
    assert result.deployment == "deployment/web"


async def test_a_failure_names_the_commands_that_show_more(space: Namespace, target: str) -> None:
    await space.deploy(replicas=1)
    with pytest.raises(ReleaseFailedError) as caught:
        await deploy_latest_image(images={"app": "shop/web:2-missing"}, **web(space, target))
    found = caught.value.diagnosis
    assert found.pod
    assert any(f"describe pod/{found.pod}" in command for command in found.commands)


async def test_a_plan_says_what_may_revert_the_release(space: Namespace, target: str) -> None:
    await space.deploy(replicas=1)
    labels = {"kustomize.toolkit.fluxcd.io/name": "apps", "kustomize.toolkit.fluxcd.io/namespace": "flux"}
    space.patch("deployments", "web", {"metadata": {"labels": labels}})
    result = await deploy_latest_image(images=WEB2, dry_run=True, **web(space, target))
    assert result.plan
    assert any("managed by Flux (apps)" in note for note in result.plan.clusters[0].notes)


async def test_no_rollback_follows_somebody_elses_change(space: Namespace, target: str) -> None:
    await space.deploy()
    releasing = asyncio.create_task(
        deploy_latest_image(images={"app": "shop/web:2-slow-30"}, on_failure="rollback", **web(space, target))
    )
    async with asyncio.timeout(60):
        while not space.writes():  # noqa: ASYNC110 - it comes true elsewhere
            await asyncio.sleep(0.2)
    space.set_image("deployments", "web", "shop/web:7")
    with pytest.raises(ReleaseFailedError) as caught:
        await releasing
    assert not isinstance(caught.value, RollbackFailedError)
    assert caught.value.diagnosis.category is Category.SUPERSEDED
    assert space.writes() == ["patch deployments/web"]
    assert space.image("deployments", "web") == "shop/web:7"


async def test_a_scale_can_be_forced_under_an_autoscaler(space: Namespace, target: str) -> None:
    await space.deploy()
    reference = {"apiVersion": "apps/v1", "kind": "Deployment", "name": "web"}
    spec = {"scaleTargetRef": reference, "minReplicas": 1, "maxReplicas": 5}
    space.create("horizontalpodautoscalers", {"metadata": {"name": "by-load"}, "spec": spec})
    result = await scale(replicas=3, force=True, **web(space, target))
    assert result.outcome == "released"
    assert space.running("shop/web:1") == 3


async def test_a_stuck_statefulset_is_unblocked_on_request(
    space: Namespace, save_target: Callable[..., str]
) -> None:
    target = save_target("as-admin", here=space.plane.kubeconfig("admin"))
    await space.deploy(kind="statefulsets")
    asked = web(space, target, "statefulset/web")
    with pytest.raises(ReleaseFailedError):
        await deploy_latest_image(images={"app": "shop/web:2-missing"}, **asked)
    back = await rollback(unblock=True, to_template="1", **asked)
    assert back.outcome == "released"
    assert space.running("shop/web:1") == 2
    # The revision that failed is on record, although no ControllerRevision names its release.
    result = await deploy_latest_image(images={"app": "shop/web:3"}, **asked)
    assert result.outcome == "released"
    again = await rollback(**asked)
    assert again.images == {"app": "shop/web:1"}


async def test_clusters_whose_pod_templates_differ_keep_their_differences(
    space: Namespace, second_plane: ControlPlane, save_target: Callable[..., str]
) -> None:
    other = Namespace(second_plane, space.name)

    def live() -> list[tuple[str, str | None]]:
        specs = [each.get("deployments", "web")["spec"]["template"]["spec"] for each in (space, other)]
        return [(each["containers"][0]["image"], each.get("hostname")) for each in specs]

    await asyncio.gather(space.deploy(replicas=1), other.deploy(replicas=1))
    other.patch("deployments", "web", {"spec": {"template": {"spec": {"hostname": "west"}}}})
    planes = {"east": space.plane, "west": second_plane}
    target = save_target("apart", **{name: each.kubeconfig("releaser") for name, each in planes.items()})
    asked = web(space, target)
    planned = await deploy_latest_image(images=WEB2, dry_run=True, **asked)
    assert planned.plan
    assert [each.changes for each in planned.plan.clusters] == [[], []]
    result = await deploy_latest_image(images=WEB2, expect_plan=planned.plan.plan_hash, **asked)
    east, west = result.clusters
    assert (result.outcome, result.template_id) == ("released", None)
    assert east.template != west.template
    assert live() == [("shop/web:2", None), ("shop/web:2", "west")]
    back = await rollback(**asked)
    assert [each.images_before for each in back.clusters] == [WEB2, WEB2]
    assert live() == [("shop/web:1", None), ("shop/web:1", "west")]


async def test_without_a_block_the_current_context_is_the_target(space: Namespace, prefect_api: str) -> None:
    await space.deploy(replicas=1)
    command = [str(BIN / "prefect-rollout"), "deploy", "--target", "kubernetes", "--app-id", space.name]
    options = ["--deployment", "web", "--image", "app=shop/web:2", "--poll-seconds", "1", "--json"]
    kubeconfig = str(space.plane.kubeconfig("releaser"))
    environment = {**os.environ, "KUBECONFIG": kubeconfig, "PREFECT_API_URL": prefect_api}

    def run() -> subprocess.CompletedProcess[bytes]:
        return subprocess.run([*command, *options], env=environment, capture_output=True, check=False)

    ended = await asyncio.to_thread(run)
    assert ended.returncode == 0, ended.stderr
    result = json.loads(ended.stdout)
    assert (result["outcome"], result["target"]) == ("released", "kubeconfig")
    assert space.writes() == ["patch deployments/web"]


class Config(Block):
    """The cluster config of prefect-kubernetes, as the Prefect API stores it."""

    _block_type_name = "Kubernetes Cluster Config"

    config: dict[str, Any]
    context_name: str


class Credentials(Block):
    """The credentials of prefect-kubernetes, as the Prefect API stores them."""

    _block_type_name = "Kubernetes Credentials"

    cluster_config: Config | None = None


async def test_credentials_of_prefect_kubernetes_release(space: Namespace) -> None:
    content = yaml.safe_load(space.plane.kubeconfig("releaser").read_text("utf-8"))
    saved = Config(config=content, context_name=content["current-context"])
    await saved.save("releaser", overwrite=True)
    await Credentials(cluster_config=saved).save("releaser", overwrite=True)
    clusters = [{"name": "here", "credentials": "releaser"}]
    block = Kubernetes.model_validate(
        {"clusters": clusters, "settle_seconds": 3, "namespace_of": {"shop": space.name}}
    )
    await block.save("by-credentials", overwrite=True)
    await space.deploy(replicas=1)
    asked = {**web(space, "kubernetes/by-credentials"), "app_id": "shop"}
    assert (await deploy_latest_image(images=WEB2, **asked)).outcome == "released"
    assert space.writes() == ["patch deployments/web"]
