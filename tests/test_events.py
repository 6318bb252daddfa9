"""The events of a release, read back from a real Prefect server, and what automations make of them."""

import asyncio
import json
import os
import subprocess
import threading
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from prefect import get_client
from prefect.blocks.notifications import CustomWebhookNotificationBlock
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
    FlowRunFilterTags,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.events import emit_event
from prefect.events.actions import SendNotification
from prefect.events.filters import (
    EventAnyResourceFilter,
    EventFilter,
    EventNameFilter,
    EventOccurredFilter,
    EventOrder,
    EventResourceFilter,
)
from prefect.events.schemas.events import ReceivedEvent
from prefect.events.worker import EventsWorker
from prefect.exceptions import Abort
from prefect.settings import PREFECT_SERVER_EVENTS_MAXIMUM_SIZE_BYTES, temporary_settings
from prefect.states import Cancelling, Crashed, Pending, Running

from prefect_rollout.errors import InputError, ReleaseCancelledError, RolloutError
from prefect_rollout.flows import deploy_latest_image, restart, rollback, scale
from prefect_rollout.release.request import Action
from prefect_rollout.release.result import ClusterResult, Outcome, ReleaseResult
from prefect_rollout.runs import events, guard
from support import BIN, Cloud, Zygote, resume, task_runs_of

ROOT = Path(__file__).parent.parent
AUTOMATIONS = ROOT / "docs" / "automations"
FAST: dict[str, Any] = {"app_id": 3290, "poll_seconds": 0.1, "poll_attempts": 200}
HOME: dict[str, Any] = {**FAST, "deployment": "qapm-home"}
BAD: dict[str, Any] = {**FAST, "deployment": "bad-image", "grace_seconds": 0.5}
_BEGUN = datetime.now(UTC)
OCCURRED = EventOccurredFilter(since=_BEGUN, until=_BEGUN + timedelta(days=1))

pytestmark = pytest.mark.usefixtures("prefect_api")


async def events_of(run_id: object, last: str, prefix: str = events.PREFIX) -> list[ReceivedEvent]:
    """The run's events of that prefix in their order, once the one called `last` has arrived."""
    wanted = EventFilter(
        event=EventNameFilter(prefix=[prefix]) if prefix else None,
        any_resource=EventAnyResourceFilter(id=[f"prefect.flow-run.{run_id}"]),
        occurred=OCCURRED,
        order=EventOrder.ASC,
    )
    async with get_client() as client:
        for _ in range(300):
            found = (await client.read_events(wanted, limit=50)).events
            if found and found[-1].event == prefix + last:
                return found
            await asyncio.sleep(0.1)
    raise AssertionError(f"no {last}: {[each.event for each in found]}")


def names(found: list[ReceivedEvent]) -> list[str]:
    return [each.event.removeprefix(events.PREFIX) for each in found]


async def failure(flow: Any, **parameters: Any) -> ReleaseResult:
    with pytest.raises(RolloutError) as caught:
        await flow(**parameters)
    result = caught.value.result
    assert isinstance(result, ReleaseResult)
    return result


@pytest.mark.promise("Each attempt reports its outcome once")
async def test_a_release_tells_its_start_each_publish_and_its_end(cloud: Cloud) -> None:
    result = await deploy_latest_image(
        **{**FAST, "deployment": "qapm-api"}, reason="测试", requested_by="zhang"
    )
    found = await events_of(result.release_id, "released")
    assert names(found) == ["started", "published", "published", "released"]
    platform = cloud.url.replace("http://127.0.0.1", "localhost")
    for event in found:
        assert dict(event.resource.root) == {
            "prefect.resource.id": f"prefect-rollout.deployment.{platform}.3290.qapm-api",
            "prefect.resource.name": "qapm-api",
            "app-id": "3290",
            "deployment": "qapm-api",
            "platform": platform,
            "action": "deploy",
        }
        roles = {role: [each.id for each in listed] for role, listed in event.resources_in_role.items()}
        assert roles["app"] == [f"prefect-rollout.app.{platform}.3290"]
        assert roles["flow-run"] == [f"prefect.flow-run.{result.release_id}"]
        assert event.payload["reason"] == "测试"
        assert event.payload["requested_by"] == "zhang"
        assert event.payload["release_id"] == result.release_id
    of_clusters = [
        [
            each.id.removeprefix(f"prefect-rollout.cluster.{platform}.")
            for each in event.resources_in_role["cluster"]
        ]
        for event in found
    ]
    both = ["pub-bjwdt", "pub-bjyt"]
    assert of_clusters == [both, both[:1], both[1:], both]
    assert [event.payload.get("template") for event in found[1:3]] == ["1343170", "1343170"]
    last = found[-1].payload
    assert (last["outcome"], last["error"], last["link"]) == ("released", None, result.links["Flow run"])
    assert [(each["cluster"], each["after"], each["online"], each["ready"]) for each in last["clusters"]] == [
        (cluster.cluster, "1343170", "1343170", cluster.replicas) for cluster in result.clusters
    ]
    assert all(each["before"] for each in last["clusters"])


