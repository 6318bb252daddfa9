"""The requests that a release sends to the Prefect API, counted on the wire."""

import asyncio
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

import httpx
import pytest
from oci_server import Registry
from prefect import get_client
from prefect.exceptions import PrefectException

from prefect_rollout.blocks import ReleaseWindows, forget_blocks, sharing_blocks
from prefect_rollout.blocks.load import load
from prefect_rollout.flows import deploy_batch, deploy_latest_image
from prefect_rollout.release.result import Outcome
from prefect_rollout.runs.heartbeat import Monitor
from support import plan_of, shop

pytestmark = pytest.mark.usefixtures("prefect_api")

ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}|(?<=/name/).+")
# Prefect's client asks once per process or client, or at intervals, however many releases there are.
SELDOM = {"GET /csrf-token", "GET /admin/storage", "GET /admin/version", "POST /logs/"}
# Joint reads of states and renewals of leases follow the clock: a slow machine sends more of them.
BY_THE_CLOCK = {"POST /flow_runs/filter", "POST /v2/concurrency_limits/leases/…/renew"}


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch, url: str) -> Iterator[Counter[str]]:
    """Count the requests to the API by method and path while the context lasts."""
    found: Counter[str] = Counter()

    def count(request: httpx.Request) -> None:
        path = f"{request.method} {ID.sub('…', request.url.path.removeprefix('/api'))}"
        if str(request.url).startswith(url) and path not in SELDOM:
            found[path] += 1

    original = httpx.AsyncClient.send

    async def send(client: httpx.AsyncClient, request: httpx.Request, **more: Any) -> httpx.Response:
        count(request)
        return await original(client, request, **more)

    with monkeypatch.context() as patched:
        patched.setattr(httpx.AsyncClient, "send", send)
        yield found


def per_release(found: Counter[str], releases: int) -> float:
    """The requests for each release that do not follow the clock."""
    return sum(count for path, count in found.items() if path not in BY_THE_CLOCK) / releases


def shown(found: Counter[str], releases: int) -> str:
    """The counts for the message of a failed assertion."""
    return "\n".join(f"{count / releases:6.2f} {path}" for path, count in found.most_common())


async def test_a_release_needs_few_requests(
    make_cloud: Any, registry: Registry, prefect_api: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_cloud(**shop(1))
    images = {"web": f"{registry.host}/shop/web:1.2.0"}
    for limit in (28, 22):  # the first one of a process and of a deployment creates what is missing
        with counted(monkeypatch, prefect_api) as found:
            result = await deploy_latest_image(
                1, "web", images=images, check_images="require", poll_seconds=0.2
            )
        assert result.outcome is Outcome.RELEASED
        assert per_release(found, 1) <= limit, shown(found, 1)


@pytest.mark.parametrize("known", [False, True])
async def test_a_release_of_a_batch_needs_few_requests(
    known: bool, make_cloud: Any, prefect_api: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_cloud(**shop(20))
    for _ in range(2 if known else 1):
        with counted(monkeypatch, prefect_api) as found:
            result = await deploy_batch(plan_of(20, max_parallel=20))
    assert result.outcome is Outcome.RELEASED
    assert per_release(found, 20) <= 17, shown(found, 20)


async def test_runs_that_ask_for_their_state_at_the_same_time_share_a_request(
    prefect_api: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with get_client() as client:
        runs = [await client.create_flow_run(deploy_latest_image) for _ in range(5)]
        with counted(monkeypatch, prefect_api) as found:
            read = await asyncio.gather(*(Monitor.of_this_loop().read(client, run.id) for run in runs))
        assert [each.id for each in read] == [run.id for run in runs]
        assert found == {"POST /flow_runs/filter": 2}  # the first was sent when the others asked
        with pytest.raises(PrefectException, match="deleted"):
            await Monitor.of_this_loop().read(client, uuid4())


async def test_a_block_is_loaded_once_until_it_may_have_changed(
    prefect_api: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"w{uuid4().hex}"
    await ReleaseWindows(timezone="UTC").save(name)
    with counted(monkeypatch, prefect_api) as found, sharing_blocks(), sharing_blocks():
        loaded = await asyncio.gather(*(load(ReleaseWindows, name, field="windows") for _ in range(5)))
        assert {each and each.timezone for each in loaded} == {"UTC"}
        assert found.total() == 1
        forget_blocks()
        await load(ReleaseWindows, name, field="windows")
        assert found.total() == 2
