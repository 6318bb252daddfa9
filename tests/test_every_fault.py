"""Every exchange of a release times every fault on the wire, for a moment and for good.

The exchanges are those that a clean release is seen to make, so that none is forgotten. What was
written is judged by the cloud's own record, what is told of it by the cloud's own state.
"""

import asyncio
from collections.abc import Callable, Collection, Coroutine, Iterator
from contextlib import ExitStack
from datetime import datetime
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlsplit

import pytest
from prefect.settings import PREFECT_API_URL, PREFECT_LOGGING_TO_API_ENABLED, temporary_settings
from pydantic import SecretStr

from prefect_rollout.blocks import ContainerCloud
from prefect_rollout.errors import (
    ConflictError,
    OverloadedError,
    ReleaseTimedOutError,
    RolloutError,
    ServerFaultError,
    UnreachableError,
    UnusableAnswerError,
)
from prefect_rollout.flows import deploy_latest_image
from prefect_rollout.models import Outcome, ReleaseResult
from prefect_rollout.progress import Progress, listening
from prefect_rollout.simulator import Scenario, SimulatorServer
from prefect_rollout.simulator.fault import Fault
from support import Door, DoorSigner, record_cell

APP, DEPLOYMENT_ID, DEPLOYMENT = 3290, 20772, "qapm-api"
CLUSTERS = {"pub-bjwdt": 1, "pub-bjyt": 2}
NEW = 102
ONLINE = {"pub-bjwdt": 100}  # the other one is published to for the first time
WRITTEN = [("template", None), *(("publish", cluster) for cluster in CLUSTERS)]
POLLS = 4  # of the release's polls, so many are walked: the pods get ready after them
LANES = 4  # as many releases at once as one Prefect server on SQLite bears


AFTER = {"reset_after", "cut", "malformed"}


class Trouble(NamedTuple):
    """A fault as the simulator takes it; empty for a refused connection, which the port itself has."""

    fault: dict[str, Any]
    error: type[RolloutError]

    @property
    def effective(self) -> bool:
        """Whether a write takes effect all the same."""
        return bool(self.fault.get("takes_effect")) or self.fault.get("kind") in AFTER


NO_TROUBLE = Trouble({}, RolloutError)


def status(code: int, **more: Any) -> dict[str, Any]:
    return {"kind": "status", "status": code, **more}


TROUBLES = {
    "connection refused": Trouble({}, UnreachableError),
    "reset before the effect": Trouble({"kind": "reset_before"}, UnreachableError),
    "reset after the effect": Trouble({"kind": "reset_after"}, UnreachableError),
    "time-out before the effect": Trouble({"kind": "never"}, UnreachableError),
    "time-out after the effect": Trouble({"kind": "never", "takes_effect": True}, UnreachableError),
    "500 after the effect": Trouble(status(500, takes_effect=True), ServerFaultError),
    "502 as HTML": Trouble(status(502, html=True), ServerFaultError),
    "503, Retry-After in seconds": Trouble(status(503, retry_after="1"), OverloadedError),
    "503, Retry-After as a date": Trouble(status(503, retry_after="http-date:1"), OverloadedError),
    "429, Retry-After in seconds": Trouble(status(429, retry_after="1"), OverloadedError),
    "429, Retry-After as a date": Trouble(status(429, retry_after="http-date:1"), OverloadedError),
    "login page after the effect": Trouble({"kind": "html", "takes_effect": True}, UnusableAnswerError),
    "answer cut off": Trouble({"kind": "cut"}, UnreachableError),
    "half of the JSON": Trouble({"kind": "malformed"}, UnusableAnswerError),
    "409001": Trouble(status(409, sub_code=409001), ConflictError),
}


class Place(NamedTuple):
    """Where an exchange stands in a release: the step, and its number among those of the step's try."""

    step: int
    number: int


