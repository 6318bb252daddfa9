"""Pins the interfaces of programs and people: CHANGELOG names each change.

`python tests/test_pinned.py` renews `data/pinned.json`.
"""

import asyncio
import inspect
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prefect.blocks.core import Block
from pydantic import BaseModel

import prefect_rollout.release.image_errors  # noqa: F401 - a part of the tree
from prefect_rollout import blocks, errors
from prefect_rollout.batch.plan import Plan
from prefect_rollout.batch.result import BatchResult
from prefect_rollout.cli.commands import app
from prefect_rollout.cli.output import WRONG_USE
from prefect_rollout.cli.results import EXIT_CODES
from prefect_rollout.flows import FLOWS
from prefect_rollout.mcp.policy import Policy
from prefect_rollout.mcp.server import Server
from prefect_rollout.mcp.session import Session
from prefect_rollout.mcp.tools import declare
from prefect_rollout.release.plan import ReleasePlan
from prefect_rollout.release.request import Action
from prefect_rollout.release.result import Outcome, ReleaseResult
from prefect_rollout.runs import events
from prefect_rollout.tasks.report_release import artifact_key
from prefect_rollout.verdict import diagnosis
from support import kinds

PINNED = Path(__file__).with_name("data") / "pinned.json"


def fields(model: type[BaseModel]) -> list[str]:
    """Return the paths of all fields of a model's JSON, such as `clusters.ready`."""
    schema = model.model_json_schema(mode="serialization")
    return sorted(set(_paths(schema, schema.get("$defs", {}), ())))


def _paths(schema: Any, definitions: dict[str, Any], above: tuple[str, ...]) -> Iterator[str]:
    if isinstance(schema, list):
        for each in schema:
            yield from _paths(each, definitions, above)
    if not isinstance(schema, dict) or len(above) > 4:
        return
    if reference := schema.get("$ref"):
        yield from _paths(definitions[reference.rpartition("/")[2]], definitions, above)
    for name, field in schema.get("properties", {}).items():
        yield ".".join((*above, name))
        yield from _paths(field, definitions, (*above, name))
    for key in ("items", "anyOf", "allOf", "prefixItems", "additionalProperties"):
        yield from _paths(schema.get(key), definitions, above)


def options() -> dict[str, list[str]]:
    """Return the options of each command."""
    found = {}
    for name in app:
        command = app[name]
        if not name.startswith("-") and command.default_command:
            names = {each for argument in command.assemble_argument_collection() for each in argument.names}
            found[name] = sorted(names)
    return found


async def tools() -> dict[str, list[str]]:
    """Return the arguments of each MCP tool."""
    session = Session(Policy(), Path("unused"))
    server = Server(session, stdio=True)
    declare(server, session, stdio=True)
    return {tool.name: sorted(tool.input_schema["properties"]) for tool in await server.list_tools()}


def events_of() -> dict[str, list[str]]:
    """Return the names of the events of a release, and the keys of what they say."""
    result = ReleaseResult(outcome=Outcome.RELEASED, app_id=1, deployment="web", release_id="r")
    endings = {
        events.ending(result.model_copy(update={"outcome": outcome, "action": action}))
        for outcome in Outcome
        for action in Action
    }
    return {
        "names": sorted(events.PREFIX + name for name in {"started", "published", *endings}),
        "payload": sorted(events.payload(result)),
        "resource": sorted(events.resource(result, "p")),
    }


def artifacts() -> list[str]:
    """Return the keys of the artifacts of a release of 3290/qapm-api; a batch's has its plan's digest."""
    result = ReleaseResult(outcome=Outcome.RELEASED, app_id=3290, deployment="qapm-api", release_id="r")
    return [artifact_key(result, kind) for kind in ("release", "plan")]


def _is(found: object, kind: type) -> bool:
    return inspect.isclass(found) and issubclass(found, kind) and not inspect.isabstract(found)


async def collected() -> dict[str, Any]:
    """Return all that is pinned."""
    saved = [each for each in vars(blocks).values() if _is(each, Block)]
    return {
        "result": fields(ReleaseResult),
        "batch result": fields(BatchResult),
        "plan": fields(ReleasePlan),
        "plan file": fields(Plan),
        "error": sorted(errors.InputError("x").to_dict()),
        "errors": sorted(each.__name__ for each in kinds(errors.RolloutError)),
        "outcomes": [each.value for each in Outcome],
        "actions": [each.value for each in Action],
        "exit codes": {outcome.value: code for outcome, code in EXIT_CODES.items()}
        | {"wrong use": WRONG_USE},
        "diagnosis categories": [each.value for each in diagnosis.Category],
        "commands": options(),
        "flows": {name: sorted(flow.parameters.properties) for name, flow in FLOWS.items()},
        "MCP tools": await tools(),
        "blocks": {each.get_block_type_slug(): sorted(each.model_fields) for each in saved},
        "events": events_of(),
        "artifacts": artifacts(),
    }


async def test_what_users_rely_on_is_as_it_was() -> None:
    assert await collected() == json.loads(PINNED.read_text("utf-8"))


if __name__ == "__main__":
    PINNED.write_text(json.dumps(asyncio.run(collected()), indent=1, ensure_ascii=False) + "\n", "utf-8")
    sys.stdout.write(f"{PINNED}\n")
