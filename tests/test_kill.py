"""`kill -9`, wherever a release stands: the same flow run, retried, goes on and writes nothing twice."""

import asyncio
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

import psutil
import pytest
from prefect import get_client
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import FlowRun, State
from prefect.events.filters import EventAnyResourceFilter, EventFilter, EventNameFilter
from prefect.events.schemas.automations import EventTrigger
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Crashed, Pending, Running, Scheduled
from prefect.types.entrypoint import EntrypointType

from prefect_rollout.flows import FLOWS, deploy_latest_image
from prefect_rollout.platforms.http import host_of
from prefect_rollout.release.progress import Progress, listening
from prefect_rollout.release.result import ReleaseResult
from prefect_rollout.runs import flow_runs, heartbeat, zombies
from prefect_rollout.runs.lock import lock_name
from prefect_rollout.simulator import Scenario
from prefect_rollout.simulator.fault import Fault
from support import BIN, Cloud, Zygote, eventually, kill_tree, lives, record_cell

pytestmark = pytest.mark.usefixtures("prefect_api")

CLUSTERS = ["pub-bjwdt", "pub-bjyt"]
RELEASE: dict[str, Any] = {
    "app_id": 3290,
    "deployment": "qapm-api",
    "poll_seconds": 0.1,
    "poll_attempts": 100,
    "lock_wait_seconds": 0,  # a lock that the killed process left would end the retry
}
WRITES = ["template 1343170", *(f"publish 1343170 to {cluster}" for cluster in CLUSTERS)]
POLLS = 2  # killed at the first ones; those that follow are the same
AT_ONCE = 3
SPEED = 50
TABLE = {
    False: "kill -9 in each step and after each write, then a retry of the same flow run",
    True: "kill -9 at every exchange, then a retry of the same flow run",
}


