"""The Kubernetes client against recorded objects of a real API server, and its errors on the wire."""

import asyncio
import json
import ssl
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
import respx
import yaml
from test_kubernetes_traces import read

from prefect_rollout.blocks import Kubernetes
from prefect_rollout.errors import (
    AccessDeniedError,
    AppNotFoundError,
    AuthenticationError,
    ClusterNotFoundError,
    ConfigurationError,
    ConflictError,
    DeploymentNotFoundError,
    InputError,
    OverloadedError,
    QuotaExceededError,
    RejectedError,
    RolloutError,
    ServerFaultError,
    TemplateNotFoundError,
    UnreachableError,
    UnusableAnswerError,
    UpgradeError,
    WorkloadError,
)
from prefect_rollout.platforms.kubernetes import watch
from prefect_rollout.platforms.kubernetes.client import KubernetesClient
from prefect_rollout.platforms.kubernetes.connection import Connection
from prefect_rollout.platforms.kubernetes.credentials import Login
from prefect_rollout.platforms.kubernetes.managers import managed_by
from prefect_rollout.platforms.kubernetes.objects import (
    RELEASE,
    RELEASED,
    RELEASES,
    Object,
    parse_name,
    releases_of,
    stored_revisions,
    with_release,
)
from prefect_rollout.platforms.port import Platform
from prefect_rollout.release.plan import Procedure, Target, release_plan
from prefect_rollout.release.plan_words import plan_lines
from prefect_rollout.release.replicas import Replicas
from prefect_rollout.release.report import render_plan
from prefect_rollout.release.request import Action
from prefect_rollout.release.workload import Applied, Baseline, Change, Workload
from prefect_rollout.runs.moves import Move, nothing_between, restart_key
from prefect_rollout.verdict.status import Observation

HOST = "https://api.example:6443"
SPACE = "/apis/apps/v1/namespaces/shop"
APP = f"{HOST}{SPACE}/deployments/app"
WEB = Workload(
    app_id="shop",
    app="shop",
    id="deployment/app",
    name="deployment/app",
    handle={
        "clusters": ["here"],
        "scaled_by": {},
        "notes": {},
        "selectors": {"here": "app=web"},
        "strategy": None,
    },
)
Json = dict[str, Any]


class Credentials:
    """Hands out a new token each time, as an exec plugin does."""

    def __init__(self) -> None:
        self.count = 0

    async def __call__(self) -> Login:
        self.count += 1
        token = f"token-{self.count}"

        async def headers() -> dict[str, str]:
            return {"Authorization": f"Bearer {token}"}

        return Login(HOST, ssl.create_default_context(), None, None, headers)


def client(credentials: Credentials | None = None) -> KubernetesClient:
    return KubernetesClient({"here": Connection("here", credentials or Credentials())})


def status(code: int, message: str) -> httpx.Response:
    return httpx.Response(
        code, json={"kind": "Status", "status": "Failure", "message": message, "code": code}
    )


def listed(items: list[Any], version: str = "100") -> httpx.Response:
    return httpx.Response(200, json={"metadata": {"resourceVersion": version}, "items": items})


class Cluster:
    """The API server of a recorded rollout, at one moment of it."""

    def __init__(self, wire: respx.MockRouter, case: str = "healthy", at: int = -1) -> None:
        seen = read(case).states[at].seen
        self.workload: Json = json.loads(json.dumps(seen.workload))
        self.holders, self.pods = list(seen.holders), list(seen.pods)
        self.writes: list[httpx.Request] = []
        self.answers: list[Callable[[], httpx.Response | None]] = []
        self.reads = wire.get(APP).mock(side_effect=lambda _: httpx.Response(200, json=self.workload))
        self.patches = wire.patch(APP).mock(side_effect=self._patch)
        wire.get(f"{HOST}{SPACE}/replicasets").mock(side_effect=lambda _: listed(self.holders))
        wire.get(f"{HOST}{SPACE}/deployments").mock(side_effect=lambda _: listed([self.workload]))
        for other in ("statefulsets", "daemonsets"):
            wire.get(f"{HOST}{SPACE}/{other}").mock(return_value=listed([]))
            wire.get(f"{HOST}{SPACE}/{other}/app").mock(return_value=status(404, "not found"))
        core = f"{HOST}/api/v1/namespaces/shop"
        wire.get(f"{core}/pods").mock(side_effect=lambda _: listed(self.pods))
        wire.get(f"{core}/events").mock(return_value=listed([]))
        wire.get(f"{HOST}/apis/autoscaling/v2/namespaces/shop/horizontalpodautoscalers").mock(
            return_value=listed([])
        )

    def _patch(self, request: httpx.Request) -> httpx.Response:
        if self.answers and (answer := self.answers.pop(0)()):
            return answer
        changed = json.loads(json.dumps(self.workload))
        for each in json.loads(request.content):
            parts = [part.replace("~1", "/").replace("~0", "~") for part in each["path"].split("/")[1:]]
            place = changed
            for part in parts[:-1]:
                place = place[part]
            if each["op"] == "remove":
                del place[parts[-1]]
            else:
                place[parts[-1]] = each["value"]
        if changed["metadata"]["resourceVersion"] != self.workload["metadata"]["resourceVersion"]:
            return status(409, "the object has been modified")
        if "dryRun" not in request.url.params:
            self.writes.append(request)
            changed["metadata"]["resourceVersion"] += "1"
            changed["metadata"]["generation"] += 1
            self.workload = changed
        return httpx.Response(200, json=changed)


