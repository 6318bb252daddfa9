"""The flow against a real Prefect server and simulated clouds over real sockets.

What was written is judged by the clouds' own record.
"""

import json
from typing import Any
from uuid import UUID

import pytest
from prefect import get_client
from prefect.client.schemas.actions import BlockDocumentUpdate
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
)
from prefect.flow_engine import run_flow_async
from prefect.states import AwaitingRetry
from pydantic import SecretStr

from prefect_rollout.blocks import ContainerCloud
from prefect_rollout.errors import (
    AppNotFoundError,
    AuthenticationError,
    ClusterNotFoundError,
    ConfigurationError,
    ConflictError,
    ContainerNotFoundError,
    DeploymentNotFoundError,
    ForeignTemplateError,
    InputError,
    NoTemplateError,
    OverloadedError,
    QuotaExceededError,
    RejectedError,
    ReleaseTimedOutError,
    RolloutError,
    ServerFaultError,
    TemplateNotFoundError,
    UnreadableTemplateError,
    WorkloadError,
)
from prefect_rollout.flows import deploy_latest_image
from prefect_rollout.release.progress import STEPS, Progress, listening
from prefect_rollout.release.result import Outcome, ReleaseResult
from prefect_rollout.release.workload import Revision
from prefect_rollout.tasks import build_image_list, check_deployment, get_template, parse_metadata
from prefect_rollout.verdict.diagnosis import Category
from support import Cloud, task_runs_of

pytestmark = pytest.mark.usefixtures("prefect_api")
IMAGE = "harbor.qihoo.net/qdgc-qapm/qapm-web:202407291835-ddc95a7"
FAST: dict[str, Any] = {"app_id": 3290, "deployment": "qapm-home", "poll_seconds": 0.1, "poll_attempts": 100}


async def release(**parameters: Any) -> ReleaseResult:
    result = await deploy_latest_image(**{**FAST, **parameters})
    assert isinstance(result, ReleaseResult)
    return result


async def failure(kind: type[RolloutError], **parameters: Any) -> RolloutError:
    with pytest.raises(kind) as caught:
        await release(**parameters)
    return caught.value


async def read(target: str = "container-cloud/default", **parameters: Any) -> Revision:
    """Take the steps that come before the first write, without a flow; return the template."""
    asked = {**FAST, **parameters}
    checked = await check_deployment.fn(asked["app_id"], asked["deployment"], target=target)
    placement = await parse_metadata.fn(checked.workload, asked.get("clusters"), target=target)
    template = await get_template.fn(checked.workload, asked.get("template_id"), target=target)
    await build_image_list.fn(
        checked.workload, list(placement.replicas), template, asked.get("images"), target=target
    )
    return template


def writes(cloud: Cloud) -> list[str]:
    """Such as `["template 1343170", "publish 1343170 to pub-bjwdt"]`."""
    return [
        f"{entry['kind']} {entry['template']}" + (f" to {entry['cluster']}" if entry["cluster"] else "")
        for entry in cloud.record
    ]


# ---- released -----------------------------------------------------------------------------------


@pytest.mark.promise("Green means released")
async def test_the_articles_app_is_released_in_eight_steps(cloud: Cloud, prefect_api: str) -> None:
    result = await release(reason="首次发布")

    assert result.outcome is Outcome.RELEASED
    assert (result.template_id, result.base_template_id) == (1343170, 1343169)
    assert result.images == {"qapm-home": IMAGE}
    assert result.evidence == "strong"
    (cluster,) = result.clusters
    assert (cluster.cluster, cluster.replicas, cluster.ready, cluster.template_before) == (
        "pub-bjwdt",
        1,
        1,
        1343102,
    )
    assert list(result.seconds) == list(STEPS[:-1])

    assert writes(cloud) == ["template 1343170", "publish 1343170 to pub-bjwdt"]
    template, publish = cloud.record
    assert template["description"] == f"首次发布 release={result.release_id}"
    assert template["idempotency_key"] == f"{result.release_id}:upgrade"
    assert publish["idempotency_key"] == f"{result.release_id}:publish:pub-bjwdt"
    assert publish["replicas"] == 1
    (truth,) = cloud.truth("qapm-home")
    assert truth["rolled_out"]

    run_id = UUID(result.release_id)
    async with get_client() as client:
        run = await client.read_flow_run(run_id)
        runs = await task_runs_of(run_id, at_least=8)
        artifacts = await client.read_artifacts(
            artifact_filter=ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run_id]))
        )
    assert run.name == "qapm-home → 202407291835-ddc95a7"
    assert len(runs) == 8
    assert "publish qapm-home template 1343170 to pub-bjwdt" in {run.name for run in runs}
    (artifact,) = [artifact for artifact in artifacts if artifact.type == "markdown"]
    assert artifact.key == "release-3290-qapm-home"
    assert "✅ qapm-home is released" in str(artifact.data)