@pytest.mark.promise("Each attempt reports its outcome once")
async def test_a_release_that_times_out_says_why_and_what_to_do(cloud: Cloud) -> None:
    result = await failure(deploy_latest_image, **{**FAST, "deployment": "never-ready", "poll_attempts": 30})
    found = await events_of(result.release_id, "timed-out")
    assert names(found) == ["started", "published", "timed-out"]
    error = found[-1].payload["error"]
    assert (error["type"], error["category"]) == ("ReleaseTimedOutError", "ContainerNotReady")
    assert "0 of 2 new pods ready" in error["message"]
    assert error["advice"]
    assert "1343170 online" in found[-1].payload["live"]


async def test_a_failed_release_that_is_rolled_back_ends_so(cloud: Cloud) -> None:
    result = await failure(deploy_latest_image, **BAD, on_failure="rollback")
    found = await events_of(result.release_id, "rolled-back")
    assert names(found) == ["started", "published", "published", "rolled-back"]
    assert [(each.payload["template"], each.payload["rollback"]) for each in found[1:3]] == [
        (str(result.template_id), False),
        (str(result.clusters[0].template_before), True),
    ]
    assert found[-1].payload["error"]["category"] == "ImagePullError"
    assert found[-1].payload["outcome"] in {"failed", "timed-out"}


async def test_the_other_flows_tell_what_they_did(cloud: Cloud) -> None:
    await deploy_latest_image(**HOME)
    for result, last in (
        (await restart(**HOME), "released"),
        (await scale(**HOME, replicas=2), "released"),
        (await rollback(**HOME), "rolled-back"),
    ):
        found = await events_of(result.release_id, last)
        assert names(found) == ["started", "published", last]
        assert {event.resource["action"] for event in found} == {result.action.value}


async def running(cloud: Cloud, deployment: str, call: str) -> FlowRun:
    """The run that releases the deployment, once the cloud has been asked that by it."""
    for _ in range(600):
        if any(seen["call"] == call for seen in cloud.requests):
            break
        await asyncio.sleep(0.05)
    async with get_client() as client:
        runs = await client.read_flow_runs(
            flow_run_filter=FlowRunFilter(
                tags=FlowRunFilterTags(all_=[f"deployment:{deployment}"]),
                state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.RUNNING])),
            )
        )
    # Runs that other tests have left for dead may stand there too.
    return max(runs, key=lambda run: (run.created is not None, run.created))


async def set_state(run_id: UUID, state: Any) -> None:
    async with get_client() as client:
        await client.set_flow_run_state(run_id, state, force=True)


async def test_a_cancelled_release_tells_what_is_live(cloud: Cloud) -> None:
    slow = {**FAST, "deployment": "never-ready", "poll_attempts": 1000}
    release = asyncio.create_task(deploy_latest_image(**slow))
    run = await running(cloud, "never-ready", "publish")
    async with asyncio.timeout(30):
        while cloud.requests[-1]["call"] != "status":  # noqa: ASYNC110 - the release's first poll
            await asyncio.sleep(0.05)
    await set_state(run.id, Cancelling())
    with pytest.raises(ReleaseCancelledError):
        await asyncio.wait_for(release, 30)
    found = await events_of(run.id, "cancelled")
    assert names(found) == ["started", "published", "cancelled"]
    assert "1343170 online" in found[-1].payload["live"]


