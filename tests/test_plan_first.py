"""Plan first: dry runs, and releases that are held to what one showed.

What was written is judged by the simulated cloud's own record.
"""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from prefect import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId
from prefect.flow_engine import run_flow_async
from prefect.states import AwaitingRetry

from prefect_rollout.errors import (
    ConflictError,
    ContainerNotFoundError,
    InputError,
    NoTemplateError,
    PlanChangedError,
    RejectedError,
    ReleaseTimedOutError,
    RolloutError,
)
from prefect_rollout.flows import deploy_latest_image, restart, rollback, scale
from prefect_rollout.platforms.container_cloud.payloads import Template
from prefect_rollout.release.plan import Procedure, ReleasePlan, Target, release_plan, with_changes
from prefect_rollout.release.plan_words import NOTHING, change_words, plan_lines, summary
from prefect_rollout.release.pod_diff import differences
from prefect_rollout.release.progress import STEPS_OF
from prefect_rollout.release.replicas import Replicas
from prefect_rollout.release.report import render, render_plan
from prefect_rollout.release.request import Action, ReleaseRequest
from prefect_rollout.release.result import Outcome, ReleaseResult
from prefect_rollout.release.workload import Baseline, Placement, Revision, Workload
from prefect_rollout.simulator.shapes import UpgradeBody
from support import BIN, Cloud


def html(markdown: str) -> str:
    return str(MarkdownIt("commonmark", {"html": True}).enable("table").render(markdown))


# ---- what differs -------------------------------------------------------------------------------


def container(**fields: Any) -> dict[str, Any]:
    return {"name": "web", "image": "r/web:1", **fields}


def pods(*containers: dict[str, Any], labels: dict[str, str] | None = None, **spec: Any) -> dict[str, Any]:
    return {"metadata": {"labels": labels or {}}, "spec": {"containers": list(containers), **spec}}


def told(before: dict[str, Any], after: dict[str, Any]) -> dict[str, str]:
    return {change.path: change_words(change) for change in differences(before, after)}


def probe(path: str) -> dict[str, Any]:
    return {"httpGet": {"path": path, "port": 80}, "periodSeconds": 5}


@pytest.mark.parametrize(
    ("before", "after", "where", "words"),
    [
        (
            container(resources={"limits": {"cpu": "1"}}),
            container(resources={"limits": {"cpu": "2"}}),
            "resources.limits[cpu]",
            "1 → 2",
        ),
        (container(), container(imagePullPolicy="Always"), "imagePullPolicy", "added: Always"),
        (container(imagePullPolicy="Always"), container(), "imagePullPolicy", "removed: Always"),
        (
            container(ports=[{"containerPort": 80}]),
            container(ports=[{"containerPort": 80, "name": "http"}]),
            "ports[80].name",
            "added",
        ),
        (
            container(livenessProbe=probe("/healthz")),
            container(livenessProbe=probe("/live")),
            "livenessProbe.httpGet.path",
            "value changed, not shown",
        ),
        (
            container(livenessProbe=probe("/?token=x")),
            container(livenessProbe=probe("/live")),
            "livenessProbe.httpGet.path",
            "value changed, not shown",
        ),
        (
            container(env=[{"name": "A", "value": "1"}]),
            container(env=[{"name": "A", "value": "2"}]),
            "env[A].value",
            "value changed, not shown",
        ),
        (container(), container(env=[{"name": "A", "value": "2"}]), "env[A]", "added"),
        (
            container(env=[{"name": "A"}, {"name": "B"}]),
            container(env=[{"name": "B"}, {"name": "A"}]),
            "env",
            "order changed",
        ),
        (container(args=["a"]), container(args=["b"]), "args", "value changed, not shown"),
        (container(lifecycle={}), container(), "lifecycle", "removed"),
        (container(key="a"), container(key="b"), "(another field)", "value changed, not shown"),
        (container(stdin=1), container(stdin=True), "stdin", "value changed, not shown"),
    ],
)
def test_a_change_is_told_where_it_is(
    before: dict[str, Any], after: dict[str, Any], where: str, words: str
) -> None:
    assert told(pods(before), pods(after)) == {f"spec.containers[web].{where}": words}


