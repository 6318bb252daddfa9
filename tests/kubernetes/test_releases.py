"""Releases, rollbacks, restarts and scaling on a real control plane, judged by its objects and audit log."""

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from oci_server import serving
from prefect import get_client
from test_mcp import assistant  # noqa: F401 - a fixture

from api_proxy import Exchange, Fault, Proxy, proxied
from control_plane import NODES, ControlPlane, Namespace
from prefect_rollout.errors import (
    AccessDeniedError,
    AppNotFoundError,
    ConflictError,
    DeploymentNotFoundError,
    InputError,
    PlanChangedError,
    ReleaseFailedError,
    ReleaseTimedOutError,
    TemplateNotFoundError,
    WorkloadError,
)
from prefect_rollout.flows import deploy_latest_image, restart, rollback, scale
from prefect_rollout.release.image_errors import ImageNotFoundError
from prefect_rollout.release.result import ReleaseResult
from prefect_rollout.runs import history
from prefect_rollout.verdict.diagnosis import Category
from tiny_images import NEW

pytestmark = pytest.mark.usefixtures("prefect_api")

FAST: dict[str, Any] = {"poll_seconds": 0.5, "poll_attempts": 120, "grace_seconds": 2}
WEB2 = {"app": "shop/web:2"}


def parameters(space: Namespace, target: str, deployment: str = "deployment/web") -> dict[str, Any]:
    return {"app_id": space.name, "deployment": deployment, "target": target, **FAST}


async def release(space: Namespace, target: str, tag: str, **options: Any) -> ReleaseResult:
    images = {"app": f"shop/web:{tag}"}
    result = await deploy_latest_image(**{**parameters(space, target), "images": images, **options})
    assert isinstance(result, ReleaseResult)
    return result


@pytest.fixture
def proxy(plane: ControlPlane, tmp_path: Path) -> Iterator[Proxy]:
    with proxied(plane, tmp_path) as made:
        yield made


# ---- releases -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["deployments", "statefulsets", "daemonsets"])
async def test_each_kind_is_released_restarted_and_rolled_back(
    space: Namespace, target: str, kind: str
) -> None:
    await space.deploy(kind=kind)
    name, count = f"{kind.removesuffix('s')}/web", NODES if kind == "daemonsets" else 2
    workload = parameters(space, target, name)

    released = await deploy_latest_image(images=WEB2, **workload)
    assert released.outcome == "released"
    assert space.running("shop/web:2") == count
    assert space.running("shop/web:1") == 0
    first = {pod["metadata"]["uid"] for pod in space.items("pods")}

    assert (await restart(**workload)).outcome == "released"
    assert space.running("shop/web:2") == count
    assert not first & {pod["metadata"]["uid"] for pod in space.items("pods")}

    back = await rollback(to_template="1", **workload)
    assert back.outcome == "released"
    assert space.running("shop/web:1") == count
    assert space.writes() == [f"patch {kind}/web"] * 3


async def test_a_release_is_marked_for_people(space: Namespace, target: str) -> None:
    await space.deploy()
    result = await release(space, target, "2", reason="new prices")
    web = space.get("deployments", "web")
    notes = web["metadata"]["annotations"]
    assert "new prices" in notes["kubernetes.io/change-cause"]
    assert notes["prefect-rollout/release"] == result.release_id
    assert "annotations" not in web["spec"]["template"]["metadata"]
    managers = {each["manager"] for each in web["metadata"]["managedFields"]}
    assert "prefect-rollout" in managers
    (cluster,) = result.clusters
    assert (cluster.published, cluster.ready, cluster.running) == (True, 2, 2)
    assert cluster.images_before == {"app": "shop/web:1"}


async def test_a_sidecar_keeps_its_image(space: Namespace, target: str) -> None:
    containers = [{"name": "app", "image": "shop/web:1"}, {"name": "proxy", "image": "mesh/proxy:7"}]
    await space.deploy(pod={"containers": containers})
    result = await release(space, target, "2")
    assert result.images == {"app": "shop/web:2", "proxy": "mesh/proxy:7"}
    pods = space.items("pods")
    assert {pod["spec"]["containers"][1]["image"] for pod in pods} == {"mesh/proxy:7"}