@pytest.mark.parametrize("interrupted", [False, True])
async def test_a_process_that_was_taken_over_tells_no_end(make_cloud: Any, interrupted: bool) -> None:
    cloud = make_cloud(faults=[{"call": "publish", "nth": 1, "kind": "delay", "seconds": 25}])
    zombie = asyncio.create_task(deploy_latest_image(**{**FAST, "deployment": "qapm-api"}))
    run = await running(cloud, "qapm-api", "publish")
    await set_state(run.id, Crashed())
    await set_state(run.id, Pending())
    await set_state(run.id, Running())  # as its successor's process does
    if interrupted:
        guard.cancel_all("cancelled by Ctrl-C")
    cloud.faults()
    with pytest.raises(Abort):
        await asyncio.wait_for(zombie, 30)
    # Whatever it had to say has arrived before this.
    emit_event(
        "end",
        {"prefect.resource.id": "the.end"},
        related=[{"prefect.resource.id": f"prefect.flow-run.{run.id}", "prefect.resource.role": "flow-run"}],
    )
    await asyncio.to_thread(EventsWorker.drain_all, timeout=30)
    found = await events_of(run.id, "end", prefix="")
    told = names([event for event in found if event.event.startswith(events.PREFIX)])
    assert set(told) <= {"started", "published"}
    assert told[0] == "started"
    assert [entry["cluster"] for entry in cloud.record if entry["kind"] == "publish"] == ["pub-bjwdt"]
    await set_state(run.id, Crashed())


@pytest.mark.promise("Each attempt reports its outcome once")
async def test_a_retry_does_not_tell_again_what_was_published(make_cloud: Any) -> None:
    cloud = make_cloud(faults=[{"call": "publish", "nth": 2, "kind": "status", "status": 400}])
    api = {**FAST, "deployment": "qapm-api"}
    result = await failure(deploy_latest_image, **api)
    assert names(await events_of(result.release_id, "failed")) == ["started", "published", "failed"]
    cloud.faults()
    async with get_client() as client:
        run = await client.read_flow_run(UUID(result.release_id))
    state = await resume(run.id)
    again_released = await state.aresult()
    assert isinstance(again_released, ReleaseResult)
    assert again_released.tries == 2
    found = await events_of(result.release_id, "released")
    assert names(found)[3:] == ["started", "published", "released"]
    assert found[4].payload["cluster"] == "pub-bjyt"
    assert [event.payload["try"] for event in found] == [1, 1, 1, 2, 2, 2]


async def test_a_release_that_fails_before_it_is_known_where_tells_that_too(cloud: Cloud) -> None:
    result = await failure(deploy_latest_image, **{**FAST, "deployment": "qapm-hom"})
    (event,) = await events_of(result.release_id, "failed")
    assert event.payload["error"]["category"] == "NotFound"
    assert event.payload["clusters"] == []
    result = await failure(deploy_latest_image, **HOME, target="nothing/default")
    (event,) = await events_of(result.release_id, "failed")
    assert event.resource.id == "prefect-rollout.deployment.unknown.3290.qapm-home"


async def test_an_event_that_cannot_be_sent_changes_nothing(
    cloud: Cloud, caplog: pytest.LogCaptureFixture
) -> None:
    # Larger than Prefect's own, and too small for a long reason in Chinese.
    with temporary_settings({PREFECT_SERVER_EVENTS_MAXIMUM_SIZE_BYTES: 4000}):
        assert (await deploy_latest_image(**HOME, reason="长" * 1000)).outcome is Outcome.RELEASED
    assert len([record for record in caplog.records if "could not be sent" in record.message]) == 3


NASTY = "<b>*x*</b> {{ 1/0 }} \x1b[35m\u202e\n# evil\udfff" + "长" * 5000


async def test_hostile_and_many_names_make_an_event_all_the_same() -> None:
    result = ReleaseResult(
        outcome=Outcome.FAILED,
        app_id=NASTY,
        app=NASTY,
        deployment=NASTY,
        release_id=str(uuid4()),
        reason=NASTY,
        requested_by=NASTY,
        images={NASTY: NASTY},
        error=InputError(NASTY, advice=NASTY).to_dict(),
        clusters=[ClusterResult(cluster=f"{number} {NASTY}", replicas=1) for number in range(200)],
    )
    mark = str(uuid4())
    events.emit("started", result, f"{mark}.{NASTY}")
    events.ended(result.model_copy(update={"dry_run": True}), f"{mark}.{NASTY}")
    events.ended(result, f"{mark}.{NASTY}")
    wanted = EventFilter(
        resource=EventResourceFilter(id_prefix=[f"prefect-rollout.deployment.{mark}."]), occurred=OCCURRED
    )
    async with get_client() as client:
        for _ in range(300):
            found = (await client.read_events(wanted, limit=50)).events
            if found and found[0].event.endswith("failed"):
                break
            await asyncio.sleep(0.1)
    assert names(found) == ["failed", "started"]
    for event in found:
        assert len(event.resources_in_role["cluster"]) == 50
        assert len(event.payload["clusters"]) == 200
        labels = [text for each in event.involved_resources for text in each.root.values()]
        assert [text for text in labels + texts(event.payload) if not text.isprintable()] == []