def test_containers_volumes_and_labels_are_matched_by_name() -> None:
    side = {"name": "side", "image": "r/side:1", "env": [{"name": "KEY", "value": "secret"}]}
    before = pods(container(), labels={"app": "web", "tier": "a"}, volumes=[{"name": "data", "emptyDir": {}}])
    after = pods(
        side,
        container(),
        labels={"app": "web", "tier": "b"},
        volumes=[{"name": "conf", "configMap": {"name": "c1"}}, {"name": "data", "hostPath": {"path": "/d"}}],
    )
    assert told(before, after) == {
        "metadata.labels[tier]": "value changed, not shown",
        "spec.containers[side]": "added",
        "spec.volumes[conf]": "added",
        "spec.volumes[data].emptyDir": "removed",
        "spec.volumes[data].hostPath.path": "added",
    }


@pytest.mark.parametrize(
    "entries", [[{"value": "a"}], [{"name": {"KEY": "a"}}], ["KEY=a"], {"KEY": "a"}, [{"name": "x"}] * 2]
)
def test_a_list_whose_entries_have_no_names_is_one_change(entries: Any) -> None:
    assert told(pods(container(env=[])), pods(container(env=entries))) == {
        "spec.containers[web].env": "value changed, not shown"
    }


SECRET = "Xq7secretXq7"
LEAVES = st.none() | st.booleans() | st.integers(0, 3) | st.sampled_from(["", "a", "r/web:1", "1"])
NAMES = st.sampled_from(["web", "side", "KEY", "data"])
# Every field that hides its value, at its place; and what nobody knows, wherever an object stands.
HIDING = st.sampled_from([SECRET, [SECRET], {"a": SECRET}, {SECRET: "a"}, f"/?{SECRET}", f"{SECRET}=1 ", "b"])
UNKNOWN = st.dictionaries(st.sampled_from([SECRET, f"{SECRET} ", "secretField"]), HIDING, max_size=1)


def objects(**fields: Any) -> st.SearchStrategy[dict[str, Any]]:
    known = st.fixed_dictionaries({}, optional=fields)
    return st.tuples(known, UNKNOWN).map(lambda both: {**both[0], **both[1]})


def listed(entry: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.lists(entry, max_size=3) | HIDING


PROBES = objects(
    httpGet=objects(path=st.just(f"/?{SECRET}"), port=LEAVES, host=HIDING, httpHeaders=HIDING),
    exec=objects(command=HIDING),
    periodSeconds=LEAVES,
)
CONTAINERS = objects(
    name=NAMES,
    image=st.just("r/web:1"),
    env=listed(objects(name=NAMES, value=HIDING, valueFrom=HIDING)),
    envFrom=HIDING,
    args=HIDING,
    command=HIDING,
    workingDir=HIDING,
    lifecycle=HIDING,
    securityContext=HIDING,
    resources=objects(limits=st.dictionaries(st.just("cpu"), LEAVES)),
    livenessProbe=PROBES,
    volumeMounts=listed(objects(name=NAMES, mountPath=st.just("/data"), subPath=HIDING)),
)
PODS = objects(
    metadata=objects(
        annotations=st.dictionaries(st.just("note"), HIDING), labels=st.dictionaries(NAMES, LEAVES)
    ),
    spec=objects(
        containers=listed(CONTAINERS),
        initContainers=listed(CONTAINERS),
        volumes=listed(objects(name=NAMES, configMap=objects(name=NAMES, items=HIDING), nfs=HIDING)),
        affinity=HIDING,
        tolerations=HIDING,
        restartPolicy=LEAVES,
    ),
)


@given(PODS, PODS)
@settings(max_examples=300, deadline=None)
def test_whatever_differs_is_told_and_no_secret_is(before: dict[str, Any], after: dict[str, Any]) -> None:
    changes = differences(before, after)
    assert bool(changes) == (json.dumps(before, sort_keys=True) != json.dumps(after, sort_keys=True))
    assert SECRET not in "".join(change.model_dump_json() for change in changes)


# ---- the plan -----------------------------------------------------------------------------------


def revision(number: int, spec: dict[str, Any]) -> Revision:
    text = json.dumps({"kind": "Deployment", "spec": {"template": spec}})
    return Template(id=number, template=text).revision


def found(**changes: Any) -> Target:
    after = changes.get("after", revision(11, pods(container(image="r/web:2"))))
    fields = {
        "cluster": "c1",
        "online": 10,
        "before": revision(10, pods(container())),
        "after": after,
        "images": after.images,
        "pods": 1,
        "replicas": 1,
        **changes,
    }
    listed = None if fields["pods"] is None else {f"web-{each}": "Running" for each in range(fields["pods"])}
    return Target(
        cluster=fields["cluster"],
        before=Baseline(online=fields["online"], revision=fields["before"], pods=listed),
        after=after,
        images=fields["images"],
        replicas=Replicas(fields["replicas"]),
    )


def planned(*clusters: Target, **changes: Any) -> ReleasePlan:
    fields: dict[str, Any] = {"platform": "k8s.qihoo.net", "app_id": 1, "in_place": False, **changes}
    return release_plan(
        Action.DEPLOY,
        clusters or [found()],
        platform=fields["platform"],
        cloud="https://k8s.qihoo.net",
        target="container-cloud/default",
        workload=Workload(app_id=fields["app_id"], app="shop", id=2, name="web"),
        placement=Placement(replicas={"c1": 1}, in_place=fields["in_place"]),
        creates=True,
        procedure=Procedure(),
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"online": 12},
        {"online": None, "before": None},
        {"before": None},
        {"before": revision(10, pods(container(args=["a"])))},
        {"after": revision(12, pods(container(image="r/web:2")))},
        {"after": revision(11, pods(container(image="r/web:2", args=["a"])))},
        {"images": {"web": "r/web:3"}},
        {"replicas": 2},
        {"cluster": "c2"},
    ],
)
def test_the_hash_is_of_whatever_decides_what_comes_out(changes: dict[str, Any]) -> None:
    assert planned(found(**changes)).plan_hash != planned().plan_hash


