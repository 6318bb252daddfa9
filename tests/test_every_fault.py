"""A release through Prefect meets faults on the wire at each of its exchanges, for a moment and for good.

The exchanges are those that a clean release is seen to make, so that none is forgotten. The cloud's own
record judges what was written, its own state what the result says of it.

Which error each fault becomes at each call is for `test_client_faults.py`: the steps know the errors
alone. So `make test` releases with one fault of each kind, and only the complete matrix with all.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Collection, Coroutine, Iterable, Iterator, Sequence
from contextlib import ExitStack
from datetime import datetime
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest
from prefect.settings import PREFECT_API_URL, PREFECT_LOGGING_TO_API_ENABLED, temporary_settings
from pydantic import SecretStr

from prefect_rollout.blocks import ContainerCloud
from prefect_rollout.errors import ReleaseTimedOutError, RolloutError, UnreachableError
from prefect_rollout.flows import deploy_latest_image
from prefect_rollout.release.progress import Progress, listening
from prefect_rollout.release.result import Outcome, ReleaseResult
from prefect_rollout.simulator import Scenario, SimulatorServer
from prefect_rollout.simulator.fault import Fault
from support import Door, DoorSigner, record_cell
from troubles import TROUBLES, Trouble

APP, DEPLOYMENT_ID, DEPLOYMENT = 3290, 20772, "qapm-api"
CLUSTERS = {"pub-bjwdt": 1, "pub-bjyt": 2}
NEW = 102
ONLINE = {"pub-bjwdt": 100}  # the other one is published to for the first time
WRITTEN = [("template", None), *(("publish", cluster) for cluster in CLUSTERS)]
POLLS = 4  # of the release's polls, so many are walked: the pods get ready after them
LANES = 4  # as many releases at once as one Prefect server on SQLite handles

KINDS = {(each.error, each.effective): name for name, each in reversed(TROUBLES.items())}.values()
"""The first fault of each kind: of each error, before and after the effect of a write."""


class Place(NamedTuple):
    """Position of an exchange in a release: the step, the path, and how often its try asked for it."""

    step: int
    path: str
    time: int


class Exchange(NamedTuple):
    """One exchange of a clean release; `number` is its position in its step."""

    place: Place
    number: int
    call: str
    name: str

    @property
    def writes(self) -> bool:
        return self.call in {"upgrade", "publish"}

    @property
    def polls(self) -> bool:
        return self.name.startswith("poll")


class Lane:
    """A cloud that one release at a time is sent to.

    Attributes:
        inside: the cloud itself, which answers whatever happens at its port.
        nonces: those of all requests of the release, in order.
        places: the place of each request, by its nonce.
        struck: the same of those that met trouble.
        retries: how often a step was tried again.
    """

    def __init__(self, server: SimulatorServer) -> None:
        self.inside = server.cloud
        self.nonces: list[str] = []
        self.places: dict[str, Place] = {}
        self.struck: dict[str, Place] = {}
        self.retries = 0
        self._server = server
        self._door = Door(server)
        self._target = f"lane-{server.port}"
        for name, seconds in ((self._target, 20.0), (f"{self._target}-hasty", 1.0)):
            ContainerCloud(
                api_url=server.url,
                key_id=SecretStr("demo-key"),
                secret_key=SecretStr("demo-secret"),
                signer=f"{DoorSigner.__module__}:{DoorSigner.__name__}",
                request_timeout_seconds=seconds,
            ).save(name, overwrite=True)

    async def release(
        self,
        trouble: Trouble | None = None,
        at: Collection[Place] = (),
        *,
        stays: str | None = None,
        walked: bool = False,
        polls: int = 200,
        **cloud: Any,
    ) -> ReleaseResult:
        """Release on a new cloud; the first request at each of these places meets the trouble.

        `stays` names the call that it stays with; else it passes with the request that it strikes.
        `walked` has the pods get ready only after the polls that are walked.
        """
        deployment = {
            "id": DEPLOYMENT_ID,
            "name": DEPLOYMENT,
            "clusters": CLUSTERS,
            "templates": [{"id": number, "image": f"r/api:{number}"} for number in range(1, NEW)],
            "online": ONLINE,
            "timings": {"start": 100_000 if walked else 3},
        }
        apps = [{"id": APP, "name": "qapm", "deployments": [deployment]}]
        self._server.accept()
        self.inside.load(Scenario.model_validate({"apps": apps, **cloud}))
        self.nonces = self._door.nonces = []
        self.places, self.struck, self.retries = {}, {}, 0
        step, waits, retried, closed = 0, False, False, False
        seen: Counter[str] = Counter()

        def heard(progress: Progress) -> None:
            nonlocal step, waits, retried
            waits = progress.step == "wait for pods"
            if progress.state == "running" and not progress.detail:  # a try begins
                step += not retried
                seen.clear()
            if progress.state in {"done", "retrying"}:
                retried = progress.state == "retrying"
                self.retries += retried

        def passing(request: httpx.Request) -> None:
            nonlocal closed
            if closed and not stays:
                self._server.accept()
                closed = False
            path = request.url.raw_path.decode()
            seen[path] += 1
            if waits and seen.total() > POLLS:
                self.inside.advance(1_000_000)
            place = self.places[self.nonces[-1]] = Place(step, path, seen[path])
            if trouble is None or place not in at or place in self.struck.values():
                return
            self.struck[self.nonces[-1]] = place
            if trouble.fault:
                limits = {"call": stays} if stays else {"times": 1}
                self.inside.set_faults([Fault.model_validate(limits | trouble.fault)])
            else:
                self._server.refuse()
                closed = True

        self._door.passing = passing
        hasty = trouble is not None and trouble.times_out
        with listening(heard):
            result = await deploy_latest_image(
                APP,
                DEPLOYMENT,
                target=f"container-cloud/{self._target}{'-hasty' if hasty else ''}",
                poll_seconds=0.05,
                poll_attempts=polls,
            )
        assert isinstance(result, ReleaseResult)
        return result

    @property
    def written(self) -> list[tuple[str, str | None]]:
        return [(entry.kind, entry.cluster) for entry in self.inside.record()]


@pytest.fixture(scope="module")
def lanes(prefect_server: str) -> Iterator[list[Lane]]:
    with ExitStack() as stack:
        settings = {PREFECT_API_URL: prefect_server, PREFECT_LOGGING_TO_API_ENABLED: False}
        stack.enter_context(temporary_settings(settings))
        yield [Lane(stack.enter_context(SimulatorServer(speed=500))) for _ in range(LANES)]


@pytest.fixture(scope="module")
def exchanges(lanes: list[Lane]) -> list[Exchange]:
    """The exchanges of a clean release, up to the last poll that is walked."""
    lane = lanes[0]
    asyncio.run(lane.release(walked=True))
    assert (lane.written, lane.retries) == (WRITTEN, 0)
    seen = lane.inside.requests()
    assert [each.headers["x-stark-nonce"] for each in seen] == list(lane.places)
    last = max(place.step for place in lane.places.values())
    found: list[Exchange] = []
    for number, (each, place) in enumerate(zip(seen, lane.places.values(), strict=True), 1):
        url = urlsplit(each.path)
        query = parse_qs(url.query)
        pages = [f"page {page}" for page in query.get("pageNo", []) if each.call == "templates"]
        where = [url.path.partition("/clusters/")[2], *query.get("cluster", [])]
        name = " ".join([f"{number}. {each.call}", *pages, *filter(None, where)])
        if place.step == last:
            name = f"poll {place.time}"
        position = 1 + sum(other.place.step == place.step for other in found)
        found.append(Exchange(place, position, each.call or each.path, name))
    assert found[-1].name == f"poll {POLLS + 1}"
    return found[:-1]


Cells = dict[str, Callable[[Lane], Coroutine[Any, Any, None]]]


async def walk(lanes: list[Lane], cells: Cells) -> None:
    """Play all cells, as many at once as there are lanes, and fail with those that fail."""
    free = asyncio.Semaphore(len(lanes))

    async def play(cell: str, played: Callable[[Lane], Coroutine[Any, Any, None]]) -> None:
        async with free:
            lane = lanes.pop()
            try:
                await played(lane)
            except BaseException as error:
                error.add_note(f"in the cell: {cell}")
                raise
            finally:
                lanes.append(lane)

    ended = await asyncio.gather(*(play(*cell) for cell in cells.items()), return_exceptions=True)
    # Not only exceptions of class Exception: pytest's own failures are none.
    failures = [each for each in ended if isinstance(each, BaseException)]
    if failures:
        raise BaseExceptionGroup(f"{len(failures)} of {len(cells)} cells", failures)


def both(few: Iterable[str], every: Iterable[str]) -> pytest.MarkDecorator:
    """Parametrise with the names of the few faults of `make test`, and of those of the complete matrix."""
    params = [pytest.param(name, False, id=name) for name in few]
    params += [pytest.param(name, True, id=f"complete, {name}", marks=pytest.mark.complete) for name in every]
    return pytest.mark.parametrize(("name", "complete"), params)


# ---- once ---------------------------------------------------------------------------------------

ONCE = {
    False: "each kind of error once, at each exchange of a release",
    True: "each fault once, at each exchange of a release",
}


@pytest.mark.promise("No write happens twice")
@both(KINDS, TROUBLES)
async def test_a_fault_at_any_exchange_costs_a_try_and_nothing_twice(
    lanes: list[Lane], exchanges: list[Exchange], name: str, complete: bool
) -> None:
    """Strike all exchanges of a step, one in each try; and in another release its last one, such as a write.

    The complete matrix takes a release for the n-th exchange of every step.
    """
    table = ONCE[complete]
    for each in exchanges:  # the table's rows in their order
        record_cell(table, each.name, name, "-")
    cells: Cells = {}
    if complete:
        for number in sorted({each.number for each in exchanges}):
            struck = [each for each in exchanges if each.number == number]
            cells[", ".join(each.name for each in struck)] = struck_once(table, name, struck)
        last = [each for each in exchanges if each.writes]
    else:
        cells["all"] = struck_once(table, name, exchanges, retry_after="0")
        last = list({each.place.step: each for each in exchanges}.values())
    cells["keys ignored"] = struck_once(table, name, last, idempotency=False)
    await walk(lanes, cells)


def struck_once(
    table: str,
    name: str,
    exchanges: Sequence[Exchange],
    *,
    idempotency: bool = True,
    retry_after: str | None = None,
) -> Callable[[Lane], Any]:
    trouble = TROUBLES[name]
    if retry_after and "retry_after" in trouble.fault:
        trouble = trouble._replace(fault=trouble.fault | {"retry_after": retry_after})

    def record(outcome: str) -> None:
        for each in exchanges:
            row = each.name + ("" if idempotency else ", key ignored")
            record_cell(table, row, name, outcome)

    async def play(lane: Lane) -> None:
        record("FAIL")
        at = [each.place for each in exchanges]
        result = await lane.release(trouble, at, walked=True, idempotency=idempotency)
        assert result.outcome is Outcome.RELEASED
        assert lane.written == WRITTEN
        assert {entry.template for entry in lane.inside.record()} == {NEW}
        assert all(truth.rolled_out for truth in lane.inside.truth())
        assert told(result) == truth_of(lane)

        assert list(lane.struck.values()) == at
        if not trouble.times_out:  # else a slow machine may time out elsewhere, too
            assert lane.retries == sum(not each.polls for each in exchanges)
        assert len(set(lane.nonces)) == len(lane.nonces)  # each try was signed anew
        requests = lane.inside.requests()
        arrived = [seen.headers["x-stark-nonce"] for seen in requests]
        if not trouble.fault:
            assert not set(lane.struck) & set(arrived)
            record("ok")
            return
        struck = [number for number, seen in enumerate(requests) if seen.fault]
        assert [arrived[number] for number in struck] == list(lane.struck)
        assert [(requests[number].call, requests[number].fault) for number in struck] == [
            (each.call, trouble.fault["kind"]) for each in exchanges
        ]
        if asked := trouble.fault.get("retry_after"):
            dates = [signed_at(seen.headers["x-stark-date"]) for seen in requests]
            waited = [(dates[number + 1] - dates[number]).total_seconds() for number in struck]
            wanted = int(asked.rpartition(":")[2])
            early = [each.name for each, wait in zip(exchanges, waited, strict=True) if wait < wanted]
            assert early == []
        record("ok")

    return play


def signed_at(date: str) -> datetime:
    return datetime.strptime(date, "%Y%m%dT%H%M%S%z")


def told(result: ReleaseResult) -> dict[str, tuple[Any, Any, Any]]:
    """`{cluster: (published, template online, pods Running)}` as the result has it."""
    return {each.cluster: (each.published, each.online, each.running) for each in result.clusters}


def truth_of(lane: Lane) -> dict[str, tuple[Any, Any, Any]]:
    """The same by the cloud itself."""
    published = {entry.cluster for entry in lane.inside.record("publish")}
    online = {row.cluster: row.template_id for row in lane.inside.online(DEPLOYMENT_ID)}
    return {
        truth.cluster: (
            truth.cluster in published,
            online.get(truth.cluster),
            sum(pod.state == "Running" for pod in truth.pods),
        )
        for truth in lane.inside.truth()
    }


# ---- for good -----------------------------------------------------------------------------------

FOR_GOOD = {
    False: "each kind of error for good, from an exchange on",
    True: "each fault for good, from an exchange on",
}

STAYS = {name: trouble for name, trouble in TROUBLES.items() if "as a date" not in name} | {
    "all calls reset before the effect": Trouble({"kind": "reset_before", "call": "any"}, UnreachableError),
    "all calls reset after the effect": Trouble({"kind": "reset_after", "call": "any"}, UnreachableError),
}

FEW = {
    "reset before the effect": ["upgrade", "poll"],
    "reset after the effect": ["first publish"],
    "500 after the effect": ["upgrade"],
    "502 as HTML": ["templates", "last publish"],
    "503, Retry-After in seconds": ["app", "last online", "first publish"],
    "login page after the effect": ["status", "last publish"],
    "409001": ["deployments", "poll"],
    "all calls reset before the effect": ["first publish", "last online", "last publish", "poll"],
    "all calls reset after the effect": ["upgrade", "first publish", "last publish"],
}
"""Where a release of `make test` meets which fault: at each call; at each write with and without its effect.