@pytest.fixture
def wire() -> Any:
    with respx.mock(assert_all_called=False) as router:
        yield router


@pytest.fixture
async def platform() -> AsyncIterator[KubernetesClient]:
    async with client() as opened:
        yield opened


async def prepared(platform: KubernetesClient, images: dict[str, str], base: int = 0) -> Change:
    revisions = await platform.revisions(WEB)
    return await platform.prepare(
        WEB,
        revisions[base],
        images,
        clusters=["here"],
        release_id="r-1",
        note="",
        requested_by="ada",
        key="k",
    )


V3 = {"app": "registry.local/app:v3"}


# ---- names and workloads ------------------------------------------------------------------------


def test_the_client_implements_the_port() -> None:
    assert isinstance(client(), Platform)


@pytest.mark.parametrize(
    ("text", "kinds", "name"),
    [
        ("web", ["Deployment", "StatefulSet", "DaemonSet"], "web"),
        ("deployment/web", ["Deployment"], "web"),
        ("deployments.apps/web", ["Deployment"], "web"),
        ("sts/db", ["StatefulSet"], "db"),
        ("ds/agent", ["DaemonSet"], "agent"),
    ],
)
def test_a_workload_is_named_as_for_kubectl(text: str, kinds: list[str], name: str) -> None:
    found, short = parse_name(text)
    assert ([kind.name for kind in found], short) == (kinds, name)


@pytest.mark.parametrize("text", ["pod/web", "/web", "deployment/"])
def test_a_name_of_no_workload_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="names no workload"):
        parse_name(text)


async def test_a_workload_is_found_by_its_name_alone(
    wire: respx.MockRouter, platform: KubernetesClient
) -> None:
    Cluster(wire)
    found = await platform.workload("shop", "app")
    placement = platform.placement(found)
    assert (found.id, found.name) == ("deployment/app", "deployment/app")
    assert placement.replicas == {"here": None}
    assert placement.strategy is not None
    assert placement.strategy.type == "RollingUpdate"


async def test_a_name_of_two_workloads_has_to_name_its_kind(
    wire: respx.MockRouter, platform: KubernetesClient
) -> None:
    cluster = Cluster(wire)
    wire.get(f"{HOST}{SPACE}/statefulsets/app").mock(return_value=httpx.Response(200, json=cluster.workload))
    with pytest.raises(InputError, match="several workloads") as caught:
        await platform.workload("shop", "app")
    assert "deployment/app, statefulset/app" in caught.value.advice


async def test_an_unknown_workload_names_similar_ones(
    wire: respx.MockRouter, platform: KubernetesClient
) -> None:
    Cluster(wire)
    for kind in ("deployments", "statefulsets", "daemonsets"):
        wire.get(f"{HOST}{SPACE}/{kind}/apq").mock(return_value=status(404, "not found"))
    with pytest.raises(DeploymentNotFoundError) as caught:
        await platform.workload("shop", "apq")
    assert caught.value.data["known"] == ["deployment/app"]


async def test_an_unknown_namespace_is_not_an_unknown_workload(
    wire: respx.MockRouter, platform: KubernetesClient
) -> None:
    for kind in ("deployments", "statefulsets", "daemonsets"):
        wire.get(f"{HOST}/apis/apps/v1/namespaces/shpo/{kind}/app").mock(return_value=status(404, "gone"))
        wire.get(f"{HOST}/apis/apps/v1/namespaces/shpo/{kind}").mock(return_value=listed([]))
    wire.get(f"{HOST}/api/v1/namespaces/shpo").mock(return_value=status(404, "gone"))
    with pytest.raises(AppNotFoundError, match="no namespace 'shpo'"):
        await platform.workload("shpo", "app")


@pytest.mark.parametrize(
    ("case", "at", "change", "says"),
    [
        ("healthy", 0, {"paused": True}, "is paused"),
        ("sts-partition", 0, {}, "has the partition 2"),
        ("ds-healthy", 0, {"updateStrategy": {"type": "OnDelete"}}, "OnDelete"),
    ],
)
async def test_a_workload_whose_pods_nobody_would_replace_is_refused(
    wire: respx.MockRouter, platform: KubernetesClient, case: str, at: int, change: Json, says: str
) -> None:
    trace = read(case)
    found = json.loads(json.dumps(trace.states[at].seen.workload))
    found["spec"] |= change
    wire.get(f"{HOST}{SPACE}/{trace.kind.plural}/app").mock(return_value=httpx.Response(200, json=found))
    wire.get(f"{HOST}/apis/autoscaling/v2/namespaces/shop/horizontalpodautoscalers").mock(
        return_value=listed([])
    )
    workload = await platform.workload("shop", f"{trace.kind.prefix}/app")  # its status can be read
    with pytest.raises(WorkloadError, match=says):
        platform.placement(workload)


async def test_an_autoscaler_sets_the_replicas(wire: respx.MockRouter, platform: KubernetesClient) -> None:
    Cluster(wire)
    autoscaler = {
        "metadata": {"name": "web"},
        "spec": {"scaleTargetRef": {"kind": "Deployment", "name": "app"}},
    }
    wire.get(f"{HOST}/apis/autoscaling/v2/namespaces/shop/horizontalpodautoscalers").mock(
        return_value=listed([autoscaler])
    )
    found = await platform.workload("shop", "deployment/app")
    assert platform.placement(found).scaled_by == {"here": "the HorizontalPodAutoscaler web"}