class Exchange(NamedTuple):
    """One exchange of a clean release."""

    place: Place
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
        inside: the cloud itself, which answers whatever befalls its port.
        nonces: those of all requests of the release, in order.
        places: where the first try of each step made its requests, by their nonces.
        struck: the nonces of those that met trouble, as far as it was meant to pass.
    """

    def __init__(self, server: SimulatorServer) -> None:
        self.inside = server.cloud
        self.nonces: list[str] = []
        self.places: dict[str, Place] = {}
        self.struck: list[str] = []
        self._server = server
        self._door = Door(server)
        self._target = f"lane-{server.port}"
        for name, seconds in ((self._target, 20.0), (f"{self._target}-hasty", 0.4)):
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
        """Releases on a cloud made anew, with trouble at these places.

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
        self.places, self.struck = {}, []
        step, number, waits, retried, closed = 0, 0, False, False, False

        def heard(progress: Progress) -> None:
            nonlocal step, number, waits, retried
            waits = progress.step == "wait for pods"
            if progress.state == "running" and not progress.detail:  # a try begins
                step, number = step + (not retried), 0
            if progress.state in {"done", "retrying"}:
                retried = progress.state == "retrying"

        def passing() -> None:
            nonlocal number, closed
            if closed and not stays:
                self._server.accept()
                closed = False
            number += 1
            if waits and number > POLLS:
                self.inside.advance(1_000_000)
            place = Place(step, number)
            if retried or trouble is None:
                return
            self.places[self.nonces[-1]] = place
            if place not in at:
                return
            self.struck.append(self.nonces[-1])
            if trouble.fault:
                limits = {"call": stays} if stays else {"times": 1}
                self.inside.set_faults([Fault.model_validate(limits | trouble.fault)])
            else:
                self._server.refuse()
                closed = True

        self._door.passing = passing
        hasty = trouble is not None and trouble.fault.get("kind") == "never"
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
    asyncio.run(lane.release(NO_TROUBLE, walked=True))
    assert lane.written == WRITTEN
    seen = lane.inside.requests()
    assert [each.headers["x-stark-nonce"] for each in seen] == list(lane.places)
    last = max(place.step for place in lane.places.values())
    found = []
    for number, (each, place) in enumerate(zip(seen, lane.places.values(), strict=True), 1):
        url = urlsplit(each.path)
        query = parse_qs(url.query)
        pages = [f"page {page}" for page in query.get("pageNo", []) if each.call == "templates"]
        where = [url.path.partition("/clusters/")[2], *query.get("cluster", [])]
        name = " ".join([f"{number}. {each.call}", *pages, *filter(None, where)])
        if place.step == last:
            name = f"poll {place.number}"
        found.append(Exchange(place, each.call or each.path, name))
    assert found[-1].name == f"poll {POLLS + 1}"
    return found[:-1]


Cells = dict[str, Callable[[Lane], Coroutine[Any, Any, None]]]


async def walk(lanes: list[Lane], cells: Cells) -> None:
    """Plays all cells, as many at once as there are lanes, and fails with those that fail."""
    free = asyncio.Semaphore(len(lanes))

    async def play(cell: str, played: Callable[[Lane], Coroutine[Any, Any, None]]) -> None:
        async with free:
            lane = lanes.pop()
            try:
                await played(lane)
            except Exception as error:
                error.add_note(f"in the cell: {cell}")
                raise
            finally:
                lanes.append(lane)

    ended = await asyncio.gather(*(play(*cell) for cell in cells.items()), return_exceptions=True)
    failures = [each for each in ended if isinstance(each, Exception)]
    if failures:
        raise ExceptionGroup(f"{len(failures)} of {len(cells)} cells", failures)


# ---- once ---------------------------------------------------------------------------------------

ONCE = "each fault once, at each exchange of a release"


@pytest.mark.parametrize("name", TROUBLES)
async def test_a_fault_at_any_exchange_costs_a_try_and_nothing_twice(
    lanes: list[Lane], exchanges: list[Exchange], name: str
) -> None:
    """In each release the n-th exchange of every step is struck, so that no step is struck twice."""
    cells: Cells = {}
    for each in exchanges:  # the table's rows in their order
        record_cell(ONCE, each.name, name, "-")
    for number in sorted({each.place.number for each in exchanges}):
        struck = [each for each in exchanges if each.place.number == number]
        cells[", ".join(each.name for each in struck)] = struck_once(name, struck)
    writes = [each for each in exchanges if each.writes]
    cells["writes, Idempotency-Key ignored"] = struck_once(name, writes, idempotency=False)
    await walk(lanes, cells)


