"""The history of what changed: the tables that releases leave, and the command that reads them."""

import asyncio
import json
import os
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from markdown_it import MarkdownIt
from prefect import flow, get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    FlowRunFilter,
    FlowRunFilterDeploymentId,
    FlowRunFilterState,
    FlowRunFilterStateType,
    FlowRunFilterTags,
)
from prefect.client.schemas.objects import Artifact, FlowRun, StateType
from prefect.client.schemas.schedules import IntervalSchedule
from prefect.flow_engine import run_flow_async
from prefect.states import Cancelling, Crashed, Pending, Running

from prefect_rollout.errors import InputError, ReleaseCancelledError, RolloutError
from prefect_rollout.flows import deploy_latest_image, restart, rollback, scale
from prefect_rollout.release.result import ClusterResult, Outcome, ReleaseResult
from prefect_rollout.runs import flow_runs, history
from prefect_rollout.runs.history import Change, Wanted, changes, select, since_of
from support import BIN, Cloud, resume

NOW = datetime(2026, 11, 24, 10, 0, tzinfo=UTC)

# ---- pure ---------------------------------------------------------------------------------------


def result(**fields: Any) -> ReleaseResult:
    given: dict[str, Any] = {
        "outcome": Outcome.RELEASED,
        "cloud": "https://k8s.example",
        "target": "container-cloud/default",
        "app_id": 3290,
        "deployment": "qapm-home",
        "release_id": "0191",
        "template_id": 6,
        "images": {"web": "r/web:2", "side": "r/side:1"},
        "requested_by": "zhang",
        "reason": "周五",
        "trigger": "cli",
        "clusters": [
            ClusterResult(
                cluster="east",
                replicas=2,
                ready=2,
                published=True,
                template=6,
                template_before=5,
                images_before={"web": "r/web:1", "side": "r/side:1"},
                online=6,
                online_known=True,
            )
        ],
    }
    return ReleaseResult.model_validate(given | fields)


def test_a_release_is_a_change_of_each_cluster() -> None:
    (row,) = changes(result(), NOW)
    assert row.model_dump(exclude_defaults=True) == {
        "when": NOW,
        "app_id": "3290",
        "deployment": "qapm-home",
        "action": "deploy",
        "outcome": "released",
        "cloud": "https://k8s.example",
        "target": "container-cloud/default",
        "cluster": "east",
        "before": "5",
        "after": "6",
        "ready": "2 of 2",
        "images": "web: r/web:1 → r/web:2",
        "who": "zhang",
        "why": "周五",
        "trigger": "cli",
        "run_id": "0191",
    }


@pytest.mark.parametrize("text", ["a b", "> <b>\n[x]: <y>", "\\u0020 \\", "\u3000\u2028\r", "']\")"])
def test_the_result_in_a_page_is_read_back_and_not_shown(text: str) -> None:
    page = history.with_record("# Title", left := result(reason=text))
    assert MarkdownIt("commonmark").render(page) == "<h1>Title</h1>\n"
    (artifact,) = [Artifact(data=page)]
    assert ReleaseResult.model_validate_json(history._record(artifact)) == left
    assert "\n" not in page.removeprefix("# Title\n").removesuffix("\n")


@pytest.mark.parametrize(
    ("cluster", "before", "after", "outcome"),
    [
        ({"template_before": 5, "template": 6, "published": False}, "5", "as before", "failed"),
        ({"template_before": 5, "template": 6, "published": None}, "5", "unknown", "failed"),
        ({"published": False}, "none or unknown", "as before", "failed"),
        (
            {"template_before": 5, "published": True, "online": 5, "online_known": True, "rolled_back": True},
            *("5", "5", "failed, rolled back"),
        ),
        (
            {"template_before": 5, "published": True, "rolled_back": False, "online_known": True},
            *("5", "nothing", "failed, rollback failed"),
        ),
    ],
)
def test_before_and_after_are_what_is_known(
    cluster: dict[str, Any], before: str, after: str, outcome: str
) -> None:
    failed = result(outcome=Outcome.FAILED, clusters=[{"cluster": "c", "replicas": 1, **cluster}])
    (row,) = changes(failed, NOW)
    assert (row.before, row.after, row.outcome, row.images) == (before, after, outcome, "")


def test_a_glass_that_was_broken_is_on_record() -> None:
    (row,) = changes(result(break_glass="outage", requested_by=""), NOW)
    assert (row.break_glass, row.who) == ("outage", "unknown")


def test_dry_runs_and_skipped_runs_change_nothing() -> None:
    assert changes(result(dry_run=True, outcome=Outcome.FAILED), NOW) == []
    assert changes(result(outcome=Outcome.PLANNED), NOW) == []
    assert changes(result(outcome=Outcome.SKIPPED), NOW) == []


