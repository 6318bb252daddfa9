"""Every call of the client meets every fault on the wire, over real sockets and without Prefect."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import pytest

from prefect_rollout.platforms.container_cloud.client import ContainerCloudClient
from prefect_rollout.platforms.container_cloud.exchange import Exchange, PathTable
from prefect_rollout.release.workload import Change, Revision, Workload
from prefect_rollout.simulator import Scenario, SimulatorServer
from prefect_rollout.simulator.fault import Fault
from support import Door, DoorSigner
from troubles import TROUBLES, Trouble

API = Workload(app_id=3290, app="qapm", id=20772, name="qapm-api")
HERE, THERE, NEWEST = "pub-bjwdt", "pub-bjyt", 1343161
WRITES = {"upgrade": None, "publish": THERE, "restart": HERE, "scale": HERE}  # and their clusters


async def listed(items: AsyncIterator[Any]) -> list[Any]:
    return [item async for item in items]


CALLS: dict[str, Callable[[ContainerCloudClient], Awaitable[Any]]] = {
    "app": lambda client: client.app(3290),
    "deployments": lambda client: client._deployment(3290, "qapm-api"),
    "templates": lambda client: client.revisions(API),
    "template": lambda client: client.revision(API, NEWEST),
    "status": lambda client: client.status(API, [HERE, THERE]),
    "online": lambda client: client.online(API),
    "history": lambda client: listed(client.published(API)),
    "upgrade": lambda client: client.prepare(
        API,
        Revision(id=NEWEST),
        {},
        clusters=[HERE, THERE],
        release_id="r",
        note="",
        requested_by="ada",
        key="upgrade",
    ),
    "publish": lambda client: client.apply(
        API, THERE, Change(base=NEWEST, images={}, revision=NEWEST), replicas=3, over=None, key="publish"
    ),
    "restart": lambda client: client.restart(API, HERE, online=NEWEST, key="restart"),
    "scale": lambda client: client.scale(API, HERE, 3, online=NEWEST, key="scale"),
}


@pytest.fixture(scope="module")
def server() -> Iterator[SimulatorServer]:
    with SimulatorServer() as running:
        yield running


async def all_calls(server: SimulatorServer, seconds: float = 20) -> dict[str, Any]:
    """Make every call of the client side by side; return what each returns or raises."""
    signer = DoorSigner(key_id="demo-key", secret_key="demo-secret", env="test")
    cloud = Exchange(server.url, signer=signer, request_timeout_seconds=seconds)
    async with ContainerCloudClient(cloud) as client:
        ended = await asyncio.gather(*(call(client) for call in CALLS.values()), return_exceptions=True)
    return dict(zip(CALLS, ended, strict=True))


def test_every_call_of_the_client_is_made() -> None:
    assert set(CALLS) == set(PathTable.model_fields)


@pytest.mark.parametrize("name", TROUBLES)
async def test_a_fault_becomes_its_error_at_every_call_and_the_next_try_is_signed_again(
    server: SimulatorServer, name: str
) -> None:
    trouble, retry_after = longer(TROUBLES[name])
    cloud, door = server.cloud, Door(server)
    cloud.load(Scenario())
    if trouble.fault:
        cloud.set_faults([Fault.model_validate(trouble.fault)])
    else:
        server.refuse()
    errors = await all_calls(server, 1 if trouble.times_out else 20)
    server.accept()

    assert {call: type(error) for call, error in errors.items()} == dict.fromkeys(CALLS, trouble.error)
    assert all(error.retryable for error in errors.values())
    for error in errors.values():
        if retry_after is None:
            assert error.retry_after is None
        else:
            assert retry_after - 600 < error.retry_after <= retry_after
    answered = trouble.fault.get("kind") in {"status", "html", "malformed"}
    in_json = "status" in trouble.fault and not trouble.fault.get("html")
    request_ids = {error.data.pop("request_id") for error in errors.values()} if in_json else set()
    assert len(request_ids) == (len(CALLS) if in_json else 0)
    for call, error in errors.items():
        expected = {
            "status": trouble.fault.get("status", 200) if answered else None,
            "code": trouble.fault.get("sub_code"),
            "cluster": WRITES.get(call),
        }
        assert error.data == {key: value for key, value in expected.items() if value is not None}, call
    struck = cloud.requests()
    assert {seen.fault for seen in struck} == ({trouble.fault["kind"]} if trouble.fault else set())
    assert sorted(str(seen.call) for seen in struck) == (sorted(CALLS) if trouble.fault else [])  # no retry
    assert len(cloud.record()) == (len(WRITES) if trouble.effective else 0)

    cloud.set_faults([])
    answers = await all_calls(server)
    assert [answer for answer in answers.values() if isinstance(answer, BaseException)] == []
    assert len(set(door.nonces)) == len(door.nonces) == 2 * len(CALLS)
    assert sorted(entry.kind for entry in cloud.record()) == ["publish", "restart", "scale", "template"]


def longer(trouble: Trouble) -> tuple[Trouble, float | None]:
    """Return the fault with an hour in place of a second to wait, and the seconds."""
    if "retry_after" not in trouble.fault:
        return trouble, None
    asked = trouble.fault["retry_after"].replace("1", "3600")
    return trouble._replace(fault=trouble.fault | {"retry_after": asked}), 3600