def texts(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [text for each in [*value, *value.values()] for text in texts(each)]
    if isinstance(value, list):
        return [text for each in value for text in texts(each)]
    return [value] if isinstance(value, str) else []


@pytest.mark.parametrize(
    ("action", "outcome", "back", "word"),
    [
        (Action.DEPLOY, Outcome.RELEASED, None, "released"),
        (Action.ROLLBACK, Outcome.RELEASED, None, "rolled-back"),
        (Action.ROLLBACK, Outcome.TIMED_OUT, None, "timed-out"),
        (Action.DEPLOY, Outcome.TIMED_OUT, [True, None], "rolled-back"),
        (Action.DEPLOY, Outcome.TIMED_OUT, [True, False], "failed"),
        (Action.SCALE, Outcome.CANCELLED, None, "cancelled"),
        (Action.DEPLOY, Outcome.SKIPPED, None, "skipped"),
    ],
)
def test_the_last_event_says_how_it_ended(
    action: Action, outcome: Outcome, back: list[bool | None] | None, word: str
) -> None:
    clusters = [ClusterResult(cluster="c", replicas=1, rolled_back=each) for each in back or [None]]
    result = ReleaseResult(
        action=action, outcome=outcome, app_id=1, deployment="d", release_id="r", clusters=clusters
    )
    assert events.ending(result) == word


# ---- processes that end right after -------------------------------------------------------------


def command(*arguments: str, home: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("K8S_")}
    return subprocess.run(
        [BIN / "prefect-rollout", *arguments],
        env={**kept, "HOME": str(home), **variables},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )


async def test_the_events_of_the_command_arrive(cloud: Cloud, prefect_api: str, tmp_path: Path) -> None:
    ended = await asyncio.to_thread(
        command,
        *("deploy", "--app-id", "3290", "--deployment", "qapm-home", "--poll-seconds", "0.1", "--json"),
        home=tmp_path,
        PREFECT_API_URL=prefect_api,
        **cloud.environment,
    )
    assert ended.returncode == 0, ended.stderr
    result = json.loads(ended.stdout)
    assert result["trigger"] == "cli"
    found = await events_of(result["release_id"], "released")
    assert names(found) == ["started", "published", "released"]
    assert {event.payload["trigger"] for event in found} == {"cli"}
    async with get_client() as client:
        run_id = UUID(result["release_id"])
        run = await client.read_flow_run(run_id)
        assert {"trigger:cli", "app:3290", "deployment:qapm-home"} == set(run.tags)
        tasks = await task_runs_of(run_id, at_least=8)
    assert {tag for each in tasks for tag in each.tags} == set()


async def test_the_events_of_a_process_that_runs_one_run_arrive(
    cloud: Cloud, prefect_api: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", prefect_api)
    async with get_client() as client:
        run = await client.create_flow_run(deploy_latest_image, parameters=HOME)
    with Zygote() as zygote:
        zygote.start(run.id, cloud.environment)
        found = await events_of(run.id, "released")
    assert names(found) == ["started", "published", "released"]


# ---- automations that notify --------------------------------------------------------------------


class Receiver:
    """A webhook's other end: what it was sent, as parsed JSON."""

    def __init__(self) -> None:
        got: list[dict[str, str]] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(204)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.got = got
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/hook"

    async def message(self, word: str) -> dict[str, str]:
        """The message in which the word stands, once it has come."""
        for _ in range(600):
            if found := [each for each in self.got if word in each["subject"] + each["body"]]:
                return found[0]
            await asyncio.sleep(0.05)
        raise AssertionError(f"nothing of {word}: {self.got}")


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    made = Receiver()
    thread = threading.Thread(target=made.server.serve_forever)
    thread.start()
    yield made
    made.server.shutdown()
    made.server.server_close()
    thread.join()


@pytest.fixture
async def hook(receiver: Receiver) -> AsyncIterator[UUID]:
    """The id of a notification block that reaches the receiver; the automations are gone after the test."""
    block = CustomWebhookNotificationBlock(
        name="ops", url=receiver.url, json_data={"subject": "{{subject}}", "body": "{{body}}"}
    )
    yield await block.asave("ops", overwrite=True)
    async with get_client() as client:
        for each in await client.read_automations():
            if any(isinstance(action, SendNotification) for action in each.actions):
                await client.delete_automation(each.id)


async def create(name: str, block: UUID, folder: Path, server: str) -> None:
    """Create an automation as docs/automations/README.md says."""
    file = folder / name
    text = (AUTOMATIONS / name).read_text(encoding="ascii")  # Prefect reads it in the locale's encoding
    file.write_text(text.replace("BLOCK_ID", str(block)), encoding="ascii")
    done = await asyncio.to_thread(
        lambda: subprocess.run(
            [BIN / "prefect", "automation", "create", "--from-file", file],
            env={**os.environ, "PREFECT_API_URL": server},
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )
    )
    assert done.returncode == 0, done.stdout + done.stderr


def shop(app_id: int) -> list[dict[str, Any]]:
    def deployment(number: int, name: str, **more: Any) -> dict[str, Any]:
        templates = [{"id": number * 10 + each, "image": f"r/{name}:{each}"} for each in (1, 2)]
        online = {"east": number * 10 + 1}
        return {
            "id": number,
            "name": name,
            "clusters": {"east": 1},
            "templates": templates,
            "online": online,
            **more,
        }

    bad = {"behaviour": {"kind": "image_cannot_be_pulled", "images": ":2"}}
    return [
        {"id": app_id, "name": "shop", "deployments": [deployment(1, "good"), deployment(2, "bad", **bad)]}
    ]


async def test_a_failed_release_notifies_and_one_that_succeeded_does_not(
    make_cloud: Any, prefect_api: str, tmp_path: Path, receiver: Receiver, hook: UUID
) -> None:
    make_cloud(apps=shop(7701))
    await create("failed.yaml", hook, tmp_path, prefect_api)
    asked: dict[str, Any] = {"app_id": 7701, "poll_seconds": 0.1, "poll_attempts": 100, "grace_seconds": 0.5}
    await deploy_latest_image(**asked, deployment="good")
    result = await failure(
        deploy_latest_image, **asked, deployment="bad", reason="周五", requested_by="zhang"
    )
    assert result.error
    message = await receiver.message("7701")
    assert message["subject"] == f"bad: deploy {result.outcome}"
    assert message["body"].splitlines() == [
        "Deployment: bad of app shop (7701)",
        "Clusters: east",
        f"What happened: {result.error['message']}",
        f"What to do: {result.error['advice']}",
        f"Live at the end: {result.error['live']}",
        "Reason: 周五",
        "Asked for by: zhang (trigger: python)",
        f"Flow run: {result.links['Flow run']}",
    ]
    assert [each["subject"] for each in receiver.got if "7701" in each["body"]] == [message["subject"]]


async def test_a_release_that_succeeded_and_one_that_was_killed_notify(
    make_cloud: Any, prefect_api: str, tmp_path: Path, receiver: Receiver, hook: UUID
) -> None:
    make_cloud(apps=shop(7702))
    for name in ("released.yaml", "killed.yaml"):
        await create(name, hook, tmp_path, prefect_api)
    result = await deploy_latest_image(app_id=7702, deployment="good", poll_seconds=0.1)
    message = await receiver.message("7702")
    assert message["subject"] == "good: deploy succeeded"
    assert message["body"].splitlines() == [
        "Deployment: good of app shop (7702)",
        f"east: template 11 -> {result.template_id}, 1 of 1 ready",
        "Reason: none given",
        "Asked for by: unknown (trigger: python)",
        f"Flow run: {result.links['Flow run']}",
    ]
    async with get_client() as client:
        run = await client.create_flow_run(
            restart, parameters={"app_id": 7702, "deployment": "x"}, name="victim"
        )
        await client.set_flow_run_state(run.id, Running(), force=True)
        await client.set_flow_run_state(run.id, Crashed(message="No sign of life."), force=True)
    message = await receiver.message("victim")
    assert message["subject"] == "victim was killed"
    assert message["body"].startswith("No sign of life.\nWhat it wrote stays")
    assert message["body"].rstrip().endswith(str(run.id))
