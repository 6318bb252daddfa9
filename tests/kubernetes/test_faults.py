"""Faults on the connection to the API server, and `kill -9`: a release continues, and patches once.

The exchanges are those that a clean release is seen to make. The API server's audit log judges what was
written.
"""

import asyncio
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from prefect import get_client
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import FlowRun
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Crashed, Pending, Scheduled

from api_proxy import Exchange, Fault, Proxy, proxied
from control_plane import ControlPlane, Namespace
from prefect_rollout.flows import deploy_latest_image
from prefect_rollout.release.progress import Progress, listening
from prefect_rollout.release.result import ReleaseResult
from prefect_rollout.runs import zombies
from support import Zygote, eventually, lives, record_cell

pytestmark = pytest.mark.usefixtures("prefect_api")

PATCH = Exchange("PATCH", "deployments/web")
ONCE = [f"patch {PATCH.what}"]
LANES = 3
PER_STEP = 4  # faults that a step meets in one release; it is tried six times
FAULTS = "faults on the connection to the API server"
KILLS = "kill -9 at an exchange, then a retry of the same flow run"


class Place(NamedTuple):
    """An exchange of a release, in the step that makes it."""

    step: str
    exchange: Exchange

    def __str__(self) -> str:
        return f"{self.step}: {self.exchange}"


class Lane:
    """A namespace with a workload, behind a proxy of its own."""

    def __init__(self, space: Namespace, proxy: Proxy, target: str) -> None:
        self.space, self.proxy, self.version = space, proxy, 1
        self._places: list[Place] = []
        self.parameters: dict[str, Any] = {
            "app_id": space.name,
            "deployment": "deployment/web",
            "target": target,
            "poll_seconds": 0.3,
            "poll_attempts": 300,
            "lock_wait_seconds": 0,  # a lock that a killed process left would end the retry
        }

    def next_images(self) -> dict[str, str]:
        """Return the images of the next version."""
        self.version += 1
        return {"app": f"shop/web:{self.version}"}

    async def release(self, strike: Callable[[Place], Fault | None]) -> ReleaseResult:
        """Release the next version; `strike` returns the fault of each exchange."""
        step = ""

        def heard(progress: Progress) -> None:
            nonlocal step
            step = progress.step

        self.proxy.passing = lambda exchange: strike(Place(step, exchange))
        with listening(heard):
            result = await deploy_latest_image(images=self.next_images(), **self.parameters)
        assert isinstance(result, ReleaseResult)
        return result

    async def places(self) -> list[Place]:
        """Return the exchanges of a clean release, each once in each step."""
        if not self._places:
            found: dict[Place, None] = {}

            def note(place: Place) -> None:
                found[place] = None

            await self.release(note)
            self._places = list(found)
        return self._places