@pytest.mark.promise("Green means released")
async def test_every_cluster_is_published_to_in_the_metadatas_order_with_its_own_replicas(
    make_cloud: Any,
) -> None:
    # A cloud that reports names and states alone, as the article's.
    cloud = make_cloud(optional_fields=False)
    result = await release(deployment="qapm-api")
    assert writes(cloud) == [
        "template 1343170",
        "publish 1343170 to pub-bjwdt",
        "publish 1343170 to pub-bjyt",
    ]
    assert [entry["replicas"] for entry in cloud.record[1:]] == [2, 3]
    assert [(c.cluster, c.ready) for c in result.clusters] == [("pub-bjwdt", 2), ("pub-bjyt", 3)]
    assert (result.outcome, result.evidence) == (Outcome.RELEASED, "weak")
    assert all(truth["rolled_out"] for truth in cloud.truth("qapm-api"))


async def test_a_subset_of_the_clusters_is_released_and_the_rest_left_alone(cloud: Cloud) -> None:
    result = await release(deployment="qapm-api", clusters=["pub-bjyt"])
    assert [c.cluster for c in result.clusters] == ["pub-bjyt"]
    assert writes(cloud) == ["template 1343170", "publish 1343170 to pub-bjyt"]


def app(**deployment: Any) -> dict[str, Any]:
    """A scenario of one app with one deployment `web`."""
    templates = deployment.pop("templates", [{"id": 10, "image": "r/web:1"}])
    spec = {"id": 1, "name": "web", "clusters": {"c1": 1}, "templates": templates, **deployment}
    return {"apps": [{"id": 1, "name": "shop", "deployments": [spec]}]}


WEB: dict[str, Any] = {"app_id": 1, "deployment": "web"}


@pytest.mark.parametrize("sort_templates", [True, False])
async def test_the_template_is_the_one_asked_for_or_the_newest_on_whatever_page(
    make_cloud: Any, sort_templates: bool
) -> None:
    templates = [{"id": number, "image": f"r/web:{number}"} for number in range(1, 251)]
    make_cloud(sort_templates=sort_templates, **app(templates=templates))
    for asked, found in ((None, 250), ("", 250), (7, 7), ("7", 7)):
        assert (await read(**WEB, template_id=asked)).id == found


async def test_the_template_and_the_images_asked_for_are_released(make_cloud: Any) -> None:
    images = {"web": "r/web:1", "log": "r/log:1"}
    cloud = make_cloud(**app(templates=[{"id": 10, "images": images}, {"id": 11, "image": "r/web:3"}]))
    result = await release(**WEB, template_id="10", images={"web": "r/web:2"})
    assert result.base_template_id == 10
    assert result.images == {"web": "r/web:2", "log": "r/log:1"}
    sent = json.loads(next(seen["body"] for seen in cloud.requests if seen["call"] == "upgrade"))
    assert (sent["templateId"], sent["images"]) == (10, result.images)


@pytest.mark.promise("Green means released")
async def test_a_release_that_changes_nothing_is_released(make_cloud: Any) -> None:
    cloud = make_cloud(optional_fields=False, **app(online={"c1": 10}))
    assert (await release(**WEB)).outcome is Outcome.RELEASED
    assert writes(cloud) == ["template 11", "publish 11 to c1"]


@pytest.mark.promise("Green means released")
async def test_zero_replicas_are_released_when_no_pod_is_left(make_cloud: Any) -> None:
    make_cloud(**app(clusters={"c1": 0}))
    (cluster,) = (await release(**WEB)).clusters
    assert (cluster.replicas, cluster.ready) == (0, 0)