def test_the_hash_is_the_same_for_other_pods_another_order_and_ids_as_text() -> None:
    two = found(cluster="c2")
    assert planned(found(), two).plan_hash == planned(two, found(pods=7, online="10")).plan_hash
    assert planned(app_id="1").plan_hash == planned().plan_hash
    assert planned(in_place=True).plan_hash != planned().plan_hash
    assert planned(platform="other").plan_hash != planned().plan_hash


def test_a_plan_that_changes_nothing_says_so() -> None:
    base = revision(11, pods(container()))
    plan = planned(found(after=base, images=base.images))
    assert plan.nothing
    assert NOTHING in html(render_plan(plan))
    assert NOTHING in plan_lines(plan)
    assert summary(plan).startswith("nothing would change")
    for pods_now in (None, 2):
        changed = planned(found(after=base, images=base.images, pods=pods_now))
        assert NOTHING not in render_plan(changed)


def test_what_cannot_be_read_is_said_to_be_unknown() -> None:
    page = html(render_plan(planned(found(before=None, pods=None))))
    assert "<td>unknown → 1</td>" in page
    assert "<li>c1: its pods are not reported now" in page
    assert "before: unknown" in page
    assert "<p>What else changes in the pod template is not known.</p>" in page
    nothing_online = html(render_plan(planned(found(online=None, before=None))))
    assert "<td>nothing online → new, from 11</td>" in nothing_online
    assert "not known" not in nothing_online


def test_clusters_that_change_alike_are_told_once_and_many_changes_counted() -> None:
    env = [{"name": f"KEY_{number}"} for number in range(250)]
    after = pods(container(image="r/web:2", env=env))
    one, two = (found(cluster=name, after=revision(11, after)) for name in ("c1", "c2"))
    changes = differences(pods(container(image="r/web:2")), after)
    plan = planned(one, two, found(cluster="c3"))
    page = html(render_plan(with_changes(plan, {"c1": changes, "c2": changes})))
    assert page.count("<td>spec.containers[web].env[KEY_99]</td>") == 1
    assert "KEY_100" not in page
    assert "<h2>Other changes of the pod template in c1, c2</h2>" in page
    assert "<p>… and 150 more.</p>" in page
    assert "<h2>Images in c3</h2>" in page


