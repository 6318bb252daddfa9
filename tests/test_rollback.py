"""Going back, cluster by cluster, restarting and scaling; judged by the simulated cloud's own record."""

from typing import Any
from uuid import UUID

import pytest
from prefect import get_client
from prefect.flow_engine import run_flow_async
from prefect.states import AwaitingRetry

from prefect_rollout.errors import (
    ClusterNotFoundError,
    ConflictError,
    ForeignTemplateError,
    InputError,
    NoPreviousTemplateError,
    NoTemplateError,
    ReleaseError,
    RollbackFailedError,
    RolloutError,
    TemplateNotFoundError,
)
from prefect_rollout.flows import deploy_latest_image, restart, rollback, scale
from prefect_rollout.release.progress import Progress, listening
from prefect_rollout.release.result import Outcome
from prefect_rollout.release.workload import Baseline
from prefect_rollout.tasks import check_deployment, choose_rollback
from support import Cloud, web

pytestmark = pytest.mark.usefixtures("prefect_api")
FAST: dict[str, Any] = {"app_id": 3290, "poll_seconds": 0.1, "poll_attempts": 100}
SHORT: dict[str, Any] = {**FAST, "poll_attempts": 20}


def writes(cloud: Cloud) -> list[str]:
    """Such as `["template 1343170", "publish 1343170 to pub-bjwdt"]`."""
    return [
        f"{entry['kind']} {entry['template'] or entry['replicas'] or ''}".strip()
        + (f" to {entry['cluster']}" if entry["cluster"] else "")
        for entry in cloud.record
    ]


def two_clusters(**behaviour: Any) -> dict[str, Any]:
    """A scenario of `web` in c1 and c2, whose template 11 behaves so."""
    return web({"images": "web:2", **behaviour}) if behaviour else web()


WEB: dict[str, Any] = {**SHORT, "app_id": 1, "deployment": "web"}


# ---- a release that rolls back ------------------------------------------------------------------


@pytest.mark.promise("A rollback is watched like a release")
async def test_a_release_that_fails_goes_back_everywhere_the_last_cluster_first(make_cloud: Any) -> None:
    cloud = make_cloud(**two_clusters(kind="never_ready", clusters=["c2"]))
    with pytest.raises(ReleaseError) as caught:
        await deploy_latest_image(**WEB, on_failure="rollback")
    assert writes(cloud) == [
        "template 12",
        "publish 12 to c1",
        "publish 12 to c2",
        "publish 10 to c2",
        "publish 10 to c1",
    ]
    keys = [entry["idempotency_key"].split(":", 1)[1] for entry in cloud.record]
    assert keys == ["upgrade", "publish:c1", "publish:c2", "rollback:c2", "rollback:c1"]
    assert all(truth["rolled_out"] and truth["template"] == 10 for truth in cloud.truth("web"))
    result = caught.value.result
    assert result is not None
    assert result.outcome is Outcome.TIMED_OUT
    assert [(c.rolled_back, c.online, c.running) for c in result.clusters] == [(True, 10, 1), (True, 10, 2)]
    assert "rolled back" in str(caught.value)
    assert "c1 has template 10 online" in str(caught.value)


async def test_by_default_a_failed_release_stays_as_it_is_and_says_what_is_live(make_cloud: Any) -> None:
    cloud = make_cloud(**two_clusters(kind="never_ready", clusters=["c2"]))
    with pytest.raises(ReleaseError) as caught:
        await deploy_latest_image(**WEB)
    assert writes(cloud)[-1] == "publish 12 to c2"
    assert "c2 has template 12 online" in str(caught.value)


async def test_only_what_was_touched_goes_back(make_cloud: Any) -> None:
    cloud = make_cloud(**two_clusters(kind="quota_refused", clusters=["c2"]))
    with pytest.raises(RolloutError) as caught:
        await deploy_latest_image(**WEB, on_failure="rollback")
    assert writes(cloud) == ["template 12", "publish 12 to c1", "publish 10 to c1"]
    assert caught.value.result is not None
    assert [c.rolled_back for c in caught.value.result.clusters] == [True, None]


