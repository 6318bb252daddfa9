"""`kill -9`, wherever a release stands: the same flow run, retried, goes on and writes nothing twice."""

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from prefect import get_client
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import FlowRun
from prefect.states import Crashed, Pending, Scheduled

from prefect_rollout.flows import deploy_latest_image
from prefect_rollout.guard import lock_name
from prefect_rollout.models import ReleaseResult
from prefect_rollout.progress import Progress, listening
from prefect_rollout.simulator import Scenario, SimulatorServer
from prefect_rollout.simulator.fault import Fault
from support import Cloud, Zygote, lives, record_cell

pytestmark = pytest.mark.usefixtures("prefect_api")

CLUSTERS = ["pub-bjwdt", "pub-bjyt"]
RELEASE: dict[str, Any] = {
    "app_id": 3290,
    "deployment": "qapm-api",
    "poll_seconds": 0.1,
    "poll_attempts": 100,
}
WRITES = ["template 1343170", *(f"publish 1343170 to {cluster}" for cluster in CLUSTERS)]
POLLS = 2  # killed at the first ones; those that follow are the same
AT_ONCE = 3
TABLE = "kill -9 at every exchange, then a retry of the same flow run"


async def until(holds: Callable[[], Any], what: str, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"{what}: not within {seconds} s"
        await asyncio.sleep(0.01)


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
    for each in clean:
        if each.step < killed.step or each.step_name == "wait for pods":
            continue
        if each.step_name == "upgrade deployment" and each.call == "online":
            calls.append("templates")  # the look for a template that an earlier try left
        if not (after and each.step == killed.step and each.call in {"upgrade", "publish"}):
            calls.append(each.call)
    if after and killed.call == "publish":
        calls.remove("status")  # the look at the pods goes before a write, and there is none
    return calls


@pytest.fixture(scope="module")
def zygote(prefect_server: str) -> Iterator[Zygote]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_API_URL", prefect_server)
        with Zygote() as made:
            yield made


async def killed_and_retried(
    client: PrefectClient, zygote: Zygote, clean: list[Exchange], killed: Exchange, *, after: bool, keys: bool
) -> None:
    fault = Fault(kind="never", nth=[killed.number], takes_effect=after)
    with SimulatorServer(Scenario(idempotency=keys, faults=[fault]), speed=20) as server:
        cloud, inside = Cloud(server), server.cloud
        run: FlowRun = await client.create_flow_run(deploy_latest_image, parameters=RELEASE, state=Pending())
        pid = zygote.start(run.id, cloud.environment)
        await until(lambda: len(inside.requests()) == killed.number or not lives(pid), "the exchange")
        os.kill(pid, signal.SIGKILL)
        await until(lambda: not lives(pid), "the process's end")
        assert [seen.fault for seen in inside.requests()] == [None] * (killed.number - 1) + ["never"]
        run = await client.read_flow_run(run.id)
        assert run.state is not None
        assert run.state.is_running()
        inside.set_faults([])

        # As the automation ends it, and as `prefect flow-run retry` has a worker take it up.
        await client.set_flow_run_state(run.id, Crashed())
        await client.set_flow_run_state(run.id, Scheduled(), force=True)
        pid = zygote.start(run.id, cloud.environment)
        await until(lambda: not lives(pid), "the retry's end", 45)  # a lock that is left lasts 60 s

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
            name = lock_name(server.url.partition("//")[2], 3290, "qapm-api", cluster)
            lock = await client.read_global_concurrency_limit_by_name(name)
            assert lock.active_slots == 0


@pytest.mark.parametrize("keys", [True, False], ids=["keys honoured", "keys ignored"])
async def test_a_release_killed_at_any_exchange_goes_on_and_writes_once(
    make_cloud: Any, zygote: Zygote, keys: bool
) -> None:
    clean = await exchanges(make_cloud(idempotency=keys))
    assert {each.call for each in clean if each.writes} == {"upgrade", "publish"}
    cells = [(each, False) for each in clean if keys or each.writes]
    cells += [(each, True) for each in clean if each.writes]
    at_once = asyncio.Semaphore(AT_ONCE)
    problems: dict[str, BaseException] = {}

    async def cell(client: PrefectClient, killed: Exchange, after: bool) -> None:
        async with at_once:
            column = f"{'after' if after else 'before'} its effect, keys {'honoured' if keys else 'ignored'}"
            outcome = "released, 1 template, 2 publishes"
            started = time.monotonic()
            try:
                await killed_and_retried(client, zygote, clean, killed, after=after, keys=keys)
            except Exception as error:  # noqa: BLE001 - the others go on, and it is raised at the end
                problems[f"{killed} {column}"] = error
                outcome = f"FAILED: {type(error).__name__}"
            record_cell(TABLE, str(killed), column, f"{outcome} ({time.monotonic() - started:.1f} s)")

    async with get_client() as client:
        await asyncio.gather(*(cell(client, killed, after) for killed, after in cells))
    assert not problems, "\n\n".join(f"{where}: {error!s}" for where, error in problems.items())
