"""Set up a Prefect API: block types, work pool, queues, and the deployments of the package's prefect.yaml.

The deployments are those that `prefect deploy --all` makes. What already exists is compared with them first.
Schedules, pauses, limits and job variables of an existing deployment are left as they are.
"""

import importlib
from collections.abc import AsyncIterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from prefect.blocks.core import Block
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.actions import DeploymentScheduleCreate, DeploymentUpdate, WorkPoolCreate
from prefect.client.schemas.schedules import CronSchedule
from prefect.exceptions import ObjectNotFound
from prefect.utilities.callables import parameter_schema
from prefect.workers.utilities import (
    get_available_work_pool_types,
    get_default_base_job_template_for_infrastructure_type,
)

from prefect_rollout.blocks import ContainerCloud, Kubernetes, ReleaseWindows
from prefect_rollout.errors import ConfigurationError, InputError
from prefect_rollout.execution.worker import RolloutWorker
from prefect_rollout.runs.prefect_errors import translate_errors
from prefect_rollout.text import one_line

POOL = "rollout"
PRIORITIES = {"urgent": 1, "default": 2, "releases": 3, "batches": 4}
"""Queues of the work pool; Prefect creates `default` with it. The lowest number is the most urgent."""
BATCHES = 4
"""Batches that run at once: they must not take all slots of the workers, which their releases need."""

_PACKAGE = files("prefect_rollout")


class Done(NamedTuple):
    """One object in Prefect, and what `apply` did with it."""

    kind: str
    name: str
    change: str  # created | updated | unchanged
    fields: list[str]  # that were updated


def _compare(kind: str, name: str, before: Mapping[str, Any] | None, after: Mapping[str, Any]) -> Done:
    if before is None:
        return Done(kind, name, "created", [])
    fields = [field for field, value in after.items() if before[field] != value]
    return Done(kind, name, "updated" if fields else "unchanged", fields)


async def apply(
    client: PrefectClient, pool: str, pool_type: str, batches: int | None = None
) -> AsyncIterator[Done]:
    """Create or update everything, and yield each object when it is done.

    Args:
        client: client of the Prefect API.
        pool: name of the work pool.
        pool_type: its type.
        batches: concurrency limit of the queue of batches; `None` keeps the limit that it has.

    Raises:
        InputError: there is no such type of work pools.
        ConfigurationError: the work pool has another type, or the API did not answer.
    """
    with translate_errors():
        done = await _work_pool(client, pool, pool_type)
        yield done
        for queue in await _queues(client, pool, batches, new=done.change == "created"):
            yield queue
        for block in (Kubernetes, ContainerCloud, ReleaseWindows):
            yield await _block_type(client, block)
        definitions = yaml.safe_load((_PACKAGE / "prefect.yaml").read_text(encoding="utf-8"))
        for definition in definitions["deployments"]:
            yield await _deployment(client, pool, definition)


async def _work_pool(client: PrefectClient, name: str, pool_type: str) -> Done:
    try:
        pool = await client.read_work_pool(name)
    except ObjectNotFound:
        template = (
            RolloutWorker.get_default_base_job_template()
            if pool_type == RolloutWorker.type
            else await get_default_base_job_template_for_infrastructure_type(pool_type)
        )
        if template is None:
            raise InputError(
                f"type: Prefect knows no work pool type {one_line(pool_type, 80)!r}",
                advice=f"There are: {', '.join(await get_available_work_pool_types())}.",
                field="type",
            ) from None
        await client.create_work_pool(WorkPoolCreate(name=name, type=pool_type, base_job_template=template))
        return Done("work pool", name, "created", [])
    if pool.type != pool_type:
        raise ConfigurationError(
            f"the work pool {name} has the type {one_line(pool.type, 80)}, not {one_line(pool_type, 80)}, "
            "and a work pool cannot change its type",
            advice=f"Keep it with `--type {one_line(pool.type, 80)}`"
            # The pool of the local server belongs to its daemon.
            + (
                f", or delete it with `prefect work-pool delete {name}` and start again."
                if name == POOL
                else "."
            ),
        )
    return Done("work pool", name, "unchanged", [])