async def test_a_publish_whose_answer_was_lost_goes_back_too(make_cloud: Any) -> None:
    cloud = make_cloud(
        **two_clusters(),
        faults=[
            # The publish to c2 takes effect, and the cloud is not heard of again for as long as it is tried.
            {"call": "publish", "cluster": "c2", "kind": "reset_after", "nth": 1},
            {"call": "online", "kind": "reset_before", "nth": [4, 5, 6, 7, 8]},
        ],
    )
    with pytest.raises(RolloutError):
        await deploy_latest_image(**WEB, on_failure="rollback")
    assert writes(cloud)[-2:] == ["publish 10 to c2", "publish 10 to c1"]
    assert all(truth["rolled_out"] and truth["template"] == 10 for truth in cloud.truth("web"))


@pytest.mark.promise("A rollback is watched like a release")
async def test_a_rollback_that_fails_says_so_first_and_tries_the_other_clusters(make_cloud: Any) -> None:
    cloud = make_cloud(
        **two_clusters(kind="never_ready"),
        faults=[{"call": "publish", "cluster": "c2", "kind": "status", "status": 400, "nth": [2, 3]}],
    )
    with pytest.raises(RollbackFailedError) as caught:
        await deploy_latest_image(**WEB, on_failure="rollback")
    assert str(caught.value).startswith("ROLLBACK FAILED: c2")
    assert "it was tried because" in str(caught.value)
    assert isinstance(caught.value.__cause__, ReleaseError)
    assert writes(cloud)[-1] == "publish 10 to c1"
    result = caught.value.result
    assert result is not None
    assert [(c.cluster, c.rolled_back, c.online) for c in result.clusters] == [
        ("c1", True, 10),
        ("c2", False, 12),
    ]


async def test_where_nothing_was_online_before_there_is_nothing_to_go_back_to(make_cloud: Any) -> None:
    scenario = two_clusters(kind="never_ready")
    scenario["apps"][0]["deployments"][0]["online"] = {}
    make_cloud(**scenario)
    with pytest.raises(RollbackFailedError, match="nothing was"):
        await deploy_latest_image(**WEB, on_failure="rollback")


async def test_a_retry_does_not_publish_beside_what_was_rolled_back(make_cloud: Any) -> None:
    cloud = make_cloud(**two_clusters(kind="quota_refused", clusters=["c2"]))
    with pytest.raises(RolloutError) as first:
        await deploy_latest_image(**WEB, on_failure="rollback")
    before = writes(cloud)
    assert before == ["template 12", "publish 12 to c1", "publish 10 to c1"]
    cloud.inside.set_behaviour(1, "web", [])  # there is quota now
    assert first.value.result is not None
    run_id = UUID(first.value.result.release_id)
    async with get_client() as client:
        await client.set_flow_run_state(run_id, AwaitingRetry(), force=True)
        run = await client.read_flow_run(run_id)
    with pytest.raises(ConflictError, match="rolled back"):
        await run_flow_async(deploy_latest_image, flow_run=run, parameters={**WEB, "on_failure": "rollback"})
    assert writes(cloud) == before


async def test_a_retry_asks_again_what_is_live_and_takes_no_verdict_of_before(make_cloud: Any) -> None:
    cloud = make_cloud(**two_clusters())
    # As if its process had died after the last step, before Prefect knew.
    run_id = UUID((await deploy_latest_image(**{**WEB, "poll_attempts": 100})).release_id)
    for cluster, replicas in (("c1", 1), ("c2", 2)):
        cloud.inside.publish(1, 1, 10, cluster, replicas, user="lisi", key=None)
    async with get_client() as client:
        await client.set_flow_run_state(run_id, AwaitingRetry(), force=True)
        run = await client.read_flow_run(run_id)
    with pytest.raises(ConflictError, match="template 12 is no longer online in c1"):
        await run_flow_async(deploy_latest_image, flow_run=run, parameters=WEB)