While all calls fail nobody can ask what is live: so at each exchange after which a cluster may be written to.
"""


def test_the_few_have_every_error() -> None:
    assert {STAYS[name].error for name in FEW} == {each.error for each in TROUBLES.values()}


@both(FEW, STAYS)
async def test_a_fault_that_stays_ends_the_release_with_its_error_and_the_truth(
    lanes: list[Lane], exchanges: list[Exchange], name: str, complete: bool
) -> None:
    first = {each.call: each for each in reversed(exchanges)}
    last = {each.call: each for each in exchanges}
    begins = {call: first[call] for call in ("app", "deployments", "templates", "status", "upgrade")}
    begins |= {"first publish": first["publish"], "last online": last["online"]}
    begins |= {"last publish": last["publish"], "poll": next(each for each in exchanges if each.polls)}
    table = FOR_GOOD[complete]
    for each in begins.values():  # the table's columns in their order
        record_cell(table, name, each.name, "-")
    chosen = [begins[begin] for begin in (begins if complete else FEW[name])]
    await walk(lanes, {each.name: struck_for_good(table, name, each) for each in chosen})


def struck_for_good(table: str, name: str, exchange: Exchange) -> Callable[[Lane], Any]:
    fault, kind = STAYS[name]
    if "retry_after" in fault:
        fault = fault | {"retry_after": "0"}
    trouble = Trouble(fault, ReleaseTimedOutError if exchange.polls else kind)
    everything = not fault or fault.get("call") == "any"
    # A write that took effect is found again, however often its answer is lost.
    found = exchange.writes and trouble.effective and not everything

    async def play(lane: Lane) -> None:
        record_cell(table, name, exchange.name, "FAIL")
        options: dict[str, Any] = {"stays": exchange.call, "idempotency": False}
        if found:
            result = await lane.release(trouble, [exchange.place], **options)
            assert any(seen.fault for seen in lane.inside.requests())
            assert lane.written == WRITTEN
            assert told(result) == truth_of(lane)
            record_cell(table, name, exchange.name, result.outcome)
            return
        with pytest.raises(trouble.error) as caught:
            await lane.release(trouble, [exchange.place], polls=4, **options)
        error = caught.value
        assert type(error) is trouble.error
        assert error.result is not None
        assert error.result.outcome is (Outcome.TIMED_OUT if exchange.polls else Outcome.FAILED)
        assert len(set(lane.written)) == len(lane.written)
        check_truth(lane, exchange, error, {"online", "status", "publish"} if everything else {exchange.call})
        record_cell(table, name, exchange.name, error.result.outcome)

    return play


def check_truth(lane: Lane, exchange: Exchange, error: RolloutError, unasked: Collection[str]) -> None:
    """What is told is the truth, but for what could not be asked: that is null, and said not to be known."""
    assert error.result is not None
    if not exchange.polls and exchange.call not in {"publish", "online"}:
        # No cluster was written to: there is nothing to look for, and nothing is claimed.
        assert ("publish" in dict(lane.written), error.live) == (False, None)
        assert set(told(error.result).values()) <= {(False, None, None)}
        return
    # The cluster whose publish may have been sent, and what is online there cannot be asked.
    lost = None
    if "online" in unasked and not exchange.polls:
        lost = next(name for name in CLUSTERS if name in exchange.name or name == list(CLUSTERS)[-1])
    truth = {
        cluster: (
            None if cluster == lost else published,
            None if "online" in unasked else online,
            None if "status" in unasked else running,
        )
        for cluster, (published, online, running) in truth_of(lane).items()
    }
    assert told(error.result) == truth
    assert error.live == "; ".join(
        live(cluster, "online" not in unasked, *each[1:]) for cluster, each in truth.items()
    )
    assert error.live in str(error)


def live(cluster: str, asked: bool, online: int | None, running: int | None) -> str:
    if online is None:
        return f"{cluster}: {'nothing is online' if asked else 'what is online is not known'}"
    pods = "pods not known"
    if running is not None:
        pods = f"{running} pods of any template Running, {CLUSTERS[cluster]} wanted"
    return f"{cluster} has template {online} online ({pods})"