async def test_a_daemonset_has_no_replicas_to_scale(
    wire: respx.MockRouter, platform: KubernetesClient
) -> None:
    agent = WEB.model_copy(update={"id": "daemonset/agent", "name": "daemonset/agent"})
    with pytest.raises(WorkloadError, match="a pod on each node"):
        await platform.scale(agent, "here", 5, online="x", key="k")


def test_a_cluster_that_does_not_have_the_workload_is_refused() -> None:
    with pytest.raises(ClusterNotFoundError) as caught:
        client().placement(WEB, ["there"])
    assert caught.value.data["known"] == ["here"]


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        ({}, []),
        (
            {"annotations": {"argocd.argoproj.io/tracking-id": "shop:apps/Deployment:shop/web"}},
            ["Argo CD (shop)"],
        ),
        ({"labels": {"kustomize.toolkit.fluxcd.io/name": "apps"}}, ["Flux (apps)"]),
        ({"annotations": {"meta.helm.sh/release-name": "web"}}, ["Helm (web)"]),
        (
            {
                "labels": {"helm.toolkit.fluxcd.io/name": "web"},
                "annotations": {"meta.helm.sh/release-name": "web"},
            },
            ["Flux (web)"],
        ),
        ({"managedFields": [{"manager": "argocd-controller", "fieldsV1": {"f:spec": {}}}]}, ["Argo CD:"]),
        ({"managedFields": [{"manager": "helm", "subresource": "scale", "fieldsV1": {"f:spec": {}}}]}, []),
        ({"managedFields": [{"manager": "kubectl-set", "fieldsV1": {"f:spec": {}}}]}, []),
        (
            {"ownerReferences": [{"kind": "Shop", "name": "web", "controller": True}]},
            ["its owner, Shop web"],
        ),
    ],
)
def test_what_may_revert_a_release_is_named(metadata: Json, says: list[str]) -> None:
    found = managed_by({"metadata": metadata})
    assert len(found) == len(says)
    assert all(f"managed by {words}" in note for words, note in zip(says, found, strict=True))


async def test_a_plan_says_who_may_revert_the_release_and_what_sets_the_replicas(
    wire: respx.MockRouter, platform: KubernetesClient
) -> None:
    cluster = Cluster(wire)
    cluster.workload["metadata"].setdefault("labels", {})["kustomize.toolkit.fluxcd.io/name"] = "apps"
    placement = platform.placement(await platform.workload("shop", "deployment/app"))
    (note,) = placement.notes["here"]
    assert note.startswith("managed by Flux (apps)")
    newest, _ = await platform.revisions(WEB)
    plan = release_plan(
        Action.DEPLOY,
        [Target("here", Baseline(online=newest.id, revision=newest), newest, V3, Replicas(None))],
        platform="p",
        cloud="",
        target="",
        workload=WEB,
        placement=placement,
        creates=True,
        procedure=Procedure(),
    )
    assert any(note in line for line in plan_lines(plan))
    assert note in render_plan(plan).replace("\\", "")


async def test_commands_of_a_workload_can_be_copied() -> None:
    connection = Connection("here", Credentials(), options=["--context", "prod bj"])
    async with KubernetesClient({"here": connection}) as platform:
        assert platform.commands(WEB, "here") == [
            "kubectl --context 'prod bj' -n shop describe deployment/app",
            "kubectl --context 'prod bj' -n shop get pods -l app=web",
            "kubectl --context 'prod bj' -n shop rollout history deployment/app",
        ]
        assert platform.commands(WEB, "here", "app-1", "app") == [
            "kubectl --context 'prod bj' -n shop describe pod/app-1",
            "kubectl --context 'prod bj' -n shop logs app-1 --previous -c app",
        ]


# ---- revisions ----------------------------------------------------------------------------------


async def test_revisions_are_found_by_id_number_and_hash(
    wire: respx.MockRouter, platform: KubernetesClient
) -> None:
    cluster = Cluster(wire)
    newest, oldest = await platform.revisions(WEB)
    assert newest.images == {"app": "registry.local/app:v2"}
    assert oldest.images == {"app": "registry.local/app:v1"}
    label = cluster.holders[1]["metadata"]["labels"]["pod-template-hash"]
    for name in (oldest.id, "1", 1, label):
        assert (await platform.revision(WEB, name)).id == oldest.id
    with pytest.raises(TemplateNotFoundError):
        await platform.revision(WEB, 7)
    assert await platform.online(WEB) == {"here": newest.id}
    assert [each async for each in platform.published(WEB)] == [("here", newest.id), ("here", oldest.id)]
    assert "image" not in json.dumps(await platform.pod_template(WEB, newest.id)).replace("imagePull", "")


