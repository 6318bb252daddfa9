"""Endings of releases that were scaled before, saw no pods, were rolled back in vain, or were stopped."""

import asyncio
import json
import math
import os
import signal
import subprocess
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from prefect import get_client

from prefect_rollout.batch.result import BatchResult, Stage, looking_on
from prefect_rollout.errors import (
    ReleaseCancelledError,
    ReleaseError,
    ReleaseTimedOutError,
    RollbackFailedError,
    RolloutError,
)
from prefect_rollout.flows import deploy_batch, deploy_latest_image, restart, rollback, scale
from prefect_rollout.release.plan import UNSEEN
from prefect_rollout.release.plan_words import plan_lines
from prefect_rollout.release.progress import Progress, listening
from prefect_rollout.release.report import render
from prefect_rollout.release.result import Outcome
from prefect_rollout.runs import guard
from prefect_rollout.text import markdown
from prefect_rollout.verdict.diagnosis import Category
from support import BAD_IMAGE, BIN, FAST, Cloud, eventually, shop, web

pytestmark = pytest.mark.usefixtures("prefect_api")
WEB: dict[str, Any] = {"app_id": 1, "deployment": "web", "poll_seconds": 0.1, "poll_attempts": 100}
SHORT: dict[str, Any] = {**WEB, "poll_attempts": 20}


async def state_of(run_id: str) -> Any:
    async with get_client() as client:
        return (await client.read_flow_run(UUID(run_id))).state


# ---- an ordinary failure --------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [None, {"call": "templates", "kind": "status", "status": 500}])
async def test_a_failure_begins_with_its_reason_and_logs_no_traceback(
    make_cloud: Any, caplog: pytest.LogCaptureFixture, fault: dict[str, Any] | None
) -> None:
    make_cloud(**web(BAD_IMAGE), faults=[fault] if fault else [])
    with pytest.raises(RolloutError) as caught:
        await deploy_latest_image(**SHORT, grace_seconds=0)
    assert caught.value.result is not None
    state = await state_of(caught.value.result.release_id)
    assert (state.name, state.message) == ("Failed", str(caught.value))
    exhausted = [record for record in caplog.records if "Retries are exhausted" in record.getMessage()]
    assert len(exhausted) == (1 if fault else 0)
    assert [record.message for record in caplog.records if record.exc_info] == []


# ---- scaled before ------------------------------------------------------------------------------


@pytest.mark.promise("The number of pods is the cloud's")
@pytest.mark.parametrize("optional_fields", [True, False])
async def test_a_restart_keeps_the_pods_of_a_scaling_and_a_plan_says_that_they_change_back(
    make_cloud: Any, optional_fields: bool
) -> None:
    cloud: Cloud = make_cloud(optional_fields=optional_fields, **web())
    await scale(**WEB, replicas=3)
    result = await restart(**WEB)
    assert result.outcome is Outcome.RELEASED
    assert [(each.replicas, each.ready) for each in result.clusters] == [(3, 3)] * 2
    assert [truth["wanted"] for truth in cloud.truth("web")] == [3, 3]
    unreported = "the platform does not report its desired replicas"
    note = "replicas stay at 3 (configured: 1)"
    if not optional_fields:
        note = f"{unreported}: 3 assumed, as so many pods are listed"
    assert result.clusters[0].note == note
    assert markdown(note) in render(result)

    flows: list[tuple[Any, dict[str, Any]]] = [(deploy_latest_image, {}), (rollback, {"to_template": 11})]
    for flow, more in flows if optional_fields else flows[:1]:
        plan = (await flow(**WEB, **more, dry_run=True)).plan
        assert plan is not None
        for after in (1, 2):
            said = f"3 → {after}, as configured"
            line = f"    replicas {said}" if optional_fields else f"    pods {said}; {unreported}"
            assert line in plan_lines(plan)


@pytest.mark.promise("The number of pods is the cloud's")
async def test_a_release_that_is_rolled_back_gets_the_pods_back_that_ran_before(make_cloud: Any) -> None:
    cloud: Cloud = make_cloud(**web({"kind": "never_ready", "images": "web:2"}))
    await scale(**WEB, replicas=3)
    with pytest.raises(ReleaseError, match="rolled back") as caught:
        await deploy_latest_image(**SHORT, clusters=["c1"], on_failure="rollback")
    assert [entry["replicas"] for entry in cloud.record if entry["kind"] == "publish"] == [1, 3]
    assert caught.value.result is not None
    (cluster,) = caught.value.result.clusters
    assert (cluster.rolled_back, cluster.replicas, cluster.ready) == (True, 3, 3)
    assert all(truth["rolled_out"] for truth in cloud.truth("web"))
    assert not caught.value.retry_helps
    assert caught.value.result.failed_steps == ["wait for pods"]


# ---- pods that were not seen --------------------------------------------------------------------


async def test_where_no_pods_were_seen_before_none_is_called_old(make_cloud: Any) -> None:
    cloud: Cloud = make_cloud(optional_fields=False, **web())
    for deployment in cloud.inside._deployments.values():
        for rollout in deployment.rollouts.values():
            rollout._no_pods_until = math.inf  # until the next publish
    plan = (await deploy_latest_image(**WEB, clusters=["c1"], dry_run=True)).plan
    assert plan is not None
    assert f"    {UNSEEN}" in plan_lines(plan)
    with pytest.raises(ReleaseTimedOutError, match="new and old pods cannot be told apart") as caught:
        await deploy_latest_image(**SHORT, clusters=["c1"])
    assert caught.value.diagnosis.category is Category.BASELINE_UNKNOWN
    assert "old web-" not in str(caught.value)
    assert "old pod left" not in str(caught.value)
    assert caught.value.result is not None
    (cluster,) = caught.value.result.clusters
    assert (cluster.ready, UNSEEN in cluster.note) == (None, True)


