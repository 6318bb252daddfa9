"""The contract of the MCP tools with clients: schemas, sizes, and arguments as models send them."""

import json
import socket
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import pytest_asyncio
from mcp import Client
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from prefect_rollout.batch.plan import Options, Plan
from prefect_rollout.batch.plan import Release as PlannedRelease
from prefect_rollout.errors import InputError
from prefect_rollout.mcp import session, types
from prefect_rollout.mcp.policy import Policy
from prefect_rollout.mcp.schemas import given
from prefect_rollout.mcp.server import Server
from prefect_rollout.mcp.session import Session
from prefect_rollout.mcp.tools import declare
from prefect_rollout.release.result import Outcome

MOST_CHARACTERS = 24_000
VALUES: dict[str, Any] = {
    "plan": {"releases": [{"app_id": 1, "deployment": "web"}]},
    "replicas": 2,
    "flow_run_id": "7b0e6a3c-6f0b-4a7e-9d3e-0d9b8f6f1c11",
}


@pytest.fixture
def silent() -> Iterator[str]:
    """The address of a Prefect API that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/api"


class NotFound(BaseHTTPRequestHandler):
    """Answer 404 to everything, as a server that is no Prefect API does."""

    def do_GET(self) -> None:
        self.send_error(404)

    do_POST = do_GET  # noqa: N815 - the name that http.server calls

    def log_message(self, *_: Any) -> None:
        pass


@pytest_asyncio.fixture
async def server(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Server]:
    """A server whose Prefect API is none."""
    with ThreadingHTTPServer(("127.0.0.1", 0), NotFound) as http:
        Thread(target=http.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{http.server_port}/api"
        monkeypatch.setenv("PREFECT_API_URL", url)
        made, found = declared(Policy())
        with temporary_settings({PREFECT_API_URL: url, PREFECT_CLIENT_MAX_RETRIES: 0}):
            yield found
        await made.close()
        http.shutdown()


def declared(policy: Policy) -> tuple[Session, Server]:
    """Return a session and a server with its tools."""
    made = Session(policy, Path("unused"))
    server = Server(made, stdio=True)
    declare(server, made, stdio=True)
    return made, server


async def refused(client: Client, tool: str, arguments: dict[str, Any]) -> str:
    """Return the error of a tool."""
    answer = await client.call_tool(tool, arguments)
    assert answer.is_error, answer
    return str(answer.content[0].text)  # type: ignore[union-attr]


def schemas(schema: Any) -> Iterator[dict[str, Any]]:
    """Yield every schema in a schema, itself included."""
    if isinstance(schema, dict):
        yield schema
    for part in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
        yield from schemas(part)


# ---- schemas -----------------------------------------------------------------------------------------


async def test_a_list_of_all_tools_is_short(server: Server) -> None:
    listed = [
        tool.model_dump(mode="json", by_alias=True, exclude_none=True) for tool in await server.list_tools()
    ]
    assert len(listed) == 13
    assert all(tool["outputSchema"]["properties"] for tool in listed)
    assert len(json.dumps(listed, ensure_ascii=False, separators=(",", ":"))) <= MOST_CHARACTERS


async def test_every_client_can_read_the_schemas(server: Server) -> None:
    for tool in await server.list_tools():
        for schema in schemas(tool.input_schema):
            assert not {"$ref", "$defs", "oneOf", "allOf"} & set(schema), (tool.name, schema)
            assert schema.get("type") != "null"
            assert schema.get("type") != "array" or "items" in schema
        for schema in schemas(tool.output_schema):
            assert "$ref" not in schema


async def test_the_schema_of_a_plan_has_the_keys_of_a_plan(server: Server) -> None:
    plans = {
        tool.name: tool.input_schema["properties"]["plan"]["properties"]
        for tool in await server.list_tools()
        if "plan" in tool.input_schema["properties"]
    }
    assert set(plans) == {"plan_release", "deploy_batch"}
    for fields in plans.values():
        assert set(fields) == set(Plan.model_fields)
    release = plans["deploy_batch"]["releases"]["items"]
    assert set(release["properties"]) == set(PlannedRelease.model_fields)
    assert set(plans["deploy_batch"]["defaults"]["properties"]) == set(Options.model_fields)
    assert release["required"] == ["deployment"]
    assert release["properties"]["app_id"]["description"].endswith("Defaults to K8S_APP_ID.")


async def test_a_read_only_server_describes_its_arguments_itself() -> None:
    _, server = declared(Policy(read_only=True))
    text = json.dumps([tool.model_dump(mode="json") for tool in await server.list_tools()])
    assert "As in" not in text.replace("Options are as in", "")
    assert "one-by-one waits until" in text


# ---- arguments ---------------------------------------------------------------------------------------


async def test_null_is_not_given_for_every_optional_argument_of_every_tool(server: Server) -> None:
    walked = 0
    async with Client(server) as client:
        for tool in await server.list_tools():
            required = set(tool.input_schema.get("required", ()))
            arguments = {name: VALUES[name] for name in required}
            optional = dict.fromkeys(set(tool.input_schema["properties"]) - required)
            walked += len(optional)
            text = await refused(client, tool.name, arguments | optional)
            # All arguments are accepted: what fails is the connection.
            assert "PREFECT_API_URL" in text, (tool.name, text)
    assert walked > 80


async def test_numbers_are_accepted_for_every_id(server: Server) -> None:
    async with Client(server) as client:
        for tool, arguments in (
            ("list_releases", {"app_id": 3290, "deployment": 7, "cursor": 20}),
            ("get_deployment_status", {"app_id": 3290, "deployment": 7}),
            ("deploy_latest_image", {"app_id": 3290, "deployment": "web", "template_id": 1343169}),
            ("rollback", {"app_id": 3290, "deployment": "web", "to_template": 1343169}),
            ("retry_release", {"flow_run_id": VALUES["flow_run_id"], "confirm": 1234567890123456}),
        ):
            assert "PREFECT_API_URL" in await refused(client, tool, arguments)


TEXT = {"type": "string"}


@pytest.mark.parametrize(
    ("sent", "taken"),
    [
        ({"app_id": None, "reason": ""}, {"reason": ""}),
        ({"app_id": 3290}, {"app_id": "3290"}),
        ({"flow_run_id": " 7b0e\n"}, {"flow_run_id": "7b0e"}),
        ({"clusters": "a, b"}, {"clusters": ["a", "b"]}),
        ({"clusters": ["a,b", " c "]}, {"clusters": ["a", "b", "c"]}),
        ({"clusters": '["a", "b"]'}, {"clusters": ["a", "b"]}),
        ({"clusters": [1]}, {"clusters": [1]}),
        ({"images": {"web": " r/web:1 ", "no": None}}, {"images": {"web": "r/web:1", "no": None}}),
        ({"limit": 5}, {"limit": 5}),
        (
            {
                "plan": {
                    "target": None,
                    "releases": [{"deployment": " web ", "wave": None, "clusters": "a,b"}],
                }
            },
            {"plan": {"releases": [{"deployment": "web", "clusters": ["a", "b"]}]}},
        ),
        ({"plan": '{"releases": [{"app_id": null}]}'}, {"plan": {"releases": [{}]}}),
    ],
)
def test_arguments_are_taken_as_models_send_them(sent: dict[str, Any], taken: dict[str, Any]) -> None:
    assert given(sent, {"app_id": TEXT, "flow_run_id": TEXT, "limit": {"type": "integer"}}) == taken


@pytest.mark.parametrize("clusters", [[], "", [""], ",", "[]"])
def test_an_empty_list_of_clusters_is_refused(clusters: Any) -> None:
    for arguments in ({"clusters": clusters}, {"plan": {"releases": [{"clusters": clusters}]}}):
        with pytest.raises(InputError, match="clusters: the list is empty"):
            given(arguments, {})


async def test_an_empty_list_of_clusters_is_refused_by_the_tools(server: Server) -> None:
    async with Client(server) as client:
        for tool in ("deploy_latest_image", "get_deployment_status", "plan_release"):
            refusal = await refused(client, tool, {"app_id": 1, "deployment": "web", "clusters": []})
            assert "leave it out for all clusters" in refusal


# ---- the first call ----------------------------------------------------------------------------------


async def test_the_first_call_waits_for_the_server_and_reports_that(
    monkeypatch: pytest.MonkeyPatch, silent: str
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", silent)
    monkeypatch.setattr(session, "_START_SECONDS", 3.0)
    monkeypatch.setattr(session, "_PROGRESS_SECONDS", 0.2)
    heard: list[float] = []

    async def hear(progress: float, total: float | None, message: str | None) -> None:
        assert total is None
        assert "Waiting for the Prefect server to start" in (message or "")
        heard.append(progress)

    with temporary_settings({PREFECT_API_URL: silent}):
        async with Client(Server(Session(Policy(), Path("unused")), stdio=True)) as client:
            answer = await client.call_tool("list_releases", {}, progress_callback=hear)
    assert "is still starting" in str(answer.content[0].text)  # type: ignore[union-attr]
    assert heard == sorted(set(heard))
    assert len(heard) >= 2
    assert max(heard) < 1


def test_the_first_call_waits_nearly_a_minute() -> None:
    assert session._START_SECONDS == 50
    assert session._LONGEST_SECONDS < 60


# ---- answers -----------------------------------------------------------------------------------------


def test_an_answer_leaves_out_what_has_no_value() -> None:
    release = types.Release(
        flow_run_id="r",
        flow="restart",
        state="Running",
        ended=False,
        outcome=None,
        started=datetime(2026, 11, 27, 8, tzinfo=UTC) + timedelta(hours=1),
        next="Call get_release.",
        ui_link="",
        steps=types.steps_of("restart", {"check deployment": ("done", 1), "wait for pods": ("running", 2)}),
        clusters=[types.cluster_of("c1", [], online=2, wanted=2, ready=0)],
    )
    assert json.loads(release.model_dump_json()) == {
        "flow_run_id": "r",
        "flow": "restart",
        "state": "Running",
        "ended": False,
        "started": "2026-11-27T09:00:00Z",
        "next": "Call get_release.",
        "ui_link": "",
        "steps": [{"number": 4, "step": "wait for pods", "state": "running", "seconds": 2.0}],
        "clusters": [
            {"cluster": "c1", "online_template": 2, "replicas": 2, "ready": 0, "pods": "2: 0 of 2 ready"}
        ],
    }
    short = types.brief(
        types.Submitted, release.model_copy(update={"outcome": Outcome.FAILED}), repeated=True
    )
    assert set(short.model_dump()) == {"flow_run_id", "state", "outcome", "next", "ui_link", "repeated"}