@pytest.mark.parametrize("value", ["0123456789abcde", "0123456789abcdeg", "newest"])
def test_a_hash_that_is_none_is_refused_in_words(value: str) -> None:
    with pytest.raises(InputError, match=r"expect_plan: .*16 digits, 0-9 and a-f") as caught:
        ReleaseRequest.of(app_id=1, deployment="web", expect_plan=value)
    assert caught.value.data["field"] == "expect_plan"
    copied = ReleaseRequest.of(app_id=1, deployment="web", expect_plan=" 0123456789ABCDEF\n")
    assert copied.expect_plan == "0123456789abcdef"


# ---- dry runs -----------------------------------------------------------------------------------

OLD, NEW = "Kd93olderXw", "Pf27newerZs"


def scenario(*, replicas: int = 2, **changes: Any) -> dict[str, Any]:
    """`web` in c1 and c2, whose newest template differs from what is online."""
    base = container(image="r/web:2", env=[{"name": "KEY", "value": NEW}], imagePullPolicy="Always")
    templates = [
        {"kind": "Deployment", "apiVersion": "apps/v1", "spec": {"template": spec}}
        for spec in (pods(container(env=[{"name": "KEY", "value": OLD}])), pods(base))
    ]
    deployment = {
        "id": 1,
        "name": "web",
        "clusters": {"c1": 1, "c2": replicas},
        "templates": [{"id": 10 + number, "template": each} for number, each in enumerate(templates)],
        "online": {"c1": 10, "c2": 10},
    }
    return {"apps": [{"id": 1, "name": "shop", "deployments": [{**deployment, **changes}]}]}


WEB: dict[str, Any] = {"app_id": 1, "deployment": "web", "poll_seconds": 0.1, "poll_attempts": 100}


@pytest.fixture
def shop(make_cloud: Any, prefect_api: str) -> Cloud:
    made: Cloud = make_cloud(**scenario())
    return made


async def plan_of(**parameters: Any) -> ReleasePlan:
    result: ReleaseResult = await deploy_latest_image(**{**WEB, **parameters}, dry_run=True)
    assert result.plan is not None
    return result.plan


async def artifact_of(result: ReleaseResult) -> tuple[str, str]:
    async with get_client() as client:
        artifacts = await client.read_artifacts(
            artifact_filter=ArtifactFilter(
                flow_run_id=ArtifactFilterFlowRunId(any_=[UUID(result.release_id)])
            )
        )
    (report,) = [artifact for artifact in artifacts if artifact.type == "markdown"]
    return str(report.key), str(report.data)


async def test_a_dry_run_reads_all_and_writes_nothing(shop: Cloud) -> None:
    async with get_client() as client:
        before = {limit.name for limit in await client.read_global_concurrency_limits(limit=200)}
    state = await deploy_latest_image(**WEB, dry_run=True, return_state=True)
    result = await state.aresult()
    assert shop.writes == []
    assert {seen["method"] for seen in shop.requests} == {"GET"}
    assert (result.outcome, result.template_id, result.base_template_id) == (Outcome.PLANNED, None, 11)
    assert (list(result.seconds), result.error) == (list(STEPS_OF["dry run"][:-1]), None)
    plan = result.plan
    assert plan is not None
    assert [
        (each.cluster, each.template_before, each.template, each.pods, each.replicas)
        for each in plan.clusters
    ] == [("c1", 10, None, 1, 1), ("c2", 10, None, 2, 2)]
    assert (state.name, state.type.value) == ("Planned", "COMPLETED")
    assert plan.plan_hash in str(state.message)
    assert "Nothing was written" in str(state.message)

    async with get_client() as client:
        run = await client.read_flow_run(UUID(result.release_id))
        limits = {limit.name for limit in await client.read_global_concurrency_limits(limit=200)}
    assert run.name == "plan web → 2"
    assert run.state is not None
    assert run.state.name == "Planned"
    assert (await run.state.aresult()) == result  # from where results persist
    assert limits == before  # it takes no lock

    key, report = await artifact_of(result)
    assert key == "plan-1-web"
    page = html(report)
    assert "<h1>📋 Plan: web, not yet released</h1>" in page
    for cell in (
        "10 → new, from 11",
        "2 → 2",
        "spec.containers[web].env[KEY].value",
        "value changed, not shown",
        "added: Always",
    ):
        assert f"<td>{cell}</td>" in page, cell
    assert "<li><strong>web</strong> before: r/web:1</li>" in page
    assert "<li><strong>web</strong> after: r/web:2</li>" in page
    assert f"<code>expect_plan={plan.plan_hash}</code>" in page
    shown = report + result.model_dump_json() + str(state.message) + "".join(plan_lines(plan))
    assert OLD not in shown
    assert NEW not in shown