# ---- a rollback that fails ----------------------------------------------------------------------


@pytest.mark.promise("A failure says why")
async def test_a_rollback_that_fails_keeps_both_diagnoses_and_both_steps(make_cloud: Any) -> None:
    make_cloud(
        **web(
            {"kind": "never_ready", "images": "web:2", "clusters": ["c2"]},
            {"kind": "image_cannot_be_pulled", "images": "web:1", "clusters": ["c1"]},
        )
    )
    told: list[Progress] = []
    with listening(told.append), pytest.raises(RollbackFailedError) as caught:
        await deploy_latest_image(**SHORT, grace_seconds=0.3, on_failure="rollback")
    error = caught.value
    assert error.diagnosis.category is Category.IMAGE_PULL_ERROR
    assert (error.diagnosis.cluster, str(error.diagnosis.pod)[:4]) == ("c1", "web-")
    assert error.result is not None
    assert error.result.error is not None
    cause = error.result.error["cause"]["diagnosis"]
    assert (cause["category"], cause["cluster"]) == ("ContainerNotReady", "c2")
    for category in ("ImagePullError: web-", "ContainerNotReady: web-"):
        assert category in str(error)
        assert category in render(error.result)
    last = {progress.step: progress.state for progress in told}
    assert (last["wait for pods"], last["roll back"], last["wait for rollback"]) == (
        "failed",
        "done",
        "failed",
    )
    assert error.result.failed_steps == ["wait for pods", "wait for rollback"]


# ---- stopped ------------------------------------------------------------------------------------

SLOW: dict[str, Any] = {
    "app_id": 3290,
    "deployment": "never-ready",
    "poll_seconds": 0.1,
    "poll_attempts": 1000,
}
PUBLISHED = "template 1343170 was published to pub-bjwdt, and the cloud continues with it"


async def test_a_release_whose_process_ends_crashes_and_says_what_the_cloud_continues_with(
    cloud: Cloud,
) -> None:
    release = asyncio.create_task(deploy_latest_image(**SLOW))
    await eventually(lambda: _seen(cloud, "status", 4))
    (run_id,) = guard.guarded_runs()
    told: list[str] = []
    assert guard.shut_down(run_id)
    with pytest.raises(ReleaseCancelledError, match="its process was shut down") as caught:
        await release
    state = await state_of(str(run_id))
    assert state.is_crashed()
    told += [str(state.message), str(caught.value)]
    assert caught.value.result is not None
    told.append(render(caught.value.result).replace("\\", ""))
    for text in told:
        assert PUBLISHED in text
        assert "Roll back to undo it." in text
        assert "Retry the run to continue where it stopped." in text


async def _seen(cloud: Cloud, call: str, number: int) -> bool:
    return len([seen for seen in cloud.requests if seen["call"] == call]) >= number


def test_a_command_that_is_terminated_says_what_the_cloud_continues_with(
    cloud: Cloud, prefect_server: str, tmp_path: Path
) -> None:
    process = subprocess.Popen(
        [
            *(BIN / "prefect-rollout", "deploy", "--app-id", "3290", "--deployment", "never-ready"),
            *("--poll-seconds", "0.1", "--poll-attempts", "1000", "--json"),
        ],
        env={**os.environ, **cloud.environment, "HOME": str(tmp_path), "PREFECT_API_URL": prefect_server},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr
    for line in process.stderr:
        if "wait for pods running" in line:
            process.send_signal(signal.SIGTERM)
            break
    printed, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"its process was shut down: {PUBLISHED}" in said
    result = json.loads(printed)
    assert result["outcome"] == "cancelled"
    assert PUBLISHED in result["error"]["message"]
    assert "Traceback" not in said


async def test_a_batch_that_is_cancelled_says_with_which_releases_the_cloud_continues(
    make_cloud: Any,
) -> None:
    make_cloud(**shop(3, {2: {"kind": "never_ready", "images": ":2"}}))
    halfway = asyncio.Event()

    def look(batch: BatchResult) -> None:
        first, second, _ = batch.releases
        if first.stage is Stage.RELEASED and second.detail.startswith("wait for pods"):
            halfway.set()

    releases = [
        {"app_id": app, "deployment": "web", "wave": wave, "images": {"web": f"r/app{app}:2"}}
        for app, wave in ((1, 1), (2, 1), (3, 2))
    ]
    plan: Any = {"defaults": FAST, "releases": releases}
    with looking_on(look):
        batch = asyncio.create_task(deploy_batch(plan=plan))
    await asyncio.wait_for(halfway.wait(), 120)
    assert guard.cancel_all("Ctrl-C")
    with pytest.raises(RolloutError, match="Ctrl-C") as caught:
        await batch
    assert caught.value.result is not None
    left = "what was released stays (1); the cloud continues with what was published of 2/web"
    assert left in str(caught.value)
    assert "Roll those deployments back to undo it." in str(caught.value)
    assert [row.stage for row in caught.value.result.releases] == [
        Stage.RELEASED,
        Stage.CANCELLED,
        Stage.SKIPPED,
    ]
    assert left in str((await state_of(caught.value.result.batch_id)).message)
    assert caught.value.retry_helps