async def until(holds: Callable[[], Any], what: str, seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"{what}: not within {seconds} s"
        await asyncio.sleep(0.05)


async def ensure() -> None:
    async with get_client() as client:
        await zombies.ensure(client)


@dataclass(frozen=True)
class Exchange:
    """A request of a release: the how-manieth it is, in which step."""

    number: int
    call: str
    step: int
    step_name: str

    @property
    def writes(self) -> bool:
        return self.call in {"upgrade", "publish"}

    def __str__(self) -> str:
        return f"{self.number:2} {self.step_name}: {self.call}"


async def exchanges(cloud: Cloud) -> list[Exchange]:
    """Those of a clean release, up to the first polls."""
    starts: list[tuple[int, str]] = []

    def note(progress: Progress) -> None:
        if progress.state == "running" and not progress.detail:
            starts.append((len(cloud.inside.requests()), progress.step))

    with listening(note):
        await deploy_latest_image(**RELEASE)
    found = []
    for number, seen in enumerate(cloud.inside.requests()):
        step = max(index for index, (first, _) in enumerate(starts) if first <= number)
        found.append(Exchange(number + 1, str(seen.call), step, starts[step][1]))
    polls = [each for each in found if each.step_name == "wait for pods"]
    return [each for each in found if each not in polls[POLLS:]]


def left_to_do(clean: list[Exchange], killed: Exchange, *, after: bool) -> list[str]:
    """The calls of the process that goes on, without its polls: no step that was completed is among them."""
    calls: list[str] = []
    first, second = sorted({each.step for each in clean if each.call == "publish"})
    looked = False
    for each in clean:
        if each.step >= max(first, killed.step) and not looked:
            looked = True
            calls.append("online")  # before a retry publishes anything, nobody else may have
        if each.step == second and each.call == "online":
            calls.append("online")  # a retry asks first whether the first publish still stands
        if each.step < killed.step or each.step_name == "wait for pods":
            continue
        if each.call == "upgrade":
            calls.append("templates")  # the look for a template that an earlier try left
        if not (after and each.step == killed.step and each.call in {"upgrade", "publish"}):
            calls.append(each.call)
    if after and killed.call == "publish":
        calls.remove("status")  # the look at the pods goes before a write, and there is none
    return [*calls, "online"]  # and, before it watches, whether both do


@pytest.fixture(scope="module")
def zygote(prefect_server: str) -> Iterator[Zygote]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_API_URL", prefect_server)
        # By this process, which has the default settings: the automation's window is its creator's.
        with temporary_settings({PREFECT_API_URL: prefect_server}):
            asyncio.run(ensure())
        with Zygote() as made:
            yield made


async def killed_and_retried(
    client: PrefectClient,
    zygote: Zygote,
    cloud: Cloud,
    clean: list[Exchange],
    killed: Exchange,
    *,
    after: bool,
    keys: bool,
) -> None:
    inside = cloud.inside
    fault = Fault(kind="never", nth=[killed.number], takes_effect=after)
    inside.load(Scenario(idempotency=keys, faults=[fault]))
    run: FlowRun = await client.create_flow_run(deploy_latest_image, parameters=RELEASE, state=Pending())
    pid = zygote.start(run.id, cloud.environment)
    await until(lambda: len(inside.requests()) == killed.number or not lives(pid), "the exchange")
    os.kill(pid, signal.SIGKILL)
    await until(lambda: not lives(pid), "the process's end")
    sent = [(each.call, None) for each in clean if each.number < killed.number]
    assert [(seen.call, seen.fault) for seen in inside.requests()] == [*sent, (killed.call, "never")]
    run = await client.read_flow_run(run.id)
    assert run.state is not None
    assert run.state.is_running()
    inside.set_faults([])

    # As the automation ends it, and as `prefect flow-run retry` has a worker take it up.
    await client.set_flow_run_state(run.id, Crashed())
    await client.set_flow_run_state(run.id, Scheduled(), force=True)
    pid = zygote.start(run.id, cloud.environment)
    await until(lambda: not lives(pid), "the retry's end")

    run = await client.read_flow_run(run.id)
    assert run.state is not None
    assert run.state.is_completed(), run.state.message
    result = await run.state.aresult()
    assert isinstance(result, ReleaseResult)
    assert result.outcome == "released"
    assert cloud.writes == WRITES
    assert all(truth.rolled_out for truth in inside.truth(deployment="qapm-api"))
    again = [seen.call for seen in inside.requests()][killed.number :]
    expected = left_to_do(clean, killed, after=after)
    assert again[: len(expected)] == expected
    assert set(again[len(expected) :]) == {"status"}
    for cluster in CLUSTERS:
        name = lock_name(host_of(cloud.url), 3290, "qapm-api", cluster)
        lock = await client.read_global_concurrency_limit_by_name(name)
        assert lock.active_slots == 0


@pytest.mark.promise("A crash loses nothing")
@pytest.mark.xdist_group("kill walk")
@pytest.mark.parametrize(
    "complete",
    [pytest.param(False, marks=pytest.mark.sample), pytest.param(True, marks=pytest.mark.complete)],
)
async def test_a_release_killed_at_any_exchange_goes_on_and_writes_once(
    make_cloud: Any, zygote: Zygote, complete: bool
) -> None:
    """Kill at the last exchange of each step, and after the effect of each write.

    For the process that goes on, all exchanges of a step without an effect are alike, and the key of a
    write that took effect is not sent again. The complete walk has all of both.
    """
    clouds = [make_cloud(SPEED) for _ in range(AT_ONCE)]
    clean = await exchanges(clouds[-1])  # whose address is in the environment
    assert {each.call for each in clean if each.writes} == {"upgrade", "publish"}
    ends = {each.step: each for each in clean}.values()
    cells = [(each, False, True) for each in clean if complete or each in ends]
    cells += [(each, True, False) for each in ends if each.writes]
    if complete:
        cells += [(each, keys, keys) for keys in (True, False) for each in ends if each.writes]
    table = TABLE[complete]
    for each, after, keys in cells:
        # In this order, whichever ends first.
        record_cell(table, str(each), column(after, keys), "not tried")
    free = asyncio.Semaphore(len(clouds))
    problems: dict[str, BaseException] = {}

    async def cell(client: PrefectClient, killed: Exchange, after: bool, keys: bool) -> None:
        async with free:
            cloud = clouds.pop()
            outcome = "released, 1 template, 2 publishes"
            started = time.monotonic()
            try:
                await killed_and_retried(client, zygote, cloud, clean, killed, after=after, keys=keys)
            except Exception as error:  # noqa: BLE001 - the others go on, and it is raised at the end
                problems[f"{killed} {column(after, keys)}"] = error
                outcome = f"FAILED: {type(error).__name__}"
            finally:
                clouds.append(cloud)
            seconds = time.monotonic() - started
            record_cell(table, str(killed), column(after, keys), f"{outcome} ({seconds:.1f} s)")

    async with get_client() as client:
        await asyncio.gather(*(cell(client, *each) for each in cells))
    assert not problems, "\n\n".join(f"{where}: {error!s}" for where, error in problems.items())


def column(after: bool, keys: bool) -> str:
    return f"{'after' if after else 'before'} its effect, keys {'honoured' if keys else 'ignored'}"


# ---- killed runs are found -----------------------------------------------------------------------

CRASHED = "Until a killed run was Crashed (window 10 s)"


async def ended(client: PrefectClient, run: FlowRun, seconds: float = 120) -> State[Any]:
    """The run's state as soon as it is final."""
    end = time.monotonic() + seconds
    while True:
        state = (await client.read_flow_run(run.id)).state
        assert state is not None
        if state.is_final():
            return state
        assert time.monotonic() < end, f"still {state.name} after {seconds} s"
        await asyncio.sleep(0.2)


async def found(client: PrefectClient, run: FlowRun, killed_at: float, row: str) -> None:
    """Asserts that the automation finds the run that was killed."""
    state = await ended(client, run)
    assert (state.name, (state.message or "")[:22]) == ("Crashed", "No sign of life for 10")
    assert "prefect-rollout retry" in (state.message or "")
    record_cell(CRASHED, row, "seconds", f"{time.monotonic() - killed_at:.1f}")


async def watched(client: PrefectClient, run: FlowRun) -> UUID:
    """Gives the run the shipped automation, with a window that a test can wait for."""
    return await client.create_automation(
        zombies.automation(f"of {run.id}", within_seconds=10, runs=f"prefect.flow-run.{run.id}")
    )


async def happened(client: PrefectClient, event: str, resource: str) -> bool:
    page = await client.read_events(
        EventFilter(event=EventNameFilter(name=[event]), any_resource=EventAnyResourceFilter(id=[resource])),
        limit=1,
    )
    return bool(page.events)


@pytest.mark.promise("A killed run is found")
async def test_every_kill_of_a_run_is_found_and_a_good_end_is_left_alone(
    make_cloud: Any, zygote: Zygote
) -> None:
    deaf = make_cloud(SPEED, faults=[{"kind": "never", "call": "publish", "nth": [1, 2]}])
    good = make_cloud(SPEED)

    beating = {"PREFECT_ROLLOUT_HEARTBEAT_SECONDS": "2"}

    async def published(times: int) -> bool:
        return len(deaf.inside.requests("publish")) == times

    async def killed_twice() -> None:
        environment = {**deaf.environment, **beating}
        run = await client.create_flow_run(deploy_latest_image, parameters=RELEASE, state=Pending())
        await watched(client, run)
        for attempt in (1, 2):
            pid = zygote.start(run.id, environment)
            await eventually(partial(published, attempt), 180)
            os.kill(pid, signal.SIGKILL)
            await found(client, run, time.monotonic(), f"a process, try {attempt}")
            await client.set_flow_run_state(run.id, Scheduled(), force=True)
        zygote.start(run.id, environment)
        assert (await ended(client, run)).is_completed()
        assert deaf.writes == WRITES

    async def ended_well() -> None:
        run = await client.create_flow_run(deploy_latest_image, parameters=RELEASE, state=Pending())
        automation = await watched(client, run)
        zygote.start(run.id, {**good.environment, **beating})
        assert (await ended(client, run)).is_completed()
        # A heartbeat that arrives after the end has the automation wait, and act, in vain.
        await heartbeat.send(client, [run.id])
        refused, resource = "prefect.automation.action.failed", f"prefect.automation.{automation}"
        await eventually(lambda: happened(client, refused, resource))
        assert (await ended(client, run)).is_completed()

    async with get_client() as client:
        await asyncio.gather(killed_twice(), ended_well())


@pytest.mark.usefixtures("zygote")
async def test_a_worker_that_is_killed_with_its_flow_is_followed_by_one_that_finishes_it(
    make_cloud: Any, prefect_api: str, tmp_path: Path
) -> None:
    cloud = make_cloud(SPEED, faults=[{"kind": "never", "takes_effect": True, "times": 1, "call": "publish"}])
    environment = {
        **os.environ,
        **cloud.environment,
        "PREFECT_API_URL": prefect_api,
        "PREFECT_WORKER_QUERY_SECONDS": "1",
        "PREFECT_ROLLOUT_HEARTBEAT_SECONDS": "2",
    }

    def start_worker() -> psutil.Popen:
        return psutil.Popen(
            [BIN / "prefect", "worker", "start", "--pool", "killable"],
            env=environment,
            cwd=tmp_path,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    async with get_client() as client:
        await client.create_work_pool(WorkPoolCreate(name="killable", type="process"), overwrite=True)
        deployment = await deploy_latest_image.ato_deployment(
            "killable", work_pool_name="killable", entrypoint_type=EntrypointType.MODULE_PATH
        )
        deployment_id = await deployment.aapply()
        run = await client.create_flow_run_from_deployment(deployment_id, parameters=RELEASE)
        await watched(client, run)
        worker = start_worker()
        try:
            await until(lambda: any(seen.fault for seen in cloud.inside.requests()), "the publish")
            started = worker.children(recursive=True)
            for process in (worker, *started):  # the worker first: it would report its flow's end
                process.kill()
            killed_at = time.monotonic()
            worker.wait(10)
            worker = start_worker()  # it is up by the time the run may be retried
            await found(client, run, killed_at, "a worker and its flow")
            # As `prefect flow-run retry` has a worker take it up.
            await client.set_flow_run_state(run.id, Scheduled(), force=True)
            state = await ended(client, run)
            assert state.is_completed(), state.message
        finally:
            kill_tree(worker.pid)
    assert cloud.writes == WRITES


async def test_the_automation_is_there_and_stays_off_where_it_was_switched_off(
    make_cloud: Any, zygote: Zygote
) -> None:
    cloud = make_cloud(SPEED)

    async def release() -> None:
        run = await client.create_flow_run(deploy_latest_image, parameters=RELEASE, state=Pending())
        zygote.start(run.id, cloud.environment)
        assert (await ended(client, run)).is_completed()

    async with get_client() as client:
        await release()
        (shipped,) = await client.read_automations_by_name(zombies.NAME)
        assert shipped.enabled
        assert isinstance(shipped.trigger, EventTrigger)
        assert shipped.trigger.within.total_seconds() == 90
        await client.pause_automation(shipped.id)
        try:
            await release()
            (kept,) = await client.read_automations_by_name(zombies.NAME)
            assert (kept.id, kept.enabled) == (shipped.id, False)
        finally:
            await client.resume_automation(shipped.id)


async def two_that_run(client: PrefectClient) -> list[FlowRun]:
    """Two releases that count as running, though no process runs them; the server looks after such."""
    await zombies.ensure(client)
    runs = [
        await client.create_flow_run(deploy_latest_image, parameters=RELEASE, state=Running())
        for _ in range(2)
    ]
    await asyncio.sleep(0.5)
    return runs


async def test_a_release_sweeps_up_what_was_killed_while_no_server_ran(
    prefect_api: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with get_client() as client:
        silent, alive = await two_that_run(client)
        moment = datetime.now(UTC)
        await heartbeat.send(client, [alive.id])
        await eventually(lambda: happened(client, heartbeat.HEARTBEAT, f"prefect.flow-run.{alive.id}"))
        assert await zombies.sweep(client) == []  # neither has been silent for long

        # As if they had, the one since a quarter of a second before the heartbeat of the other.
        monkeypatch.setattr(zombies, "_BUFFER", datetime.now(UTC) - moment - timedelta(seconds=90 - 0.25))
        assert [run.id for run in await zombies.sweep(client)] == [silent.id]
        assert (await ended(client, silent)).is_crashed()
        still = await client.read_flow_run(alive.id)
        assert still.state is not None
        assert still.state.is_running()
        for run in (silent, alive):
            await client.delete_flow_run(run.id)


async def test_a_detector_believes_silence_only_if_heartbeats_are_recorded(
    prefect_api: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with get_client() as client:
        silent, ours = await two_that_run(client)
        monkeypatch.setattr(zombies, "_BUFFER", timedelta(seconds=-90))  # as if both had been silent for long
        detector = zombies.ZombieDetector(client, "none")
        assert await detector.detect(alive={ours.id}) == []
        await eventually(lambda: happened(client, heartbeat.HEARTBEAT, detector._resource))
        assert [run.id for run in await detector.detect(alive={ours.id})] == [silent.id]
        assert (await ended(client, silent)).is_crashed()
        # Whoever has read it before does not end what goes on with it, or is gone, by now.
        await client.set_flow_run_state(silent.id, Running(), force=True)
        assert await zombies._end(client, silent) is False
        for run in (silent, ours):
            await client.delete_flow_run(run.id)
        assert await zombies._end(client, silent) is False


def test_the_flows_that_beat_are_the_flows_there_are() -> None:
    assert set(flow_runs.FLOW_NAMES) == set(FLOWS)