def test_a_release_that_failed_before_its_clusters_were_known_is_a_row_all_the_same() -> None:
    (row,) = changes(result(outcome=Outcome.FAILED, clusters=[]), NOW)
    assert (row.cluster, row.after) == ("none", "as before")


@pytest.mark.parametrize(
    ("fields", "trigger"),
    [
        ({"tags": ["trigger:cli", "x"]}, "cli"),
        ({"tags": ["trigger:mcp"], "deployment_id": uuid4()}, "mcp"),
        ({"auto_scheduled": True, "deployment_id": uuid4()}, "schedule"),
        ({"deployment_id": uuid4()}, "ui or api"),
        ({"tags": ["trigger:cli"], "parent_task_run_id": uuid4()}, "batch"),
        ({}, "python"),
    ],
)
def test_the_trigger_is_read_off_the_run(fields: dict[str, Any], trigger: str) -> None:
    assert history.trigger_of(FlowRun(flow_id=uuid4(), **fields)) == trigger


def test_who_made_the_run_is_said_as_far_as_prefect_knows() -> None:
    by = {"id": uuid4(), "type": "SCHEDULE", "display_value": "Weekly"}
    assert (
        history.asker_of(FlowRun.model_validate({"flow_id": uuid4(), "created_by": by})) == "schedule Weekly"
    )
    assert history.asker_of(FlowRun(flow_id=uuid4())) == ""


def change(**fields: Any) -> Change:
    given = {
        "when": NOW,
        "app_id": "1",
        "deployment": "a",
        "action": "deploy",
        "outcome": "released",
        "cluster": "east",
        "run_id": "r",
    }
    return Change.model_validate(given | fields)


def test_changes_are_chosen_by_every_filter_and_the_newest_come_first() -> None:
    old, new = change(run_id="old", when=NOW - timedelta(hours=2)), change(run_id="new")
    other = change(run_id="other", app_id="2", deployment="b", cluster="west")
    lost = change(run_id="lost", cluster="?", when=NOW - timedelta(hours=1))
    found = [old, other, lost, new]

    def ids(**wanted: Any) -> list[str]:
        return [each.run_id for each in select(found, Wanted(**wanted))]

    assert ids() == ["other", "new", "lost", "old"]
    assert ids(limit=2) == ["other", "new"]
    assert ids(app_id="1") == ["new", "lost", "old"]
    assert ids(deployment="b") == ["other"]
    assert ids(cluster="west") == ["other", "lost"]
    assert ids(since=NOW - timedelta(minutes=90)) == ["other", "new", "lost"]


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("90m", NOW - timedelta(minutes=90)),
        ("36h", NOW - timedelta(hours=36)),
        ("7d", NOW - timedelta(days=7)),
        ("2w", NOW - timedelta(weeks=2)),
        ("2026-11-01", datetime(2026, 11, 1, tzinfo=UTC)),
        ("2026-11-01T08:00+08:00", datetime(2026, 11, 1, tzinfo=UTC)),
        ("2026-11-01T08:00:00Z", datetime(2026, 11, 1, 8, tzinfo=UTC)),
        ("2026-11-01T08:00", datetime(2026, 11, 1, 8, tzinfo=UTC)),
    ],
)
def test_since_is_a_span_or_a_moment(text: str, moment: datetime) -> None:
    assert since_of(text, NOW) == moment


@pytest.mark.parametrize(
    "text",
    [
        *("", "d", "7", "7y", "-1d", "yesterday", "2026-13-01", "999999w", "7d\x1b[1m", "٧d"),
        *("2026-W45-1", "20261101", "2026-11-01 08:00", "2026-11-01T0800", "0001-01-01T00:00+08:00"),
    ],
)
def test_another_since_is_refused_with_the_forms_there_are(text: str) -> None:
    with pytest.raises(InputError) as caught:
        since_of(text, NOW)
    assert str(caught.value).isprintable()
    for form in ("since", "90m", "36h", "7d", "2026-11-01", "2026-11-01T08:00+08:00"):
        assert form in str(caught.value)


# ---- real runs ----------------------------------------------------------------------------------


