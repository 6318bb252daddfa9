"""Closed release windows before real flow runs: real Prefect server, simulated clouds over real sockets."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
import respx
from prefect import get_client
from prefect.settings import PREFECT_API_URL, temporary_settings

from prefect_rollout.blocks import ContainerCloud, ReleaseWindows, load_windows
from prefect_rollout.errors import (
    ConfigurationError,
    ReleaseCancelledError,
    ReleaseError,
    RolloutError,
    WindowClosedError,
)
from prefect_rollout.flows import deploy_latest_image, restart, rollback, scale
from prefect_rollout.release.progress import Progress, listening
from prefect_rollout.release.result import Outcome, ReleaseResult
from prefect_rollout.runs import admission, guard
from support import Cloud

pytestmark = pytest.mark.usefixtures("prefect_api")
HOME: dict[str, Any] = {
    "app_id": 3290,
    "deployment": "qapm-home",
    "poll_seconds": 0.1,
    "poll_attempts": 100,
    "lock_wait_seconds": 0,
}


def deny(*, since: float = -3600, until: float = 3600, **more: Any) -> dict[str, Any]:
    """A rule that closes from and to so many seconds from now."""
    now = datetime.now(UTC).replace(tzinfo=None)
    start, end = now + timedelta(seconds=since), now + timedelta(seconds=until)
    return {"name": "freeze", "start": start.isoformat(), "end": end.isoformat(), **more}


async def save(name: str, *rules: dict[str, Any], **more: Any) -> None:
    await ReleaseWindows.model_validate({"rules": rules, **more}).asave(name, overwrite=True)


async def target(*rules: dict[str, Any], **more: Any) -> str:
    """A saved target of the cloud in the environment, whose releases obey those rules."""
    name = f"w-{uuid4().hex[:8]}"
    await save(name, *rules, **more)
    return await targeting(name)


async def targeting(windows: str) -> str:
    block = ContainerCloud.from_environment()
    assert block is not None
    block.windows = windows
    name = f"t-{uuid4().hex[:8]}"
    await block.asave(name)
    return f"container-cloud/{name}"


class Heard(list[str]):
    """What runs say aloud."""

    def note(self, progress: Progress) -> None:
        if progress.aloud:
            self.append(progress.detail)

    async def until(self, words: str) -> None:
        for _ in range(600):
            if any(words in one for one in self):
                return
            await asyncio.sleep(0.05)
        raise AssertionError(f"{words!r} is not in {self}")


async def labels(error_or_result: RolloutError | ReleaseResult) -> dict[str, Any]:
    result = error_or_result if isinstance(error_or_result, ReleaseResult) else error_or_result.result
    assert result is not None
    async with get_client() as client:
        return dict((await client.read_flow_run(UUID(result.release_id))).labels)


@pytest.fixture
async def default_windows(prefect_api: str) -> AsyncIterator[None]:
    """The windows that whoever names none obeys are closed."""
    # An async fixture does not see what the settings of another one are.
    with temporary_settings({PREFECT_API_URL: prefect_api}):
        await save("default", deny())
    yield
    with temporary_settings({PREFECT_API_URL: prefect_api}):
        await ReleaseWindows.adelete("default")


@pytest.mark.promise("Nothing is written in a closed release window")
@pytest.mark.parametrize(
    ("flow", "more"), [(deploy_latest_image, {}), (restart, {}), (scale, {"replicas": 2})]
)
@pytest.mark.usefixtures("default_windows")
async def test_nothing_is_written_where_the_default_windows_are_closed(
    cloud: Cloud, flow: Any, more: dict[str, Any]
) -> None:
    with pytest.raises(WindowClosedError) as caught:
        await flow(**HOME, **more)
    said = str(caught.value)
    assert said.startswith(
        "the release window 'freeze' of release-windows/default is closed for pub-bjwdt until "
    )
    assert "UTC. Start again when the window is open, or" in said
    assert cloud.record == []
    result = caught.value.result
    assert result is not None
    assert (result.outcome, result.break_glass) == (Outcome.FAILED, "")
    told = caught.value.to_dict()
    assert (told["windows"], told["block"]) == (["freeze"], "release-windows/default")
    assert (told["clusters"], told["diagnosis"]["category"]) == (["pub-bjwdt"], "WindowClosed")
    assert datetime.fromisoformat(told["reopens"]) > datetime.now(UTC)
    assert result.error == told


async def test_where_nobody_saved_default_windows_all_is_open_and_no_glass_is_broken(cloud: Cloud) -> None:
    assert await load_windows("container-cloud/default") is None
    result = await deploy_latest_image(**HOME, break_glass="just in case")
    assert (result.outcome, result.break_glass) == (Outcome.RELEASED, "")
    assert "rollout.break-glass" not in await labels(result)


async def test_a_target_that_names_no_windows_obeys_none(cloud: Cloud) -> None:
    assert await load_windows(await targeting("")) is None


async def test_windows_that_are_named_and_not_there_close_all(cloud: Cloud) -> None:
    missing = await targeting("mispelt")
    with pytest.raises(ConfigurationError, match="there is no block release-windows/mispelt") as caught:
        await deploy_latest_image(**HOME, target=missing, break_glass="now")
    assert not caught.value.retryable
    assert cloud.record == []


async def test_windows_that_cannot_be_used_close_all_and_are_told_by_rule_and_field(cloud: Cloud) -> None:
    name = f"w-{uuid4().hex[:8]}"
    await save(name)
    async with get_client() as client:
        document = await client.read_block_document_by_name(name, "release-windows")
        # As the Prefect UI does, which checks nothing of this.
        rule = {"name": "x", "cron": "0 25 * * *", "duration_minutes": 5}
        answer = await client._client.patch(
            f"/block_documents/{document.id}", json={"data": {"rules": [rule]}, "merge_existing_data": True}
        )
        answer.raise_for_status()
    with pytest.raises(ConfigurationError, match=f"{name} cannot be used: rules.0.cron: .* of 'x': Bad hour"):
        await deploy_latest_image(**HOME, target=await targeting(name))
    assert cloud.record == []


async def test_an_api_that_does_not_answer_closes_all_and_a_retry_may_help(cloud: Cloud) -> None:
    with (
        temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}),
        pytest.raises(ConfigurationError) as caught,
    ):
        await load_windows("container-cloud/default")
    assert caught.value.retryable


async def test_an_answer_that_is_no_block_does_not_count_as_no_windows(cloud: Cloud) -> None:
    with respx.mock(assert_all_called=False) as router:
        router.get(path__regex="release-windows").respond(200, text="<html>a login page</html>")
        router.route().pass_through()
        with pytest.raises(ConfigurationError) as caught:
            await deploy_latest_image(**HOME)
    assert "did not return the block release-windows/default" in str(caught.value)
    assert cloud.record == []


async def test_other_apps_and_other_clusters_are_not_concerned(make_cloud: Any) -> None:
    cloud = make_cloud()
    elsewhere = await target(deny(name="a", apps=["1"]), deny(name="b", clusters=["pub-bjyt"]))
    api: dict[str, Any] = {**HOME, "deployment": "qapm-api", "target": elsewhere}
    with pytest.raises(WindowClosedError, match=r"'b' of .* is closed for pub-bjyt until"):
        await deploy_latest_image(**api)
    assert cloud.record == []
    assert (await deploy_latest_image(**api, clusters=["pub-bjwdt"])).outcome is Outcome.RELEASED


@pytest.mark.promise("Nothing is written in a closed release window")
async def test_it_waits_until_the_window_opens_and_reads_anew_what_it_releases_to(
    cloud: Cloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission, "_ASK_AGAIN_SECONDS", 0.2)
    await save("moving", deny())
    heard = Heard()
    with listening(heard.note):
        release = asyncio.create_task(
            deploy_latest_image(**HOME, target=await targeting("moving"), window_wait_seconds=7200)
        )
    await heard.until("waiting: the release window 'freeze' of release-windows/moving is closed for ")
    assert cloud.record == []
    await save("moving", deny(until=2))
    result = await asyncio.wait_for(release, 60)
    assert (result.outcome, result.break_glass) == (Outcome.RELEASED, "")
    assert [request["call"] for request in cloud.requests].count("app") == 2


async def test_a_window_that_stays_closed_for_longer_is_not_waited_for(cloud: Cloud) -> None:
    with pytest.raises(WindowClosedError, match="longer than the 60 s that it may wait"):
        await deploy_latest_image(**HOME, target=await target(deny()), window_wait_seconds=60)
    assert cloud.record == []


async def test_a_wait_outlives_an_api_that_is_away(cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "_ASK_AGAIN_SECONDS", 0.2)
    await save("far", deny())
    asked = 0

    def answer(request: httpx.Request) -> httpx.Request:
        nonlocal asked
        asked += 1
        if asked in {2, 3}:
            raise httpx.ConnectError("refused")
        return request

    heard = Heard()
    with respx.mock(assert_all_called=False) as router:
        router.get(path__regex="release-windows").mock(side_effect=answer)
        router.route().pass_through()
        with listening(heard.note):
            release = asyncio.create_task(
                deploy_latest_image(**HOME, target=await targeting("far"), window_wait_seconds=7200)
            )
        await heard.until("waiting: ")
        while asked < 4 and not release.done():  # noqa: ASYNC110 - counted by the wire
            await asyncio.sleep(0.05)
        await save("far")
        assert (await asyncio.wait_for(release, 60)).outcome is Outcome.RELEASED
    assert asked > 3


async def test_a_run_that_waits_can_be_cancelled(cloud: Cloud) -> None:
    heard = Heard()
    with listening(heard.note):
        release = asyncio.create_task(
            deploy_latest_image(**HOME, target=await target(deny()), window_wait_seconds=7200)
        )
    await heard.until("waiting: ")
    assert guard.cancel_all("cancelled by Ctrl-C")
    with pytest.raises(ReleaseCancelledError, match="no cluster was written to"):
        await asyncio.wait_for(release, 60)
    assert cloud.record == []


@pytest.mark.promise("Nothing is written in a closed release window")
async def test_breaking_the_glass_passes_and_is_recorded(cloud: Cloud) -> None:
    heard = Heard()
    with listening(heard.note):
        result = await deploy_latest_image(
            **HOME, target=await target(deny()), break_glass=" 线上故障 #42\n", window_wait_seconds=7200
        )
    assert (result.outcome, result.break_glass) == (Outcome.RELEASED, "线上故障 #42")
    assert (await labels(result))["rollout.break-glass"] == "线上故障 #42"
    await heard.until("breaking the glass: the release window 'freeze' of ")


async def test_a_blank_reason_breaks_no_glass(cloud: Cloud) -> None:
    with pytest.raises(WindowClosedError):
        await deploy_latest_image(**HOME, target=await target(deny()), break_glass=" ")


async def test_a_rollback_is_exempt_unless_the_windows_say_otherwise(cloud: Cloud) -> None:
    await deploy_latest_image(**HOME)
    written = len(cloud.record)
    back: dict[str, Any] = HOME
    with pytest.raises(WindowClosedError):
        await rollback(**back, target=await target(deny(), rollback_exempt=False))
    assert len(cloud.record) == written
    assert (await rollback(**back, target=await target(deny()))).outcome is Outcome.RELEASED
    assert len(cloud.record) == written + 1


async def test_a_release_that_fails_in_a_window_that_has_closed_still_goes_back(cloud: Cloud) -> None:
    await save("shut", rollback_exempt=False)
    asked: dict[str, Any] = {**HOME, "deployment": "never-ready", "poll_attempts": 30}
    release = asyncio.create_task(
        deploy_latest_image(**asked, target=await targeting("shut"), on_failure="rollback")
    )
    await published(cloud)
    await save("shut", deny(), rollback_exempt=False)
    assert not release.done()
    with pytest.raises(ReleaseError, match="rolled back"):
        await asyncio.wait_for(release, 120)
    assert [entry["kind"] for entry in cloud.record] == ["template", "publish", "publish"]


async def published(cloud: Cloud) -> None:
    """Waits until anything was published."""
    for _ in range(1200):
        if any(entry["kind"] == "publish" for entry in cloud.record):
            return
        await asyncio.sleep(0.05)
    raise AssertionError("nothing was published")


async def test_a_dry_run_is_admitted(cloud: Cloud) -> None:
    result = await deploy_latest_image(**HOME, target=await target(deny()), dry_run=True)
    assert result.break_glass == ""


@pytest.mark.promise("Nothing is written in a closed release window")
async def test_a_window_that_closed_while_a_release_waited_for_its_lock_refuses_it(cloud: Cloud) -> None:
    await save("closing")
    slow: dict[str, Any] = {
        **HOME,
        "deployment": "never-ready",
        "poll_attempts": 1000,
        "lock_wait_seconds": 120,
        "window_wait_seconds": 7200,
    }
    first = asyncio.create_task(deploy_latest_image(**slow))
    await published(cloud)
    (holder,) = guard._running
    heard = Heard()
    with listening(heard.note):
        second = asyncio.create_task(deploy_latest_image(**slow, target=await targeting("closing")))
    await heard.until("waiting for another release of the deployment")
    await save("closing", deny())
    written = len(cloud.record)
    holder.cancel("over")
    with pytest.raises(ReleaseCancelledError):
        await asyncio.wait_for(first, 60)
    with pytest.raises(WindowClosedError):
        await asyncio.wait_for(second, 60)
    assert len(cloud.record) == written
    # The lock that it had taken by then is free again.
    with pytest.raises(ReleaseError, match="after"):
        await deploy_latest_image(**{**slow, "poll_attempts": 2, "lock_wait_seconds": 0})