async def test_a_rollback_whose_answer_was_lost_is_still_recognised_by_names_alone(make_cloud: Any) -> None:
    cloud = make_cloud(
        optional_fields=False,
        **two_clusters(kind="never_ready"),
        faults=[{"call": "publish", "cluster": "c2", "kind": "reset_after", "nth": 2}],
    )
    with pytest.raises(ReleaseError, match="rolled back") as caught:
        await deploy_latest_image(**{**WEB, "poll_attempts": 40}, on_failure="rollback")
    assert not isinstance(caught.value, RollbackFailedError)
    assert all(truth["rolled_out"] and truth["template"] == 10 for truth in cloud.truth("web"))


# ---- rolling back by itself ---------------------------------------------------------------------


@pytest.mark.promise("A rollback is watched like a release")
async def test_a_rollback_goes_to_what_was_online_before_in_each_cluster(cloud: Cloud) -> None:
    await deploy_latest_image(deployment="qapm-api", **FAST)
    await deploy_latest_image(deployment="qapm-api", clusters=["pub-bjyt"], **FAST)
    result = await rollback(deployment="qapm-api", reason="wrong", **FAST)
    assert writes(cloud)[-2:] == ["publish 1343110 to pub-bjwdt", "publish 1343170 to pub-bjyt"]
    assert [(c.template_before, c.template) for c in result.clusters] == [
        (1343170, 1343110),
        (1343171, 1343170),
    ]
    assert (result.action, result.outcome) == ("rollback", Outcome.RELEASED)
    assert all(truth["rolled_out"] for truth in cloud.truth("qapm-api"))


async def test_a_rollback_to_a_template_by_its_id(cloud: Cloud) -> None:
    result = await rollback(deployment="qapm-home", to_template="1342977", **FAST)
    assert writes(cloud) == ["publish 1342977 to pub-bjwdt"]
    assert result.template_id == 1342977
    assert cloud.truth("qapm-home")[0]["template"] == 1342977


@pytest.mark.parametrize(
    ("parameters", "kind"), [({}, NoPreviousTemplateError), ({"canary": "nowhere"}, ClusterNotFoundError)]
)
async def test_a_rollback_that_cannot_be_is_refused_before_anything_is_written(
    cloud: Cloud, parameters: dict[str, Any], kind: type[RolloutError]
) -> None:
    with pytest.raises(kind):
        await rollback(deployment="qapm-home", **FAST, **parameters)
    assert cloud.record == []


async def test_a_template_to_go_back_to_has_to_be_one_of_the_deployments_own(cloud: Cloud) -> None:
    target = "container-cloud/default"
    checked = await check_deployment.fn(3290, "qapm-home", target=target)
    for to_template, kind in ((99, TemplateNotFoundError), (1343161, ForeignTemplateError)):
        with pytest.raises(kind):
            await choose_rollback.fn(checked.workload, {"pub-bjwdt": Baseline()}, to_template, target=target)


# ---- cluster by cluster -------------------------------------------------------------------------


def order_of(cloud: Cloud) -> list[str]:
    """The publishes and the rollouts' ends in the order of their time, as `c1+` and `c1.`."""
    events = [(entry["at"], f"{entry['cluster']}+") for entry in cloud.record if entry["cluster"]]
    events += [(truth["at"], f"{truth['cluster']}.") for truth in cloud.truth("web")]
    return [name for _, name in sorted(events)]


@pytest.mark.parametrize(
    ("parameters", "order"),
    [
        ({}, ["c1+", "c2+", "c1.", "c2."]),
        ({"order": "one-by-one", "canary": "c2"}, ["c2+", "c2.", "c1+", "c1."]),
    ],
)
async def test_clusters_are_released_in_the_order_asked_for(
    make_cloud: Any, parameters: dict[str, Any], order: list[str]
) -> None:
    cloud = make_cloud(**two_clusters())
    await deploy_latest_image(**{**WEB, **parameters, "poll_attempts": 100})
    assert order_of(cloud) == order


async def test_a_canary_that_fails_keeps_the_others_untouched(make_cloud: Any) -> None:
    cloud = make_cloud(**two_clusters(kind="never_ready"))
    with pytest.raises(ReleaseError):
        await deploy_latest_image(**WEB, canary="c2", on_failure="rollback")
    assert writes(cloud) == ["template 12", "publish 12 to c2", "publish 10 to c2"]