def shop(app_id: int) -> list[dict[str, Any]]:
    def deployment(number: int, name: str, *clusters: str, **more: Any) -> dict[str, Any]:
        templates = [{"id": number * 10 + each, "image": f"r/{name}:{each}"} for each in (1, 2)]
        online = dict.fromkeys(clusters, number * 10 + 1)
        return {
            "id": number,
            "name": name,
            "clusters": dict.fromkeys(clusters, 1),
            "templates": templates,
            "online": online,
            **more,
        }

    bad = {"behaviour": {"kind": "image_cannot_be_pulled", "images": ":2"}}
    slow = {"behaviour": {"kind": "never_ready", "images": ":2"}}
    deployments = [
        deployment(1, "good", "east", "west"),
        deployment(2, "bad", "east", **bad),
        deployment(3, "slow", "west", **slow),
    ]
    return [{"id": app_id, "name": "shop", "deployments": deployments}]


async def fails(release: Any) -> ReleaseResult:
    with pytest.raises(RolloutError) as caught:
        await release
    result = caught.value.result
    assert isinstance(result, ReleaseResult)
    return result


async def cancelled(cloud: Cloud, asked: dict[str, Any]) -> None:
    release = asyncio.create_task(deploy_latest_image(**asked, deployment="slow", reason="never mind"))

    async with asyncio.timeout(60):
        while "publish 36 to west" not in cloud.writes:  # noqa: ASYNC110 - by the release
            await asyncio.sleep(0.1)
    slow = FlowRunFilter(
        tags=FlowRunFilterTags(all_=[f"app:{asked['app_id']}", "deployment:slow"]),
        state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.RUNNING])),
    )
    async with get_client() as client:
        (run,) = await client.read_flow_runs(flow_run_filter=slow)
        await client.set_flow_run_state(run.id, Cancelling(), force=True)
    with pytest.raises(ReleaseCancelledError):
        await asyncio.wait_for(release, 60)


def command(*arguments: str, home: Path, server: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("K8S_")}
    return subprocess.run(
        [BIN / "prefect-rollout", "history", *arguments],
        env={**kept, "HOME": str(home), "PREFECT_API_URL": server, "TZ": "UTC"},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )


