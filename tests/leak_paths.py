"""Goes the paths that test_leaks searches, one after the other in a process of its own.

`python leak_paths.py PLAN ENDINGS`: a JSON file of what to do, and where to say how each ended.
"""

import asyncio
import json
import logging
import os
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import httpx
from prefect import flow, get_run_logger, task
from prefect.artifacts import acreate_markdown_artifact
from pydantic import SecretStr

from prefect_rollout import flows
from prefect_rollout.blocks import ContainerCloud


class RefusesTheKey(httpx.Auth):
    """A signer that cannot be made, and says too much."""

    def __init__(self, *, key_id: str, secret_key: str, env: str) -> None:
        raise RuntimeError(f"{env} has no {key_id} with {secret_key}")


class _Keeps(httpx.Auth):
    def __init__(self, *, key_id: str, secret_key: str, env: str) -> None:
        self.secrets = f"{key_id} {secret_key} {env}"


class FailsWhileSigning(_Keeps):
    """A signer that crashes at the first request, and says too much."""

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        raise LookupError(self.secrets)


class SignsWhatCannotBeSent(_Keeps):
    """A signer whose header is no header: h11 quotes it when it refuses to send it."""

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        request.headers["X-Signed"] = f"{self.secrets}\r\nX-Next: 1"
        yield request


@task(persist_result=True, result_serializer="compressed/pickle")
async def kept_compressed(secret: str) -> list[str]:
    return [secret]


@flow(persist_result=True)
async def careless(secret: str) -> dict[str, str]:
    """Leaks wherever one can: the search has to find all of it."""
    get_run_logger().debug("logged %s", secret)
    logging.getLogger("prefect_rollout").debug("%s in a log of ours", secret)
    await acreate_markdown_artifact(secret, key="careless")
    await kept_compressed(secret)
    return {"kept": secret}


@flow(persist_result=True)
async def crashes(secret: str) -> None:
    raise RuntimeError(secret)


async def _saved(name: str, fields: dict[str, Any]) -> None:
    secrets = {field: SecretStr(fields.pop(field)) for field in ("key_id", "secret_key")}
    await ContainerCloud(**secrets, **fields).asave(name)


async def _gone(path: dict[str, Any], control: str) -> str:
    async with httpx.AsyncClient() as client:
        (await client.put(f"{control}/_control/faults", json=path.get("faults", []))).raise_for_status()
    os.environ.update(path.get("environment", {}))
    try:
        result = await getattr(flows, path["flow"])(**path["parameters"])
    except Exception as error:  # noqa: BLE001 - any other would be a finding, and end no path but its own
        return f"{type(error).__name__}: {error} {error!r} {vars(error)}"
    return f"{result.outcome.value}: {result.model_dump_json()}"


async def _main(plan: dict[str, Any]) -> dict[str, str]:
    for name, fields in plan["blocks"].items():
        await _saved(name, fields)
    endings = {name: await _gone(path, plan["control"]) for name, path in plan["paths"].items()}
    await careless(plan["careless"])
    await crashes(plan["careless"], return_state=True)
    return endings


if __name__ == "__main__":
    for name in ("httpx", "httpcore"):  # Prefect sends on what extra loggers say, and leaves their level
        logging.getLogger(name).setLevel(logging.DEBUG)
    endings = asyncio.run(_main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
    Path(sys.argv[2]).write_text(json.dumps(endings), encoding="utf-8")