def struck_once(name: str, exchanges: list[Exchange], idempotency: bool = True) -> Callable[[Lane], Any]:
    trouble = TROUBLES[name]

    def record(outcome: str) -> None:
        for each in exchanges:
            row = each.name + ("" if idempotency else ", key ignored")
            record_cell(ONCE, row, name, outcome)

    async def play(lane: Lane) -> None:
        record("FAIL")
        at = [each.place for each in exchanges]
        result = await lane.release(trouble, at, walked=True, idempotency=idempotency)
        assert result.outcome is Outcome.RELEASED
        assert lane.written == WRITTEN
        assert {entry.template for entry in lane.inside.record()} == {NEW}
        assert all(truth.rolled_out for truth in lane.inside.truth())
        assert told(result) == truth_of(lane)

        assert len(set(lane.nonces)) == len(lane.nonces)  # each try was signed anew
        requests = lane.inside.requests()
        arrived = [seen.headers["x-stark-nonce"] for seen in requests]
        assert [lane.places[nonce] for nonce in lane.struck] == at
        if not trouble.fault:
            assert not set(lane.struck) & set(arrived)
            record("ok")
            return
        struck = [number for number, seen in enumerate(requests) if seen.fault]
        assert [arrived[number] for number in struck] == lane.struck
        assert [(requests[number].call, requests[number].fault) for number in struck] == [
            (each.call, trouble.fault["kind"]) for each in exchanges
        ]
        if "retry_after" in trouble.fault:
            dates = [signed_at(seen.headers["x-stark-date"]) for seen in requests]
            waited = [(dates[number + 1] - dates[number]).total_seconds() for number in struck]
            assert [each.name for each, seconds in zip(exchanges, waited, strict=True) if seconds < 1] == []
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

FOR_GOOD = "each fault for good, from an exchange on"

STAYS = {name: trouble for name, trouble in TROUBLES.items() if "as a date" not in name} | {
    "all calls reset before the effect": Trouble({"kind": "reset_before", "call": "any"}, UnreachableError),
    "all calls reset after the effect": Trouble({"kind": "reset_after", "call": "any"}, UnreachableError),
}


@pytest.mark.parametrize("name", STAYS)
async def test_a_fault_that_stays_ends_the_release_with_its_error_and_the_truth(
    lanes: list[Lane], exchanges: list[Exchange], name: str
) -> None:
    first = {each.call: each for each in reversed(exchanges)}
    last = {each.call: each for each in exchanges}
    begins = [first[call] for call in ("app", "deployments", "templates", "status", "upgrade", "publish")]
    begins += [last["online"], last["publish"], next(each for each in exchanges if each.polls)]
    await walk(lanes, {each.name: struck_for_good(name, each) for each in begins})


def struck_for_good(name: str, exchange: Exchange) -> Callable[[Lane], Any]:
    fault, kind = STAYS[name]
    if "retry_after" in fault:
        fault = fault | {"retry_after": "0"}
    trouble = Trouble(fault, ReleaseTimedOutError if exchange.polls else kind)
    everything = not fault or fault.get("call") == "any"
    # A write that took effect is found again, however often its answer is lost.
    found = exchange.writes and trouble.effective and not everything

    async def play(lane: Lane) -> None:
        record_cell(FOR_GOOD, name, exchange.name, "FAIL")
        options: dict[str, Any] = {"stays": exchange.call, "idempotency": False}
        if found:
            result = await lane.release(trouble, [exchange.place], **options)
            assert any(seen.fault for seen in lane.inside.requests())
            assert lane.written == WRITTEN
            assert told(result) == truth_of(lane)
            record_cell(FOR_GOOD, name, exchange.name, result.outcome)
            return
        with pytest.raises(trouble.error) as caught:
            await lane.release(trouble, [exchange.place], polls=4, **options)
        error = caught.value
        assert type(error) is trouble.error
        assert error.result is not None
        assert error.result.outcome is (Outcome.TIMED_OUT if exchange.polls else Outcome.FAILED)
        assert len(set(lane.written)) == len(lane.written)
        check_truth(lane, exchange, error, {"online", "status", "publish"} if everything else {exchange.call})
        record_cell(FOR_GOOD, name, exchange.name, error.result.outcome)

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
