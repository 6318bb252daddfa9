"""What a cloud and its users write stays words, wherever it is shown: hostile text goes through releases."""

import json
import os
import pty
import subprocess
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from markdown_it import MarkdownIt
from prefect import get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    LogFilter,
    LogFilterFlowRunId,
)

from prefect_rollout.errors import PlatformError, ReleaseTimedOutError, RolloutError, UnusableAnswerError
from prefect_rollout.flows import deploy_latest_image
from support import BIN, Cloud, task_runs_of
from tap import Tap, tapped

MARKUP = "<img src=x onerror=alert(1)><!--`[a](http://evil.example)|**b**"
LINKS = "http://evil.example/x www.evil.example a@evil.example evil.example //evil.example"
STEERING = "\x1b[35;5m\x1b]0;title\x07\x9b2J\x7f\u202eeverse\u2066\U000e0041"
LINES = "\n# evil\r\n12:00:00.000 | ERROR | forged\u2028- evil\x85> evil :bug:"
PRINTABLE = f"{MARKUP} {LINKS} [red]:bug:"  # names that stand in a path or a query hold no more than this
NASTY = f"{MARKUP} {LINKS}{STEERING}{LINES}"

DEPLOYMENT, CLUSTER = PRINTABLE, f"c {PRINTABLE}"
WEB: dict[str, Any] = {"app_id": 1, "deployment": DEPLOYMENT, "poll_seconds": 0.1, "poll_attempts": 100}


def template(image: str) -> dict[str, Any]:
    containers = [{"name": f"web {NASTY}", "image": image}]
    return {"kind": "Deployment", "spec": {"template": {"spec": {"containers": containers}}}}


def written(number: int, image: str) -> dict[str, Any]:
    return {"id": number, "template": template(image), "description": NASTY, "user": NASTY}


# A pod of a hostile image would not start: it is online, and the release takes the newer one.
SPEC = {
    "id": 1,
    "name": DEPLOYMENT,
    "clusters": {CLUSTER: 1},
    "templates": [written(10, f"r/web:1{NASTY}"), written(11, "r/web:2")],
    "online": {CLUSTER: 10},
}
APPS = [{"id": 1, "name": NASTY, "deployments": [SPEC]}]


def nasty(path: str, body: bytes) -> bytes:
    """Names and states that no simulated cluster would give its pods."""
    answer = json.loads(body)
    if "/status?" in path and "data" in answer:
        for status in answer["data"]:
            for pod in status["pods"] or []:
                pod["name"] += NASTY
                pod["nodeName"] = NASTY
                pod["state"] = pod["state"] if pod["state"] == "Running" else f"{pod['state']}{NASTY}"
    return json.dumps(answer).encode()


@pytest.fixture
def shop(make_cloud: Any) -> Cloud:
    made: Cloud = make_cloud(apps=APPS)
    return made


@pytest.fixture
def tap(shop: Cloud, monkeypatch: pytest.MonkeyPatch) -> Iterator[Tap]:
    with tapped(shop.url, nasty) as made:
        monkeypatch.setenv("K8S_API_URL", made.url)
        yield made