async def test_a_dry_run_says_whether_a_plan_still_holds(shop: Cloud) -> None:
    plan = await plan_of()
    assert await plan_of(expect_plan=plan.plan_hash) == plan
    shop.inside.publish(1, 1, 11, "c1", 1, user="lisi", key=None)
    with pytest.raises(PlanChangedError, match="c1: template 11 → new, from 11, pods 1 → 1") as caught:
        await plan_of(expect_plan=plan.plan_hash)
    now = (await plan_of()).plan_hash
    assert caught.value.data == {"plan_hash": now, "expect_plan": plan.plan_hash}
    assert "Nothing was written" in str(caught.value)
    assert caught.value.result is not None
    assert (await artifact_of(caught.value.result))[0] == "plan-1-web"


async def test_a_dry_run_fails_where_the_release_would(shop: Cloud) -> None:
    with pytest.raises(ContainerNotFoundError):
        await plan_of(images={"nothing": "r/web:3"})
    assert shop.writes == []


async def test_a_dry_run_that_is_retried_plans_from_what_is_there_by_then(shop: Cloud) -> None:
    shop.faults({"call": "online", "kind": "status", "status": 400, "nth": 1})
    with pytest.raises(RejectedError) as caught:
        await plan_of()
    shop.control("PUT", "scenario", json=scenario(replicas=3))
    result = await retried(caught.value, dry_run=True)
    assert result.plan == await plan_of()
    assert [cluster.replicas for cluster in result.clusters] == [1, 3]


async def test_a_rollback_is_planned_cluster_by_cluster(shop: Cloud) -> None:
    await deploy_latest_image(**WEB)
    shop.inside.publish(1, 1, 11, "c1", 1, user="lisi", key=None)
    written = shop.writes
    result = await rollback(**WEB, dry_run=True)
    assert shop.writes == written
    assert result.plan is not None
    assert [(each.template_before, each.template) for each in result.plan.clusters] == [(11, 12), (12, 10)]
    assert [cluster.template for cluster in result.clusters] == [12, 10]
    assert "📋 Plan: web, not yet rolled back" in render(result)
    with pytest.raises(PlanChangedError):
        await rollback(**WEB, clusters=["c2"], expect_plan=result.plan.plan_hash)
    assert shop.writes == written
    back = await rollback(**WEB, expect_plan=result.plan.plan_hash)
    assert shop.writes[len(written) :] == ["publish 12 to c1", "publish 10 to c2"]
    assert back.outcome is Outcome.RELEASED


async def test_a_restart_is_planned_and_held_to_its_plan(shop: Cloud) -> None:
    result = await restart(**WEB, dry_run=True)
    assert shop.writes == []
    plan = result.plan
    assert plan is not None
    assert (result.outcome, plan.nothing) == (Outcome.PLANNED, False)
    assert [(each.template_before, each.template, each.changes) for each in plan.clusters] == [
        (10, 10, []),
        (10, 10, []),
    ]
    assert plan_lines(plan)[-2:] == [
        "Every pod would be replaced by a new one of the same template.",
        f"Plan hash: {plan.plan_hash}",
    ]
    assert "📋 Plan: web, not yet restarted" in render(result)
    # Another template is online by then: what would be restarted is not what was looked at.
    publish(shop)
    with pytest.raises(PlanChangedError):
        await restart(**WEB, expect_plan=plan.plan_hash)
    planned = (await restart(**WEB, dry_run=True)).plan
    assert planned is not None
    done = await restart(**WEB, expect_plan=planned.plan_hash)
    assert [write.split()[0] for write in shop.writes] == ["publish", "restart", "restart"]
    assert list(done.seconds) == list(STEPS_OF["restart"][:-1])