async def test_images_are_looked_up_before_a_patch(space: Namespace, target: str) -> None:
    workload = {**parameters(space, target), "check_images": "auto"}
    with serving() as registry:
        web = f"{registry.host}/shop/web"
        registry.put("shop/web", NEW, "1.2.0")
        await space.deploy(image=f"{web}:1.1.0")
        with pytest.raises(ImageNotFoundError, match=r"has no tag '1\.22\.0'\. Similar tags: 1\.2\.0"):
            await deploy_latest_image(images={"app": f"{web}:1.22.0"}, **workload)
        assert space.writes() == []
        newest = {"range": "^1"}
        result = await deploy_latest_image(images={"app": web}, newest=newest, pin_digest=True, **workload)
    pinned = f"{web}:1.2.0@{NEW.digest}"
    assert result.images == {"app": pinned}
    assert space.running(pinned) == 2
    assert space.writes() == ["patch deployments/web"]


async def test_what_is_not_there_is_named(
    space: Namespace, target: str, save_target: Callable[..., str]
) -> None:
    await space.deploy(replicas=1)
    with pytest.raises(DeploymentNotFoundError, match="deployment/web"):
        await deploy_latest_image(images=WEB2, **parameters(space, target, "wbe"))
    nowhere = {**parameters(space, target), "app_id": "no-such-space"}
    with pytest.raises(AccessDeniedError, match='in the namespace "no-such-space"'):
        await deploy_latest_image(images=WEB2, **nowhere)
    nowhere["target"] = save_target("as-admin", here=space.plane.kubeconfig("admin"))
    with pytest.raises(AppNotFoundError, match="no-such-space"):
        await deploy_latest_image(images=WEB2, **nowhere)
    with pytest.raises(TemplateNotFoundError):
        await rollback(to_template="77", **parameters(space, target))
    await space.deploy(kind="statefulsets", replicas=1)
    with pytest.raises(InputError, match="statefulset/web"):
        await deploy_latest_image(images=WEB2, **parameters(space, target, "web"))
    assert space.writes() == []


async def test_what_the_api_server_refuses_is_refused_before_anything_is_written(
    space: Namespace, target: str
) -> None:
    """A quota of the namespace that a policy enforces is found by the dry run."""
    await space.deploy(replicas=1)
    policy = {
        "metadata": {"name": space.name},
        "spec": {
            "matchConstraints": {
                "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": space.name}},
                "resourceRules": [
                    {
                        "apiGroups": ["apps"],
                        "apiVersions": ["v1"],
                        "operations": ["UPDATE"],
                        "resources": ["deployments"],
                    }
                ],
            },
            "validations": [
                {
                    "expression": "!object.spec.template.spec.containers.exists(c, c.image.endsWith(':2'))",
                    "message": "version 2 is recalled",
                }
            ],
        },
    }
    path = "/apis/admissionregistration.k8s.io/v1"
    space.plane.call("POST", f"{path}/validatingadmissionpolicies", policy)
    binding = {
        "metadata": {"name": space.name},
        "spec": {"policyName": space.name, "validationActions": ["Deny"]},
    }
    space.plane.call("POST", f"{path}/validatingadmissionpolicybindings", binding)

    def tried() -> bool:
        probe = space.plane.call("GET", space.path("deployments", "web"))
        probe["spec"]["template"]["spec"]["containers"][0]["image"] = "shop/web:2"
        try:
            space.plane.call("PUT", f"{space.path('deployments', 'web')}?dryRun=All", probe)
        except AssertionError:
            return True
        return False

    async with asyncio.timeout(60):  # the API server takes a moment to know the policy
        while not tried():  # noqa: ASYNC110
            await asyncio.sleep(0.2)
    with pytest.raises(Exception, match="version 2 is recalled"):
        await release(space, target, "2")
    assert space.writes() == []


# ---- plans and conflicts ------------------------------------------------------------------------