class Page(HTMLParser):
    """The tags, targets, headings and words of a page."""

    def __init__(self, markdown: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.targets: list[str | None] = []
        self.headings: list[str] = []
        self.text = ""
        self._in: list[str] = []
        self.feed(MarkdownIt("gfm-like", {"html": True}).render(markdown))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self._in.append(tag)
        if tag in {"h1", "h2"}:
            self.headings.append("")
        self.targets += [value for name, value in attrs if name in {"href", "src"}]

    def handle_endtag(self, tag: str) -> None:
        assert self._in.pop() == tag

    def handle_comment(self, data: str) -> None:
        self.tags.add("a comment")

    def handle_data(self, data: str) -> None:
        self.text += data
        if "h1" in self._in or "h2" in self._in:
            self.headings[-1] += data


OURS = {"h1", "h2", "p", "ul", "li", "strong", "code", "a", "blockquote"}
OURS |= {"table", "thead", "tbody", "tr", "th", "td"}


async def assert_tame(run_id: UUID, links: list[str], steps: int = 2) -> str:
    """No text of others is alive in anything that Prefect keeps of the run, or of its steps; all of it."""
    async with get_client() as client:
        run = await client.read_flow_run(run_id)
        tasks = await task_runs_of(run_id, at_least=steps)
        logs = await client.read_logs(LogFilter(flow_run_id=LogFilterFlowRunId(any_=[run_id])))
        artifacts = await client.read_artifacts(
            artifact_filter=ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run_id]))
        )
    # A traceback has lines of its own; its last says what an error says.
    lines = [line for log in logs for line in log.message.split("\n")]
    states = [state.message or "" for state in (run.state, *(each.state for each in tasks)) if state]
    shown = [run.name, *run.tags, *(each.name for each in tasks), *states, *lines]
    assert [text for text in shown if not text.isprintable()] == []
    assert [line for line in lines if line.startswith(("12:00", "# evil", "> evil"))] == []
    (report,) = [artifact for artifact in artifacts if artifact.type == "markdown"]
    page = Page(str(report.data))
    assert page.tags <= OURS
    assert sorted(map(str, page.targets)) == sorted(links)
    assert page.headings[0].startswith(("✅", "❌", "📋"))
    ours = {
        "Clusters",
        "Choice of template and images",
        "Notes",
        "Images",
        "Pods at the last look",
        "Time",
    }
    assert ours >= set(page.headings[1:])
    description = Page(report.description or "")
    assert description.tags <= {"p", "code"}
    return "\n".join([*shown, page.text, description.text])


pytestmark = pytest.mark.usefixtures("prefect_api")


@pytest.mark.promise("Foreign text is shown as data")
async def test_hostile_names_are_words_in_a_release(tap: Tap) -> None:
    result = await deploy_latest_image(**WEB, reason="[x](http://evil.example)\n# evil")
    shown = await assert_tame(UUID(result.release_id), list(result.links.values()), steps=8)
    # About twenty times; exactly how often is up to the looks at the pods, and to what is recorded by now.
    assert shown.count(MARKUP) > 12, "they are shown, as they are"
    assert result.app == NASTY


async def test_hostile_names_are_words_in_a_plan(tap: Tap) -> None:
    result = await deploy_latest_image(**WEB, dry_run=True)
    shown = await assert_tame(UUID(result.release_id), list(result.links.values()))
    assert shown.count(MARKUP) > 10, "they are shown, as they are"


async def failure(kind: type[RolloutError], **parameters: Any) -> RolloutError:
    with pytest.raises(kind) as caught:
        await deploy_latest_image(**{**WEB, **parameters})
    return caught.value


@pytest.mark.promise("Foreign text is shown as data")
async def test_hostile_pods_are_words_when_a_release_times_out(shop: Cloud, tap: Tap) -> None:
    behaviour = {"kind": "never_ready"}
    shop.control(
        "PUT", "scenario", json={"apps": [{**APPS[0], "deployments": [{**SPEC, "behaviour": behaviour}]}]}
    )
    error = await failure(ReleaseTimedOutError, poll_attempts=3)
    assert error.result
    assert str(error).isprintable()
    shown = await assert_tame(UUID(error.result.release_id), list(error.result.links.values()))
    assert f"ContainersNotReady{MARKUP[:30]}" in shown


@pytest.mark.promise("Foreign text is shown as data")
async def test_a_hostile_message_is_words_in_the_failure(shop: Cloud, tap: Tap) -> None:
    shop.faults({"call": "publish", "kind": "status", "status": 400, "message": NASTY})
    error = await failure(PlatformError)
    assert error.result
    assert str(error).isprintable()
    shown = await assert_tame(UUID(error.result.release_id), list(error.result.links.values()))
    assert f"the cloud refused publish: {MARKUP}" in shown


META = {
    "a cluster of another shape": {"clusters": {NASTY: {"replica": "x"}}},
    "a cluster without replicas": {"clusters": {CLUSTER: {}}},
    "a cluster with an unusable name": {"clusters": {NASTY: {"replica": 1}}},
}