# ---- refused before anything is written ---------------------------------------------------------

BAD: dict[str, tuple[dict[str, Any], type[RolloutError], str]] = {
    "unknown app": ({"app_id": 99}, AppNotFoundError, "'99'"),
    "app id that climbs": ({"app_id": "../.."}, RejectedError, "cloud refused app"),
    "unknown deployment": ({"deployment": "qapm-hom"}, DeploymentNotFoundError, "qapm-home"),
    "deployment with a slash": ({"deployment": "a/b"}, DeploymentNotFoundError, "a/b"),
    "unknown template": ({"template_id": 99}, TemplateNotFoundError, "'99'"),
    "template id with a zero in front": ({"template_id": "01343169"}, TemplateNotFoundError, "01343169"),
    "template of another deployment": ({"template_id": 1343161}, ForeignTemplateError, "1343161"),
    "unknown cluster": ({"clusters": ["pub-nowhere"]}, ClusterNotFoundError, "pub-bjwdt"),
    "unknown container": ({"images": {"web": "x:1"}}, ContainerNotFoundError, "qapm-home"),
    "unknown kind of target": ({"target": "nothing/default"}, ConfigurationError, "container-cloud"),
    "a block that is no target": ({"target": "secret/default"}, ConfigurationError, "container-cloud"),
    "target that nobody saved": ({"target": "container-cloud/other"}, ConfigurationError, "configure"),
}


@pytest.mark.parametrize(("parameters", "kind", "says"), BAD.values(), ids=BAD)
async def test_what_is_not_there_is_named(
    cloud: Cloud, parameters: dict[str, Any], kind: type[RolloutError], says: str
) -> None:
    with pytest.raises(kind) as caught:
        await read(**parameters)
    assert says in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("unknown deployment", "check deployment"),
        ("unknown cluster", "parse metadata"),
        ("template of another deployment", "get template"),
        ("unknown container", "build image list"),
    ],
)
async def test_a_step_that_finds_something_missing_ends_the_release_before_anything_is_written(
    cloud: Cloud, name: str, step: str
) -> None:
    parameters, kind, _ = BAD[name]
    error = await failure(kind, **parameters)
    assert error.step == step
    assert error.result is not None
    assert error.result.outcome is Outcome.FAILED
    assert cloud.record == []


DEPLOYMENTS: dict[str, tuple[dict[str, Any], type[RolloutError]]] = {
    "empty metaData": ({"metaData": ""}, WorkloadError),
    "metaData that is no JSON": ({"metaData": "{clusters"}, WorkloadError),
    "metaData of another shape": ({"metaData": '{"clusters": ["c1"]}'}, WorkloadError),
    "metaData without clusters": ({"metaData": "{}"}, WorkloadError),
    "metaData with a cluster that climbs": (
        {"metaData": '{"clusters": {"..": {"replica": 1}}}'},
        WorkloadError,
    ),
    "metaData with two clusters in one name": (
        {"metaData": '{"clusters": {"a,b": {"replica": 1}}}'},
        WorkloadError,
    ),
    "metaData without replicas": ({"metaData": '{"clusters": {"c1": {"name": "c1"}}}'}, WorkloadError),
    "metaData nested 10,000 deep": ({"metaData": '{"a":' * 10_000 + "1" + "}" * 10_000}, WorkloadError),
    "no template": ({"templates": []}, NoTemplateError),
    "template that is no JSON": ({"templates": [{"id": 1, "template": "{"}]}, UnreadableTemplateError),
    "template that is no Deployment": (
        {"templates": [{"id": 1, "template": {"kind": "StatefulSet", "spec": {"template": {"spec": {}}}}}]},
        UnreadableTemplateError,
    ),
    "template without containers": (
        {
            "templates": [
                {"id": 1, "template": '{"kind":"Deployment","spec":{"template":{"spec":{"containers":[]}}}}'}
            ]
        },
        ContainerNotFoundError,
    ),
}


@pytest.mark.parametrize(("deployment", "kind"), DEPLOYMENTS.values(), ids=DEPLOYMENTS)
async def test_a_deployment_that_cannot_be_released_is_refused(
    make_cloud: Any, deployment: dict[str, Any], kind: type[RolloutError]
) -> None:
    make_cloud(**app(**deployment))
    with pytest.raises(kind) as caught:
        await read(**WEB)
    assert len(str(caught.value)) < 1000