async def test_each_cluster_has_revisions_of_its_own(wire: respx.MockRouter) -> None:
    first = Cluster(wire)
    there = respx.MockRouter(assert_all_called=False)
    second = Cluster(there)
    second.workload["spec"]["template"]["spec"]["containers"][0]["env"] = [{"name": "REGION", "value": "sh"}]
    connections = {
        "here": Connection("here", Credentials()),
        "there": Connection("there", Credentials(), transport=httpx.MockTransport(there.async_handler)),
    }
    both = WEB.model_copy(update={"handle": {**cast(Json, WEB.handle), "clusters": ["here", "there"]}})
    async with KubernetesClient(connections) as platform:
        assert platform.groups(["here", "there"]) == [["here"], ["there"]]
        online = await platform.online(both)
        assert online["here"] != online["there"]
        with pytest.raises(TemplateNotFoundError, match="in here"):
            await platform.revision(both, online["there"], "here")
        assert (await platform.revision(both, online["there"])).id == online["there"]
        for cluster, of in (("here", first), ("there", second)):
            base = (await platform.revisions(both, cluster))[0]
            assert base.id == online[cluster]
            change = await platform.prepare(
                both, base, V3, clusters=[cluster], release_id="r", note="", requested_by="", key="k"
            )
            await platform.apply(both, cluster, change, replicas=None, over=base.id, key="k")
            assert len(of.writes) == 1
    container = second.workload["spec"]["template"]["spec"]["containers"][0]
    assert (container["image"], container["env"][0]["value"]) == (V3["app"], "sh")


# ---- writes -------------------------------------------------------------------------------------


async def test_a_release_is_one_patch_that_a_dry_run_has_checked(
    wire: respx.MockRouter, platform: KubernetesClient
) -> None:
    cluster = Cluster(wire)
    before = await platform.online(WEB)
    change = await prepared(platform, V3)
    dry_run = cluster.patches.calls.last.request.url.params
    assert (dry_run["dryRun"], dry_run["fieldValidation"]) == ("All", "Strict")
    assert cluster.writes == []
    applied = await platform.apply(WEB, "here", change, replicas=None, over=before["here"], key="k")
    assert applied == Applied(revision=change.revision or "", generation=3)
    (write,) = cluster.writes
    assert write.url.params["fieldManager"] == "prefect-rollout"
    assert "replicas" not in write.content.decode()
    assert cluster.workload["spec"]["template"]["spec"]["containers"][0]["image"] == V3["app"]
    notes = cluster.workload["metadata"]["annotations"]
    assert notes["prefect-rollout/release"] == "r-1"
    assert notes["prefect-rollout/revision"] == change.revision
    assert notes["prefect-rollout/requested-by"] == "ada"
    assert "annotations" not in cluster.workload["spec"]["template"]["metadata"]
    made = (await platform.revisions(WEB))[0]
    assert (made.id, made.made_by, made.author) == (change.revision, "r-1", "ada")


async def test_a_repeated_write_finds_its_own_and_writes_nothing(
    wire: respx.MockRouter, platform: KubernetesClient
) -> None:
    cluster = Cluster(wire)
    over = (await platform.online(WEB))["here"]
    change = await prepared(platform, V3)
    first = await platform.apply(WEB, "here", change, replicas=None, over=over, key="k")
    assert await platform.apply(WEB, "here", change, replicas=None, over=over, key="k") == first
    assert len(cluster.writes) == 1


async def test_the_same_image_is_nothing_to_write(wire: respx.MockRouter, platform: KubernetesClient) -> None:
    cluster = Cluster(wire)
    change = await prepared(platform, {"app": "registry.local/app:v2"})
    applied = await platform.apply(WEB, "here", change, replicas=None, over=change.base, key="k")
    assert (applied.revision, cluster.writes) == (change.base, [])


async def test_a_new_status_between_read_and_write_is_no_conflict(
    wire: respx.MockRouter, platform: KubernetesClient
) -> None:
    cluster = Cluster(wire)
    change = await prepared(platform, V3)

    def moved() -> None:
        cluster.workload["metadata"]["resourceVersion"] = "99999"

    cluster.answers = [moved, moved]
    await platform.apply(WEB, "here", change, replicas=None, over=change.base, key="k")
    assert len(cluster.writes) == 1


async def test_a_change_of_somebody_else_is_a_conflict_and_stays(
    wire: respx.MockRouter, platform: KubernetesClient
) -> None:
    cluster = Cluster(wire)
    change = await prepared(platform, V3)

    def edited() -> None:
        cluster.workload["metadata"]["resourceVersion"] = "99999"
        cluster.workload["spec"]["template"]["spec"]["containers"][0]["image"] = "other:1"

    cluster.answers = [edited]
    with pytest.raises(ConflictError, match="changed after this run was planned"):
        await platform.apply(WEB, "here", change, replicas=None, over=change.base, key="k")
    assert cluster.writes == []
    assert cluster.workload["spec"]["template"]["spec"]["containers"][0]["image"] == "other:1"


async def test_a_rollback_restores_the_pod_template_and_its_marks(
    wire: respx.MockRouter, platform: KubernetesClient
) -> None:
    cluster = Cluster(wire)
    newest, oldest = await platform.revisions(WEB)
    back = await platform.revert(WEB, oldest)
    assert back.revision == oldest.id
    applied = await platform.apply(WEB, "here", back, replicas=None, over=newest.id, key="k")
    assert applied.revision == oldest.id == (await platform.online(WEB))["here"]
    assert "prefect-rollout/release" not in cluster.workload["metadata"]["annotations"]