async def test_there_is_a_pause_between_the_clusters(make_cloud: Any) -> None:
    cloud = make_cloud(**two_clusters())
    await deploy_latest_image(**{**WEB, "order": "one-by-one", "pause_seconds": 1.5, "poll_attempts": 100})
    assert order_of(cloud) == ["c1+", "c1.", "c2+", "c2."]
    ended = next(truth["at"] for truth in cloud.truth("web") if truth["cluster"] == "c1")
    began = next(entry["at"] for entry in cloud.record if entry["cluster"] == "c2")
    assert began - ended >= 1.5 * 20  # simulated seconds pass twenty times as fast


async def test_somebody_who_publishes_in_between_is_not_published_over(make_cloud: Any) -> None:
    cloud = make_cloud(**two_clusters())

    def rival(progress: Progress) -> None:
        if progress.step == "publish deployment" and progress.state == "done" and len(cloud.record) == 2:
            cloud.inside.publish(1, 1, 11, "c2", 2, user="lisi", key=None)

    with listening(rival), pytest.raises(ConflictError, match="another release was published to c2"):
        await deploy_latest_image(**WEB)
    assert writes(cloud) == ["template 12", "publish 12 to c1", "publish 11 to c2"]


# ---- restart and scale --------------------------------------------------------------------------


@pytest.mark.parametrize("optional_fields", [True, False])
async def test_a_restart_is_over_when_all_pods_are_new(make_cloud: Any, optional_fields: bool) -> None:
    cloud = make_cloud(optional_fields=optional_fields)
    before = {pod["name"] for truth in cloud.truth("qapm-api") for pod in truth["pods"]}
    result = await restart(deployment="qapm-api", **FAST)
    assert writes(cloud) == ["restart to pub-bjwdt", "restart to pub-bjyt"]
    after = {pod.name for cluster in result.clusters for pod in cluster.pods}
    assert len(after) == 5
    assert not after & before
    assert all(truth["rolled_out"] for truth in cloud.truth("qapm-api"))


@pytest.mark.parametrize(("replicas", "optional_fields"), [(1, False), (4, True)])
async def test_scaling_is_over_when_so_many_pods_run(
    make_cloud: Any, replicas: int, optional_fields: bool
) -> None:
    cloud = make_cloud(optional_fields=optional_fields)
    result = await scale(deployment="qapm-api", replicas=replicas, **FAST)
    assert [(c.replicas, c.ready) for c in result.clusters] == [(replicas, replicas)] * 2
    assert [truth["wanted"] for truth in cloud.truth("qapm-api")] == [replicas] * 2
    assert all(truth["rolled_out"] for truth in cloud.truth("qapm-api"))


@pytest.mark.promise("No write happens twice")
@pytest.mark.parametrize("call", ["restart", "scale"])
async def test_a_lost_answer_to_a_restart_or_scaling_is_not_asked_twice(make_cloud: Any, call: str) -> None:
    cloud = make_cloud(idempotency=False, faults=[{"call": call, "nth": 1, "kind": "reset_after"}])
    if call == "restart":
        await restart(deployment="qapm-home", **FAST)
    else:
        await scale(deployment="qapm-home", replicas=3, **FAST)
    assert [entry["kind"] for entry in cloud.record] == [call]


async def test_replicas_that_the_cloud_refuses_are_refused_here(cloud: Cloud) -> None:
    with pytest.raises(InputError, match="replicas"):
        await scale(deployment="qapm-home", replicas=33, **FAST)
    assert cloud.record == []


async def test_what_was_never_released_can_be_neither_restarted_nor_scaled(make_cloud: Any) -> None:
    scenario = two_clusters()
    scenario["apps"][0]["deployments"][0]["online"] = {"c1": 10}
    cloud = make_cloud(**scenario)
    for flow in (restart(**WEB), scale(**WEB, replicas=2)):
        with pytest.raises(NoTemplateError, match="c2"):
            await flow
    assert cloud.record == []