async def test_metadata_of_50_mb_is_refused_without_being_held(make_cloud: Any) -> None:
    make_cloud(**app(metaData="x" * 50_000_000))
    with pytest.raises(RolloutError, match="longer than 32 MiB"):
        await read(**WEB)


async def test_a_wrong_key_is_refused_once_and_not_shown(
    cloud: Cloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("K8S_SECRET_KEY", "wrong-secret-7")
    error = await failure(AuthenticationError)
    assert len(cloud.requests) == 1
    assert cloud.record == []
    assert "wrong-secret-7" not in str(error)


# ---- faults on the wire, beyond what test_every_fault walks --------------------------------------


async def test_a_fault_that_stays_ends_the_step_with_its_own_error(cloud: Cloud) -> None:
    cloud.faults({"kind": "status", "status": 500, "call": "upgrade", "message": "数据库错误"})
    error = await failure(ServerFaultError)
    assert error.step == "upgrade deployment"
    assert "数据库错误" in str(error)
    assert len([seen for seen in cloud.requests if seen["call"] == "upgrade"]) == 6
    assert cloud.record == []


async def test_a_platform_that_asks_to_wait_too_long_ends_the_step(cloud: Cloud) -> None:
    cloud.faults({"kind": "status", "status": 503, "retry_after": "3600", "call": "app"})
    error = await failure(OverloadedError)
    assert error.retry_after == 3600
    assert len(cloud.requests) == 1


# ---- started, and not ended well ----------------------------------------------------------------

SHORT = {"poll_seconds": 0.05, "poll_attempts": 20}


@pytest.mark.promise("Green means released")
@pytest.mark.parametrize(("deployment", "optional_fields"), [("crash-loop", False), ("no-pods", True)])
async def test_pods_that_do_not_get_ready_time_the_release_out(
    make_cloud: Any, deployment: str, optional_fields: bool
) -> None:
    cloud = make_cloud(optional_fields=optional_fields)
    error = await failure(ReleaseTimedOutError, deployment=deployment, **SHORT)
    assert "pub-bjwdt" in str(error)
    assert error.result is not None
    assert error.result.outcome is Outcome.TIMED_OUT
    assert error.result.clusters[0].published
    assert not cloud.truth(deployment)[0]["rolled_out"]
    polls = [seen for seen in cloud.requests if seen["call"] == "status"]
    assert len(polls) <= 3 + SHORT["poll_attempts"]  # two looks at what stood before, one at what is live


@pytest.mark.promise("A failure says why")
async def test_a_time_out_names_the_pods_that_wait_and_leaves_a_report_that_says_why(cloud: Cloud) -> None:
    error = await failure(ReleaseTimedOutError, deployment="bad-image", **SHORT)
    waiting = error.data["not_ready"]["pub-bjwdt"]
    pending = [pod["pod"] for pod in waiting if pod["state"] == "Pending"]
    assert pending
    assert f"{pending[0]}: ErrImagePull" in str(error)
    assert error.diagnosis.category is Category.IMAGE_PULL_ERROR
    assert error.diagnosis.pod in pending
    assert error.result is not None
    run_id = UUID(error.result.release_id)
    async with get_client() as client:
        run = await client.read_flow_run(run_id)
        (artifact,) = [
            artifact
            for artifact in await client.read_artifacts(
                artifact_filter=ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run_id]))
            )
            if artifact.type == "markdown"
        ]
    assert run.state is not None
    assert run.state.is_failed()
    assert "wait for pods" in (run.state.message or "")
    assert "❌ bad-image timed out" in str(artifact.data)
    assert "What to do" in str(artifact.data)


@pytest.mark.promise("A failure says why")
async def test_a_refused_quota_is_a_failure_with_the_clouds_words(cloud: Cloud) -> None:
    error = await failure(QuotaExceededError, deployment="no-quota")
    assert "配额不足" in str(error)
    assert (error.step, error.data["cluster"]) == ("publish deployment", "pub-bjwdt")
    assert error.result is not None
    assert [c.published for c in error.result.clusters] == [False]


