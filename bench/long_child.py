"""Releases at a steady rate in this process; prints how they ended and what grew."""

import asyncio
import json
import sys
import time
from collections import Counter
from pathlib import Path

import psutil

from prefect_rollout.errors import RolloutError
from prefect_rollout.flows import deploy_latest_image


async def main(database: Path, apps: int, seconds: float, every: float) -> None:
    """Starts a release every so many seconds, app after app."""
    outcomes: list[str] = []
    begun: Counter[int] = Counter()
    samples: list[dict[str, int]] = []

    async def one(app: int, number: int) -> None:
        try:
            result = await deploy_latest_image(
                app_id=app,
                deployment="web",
                images={"web": f"r/app:{number}"},
                poll_seconds=0.5,
                poll_attempts=100,
            )
            outcomes.append(result.outcome.value)
        except RolloutError as error:
            print(error, file=sys.stderr)
            outcomes.append(type(error).__name__)

    def sample() -> None:
        files = [database.with_name(database.name + end) for end in ("", "-wal")]
        size = sum(file.stat().st_size for file in files if file.exists())
        memory = psutil.Process().memory_info().rss
        samples.append({"memory": memory, "database": size, "releases": len(outcomes)})

    began, number = time.monotonic(), 0
    async with asyncio.TaskGroup() as group:
        while (now := time.monotonic() - began) < seconds:
            app = 1 + number % apps
            begun[app] += 1
            group.create_task(one(app, number))
            number += 1
            if now > seconds * (1 + len(samples)) / 4:
                sample()
            await asyncio.sleep(max(0, began + number * every - time.monotonic()))
        sample()  # as under way as the first
    print(json.dumps({"outcomes": outcomes, "begun": list(begun.items()), "samples": samples}))


if __name__ == "__main__":
    path, *numbers = sys.argv[1:]
    asyncio.run(main(Path(path), int(numbers[0]), float(numbers[1]), float(numbers[2])))