async def test_a_scaling_is_planned_and_held_to_its_plan(shop: Cloud) -> None:
    result = await scale(**WEB, replicas=3, dry_run=True)
    assert shop.writes == []
    plan = result.plan
    assert plan is not None
    assert [(each.pods, each.replicas) for each in plan.clusters] == [(1, 3), (2, 3)]
    assert plan_lines(plan)[1] == "  c1: template 10 stays; pods 1 → 3"
    with pytest.raises(PlanChangedError):
        await scale(**WEB, replicas=4, expect_plan=plan.plan_hash)
    assert shop.writes == []
    done = await scale(**WEB, replicas=3, expect_plan=plan.plan_hash)
    assert [write.split()[0] for write in shop.writes] == ["scale", "scale"]
    assert [cluster.ready for cluster in done.clusters] == [3, 3]


async def test_nothing_is_restarted_where_nothing_is_online(shop: Cloud) -> None:
    empty = scenario()
    empty["apps"][0]["deployments"][0]["online"] = {"c1": 10}
    shop.control("PUT", "scenario", json=empty)
    with pytest.raises(NoTemplateError, match="nothing of web is online in c2"):
        await restart(**WEB, dry_run=True)


# ---- held to a plan -----------------------------------------------------------------------------


async def retried(error: RolloutError, **parameters: Any) -> ReleaseResult:
    """The same flow run again."""
    assert error.result is not None
    run_id = UUID(error.result.release_id)
    async with get_client() as client:
        await client.set_flow_run_state(run_id, AwaitingRetry(), force=True)
        run = await client.read_flow_run(run_id)
    result: Any = await run_flow_async(deploy_latest_image, flow_run=run, parameters={**WEB, **parameters})
    assert isinstance(result, ReleaseResult)
    return result


@pytest.mark.promise("What was planned is what is done")
async def test_a_release_does_what_its_plan_said(shop: Cloud) -> None:
    plan = await plan_of(images={"web": "r/web:3"})
    result = await deploy_latest_image(**WEB, images={"web": "r/web:3"}, expect_plan=plan.plan_hash)
    assert shop.writes == ["template 12", "publish 12 to c1", "publish 12 to c2"]
    assert result.plan is not None
    # The hash covers the digests of the pod templates; only a plan that somebody looks at lists the changes.
    unlisted = [each.model_copy(update={"changes": None}) for each in plan.clusters]
    assert result.plan == plan.model_copy(update={"clusters": unlisted})
    assert list(result.seconds) == list(STEPS_OF["deploy"][:-1])
    assert f"Held to plan:</strong> <code>{plan.plan_hash}</code>" in html(render(result))


def publish(cloud: Cloud) -> None:
    cloud.inside.publish(1, 1, 11, "c2", 2, user="lisi", key=None)


def upgrade(cloud: Cloud) -> None:
    body = UpgradeBody(template_id=11, clusters=["c1"], images={"web": "r/web:9"})
    cloud.inside.upgrade(1, 1, body, user="lisi", key=None)


def rescale(cloud: Cloud) -> None:
    cloud.control("PUT", "scenario", json=scenario(replicas=3))


def nothing(_cloud: Cloud) -> None:
    pass


@pytest.mark.promise("What was planned is what is done")
async def test_a_release_is_refused_where_its_plan_holds_no_more(shop: Cloud) -> None:
    plan = await plan_of()
    cases: list[tuple[Callable[[Cloud], None], dict[str, Any], str]] = [
        (nothing, {"images": {"web": "r/web:3"}}, "r/web:3"),
        (nothing, {"clusters": ["c1"]}, "c1: template 10 → new, from 11"),
        (publish, {}, "c2: template 11 → new, from 11"),
        (upgrade, {}, "template 10 → new, from 12, r/web:9"),
        (rescale, {}, "pods 3 → 3"),
    ]
    for meanwhile, parameters, says in cases:
        shop.control("PUT", "scenario", json=scenario())
        meanwhile(shop)
        before = shop.writes
        with pytest.raises(PlanChangedError) as caught:
            await deploy_latest_image(**WEB, **parameters, expect_plan=plan.plan_hash)
        assert shop.writes == before
        assert says in str(caught.value)
        assert caught.value.result is not None
        assert caught.value.result.failed_steps == ["build image list"]
    assert (await plan_of()).plan_hash in str(caught.value)