@pytest.fixture(scope="module")
def lanes(
    plane: ControlPlane,
    new_space: Callable[..., Namespace],
    save_target: Callable[..., str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[list[Lane]]:
    folder = tmp_path_factory.mktemp("proxies")
    with ExitStack() as stack:
        made: list[Lane] = []
        for _ in range(LANES):
            space, proxy = new_space(), stack.enter_context(proxied(plane, folder))
            asyncio.run(space.deploy())
            made.append(Lane(space, proxy, save_target(space.name, here=proxy.kubeconfig)))
        yield made


@pytest.fixture
async def lane(lanes: list[Lane]) -> AsyncIterator[Lane]:
    """Return a lane for a release at a time."""
    yield lanes[0]
    lanes[0].proxy.passing = lambda _: None


# ---- faults -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    [Fault.RESET_BEFORE, Fault.RESET_AFTER, Fault.CUT, Fault.THROTTLED, Fault.FAILED, Fault.UNAVAILABLE],
)
async def test_a_fault_at_any_exchange_costs_a_try_and_writes_nothing_twice(lane: Lane, fault: Fault) -> None:
    left = await lane.places()
    assert any(each.exchange == PATCH for each in left)
    assert {"WATCH", "TRY", "GET"} <= {each.exchange.verb for each in left}
    for each in left:  # the table's rows in their order
        record_cell(FAULTS, str(each), fault, "not struck")
    while left:
        chosen = [
            each for each in left if each in [other for other in left if other.step == each.step][:PER_STEP]
        ]
        struck: list[Place] = []

        def strike(place: Place, chosen: list[Place] = chosen, struck: list[Place] = struck) -> Fault | None:
            if place in chosen and place not in struck:
                struck.append(place)
                return fault
            return None

        before = len(lane.space.writes())
        result = await lane.release(strike)
        assert result.outcome == "released"
        assert lane.space.writes()[before:] == ONCE
        assert lane.space.running(result.images["app"]) == 2
        assert struck, left
        for each in struck:
            record_cell(FAULTS, str(each), fault, "released, 1 patch")
        left = [each for each in left if each not in struck]


# ---- kill -9 ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def zygote(prefect_server: str) -> Iterator[Zygote]:
    async def ensure() -> None:
        async with get_client() as client:
            await zombies.ensure(client)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_API_URL", prefect_server)
        with temporary_settings({PREFECT_API_URL: prefect_server}):
            asyncio.run(ensure())
        with Zygote() as made:
            yield made


async def gone(pid: int) -> None:
    async def ended() -> bool:
        return not lives(pid)

    await eventually(ended, 120)


async def killed_and_retried(
    client: PrefectClient, zygote: Zygote, lane: Lane, at: Exchange, number: int, fault: Fault
) -> None:
    """Kill a release while the n-th exchange of a kind has no answer, and retry the flow run."""
    seen: Counter[Exchange] = Counter()
    reached = asyncio.Event()
    loop = asyncio.get_running_loop()

    def strike(exchange: Exchange) -> Fault | None:
        seen[exchange] += 1
        if exchange == at and seen[exchange] == number:
            loop.call_soon_threadsafe(reached.set)
            return fault
        return None

    before = len(lane.space.writes())
    lane.proxy.passing = strike
    parameters = {**lane.parameters, "images": lane.next_images()}
    run: FlowRun = await client.create_flow_run(deploy_latest_image, parameters=parameters, state=Pending())
    pid = zygote.start(run.id, {})
    async with asyncio.timeout(120):
        await reached.wait()
    if fault is Fault.SILENT_AFTER:

        async def accepted() -> bool:
            return lane.space.writes()[before:] == ONCE

        await eventually(accepted)
    os.kill(pid, signal.SIGKILL)
    await gone(pid)
    lane.proxy.passing = lambda _: None

    # As the automation ends it, and as `prefect flow-run retry` has a worker take it up.
    await client.set_flow_run_state(run.id, Crashed())
    await client.set_flow_run_state(run.id, Scheduled(), force=True)
    await gone(zygote.start(run.id, {}))
    run = await client.read_flow_run(run.id)
    assert run.state
    assert run.state.is_completed(), run.state.message
    assert lane.space.writes()[before:] == ONCE
    assert lane.space.running(parameters["images"]["app"]) == 2


async def test_a_release_killed_at_any_exchange_continues_and_patches_once(
    lanes: list[Lane], zygote: Zygote
) -> None:
    clean = Counter(each.exchange for each in await lanes[0].places())
    # Each late in the release; the steps look at the same objects again.
    cells = [(each, count, Fault.SILENT_BEFORE) for each, count in clean.items()]
    cells.append((PATCH, 1, Fault.SILENT_AFTER))
    for at, _, fault in cells:  # the table's rows in their order
        record_cell(KILLS, str(at), fault, "not tried")
    free = list(lanes)
    turns = asyncio.Semaphore(len(free))
    problems: dict[str, BaseException] = {}

    async def cell(client: PrefectClient, at: Exchange, number: int, fault: Fault) -> None:
        async with turns:
            lane = free.pop()
            outcome = "released, 1 patch"
            try:
                await killed_and_retried(client, zygote, lane, at, number, fault)
            except Exception as error:  # noqa: BLE001 - the others go on, and it is raised at the end
                problems[f"{at} {number} {fault}"] = error
                outcome = f"FAILED: {type(error).__name__}"
            finally:
                free.append(lane)
            record_cell(KILLS, str(at), fault, outcome)

    async with get_client() as client:
        await asyncio.gather(*(cell(client, *each) for each in cells))
    assert not problems, "\n\n".join(f"{where}: {error!r}" for where, error in problems.items())


async def test_a_release_killed_between_two_clusters_patches_each_once(
    plane: ControlPlane,
    second_plane: ControlPlane,
    new_space: Callable[..., Namespace],
    save_target: Callable[..., str],
    zygote: Zygote,
    tmp_path: Path,
) -> None:
    east = new_space()
    west = Namespace(second_plane, east.name)
    await asyncio.gather(east.deploy(), west.deploy())
    with proxied(second_plane, tmp_path) as proxy:
        target = save_target(east.name, east=plane.kubeconfig("releaser"), west=proxy.kubeconfig)
        lane = Lane(west, proxy, target)
        async with get_client() as client:
            await killed_and_retried(client, zygote, lane, PATCH, 1, Fault.SILENT_BEFORE)
    assert east.writes() == west.writes() == ONCE
    assert east.running("shop/web:2") == west.running("shop/web:2") == 2