async def test_a_revision_that_is_no_longer_kept_is_refused_before_the_write(
    wire: respx.MockRouter, platform: KubernetesClient
) -> None:
    cluster = Cluster(wire)
    _, oldest = await platform.revisions(WEB)
    back = await platform.revert(WEB, oldest)
    cluster.holders = cluster.holders[:1]
    with pytest.raises(UpgradeError, match="no longer kept"):
        await platform.apply(WEB, "here", back, replicas=None, over=None, key="k")
    assert cluster.writes == []


async def test_a_refusal_of_the_dry_run_is_the_api_servers(
    wire: respx.MockRouter, platform: KubernetesClient
) -> None:
    cluster = Cluster(wire)
    cluster.answers = [lambda: status(422, 'Deployment.apps "app" is invalid: spec.template: bad')]
    with pytest.raises(RejectedError, match=r"spec\.template: bad"):
        await prepared(platform, V3)
    assert cluster.writes == []


async def test_a_restart_makes_a_revision_and_a_repeat_finds_it(
    wire: respx.MockRouter, platform: KubernetesClient
) -> None:
    cluster = Cluster(wire)
    online = (await platform.online(WEB))["here"]
    first = await platform.restart(WEB, "here", online=online, key="r-2:restart:here")
    assert first.revision != online
    assert await platform.restart(WEB, "here", online=online, key="r-2:restart:here") == first
    assert await platform.restarted(WEB, "here", Baseline(online=online), key="r-2:restart:here") == first
    assert await platform.restarted(WEB, "here", Baseline(online=online), key="r-3:restart:here") is None
    assert await platform.online(WEB) == {"here": first.revision}
    assert len(cluster.writes) == 1
    with pytest.raises(ConflictError):
        await platform.restart(WEB, "here", online=online, key="r-3:restart:here")


async def test_a_change_after_a_restart_does_not_count_as_the_restart(
    wire: respx.MockRouter, platform: KubernetesClient
) -> None:
    cluster = Cluster(wire)
    online = (await platform.online(WEB))["here"]
    first = await platform.restart(WEB, "here", online=online, key="k")
    cluster.workload["spec"]["template"]["spec"]["containers"][0]["image"] = "other:1"
    again = await platform.restarted(WEB, "here", Baseline(online=online), key="k")
    assert again == first
    assert first.revision != (await platform.online(WEB))["here"]


async def test_a_retried_restart_continues_after_its_own_revision(
    wire: respx.MockRouter, platform: KubernetesClient
) -> None:
    Cluster(wire)
    online = (await platform.online(WEB))["here"]
    move = Move(
        cluster="here", replicas=None, revision=online, before=Baseline(online=online), restarted=True
    )
    await platform.restart(WEB, "here", online=online, key=restart_key("r-2", "here"))
    await nothing_between(platform, WEB, [move], "r-2")
    with pytest.raises(ConflictError):
        await nothing_between(platform, WEB, [move], "r-3")


async def test_the_age_of_a_revision_is_that_of_its_creation(
    wire: respx.MockRouter, platform: KubernetesClient
) -> None:
    cluster = Cluster(wire)
    newest, oldest = await platform.revisions(WEB)
    assert oldest.is_older_than(newest)
    # An undo renumbers the revision that it returns to, and does not make it younger.
    first = read("healthy").states[0].seen.workload
    assert first is not None
    cluster.workload["spec"]["template"] = first["spec"]["template"]
    current, other = await platform.revisions(WEB)
    assert (current.id, other.id) == (oldest.id, newest.id)
    assert current.is_older_than(other)
    assert not other.is_older_than(None)


async def test_a_scale_uses_the_scale_subresource(wire: respx.MockRouter, platform: KubernetesClient) -> None:
    cluster = Cluster(wire)
    scaled = wire.patch(f"{APP}/scale").mock(return_value=httpx.Response(200, json={"kind": "Scale"}))
    await platform.scale(WEB, "here", 3, online="x", key="k")  # it has 3
    assert not scaled.called
    await platform.scale(WEB, "here", 5, online="x", key="k")
    assert json.loads(scaled.calls.last.request.content) == {"spec": {"replicas": 5}}
    assert cluster.writes == []


def stuck(wire: respx.MockRouter) -> tuple[Workload, Json]:
    """A StatefulSet that returned to another revision while a pod could not become ready, and that pod."""
    trace = read("sts-healthy")
    seen, found = trace.states[0].seen, json.loads(json.dumps(trace.states[-1].seen.workload))
    pods = json.loads(json.dumps(seen.pods))
    for condition in pods[-1]["status"]["conditions"]:
        condition["status"] = "False" if condition["type"] == "Ready" else condition["status"]
    holders = list(trace.states[-1].seen.holders)
    wire.get(f"{HOST}{SPACE}/statefulsets/app").mock(return_value=httpx.Response(200, json=found))
    wire.get(f"{HOST}{SPACE}/statefulsets").mock(return_value=listed([found]))
    wire.get(f"{HOST}{SPACE}/controllerrevisions").mock(return_value=listed(holders))
    wire.get(f"{HOST}/api/v1/namespaces/shop/pods").mock(return_value=listed(pods))
    wire.get(f"{HOST}/api/v1/namespaces/shop/events").mock(return_value=listed([]))
    return WEB.model_copy(update={"id": "statefulset/app", "name": "statefulset/app"}), pods[-1]