async def test_a_plan_holds_until_somebody_changes_the_workload(space: Namespace, target: str) -> None:
    await space.deploy()
    plan = (await release(space, target, "2", dry_run=True)).plan
    assert plan
    assert plan.plan_hash == (await release(space, target, "2", dry_run=True)).plan.plan_hash  # type: ignore[union-attr]
    space.set_image("deployments", "web", "shop/web:7")
    with pytest.raises(PlanChangedError):
        await release(space, target, "2", expect_plan=plan.plan_hash)
    assert space.writes() == []
    space.set_image("deployments", "web", "shop/web:1")
    assert (await release(space, target, "2", expect_plan=plan.plan_hash)).outcome == "released"
    assert space.writes() == ["patch deployments/web"]


@pytest.mark.parametrize("at", ["TRY", "PATCH"])
async def test_somebody_elses_change_in_between_is_a_conflict(
    space: Namespace, proxy: Proxy, save_target: Callable[..., str], at: str
) -> None:
    """Others change the image after the dry run, and right before the patch, which the API server refuses."""
    await space.deploy()

    def passing(exchange: Exchange) -> Fault | None:
        if exchange == Exchange(at, "deployments/web"):
            space.set_image("deployments", "web", "shop/web:7")
            proxy.passing = lambda _: None
        return None

    proxy.passing = passing
    with pytest.raises(ConflictError):
        await release(space, save_target(space.name, here=proxy.kubeconfig), "2")
    assert space.writes() == []
    assert space.image("deployments", "web") == "shop/web:7"


async def test_a_change_of_something_else_in_between_is_kept(
    space: Namespace, proxy: Proxy, save_target: Callable[..., str]
) -> None:
    await space.deploy()

    def passing(exchange: Exchange) -> Fault | None:
        if exchange == Exchange("PATCH", "deployments/web"):
            space.patch(
                "deployments", "web", {"metadata": {"labels": {"team": "a"}}, "spec": {"replicas": 3}}
            )
            proxy.passing = lambda _: None
        return None

    proxy.passing = passing
    result = await release(space, save_target(space.name, here=proxy.kubeconfig), "2")
    assert result.outcome == "released"
    web = space.get("deployments", "web")
    assert (web["spec"]["replicas"], web["metadata"]["labels"]["team"]) == (3, "a")
    assert space.running("shop/web:2") == 3
    assert space.writes() == ["patch deployments/web"]


# ---- rollback, scale, history -------------------------------------------------------------------


async def test_a_failed_release_is_rolled_back_and_then_skipped(space: Namespace, target: str) -> None:
    await space.deploy()
    await release(space, target, "2")
    with pytest.raises(ReleaseFailedError) as caught:
        await release(space, target, "3-missing", on_failure="rollback")
    assert caught.value.diagnosis.category is Category.IMAGE_PULL_ERROR
    assert caught.value.result
    assert caught.value.result.clusters[0].rolled_back is True
    assert (space.running("shop/web:2"), space.image("deployments", "web")) == (2, "shop/web:2")
    assert space.writes() == ["patch deployments/web"] * 3

    # The revision that failed is newer, and is not what a rollback returns to.
    await release(space, target, "4")
    back = await rollback(**parameters(space, target))
    assert back.images == {"app": "shop/web:2"}
    assert (space.running("shop/web:2"), space.image("deployments", "web")) == (2, "shop/web:2")


async def test_a_statefulset_that_is_stuck_is_red_and_unblocked_with_consent(
    new_space: Callable[..., Namespace], target: str
) -> None:
    space = new_space(unblock=True)
    await space.deploy(kind="statefulsets")
    workload = parameters(space, target, "statefulset/web")
    with pytest.raises(ReleaseFailedError) as caught:
        await deploy_latest_image(images={"app": "shop/web:2-missing"}, **workload)
    assert caught.value.diagnosis.category is Category.IMAGE_PULL_ERROR
    assert space.running("shop/web:1") == 1  # pod 0 keeps serving

    # Its controller does not replace the pod that is not ready, even if the revision is a good one again.
    with pytest.raises(ReleaseTimedOutError, match="unblock"):
        await deploy_latest_image(images={"app": "shop/web:3"}, **{**workload, "poll_attempts": 6})
    assert (await deploy_latest_image(images={"app": "shop/web:3"}, unblock=True, **workload)).wrote
    assert space.running("shop/web:3") == 2
    assert space.writes() == ["patch statefulsets/web"] * 2 + ["delete pods/web-1"]