async def _queues(client: PrefectClient, pool: str, batches: int | None, *, new: bool) -> list[Done]:
    async def read() -> dict[str, dict[str, Any]]:
        return {
            queue.name: {"priority": queue.priority, "concurrency_limit": queue.concurrency_limit}
            for queue in await client.read_work_queues(work_pool_name=pool)
        }

    now = await read()
    before = {} if new else now
    limit = batches or before.get("batches", {}).get("concurrency_limit") or BATCHES
    # Most urgent first: Prefect moves the queue that has the priority, and those behind it, to the next ones.
    for name, priority in PRIORITIES.items():
        wanted = {"priority": priority} | ({"concurrency_limit": limit} if name == "batches" else {})
        found = now.get(name)
        if found is None:
            await client.create_work_queue(name, work_pool_name=pool, **wanted)
        elif found != found | wanted:
            await client.request(
                "PATCH",
                "/work_pools/{work_pool_name}/queues/{name}",
                path_params={"work_pool_name": pool, "name": name},
                json=wanted,
            )
        else:
            continue
        now = await read()
    return [_compare("work queue", name, before.get(name), now[name]) for name in PRIORITIES]


async def _block_type(client: PrefectClient, block: type[Block]) -> Done:
    slug = block.get_block_type_slug()

    async def read() -> dict[str, Any] | None:
        try:
            found = await client.read_block_type_by_slug(slug)
        except ObjectNotFound:
            return None
        schema = await client.get_most_recent_block_schema_for_block_type(found.id)
        return {**found.model_dump(exclude={"created", "updated"}), "schema": schema and schema.checksum}

    before = await read()
    await block.aregister_type_and_schema(client=client)
    return _compare("block type", slug, before, await read() or {})


async def _deployment(client: PrefectClient, pool: str, definition: dict[str, Any]) -> Done:
    name, entrypoint = definition["name"], definition["entrypoint"]
    module, _, function = entrypoint.rpartition(".")
    flow = getattr(importlib.import_module(module), function)
    wanted = {
        "description": definition["description"],
        "tags": definition["tags"],
        "parameters": definition.get("parameters", {}),
        "entrypoint": entrypoint,
        "pull_steps": definition["pull"],
        "work_pool_name": pool,
        "work_queue_name": definition["work_pool"]["work_queue_name"],
        "enforce_parameter_schema": True,
        "parameter_openapi_schema": parameter_schema(flow).model_dump(mode="json", exclude_unset=True),
    }
    try:
        found = await client.read_deployment_by_name(f"{flow.name}/{name}")
    except ObjectNotFound:
        flow_id = await client.create_flow_from_name(flow.name)
        schedules = [_schedule(each) for each in definition.get("schedules", [])]
        await client.create_deployment(flow_id, name, version=flow.version, schedules=schedules, **wanted)
        return Done("deployment", f"{flow.name}/{name}", "created", [])
    done = _compare("deployment", f"{flow.name}/{name}", found.model_dump(mode="json"), wanted)
    if done.fields:
        await client.update_deployment(found.id, DeploymentUpdate(**wanted))
    return done


def _schedule(definition: dict[str, Any]) -> DeploymentScheduleCreate:
    cron = CronSchedule(cron=definition["cron"], timezone=definition["timezone"])
    rest = {key: definition[key] for key in ("slug", "active", "parameters")}
    return DeploymentScheduleCreate(schedule=cron, **rest)


def write(folder: Path) -> list[Path]:
    """Write prefect.yaml and examples of automations to `folder`, and return the files.

    Raises:
        InputError: a file exists already, or cannot be written.
    """
    automations = sorted((_PACKAGE / "automations").iterdir(), key=lambda each: each.name)
    sources = {folder / "prefect.yaml": _PACKAGE / "prefect.yaml"} | {
        folder / "automations" / each.name: each for each in automations if each.name.endswith(".yaml")
    }
    if existing := [one_line(path) for path in sources if path.exists()]:
        raise InputError(
            f"write: {', '.join(existing)} already exist{'s' if len(existing) == 1 else ''}",
            advice="Name another folder, or move the file away; nothing was written.",
            field="write",
        )
    for path, source in sources.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("xb") as file:
                file.write(source.read_bytes())
        except OSError as error:
            raise InputError(
                f"write: {one_line(path)} cannot be written: {error.strerror}",
                advice="Name another folder.",
                field="write",
            ) from error
    return list(sources)