@pytest.mark.usefixtures("prefect_api")
async def test_the_history_tells_every_kind_of_release(
    make_cloud: Any, prefect_api: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cloud = make_cloud(apps=shop(8801))
    asked: dict[str, Any] = {"app_id": 8801, "poll_seconds": 0.1, "poll_attempts": 200, "grace_seconds": 0.5}
    begun = datetime.now(UTC).replace(microsecond=0)
    released = await deploy_latest_image(
        **asked, deployment="good", requested_by="zhang", reason="[a](b)\n- x"
    )
    await rollback(**asked, deployment="good", clusters=["west"], reason="- wrong")
    await restart(**asked, deployment="good", clusters=["east"])
    await scale(**asked, deployment="good", clusters=["east"], replicas=2)
    await fails(deploy_latest_image(**asked, deployment="bad", on_failure="rollback"))
    await fails(deploy_latest_image(**asked, deployment="bad"))
    await cancelled(cloud, asked)
    await another_programs()
    async with get_client() as client:
        killed = await client.create_flow_run(
            restart,
            parameters={"app_id": 8801, "deployment": "lost", "reason": "why not", "requested_by": "li"},
        )
        await client.set_flow_run_state(killed.id, Running(), force=True)
        await client.set_flow_run_state(killed.id, Crashed(), force=True)
        later = datetime.now(UTC)
        found = await history.read(client, Wanted(app_id="8801"))
    told = [(each.action, each.deployment, each.cluster, each.outcome) for each in found]
    assert told == [
        ("restart", "lost", "?", "crashed"),
        ("deploy", "slow", "west", "cancelled"),
        ("deploy", "bad", "east", "failed"),
        ("deploy", "bad", "east", "failed, rolled back"),
        ("scale", "good", "east", "released"),
        ("restart", "good", "east", "released"),
        ("rollback", "good", "west", "released"),
        ("deploy", "good", "east", "released"),
        ("deploy", "good", "west", "released"),
    ]
    assert all(begun <= each.when <= later for each in found)
    assert [(each.before, each.after) for each in found] == [
        ("?", "?"),
        ("31", "36"),
        ("21", "35"),
        ("21", "21"),
        ("33", "33"),
        ("33", "33"),
        ("33", "11"),
        ("11", "33"),
        ("11", "33"),
    ]
    assert [found[number].images for number in (2, 7)] == [
        "bad: r/bad:1 → r/bad:2",
        "good: r/good:1 → r/good:2",
    ]
    assert found[4].ready == "2 of 2"
    assert [(found[number].who, found[number].why) for number in (0, 6, 7)] == [
        ("li", "why not"),
        ("unknown", "- wrong"),
        ("zhang", "[a](b) - x"),
    ]
    assert {each.trigger for each in found} == {"python"}
    assert found[-1].run_id == released.release_id

    async with get_client() as client:
        pages = await client.read_artifacts(
            artifact_filter=ArtifactFilter(
                flow_run_id=ArtifactFilterFlowRunId(any_=[UUID(released.release_id)]),
            )
        )
        assert [(page.type, page.key) for page in pages if page.key] == [("markdown", "release-8801-good")]
        monkeypatch.setattr(flow_runs, "PAGE", 2)
        assert await history.read(client, Wanted(app_id="8801")) == found
        assert await history.read(client, Wanted(app_id="8801", limit=3)) == found[:3]

    async def printed(*arguments: str) -> subprocess.CompletedProcess[str]:
        return await asyncio.to_thread(
            command, "--app", "8801", *arguments, home=tmp_path, server=prefect_api
        )

    narrow = ("--deployment", "good", "--cluster", "west", "--since", "1d", "--limit", "1")
    full, one, none = await asyncio.gather(
        printed("--json"), printed(*narrow), printed("--since", "2999-01-01")
    )
    assert full.returncode == 0, full.stderr
    assert [Change.model_validate(each) for each in json.loads(full.stdout)["changes"]] == found
    for word in ("good (app 8801)", "rollback: released", "west", "33 → 11", "unknown (python)", "- wrong"):
        assert word in one.stdout, one.stdout
    assert "deploy" not in one.stdout
    assert (none.returncode, none.stdout) == (0, "")
    assert "No release of app 8801, since 2999-01-01 is on record." in none.stderr


@flow(name="restart")
async def another_programs() -> None:
    """A flow of one of our flows' names."""


@pytest.mark.promise("Each attempt reports its outcome once")
@pytest.mark.usefixtures("prefect_api")
async def test_a_retry_is_a_change_of_its_own_and_a_killed_one_is_not_overlooked(make_cloud: Any) -> None:
    cloud = make_cloud(
        apps=shop(8802), faults=[{"call": "publish", "nth": 2, "kind": "status", "status": 400}]
    )
    failed = await fails(deploy_latest_image(app_id=8802, deployment="good", poll_seconds=0.1))
    run_id = UUID(failed.release_id)
    cloud.faults()
    await resume(run_id)
    async with get_client() as client:
        found = await history.read(client, Wanted(app_id="8802"))
        assert [(each.tries, each.cluster, each.outcome, each.after) for each in found] == [
            (2, "east", "released", "33"),
            (2, "west", "released", "33"),
            (1, "east", "failed", "33"),
            (1, "west", "failed", "11"),
        ]
        await client.set_flow_run_state(run_id, Running(), force=True)
        await client.set_flow_run_state(run_id, Crashed(), force=True)
        crashed = (await history.read(client, Wanted(app_id="8802")))[:2]
    # Its lock had been asked for: where it went is known, and what it did there is not.
    assert [(each.tries, each.cluster, each.outcome, each.after) for each in crashed] == [
        (3, "east", "crashed", "?"),
        (3, "west", "crashed", "?"),
    ]


@pytest.mark.usefixtures("prefect_api")
async def test_a_run_of_a_schedule_is_told_from_one_that_a_person_started(make_cloud: Any) -> None:
    make_cloud(apps=shop(8803))
    parameters = {"app_id": 8803, "deployment": "good", "poll_seconds": 0.1}
    async with get_client() as client:
        flow_id = await client.create_flow(deploy_latest_image)
        deployment_id = await client.create_deployment(
            flow_id,
            name="scheduled",
            parameters=parameters,
            schedules=[
                DeploymentScheduleCreate(schedule=IntervalSchedule(interval=timedelta(days=1)), slug="daily")
            ],
        )
        ours = FlowRunFilter(deployment_id=FlowRunFilterDeploymentId(any_=[deployment_id]))
        # As the server's scheduler does.
        answer = await client.request(
            "POST", "/deployments/{id}/schedule", path_params={"id": deployment_id}, json={"max_runs": 1}
        )
        answer.raise_for_status()
        (scheduled,) = await client.read_flow_runs(flow_run_filter=ours)
        for run in (scheduled, await client.create_flow_run_from_deployment(deployment_id)):
            await client.set_flow_run_state(run.id, Pending(), force=True)
            # As a worker's process does.
            begun = await client.read_flow_run(run.id)
            await run_flow_async(deploy_latest_image, flow_run=begun, parameters=begun.parameters)
        found = await history.read(client, Wanted(app_id="8803"))
        await client.delete_deployment(deployment_id)
    assert [(each.trigger, each.who, each.outcome) for each in found[::2]] == [
        ("ui or api", "unknown", "released"),
        ("schedule", "schedule daily", "released"),
    ]