async def test_a_newer_template_is_no_matter_where_one_is_named(shop: Cloud) -> None:
    plan = await plan_of(template_id=11)
    upgrade(shop)
    await deploy_latest_image(**WEB, template_id="11", expect_plan=plan.plan_hash)


async def test_a_retry_is_not_refused_for_what_the_run_wrote_itself(shop: Cloud) -> None:
    plan = await plan_of()
    shop.faults({"call": "publish", "cluster": "c2", "kind": "status", "status": 400, "nth": 1})
    with pytest.raises(RejectedError) as caught:
        await deploy_latest_image(**WEB, expect_plan=plan.plan_hash)
    assert shop.writes == ["template 12", "publish 12 to c1"]
    result = await retried(caught.value, expect_plan=plan.plan_hash)
    assert result.outcome is Outcome.RELEASED
    assert shop.writes == ["template 12", "publish 12 to c1", "publish 12 to c2"]


async def test_a_retry_is_refused_where_somebody_published_before_its_first_write(shop: Cloud) -> None:
    plan = await plan_of()
    shop.faults({"call": "upgrade", "kind": "status", "status": 400, "nth": 1})
    with pytest.raises(RejectedError) as caught:
        await deploy_latest_image(**WEB, expect_plan=plan.plan_hash)
    publish(shop)
    with pytest.raises(ConflictError, match=r"to c2 .* template 11 is online there, and template 10 was"):
        await retried(caught.value, expect_plan=plan.plan_hash)
    assert [written for written in shop.writes if written.startswith("publish")] == ["publish 11 to c2"]


async def test_a_release_that_read_other_replicas_before_its_lock_is_refused(shop: Cloud) -> None:
    shop.faults({"call": "templates", "kind": "status", "status": 400, "nth": 1})
    with pytest.raises(RejectedError) as caught:
        await deploy_latest_image(**WEB)  # it knows of two replicas
    rescale(shop)
    plan = await plan_of()
    with pytest.raises(PlanChangedError, match=f"{plan.plan_hash} was expected"):
        await retried(caught.value, expect_plan=plan.plan_hash)
    assert shop.writes == []


async def test_a_release_that_times_out_goes_on_under_its_plan(make_cloud: Any, prefect_api: str) -> None:
    cloud = make_cloud(**scenario(behaviour={"kind": "slow_start", "seconds": 60, "images": "web:2"}))
    plan = await plan_of()
    with pytest.raises(ReleaseTimedOutError) as caught:
        await deploy_latest_image(**{**WEB, "poll_attempts": 3}, expect_plan=plan.plan_hash)
    cloud.inside.advance(120)
    assert (await retried(caught.value, expect_plan=plan.plan_hash)).outcome is Outcome.RELEASED


# ---- the command line ---------------------------------------------------------------------------


def test_the_command_shows_the_plan_and_holds_to_its_hash(
    shop: Cloud, prefect_server: str, tmp_path: Path
) -> None:
    def ended(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [
                *(BIN / "prefect-rollout", "deploy", "--app-id", "1", "--deployment", "web", "--json"),
                *("--poll-seconds", "0.1", *arguments),
            ],
            env={**os.environ, **shop.environment, "HOME": str(tmp_path), "PREFECT_API_URL": prefect_server},
            capture_output=True,
            text=True,
            check=False,
        )

    shown = ended("--dry-run")
    assert shown.returncode == 0, shown.stderr
    result = json.loads(shown.stdout)
    assert result["outcome"] == "planned"
    plan_hash = result["plan"]["plan_hash"]
    for line in (
        "  c1: template 10 → new, from 11; pods 1 → 1",
        "    image web: r/web:1 → r/web:2",
        "    spec.containers[web].env[KEY].value: value changed, not shown",
        f"Plan hash: {plan_hash}",
        f"the same command with --expect-plan {plan_hash} instead of --dry-run.",
        "5/6 plan release done",
    ):
        assert line in shown.stderr
    assert shop.writes == []
    refused = ended("--expect-plan", "0" * 16)
    assert (refused.returncode, json.loads(refused.stdout)["error"]["type"]) == (1, "PlanChangedError")
    assert "4/8 build image list failed" in refused.stderr
    assert f"the plan is {plan_hash} now" in refused.stderr
    assert shop.writes == []