async def test_a_cluster_that_is_down_leaves_the_others_story_told(cloud: Cloud) -> None:
    error = await failure(ServerFaultError, deployment="cluster-down")
    assert error.data["cluster"] == "pub-bjyt"
    assert error.result is not None
    assert [(c.cluster, c.published) for c in error.result.clusters] == [
        ("pub-bjwdt", True),
        ("pub-bjyt", False),
    ]
    assert len(cloud.record) == 2


async def test_polls_that_fail_are_tried_again_at_the_next_tick(cloud: Cloud) -> None:
    cloud.faults({"call": "status", "kind": "status", "status": 502, "html": True, "nth": [3, 4, 6]})
    assert (await release()).outcome is Outcome.RELEASED


async def test_a_cloud_that_says_nothing_any_more_is_a_time_out_that_says_so(cloud: Cloud) -> None:
    cloud.faults({"call": "status", "kind": "reset_before", "nth": list(range(3, 500))})
    error = await failure(ReleaseTimedOutError, **SHORT)
    assert "the last poll was not answered" in str(error)
    assert "no status is reported" in str(error)


# ---- again --------------------------------------------------------------------------------------


@pytest.mark.promise("A crash loses nothing")
async def test_a_failed_run_that_is_retried_goes_on_where_it_stopped(cloud: Cloud) -> None:
    cloud.faults({"call": "publish", "cluster": "pub-bjyt", "kind": "status", "status": 400})
    error = await failure(RejectedError, deployment="qapm-api")
    assert error.result is not None
    assert writes(cloud) == ["template 1343170", "publish 1343170 to pub-bjwdt"]
    before = [seen["call"] for seen in cloud.requests]

    cloud.faults()
    async with get_client() as client:
        await client.set_flow_run_state(UUID(error.result.release_id), AwaitingRetry(), force=True)
        run = await client.read_flow_run(UUID(error.result.release_id))
    result: Any = await run_flow_async(
        deploy_latest_image, flow_run=run, parameters={**FAST, "deployment": "qapm-api"}
    )

    assert result.outcome is Outcome.RELEASED
    assert writes(cloud) == [
        "template 1343170",
        "publish 1343170 to pub-bjwdt",
        "publish 1343170 to pub-bjyt",
    ]
    again = [seen["call"] for seen in cloud.requests][len(before) :]
    # Has somebody else published? Is the first publish online? Then the second one looks and writes.
    assert again[:5] == ["online", "online", "online", "status", "publish"]
    assert set(again[5:]) == {"online", "status"}  # is what was published still online? then the polls


async def test_a_parameter_of_the_wrong_kind_is_refused_before_anything_is_asked(cloud: Cloud) -> None:
    await failure(InputError, images=["x"])
    assert cloud.requests == []


async def test_a_release_that_another_one_followed_is_not_published_over_it(make_cloud: Any) -> None:
    cloud = make_cloud(idempotency=False, faults=[{"call": "publish", "nth": 1, "kind": "reset_after"}])
    # The answer to the first publish is lost, and before the step tries again, a hotfix goes out.
    tries = 0

    def meanwhile(progress: Progress) -> None:
        nonlocal tries
        if progress.step == "publish deployment" and progress.state == "retrying":
            tries += 1
            cloud.publish(deployment_id=20771, template_id=1342977, cluster="pub-bjwdt")

    with listening(meanwhile):
        error = await failure(ConflictError)
    assert tries == 1
    assert "another release" in str(error)
    assert writes(cloud) == [
        "template 1343170",
        "publish 1343170 to pub-bjwdt",
        "publish 1342977 to pub-bjwdt",
    ]


async def test_a_block_that_cannot_be_used_is_an_error_of_ours(cloud: Cloud) -> None:
    block = ContainerCloud(key_id=SecretStr("key"), secret_key=SecretStr("s3cret"), api_url=cloud.url)
    saved = await block.asave("spoilt", overwrite=True)
    async with get_client() as client:
        document = await client.read_block_document(saved)
        await client.update_block_document(
            document.id,
            BlockDocumentUpdate(data={"api_url": "ftp://x", "key_id": "k"}, merge_existing_data=False),
        )
    with pytest.raises(ConfigurationError, match="spoilt") as caught:
        await read(target="container-cloud/spoilt")
    assert "s3cret" not in str(caught.value)
