"""One release after the other in this process, each beside its bare HTTP calls; prints what they took."""

import asyncio
import json
import os
import secrets
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import httpx
from rig import Cloud, Meter, Sent

from prefect_rollout.execution import endpoint, prefect_api
from prefect_rollout.platforms.container_cloud.signing import StarkHmacSigner
from prefect_rollout.release.progress import Progress, listening

ARTICLE_TIMES = 3


async def reached(home: Path, times: int, apps: list[str]) -> None:
    """The same, with a local server of its own."""
    async with prefect_api.connected(home):
        await main(times, apps)


async def main(times: int, apps: list[str]) -> None:
    """Releases app 1 so many times, and each of `apps` once."""
    cloud = Cloud(os.environ["K8S_API_URL"])
    found: dict[str, Any] = {"ours": [], "bare": [], "article": [], "seen": []}
    cpu: list[float] = []
    meters: list[Meter] = []
    for turn in range(times + 1):
        with Meter(cloud.url).reading() as meter:
            began, worked = time.monotonic(), time.process_time()
            await _release("1", f"r/app:{turn}")
            took, worked = time.monotonic() - began, time.process_time() - worked
        bare = await _replayed(meter.of(cloud=True))
        if turn:  # the first one imports
            found["ours"].append(took)
            found["bare"].append(bare)
            cpu.append(worked)
            meters.append(meter)
        if turn < ARTICLE_TIMES:
            found["article"].append(await _replayed(meter.of(cloud=True), first_look_after=5))
    found["parts"] = [
        _part("requests to the cloud", [meter.of(cloud=True) for meter in meters]),
        _part("requests to the Prefect API", [meter.of(cloud=False) for meter in meters]),
        ("processor time of its process", statistics.median(cpu), "requests' own included"),
    ]
    found["seen"] = await asyncio.gather(*(_seen(cloud, app) for app in apps))
    print(json.dumps(found))


async def _release(app: str, image: str) -> None:
    from prefect_rollout.flows import deploy_latest_image

    await deploy_latest_image(app_id=app, deployment="web", images={"web": image})


async def _replayed(calls: list[Sent], first_look_after: float = 0) -> float:
    """Seconds that a script needs for the same calls, with a client of its own."""
    looked = False
    began = time.monotonic()
    async with httpx.AsyncClient(
        auth=StarkHmacSigner(key_id="demo-key", secret_key="demo-secret", env="prod")
    ) as client:
        for call in calls:
            if call.request.url.path.endswith("/status") and not looked:
                looked = True
                await asyncio.sleep(first_look_after)
            headers = {
                name: value
                for name, value in call.request.headers.items()
                if name in {"content-type", "accept"}
            }
            if "idempotency-key" in call.request.headers:
                headers["idempotency-key"] = secrets.token_hex(8)
            (
                await client.request(
                    call.request.method, call.request.url, headers=headers, content=call.request.content
                )
            ).raise_for_status()
    return time.monotonic() - began


def _part(name: str, of_each: list[list[Sent]]) -> tuple[str, float, str]:
    seconds = statistics.median(sum(call.seconds for call in calls) for calls in of_each)
    return name, seconds, f"{statistics.median(map(len, of_each)):.0f} of them; those that overlap count each"


async def _seen(cloud: Cloud, app: str) -> float:
    """Seconds from the moment that the app's pods are ready to the moment that its release knows."""
    known: list[float] = []

    def listen(progress: Progress) -> None:
        if progress.step == "wait for pods" and progress.state == "done":
            known.append(cloud.control("POST", "advance", json={"seconds": 0})["now"])

    with listening(listen, alone=True):
        await _release(app, "r/app:new")
    (truth,) = cloud.control("GET", "truth", params={"app": app})
    return float(known[0] - truth["at"])


if __name__ == "__main__":
    home = Path(sys.argv[1])
    prefect_api.isolate(home / endpoint.PREFECT_HOME)
    asyncio.run(reached(home, int(sys.argv[2]), sys.argv[3:]))