@pytest.mark.parametrize("meta", META.values(), ids=META)
async def test_hostile_metadata_forges_no_line_of_a_log(make_cloud: Any, meta: dict[str, Any]) -> None:
    spec = {**SPEC, "clusters": None, "online": {}, "metaData": json.dumps(meta)}
    make_cloud(apps=[{**APPS[0], "deployments": [spec]}])
    error = await failure(RolloutError)
    assert error.step == "parse metadata"
    assert error.result
    await assert_tame(UUID(error.result.release_id), list(error.result.links.values()))


@pytest.mark.parametrize("call", ["templates", "deployments"])
async def test_a_hostile_id_is_refused(tap: Tap, call: str) -> None:
    def nasty_id(path: str, body: bytes) -> bytes:
        answer = json.loads(body)
        if ("/tpls?" in path) == (call == "templates") and "?" in path:
            answer["data"]["list"][0]["id"] = NASTY
        return json.dumps(answer).encode()

    tap.rewrite = nasty_id
    error = await failure(UnusableAnswerError)
    assert error.result
    assert "id: " in str(error)
    await assert_tame(UUID(error.result.release_id), list(error.result.links.values()))


def on_a_terminal(command: list[Any], variables: dict[str, str]) -> tuple[int, str, str]:
    """Exit code, standard output, and what a terminal was sent as standard error."""
    terminal, end = pty.openpty()
    with subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=end, text=True) as process:
        os.close(end)
        said: list[bytes] = []

        def read() -> None:
            with os.fdopen(terminal, "rb", buffering=0) as file:
                try:
                    while part := file.read(65536):
                        said.append(part)
                except OSError:  # the other end is closed
                    return

        reader = threading.Thread(target=read)
        reader.start()
        assert process.stdout
        out = process.stdout.read()
        code = process.wait(120)
        reader.join(10)
    return code, out, b"".join(said).decode()


@pytest.mark.promise("Foreign text is shown as data")
@pytest.mark.parametrize(
    ("terminal", "fails"),
    [
        (True, True),
        pytest.param(False, False, marks=pytest.mark.complete),
        pytest.param(True, False, marks=pytest.mark.complete),
        pytest.param(False, True, marks=pytest.mark.complete),
    ],
)
def test_the_command_shows_hostile_text_as_words(
    shop: Cloud, tap: Tap, prefect_server: str, tmp_path: Path, terminal: bool, fails: bool
) -> None:
    if fails:
        shop.faults({"call": "publish", "kind": "status", "status": 400, "message": NASTY})
    command: list[Any] = [
        BIN / "prefect-rollout",
        "deploy",
        "--app-id",
        "1",
        "--deployment",
        DEPLOYMENT,
        "--json",
    ]
    command += ["--poll-seconds", "0.1", "--reason", NASTY]
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PREFECT_HOME", "PREFECT_LOGGING"))
    }
    screen = {"TERM": "xterm-256color", "COLUMNS": "200"}
    variables = {**kept, **screen, "HOME": str(tmp_path), "PREFECT_API_URL": prefect_server}
    if terminal:
        code, out, said = on_a_terminal(command, variables)
        assert "\x1b[" in said, "it draws"
    else:
        ended = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
        code, out, said = ended.returncode, ended.stdout, ended.stderr
        assert [line for line in said.split("\n") if not line.isprintable()] == []
    assert code == (1 if fails else 0), said
    assert "<img src=x onerror=alert(1)>" in said
    assert ":bug:" in said
    assert [
        steer
        for steer in ("\x1b[35;5m", "\x1b]", "\x07", "\x9b", "\x7f", "\u202e", "\u2066")
        if steer in said
    ] == []
    assert [line for line in said.split("\n") if line.startswith(("12:00", "# evil"))] == []
    (line,) = out.splitlines()
    assert line.isprintable()
    result = json.loads(line)
    assert result["app"] == NASTY
    assert result["outcome"] == ("failed" if fails else "released")