async def test_a_pod_that_blocks_a_statefulset_is_named_and_deleted_on_request(
    wire: respx.MockRouter, platform: KubernetesClient
) -> None:
    workload, pod = stuck(wire)
    name, revision = pod["metadata"]["name"], (await platform.online(workload))["here"]
    conditions = (await platform.status(workload, ["here"]))["here"].conditions
    assert any(f"waits for {name} of another revision" in each.text for each in conditions)
    delete = wire.delete(f"{HOST}/api/v1/namespaces/shop/pods/{name}").mock(
        return_value=httpx.Response(200, json={"kind": "Status"})
    )
    assert await platform.unblock(workload, "here", revision=revision) == [name]
    sent = json.loads(delete.calls.last.request.content)["preconditions"]
    assert sent == {key: pod["metadata"][key] for key in ("uid", "resourceVersion")}
    delete.mock(return_value=status(409, "the pod has changed"))
    assert await platform.unblock(workload, "here", revision=revision) == []


def test_earlier_revisions_of_a_statefulset_name_their_releases() -> None:
    trace = read("sts-healthy")
    found: Json = json.loads(json.dumps(trace.states[-1].seen.workload))
    holders = list(trace.states[-1].seen.holders)
    second, first = (each.id for each in stored_revisions(trace.kind, found, holders))
    marks = with_release({RELEASES: f"{first}=r-1"}, second, "r-2")
    found["metadata"].setdefault("annotations", {}).update(
        {RELEASES: marks, RELEASE: "r-2", RELEASED: second}
    )
    made = {each.id: each.listed.made_by for each in stored_revisions(trace.kind, found, holders)}
    assert made == {first: "r-1", second: "r-2"}
    many = {RELEASES: ""}
    for number in range(30):
        many = {RELEASES: with_release(many, f"v{number}", f"r-{number}")}
    assert list(releases_of(many)) == [f"v{number}" for number in range(20, 30)]


async def test_a_deployment_has_no_pods_that_block_it(
    wire: respx.MockRouter, platform: KubernetesClient
) -> None:
    Cluster(wire, "bad-image")
    online = (await platform.online(WEB))["here"]
    assert await platform.unblock(WEB, "here", revision=online) == []


# ---- errors -------------------------------------------------------------------------------------


FORBIDDEN = (
    'deployments.apps "app" is forbidden: User "releaser" cannot get resource "deployments" in API group '
    '"apps" in the namespace "shop"'
)


@pytest.mark.parametrize(
    ("answer", "kind", "says", "retryable"),
    [
        (status(401, "Unauthorized"), AuthenticationError, "does not accept the credentials", False),
        (status(403, FORBIDDEN), AccessDeniedError, 'cannot get resource "deployments"', False),
        (status(403, "exceeded quota: pods"), QuotaExceededError, "exceeded quota", False),
        (status(404, "not found"), DeploymentNotFoundError, "any more", False),
        (status(422, "is invalid"), RejectedError, "is invalid", False),
        (status(429, "too many"), OverloadedError, "too many", True),
        (status(500, "etcdserver: timed out"), ServerFaultError, "etcdserver", True),
        (status(503, "apiserver is shutting down"), OverloadedError, "shutting down", True),
        (httpx.Response(502, text="<html>"), ServerFaultError, "refused GET", True),
        (httpx.Response(302, headers={"Location": "/login"}), UnusableAnswerError, "redirect", False),
        (httpx.Response(200, text="<html>"), UnusableAnswerError, "not the JSON", True),
        (httpx.Response(200, json=[1]), UnusableAnswerError, "not the JSON", False),
    ],
)
async def test_an_answer_is_an_error_of_its_kind(
    wire: respx.MockRouter,
    platform: KubernetesClient,
    answer: httpx.Response,
    kind: type[RolloutError],
    says: str,
    retryable: bool,
) -> None:
    wire.get(APP).mock(return_value=answer)
    with pytest.raises(kind, match=says) as caught:
        await platform.online(WEB)
    assert caught.value.retryable is retryable
    assert caught.value.data["cluster"] == "here"
    assert caught.value.advice


async def test_retry_after_is_passed_on(wire: respx.MockRouter, platform: KubernetesClient) -> None:
    wire.get(APP).mock(return_value=httpx.Response(429, headers={"Retry-After": "7"}, json={}))
    with pytest.raises(OverloadedError) as caught:
        await platform.online(WEB)
    assert caught.value.retry_after == 7


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (httpx.ConnectError("refused"), UnreachableError),
        (httpx.ReadError("reset"), UnreachableError),
        (httpx.RemoteProtocolError("closed"), UnreachableError),
        (httpx.ReadTimeout("slow"), UnreachableError),
        (httpx.UnsupportedProtocol("no scheme"), ConfigurationError),
    ],
)
async def test_no_error_of_httpx_leaves_the_client(
    wire: respx.MockRouter, platform: KubernetesClient, error: Exception, kind: type[RolloutError]
) -> None:
    wire.get(APP).mock(side_effect=error)
    with pytest.raises(kind, match="here"):
        await platform.online(WEB)