async def test_scaling_writes_the_replicas_once_and_is_refused_under_an_autoscaler(
    space: Namespace, target: str
) -> None:
    await space.deploy()
    scaled = await scale(replicas=3, **parameters(space, target))
    assert scaled.outcome == "released"
    assert space.running("shop/web:1") == 3
    assert space.writes() == ["patch deployments/scale/web"]
    # A release keeps the replicas.
    await release(space, target, "2")
    assert space.running("shop/web:2") == 3

    reference = {"apiVersion": "apps/v1", "kind": "Deployment", "name": "web"}
    spec = {"scaleTargetRef": reference, "minReplicas": 2, "maxReplicas": 5}
    space.create("horizontalpodautoscalers", {"metadata": {"name": "by-load"}, "spec": spec})
    with pytest.raises(WorkloadError, match="by-load"):
        await scale(replicas=4, **parameters(space, target))
    assert space.get("deployments", "web")["spec"]["replicas"] == 3


async def test_the_history_lists_what_was_released(space: Namespace, target: str) -> None:
    await space.deploy()
    await release(space, target, "2", reason="prices", requested_by="zhangsan")
    with pytest.raises(ReleaseFailedError):
        await release(space, target, "3-missing")
    async with get_client() as client:
        wanted = history.Wanted(app_id=space.name)
        failed, released = await history.read(client, wanted)
    assert (failed.outcome, released.outcome) == ("failed", "released")
    assert released.images == "app: shop/web:1 → shop/web:2"
    assert (released.cluster, released.who, released.why) == ("here", "zhangsan", "prices")
    assert (released.app_id, released.deployment) == (space.name, "deployment/web")


# ---- two clusters -------------------------------------------------------------------------------


async def test_two_clusters_are_released_one_after_the_other_and_back_together(
    plane: ControlPlane,
    second_plane: ControlPlane,
    save_target: Callable[..., str],
    new_space: Callable[..., Namespace],
) -> None:
    first = new_space()
    second = Namespace(second_plane, first.name)
    both = [first, second]
    await asyncio.gather(*(space.deploy(probed=True) for space in both))
    target = save_target("both", east=plane.kubeconfig("releaser"), west=second_plane.kubeconfig("releaser"))

    result = await release(first, target, "2", order="one-by-one")
    assert [(each.cluster, each.ready) for each in result.clusters] == [("east", 2), ("west", 2)]
    assert [space.running("shop/web:2") for space in both] == [2, 2]
    assert [space.writes() for space in both] == [["patch deployments/web"]] * 2

    # West refuses the pods of version 3: both return to version 2.
    second.create("resourcequotas", {"metadata": {"name": "all"}, "spec": {"hard": {"pods": "2"}}})
    with pytest.raises(ReleaseFailedError, match="west") as caught:
        await release(first, target, "3", on_failure="rollback")
    assert caught.value.diagnosis.category is Category.QUOTA_EXCEEDED
    assert [space.running("shop/web:2") for space in both] == [2, 2]
    assert [space.image("deployments", "web") for space in both] == ["shop/web:2"] * 2

    # One cluster alone.
    alone = await release(first, target, "4", clusters=["east"])
    assert [each.cluster for each in alone.clusters] == ["east"]
    assert [space.image("deployments", "web") for space in both] == ["shop/web:4", "shop/web:2"]


# ---- an assistant -------------------------------------------------------------------------------


async def test_an_assistant_plans_and_releases(
    space: Namespace,
    target: str,
    assistant: Any,  # noqa: F811 - the fixture
) -> None:
    await space.deploy()
    asked = {"app_id": space.name, "deployment": "deployment/web", "target": target, "images": WEB2}
    async with assistant() as user:
        plan = await user.call(
            "plan_release", app_id=space.name, deployment="deployment/web", images=WEB2, target=target
        )
        assert any("shop/web:2" in line for line in plan["plan"]["lines"])
        assert space.writes() == []
        submitted = await user.call("deploy_latest_image", confirm=plan["plan"]["plan_hash"], **asked)
        release = await user.ended(submitted["flow_run_id"])
        assert (release["outcome"], release["images"]) == ("released", WEB2)
    assert space.writes() == ["patch deployments/web"]
    assert space.running("shop/web:2") == 2