async def test_a_certificate_that_is_not_trusted_is_a_setting() -> None:
    def refuse(_: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("verify failed") from ssl.SSLCertVerificationError("self-signed")

    connection = Connection("here", Credentials(), transport=httpx.MockTransport(refuse))
    async with KubernetesClient({"here": connection}) as platform:
        with pytest.raises(ConfigurationError, match="not trusted") as caught:
            await platform.online(WEB)
    assert "certificate-authority" in caught.value.advice


async def test_an_expired_token_is_renewed_once(wire: respx.MockRouter) -> None:
    credentials = Credentials()
    cluster = Cluster(wire)
    alive = httpx.Response(200, json=cluster.workload)
    cluster.reads.mock(
        side_effect=lambda request: (
            alive if request.headers["Authorization"] == "Bearer token-2" else status(401, "Unauthorized")
        )
    )
    async with client(credentials) as platform:
        await platform.online(WEB)
        await platform.online(WEB)
    assert credentials.count == 2
    assert cluster.reads.call_count == 3


async def test_without_the_extra_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kubernetes_asyncio.client", None)
    block = Kubernetes.model_validate({"clusters": [{"name": "here", "context": "x"}]})
    with pytest.raises(ConfigurationError) as caught:
        await block.get_client().__aenter__()
    assert 'pip install "prefect-rollout[kubernetes]"' in caught.value.advice


# ---- watch --------------------------------------------------------------------------------------


def event(kind: str, found: Object) -> str:
    return json.dumps({"type": kind, "object": found}) + "\n"


class Held(httpx.AsyncByteStream):
    """A watch that reports events after `start`, then stays open or breaks off."""

    def __init__(
        self, lines: list[str], error: Exception | None = None, start: asyncio.Event | None = None
    ) -> None:
        self.lines, self.error, self.start = lines, error, start

    async def __aiter__(self) -> AsyncIterator[bytes]:
        if self.start:
            await self.start.wait()
        for line in self.lines:
            yield line.encode()
        if self.error:
            raise self.error
        await asyncio.Event().wait()


class Watches(httpx.AsyncBaseTransport):
    """Answers watches itself, by path and in order, then keeps them open; leaves other requests to respx.

    respx reads an answer to its end, which a watch does not have.
    """

    def __init__(self, wire: respx.MockRouter, **answers: list[httpx.Response]) -> None:
        self.wire, self.answers = wire, answers
        self.opened: list[str] = []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if "watch" not in request.url.params:
            return await self.wire.async_handler(request)
        plural = request.url.path.rpartition("/")[2]
        self.opened.append(plural)
        assert request.url.params["resourceVersion"]
        left = self.answers.get(plural)
        return left.pop(0) if left else httpx.Response(200, stream=Held([]))

    def client(self) -> KubernetesClient:
        return KubernetesClient({"here": Connection("here", Credentials(), transport=self)})


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "SHORTEST_WATCH", 0.01)


@pytest.fixture
def router() -> respx.MockRouter:
    return respx.MockRouter(assert_all_called=False)


async def pods_of(looks: AsyncIterator[Observation]) -> int:
    look = await anext(looks)
    assert look.clusters is not None
    return len(look.clusters["here"].pods or [])


async def test_a_watch_observes_at_once_and_after_each_change(router: respx.MockRouter, fast: None) -> None:
    cluster = Cluster(router)
    seen = asyncio.Event()
    gone = httpx.Response(200, stream=Held([event("DELETED", cluster.pods[0])], start=seen))
    async with (
        Watches(router, pods=[gone]).client() as platform,
        aclosing(platform.watch(WEB, ["here"], 60)) as looks,
    ):
        assert await pods_of(looks) == 3
        seen.set()
        while await pods_of(looks) != 2:
            pass


async def test_a_watch_that_expired_lists_again(router: respx.MockRouter, fast: None) -> None:
    pods = Cluster(router).pods
    expired: Json = {"kind": "Status", "code": 410, "message": "too old resource version"}
    watches = Watches(
        router,
        pods=[
            httpx.Response(200, stream=Held([json.dumps({"type": "ERROR", "object": expired}) + "\n"])),
            httpx.Response(410, json=expired),
        ],
    )
    router.get(f"{HOST}/api/v1/namespaces/shop/pods").mock(
        side_effect=lambda _: listed(pods if watches.opened.count("pods") == 0 else pods[:1])
    )
    async with watches.client() as platform, aclosing(platform.watch(WEB, ["here"], 0.2)) as looks:
        while await pods_of(looks) != 1:
            pass
    assert watches.opened.count("pods") <= 3


async def test_a_watch_that_breaks_off_is_reported_and_opened_again(
    router: respx.MockRouter, fast: None
) -> None:
    Cluster(router)
    broken = httpx.Response(200, stream=Held([], httpx.ReadError("reset")))
    async with (
        Watches(router, replicasets=[broken]).client() as platform,
        aclosing(platform.watch(WEB, ["here"], 0.2)) as looks,
    ):
        errors = [(await anext(looks)).error]
        while not isinstance(errors[-1], UnreachableError):
            errors.append((await anext(looks)).error)
        while errors[-1] is not None:
            errors.append((await anext(looks)).error)


async def test_a_denied_watch_is_an_error_of_the_observation(
    wire: respx.MockRouter, platform: KubernetesClient
) -> None:
    wire.get(f"{HOST}{SPACE}/deployments").mock(return_value=status(403, FORBIDDEN))
    async with aclosing(platform.watch(WEB, ["here"], 60)) as looks:
        look = await anext(looks)
    assert isinstance(look.error, AccessDeniedError)


async def test_the_output_of_a_crashed_container_is_in_its_status(
    wire: respx.MockRouter, platform: KubernetesClient
) -> None:
    Cluster(wire, "crash-loop", 20)
    logs = wire.get(url__regex=rf"{HOST}/api/v1/namespaces/shop/pods/[a-z0-9-]+/log").mock(
        return_value=httpx.Response(200, text="starting\npanic: no database\n")
    )
    status = (await platform.status(WEB, ["here"]))["here"]
    lines = [each.log_lines for pod in status.pods or [] for each in pod.container_status or [] if each]
    assert ["starting", "panic: no database"] in lines
    assert logs.calls.last.request.url.params["previous"] == "true"


async def test_output_that_cannot_be_read_leaves_the_status(
    wire: respx.MockRouter, platform: KubernetesClient
) -> None:
    Cluster(wire, "crash-loop", 20)
    wire.get(url__regex=rf"{HOST}/api/v1/namespaces/shop/pods/[a-z0-9-]+/log").mock(
        return_value=status(403, "pods/log is forbidden")
    )
    assert (await platform.status(WEB, ["here"]))["here"].pods


async def test_a_workload_that_is_gone_is_a_status(
    wire: respx.MockRouter, platform: KubernetesClient
) -> None:
    wire.get(f"{HOST}{SPACE}/deployments").mock(return_value=listed([]))
    found = (await platform.status(WEB, ["here"]))["here"]
    assert [each.category for each in found.conditions] == ["NotFound"]


# ---- rights -------------------------------------------------------------------------------------


Right = tuple[str, str, str]  # API group, resource, verb


def right_of(request: httpx.Request) -> Right:
    """Return the right that the API server checks for a request."""
    _, root, *parts = request.url.path.split("/")
    group = parts.pop(0) if root == "apis" else ""
    _version, _namespaces, _namespace, resource, *name = parts
    verb = {"GET": "get" if name else "list", "PATCH": "patch"}[request.method]
    verb = "watch" if "watch" in request.url.params else verb
    return (group, "/".join([resource, *name[1:]]), verb)


def rights_of_the_role() -> set[Right]:
    text = (Path(__file__).parent.parent / "deploy" / "kubernetes-rbac.yaml").read_text(encoding="utf-8")
    role, _binding = yaml.safe_load_all(text)
    return {
        (group, resource, verb)
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


class Recorded(Watches):
    """Records the right of each request."""

    def __init__(self, wire: respx.MockRouter) -> None:
        super().__init__(wire)
        self.rights: set[Right] = set()
        self.all_watched = asyncio.Event()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.rights.add(right_of(request))
        response = await super().handle_async_request(request)
        if len(set(self.opened)) == 4:
            self.all_watched.set()
        return response


@pytest.mark.parametrize("case", ["crash-loop", "sts-healthy", "ds-healthy"])
async def test_the_role_has_every_right_that_a_release_of_a_kind_uses(
    router: respx.MockRouter, case: str
) -> None:
    rights = await rights_used(router, case)
    assert rights <= rights_of_the_role()


async def test_the_role_has_no_right_that_nothing_uses() -> None:
    used: set[Right] = set()
    for case in ("crash-loop", "sts-healthy", "ds-healthy"):
        used |= await rights_used(respx.MockRouter(assert_all_called=False), case)
    assert used == rights_of_the_role()


async def rights_used(router: respx.MockRouter, case: str) -> set[Right]:
    """Return the rights that a release, a restart and a scale of a recorded workload use."""
    trace = read(case)
    kind, seen = trace.kind, trace.states[20].seen
    found: Json = json.loads(json.dumps(seen.workload))
    found["kind"] = kind.name
    core = f"{HOST}/api/v1/namespaces/shop"
    router.get(f"{core}/pods").mock(return_value=listed(list(seen.pods)))
    router.get(f"{core}/events").mock(return_value=listed([]))
    router.get(url__regex=rf"{core}/pods/[^/]+/log").mock(return_value=httpx.Response(200, text="panic"))
    router.get(f"{HOST}/apis/autoscaling/v2/namespaces/shop/horizontalpodautoscalers").mock(
        return_value=listed([])
    )
    router.get(f"{HOST}{SPACE}/{kind.revisions}").mock(return_value=listed(list(seen.holders)))
    router.get(f"{HOST}{SPACE}/{kind.plural}").mock(return_value=listed([found]))
    one = f"{HOST}{SPACE}/{kind.plural}/app"
    router.get(one).mock(return_value=httpx.Response(200, json=found))
    router.patch(url__regex=rf"{one}(/scale)?").mock(return_value=httpx.Response(200, json=found))
    recorded = Recorded(router)
    async with recorded.client() as platform:
        web = await platform.workload("shop", f"{kind.prefix}/app")
        revisions = await platform.revisions(web)
        online = (await platform.online(web))["here"]
        change = await platform.prepare(
            web, revisions[0], {}, clusters=["here"], release_id="r", note="", requested_by="ada", key="k"
        )
        await platform.apply(web, "here", change, replicas=None, over=None, key="k")
        await platform.restart(web, "here", online=online, key="k")
        if kind.name != "DaemonSet":
            await platform.scale(web, "here", 7, online=online, key="k")
        async with aclosing(platform.watch(web, ["here"], 60)) as looks:
            await anext(looks)
            await recorded.all_watched.wait()
    return recorded.rights
