"""The net around every command: settings, proxies, Prefect APIs and encodings that do not fit."""

import io
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from cyclopts import App
from rich.console import Console

import forked
from prefect_rollout import __main__
from prefect_rollout.cli import lists, output, results
from prefect_rollout.cli.options import request_of
from prefect_rollout.errors import InputError, ReleaseFailedError, RolloutError
from prefect_rollout.execution import daemon, endpoint
from prefect_rollout.execution.sockets import listen
from prefect_rollout.release.request import ReleaseRequest
from prefect_rollout.release.result import Outcome, ReleaseResult
from prefect_rollout.runs.history import Change
from prefect_rollout.settings import cloud_environment
from prefect_rollout.verdict.diagnosis import Category, Diagnosis
from support import BIN

COMMANDS = [
    ["deploy", "--app-id", "1", "--deployment", "web"],
    ["retry", "00000000"],
    ["history"],
    ["status", "--app-id", "1", "--deployment", "web"],
    ["init"],
]


def call(home: Path, *arguments: str, **variables: str) -> Any:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("K8S_", "PREFECT_"))}
    cloud = {"K8S_KEY_ID": "key", "K8S_SECRET_KEY": "s3cret", "K8S_API_URL": "http://127.0.0.1:9"}
    environment = {**kept, **cloud, "HOME": str(home), "PREFECT_HOME": str(home), **variables}
    return forked.run([BIN / "prefect-rollout", *arguments], environment)


@contextmanager
def answering(status: int, body: bytes) -> Iterator[str]:
    """A server that gives every request the same answer."""

    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = do_PATCH = _answer  # noqa: N815

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def refused(ended: Any, *says: str) -> None:
    assert ended.returncode == 2, ended.stderr
    error = json.loads(ended.stdout)["error"]
    for text in says:
        assert text in f"{error['message']} {error['advice']}"
        assert text in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.server
@pytest.mark.parametrize("command", COMMANDS, ids=lambda each: each[0])
def test_a_server_with_a_password_is_named_with_its_variable(tmp_path: Path, command: list[str]) -> None:
    with answering(401, b'{"exception_message": "Unauthorized"}') as url:
        ended = call(tmp_path, *command, "--json", PREFECT_API_URL=f"{url}/api")
    refused(ended, "PREFECT_API_AUTH_STRING", "401")


@pytest.mark.server
@pytest.mark.parametrize(("status", "body"), [(200, b"<!doctype html>"), (404, b""), (405, b"")])
def test_an_address_without_api_is_named(tmp_path: Path, status: int, body: bytes) -> None:
    with answering(status, body) as url:
        refused(call(tmp_path, "list", "--json", PREFECT_API_URL=url), "PREFECT_API_URL", "/api")


@pytest.mark.server
@pytest.mark.parametrize("command", COMMANDS, ids=lambda each: each[0])
def test_a_proxy_that_cannot_be_used_is_named(tmp_path: Path, command: list[str]) -> None:
    refused(call(tmp_path, *command, "--json", ALL_PROXY="ftp://proxy:21"), "ALL_PROXY")


@pytest.mark.server
@pytest.mark.parametrize("name", ["SSL_CERT_FILE", "PREFECT_API_SSL_CERT_FILE"])
def test_a_certificate_file_that_is_missing_is_named(tmp_path: Path, name: str) -> None:
    refused(call(tmp_path, "list", "--json", **{name: str(tmp_path / "none.pem")}), name)


@pytest.mark.server
def test_no_proxy_stands_between_this_machine_and_itself(tmp_path: Path) -> None:
    proxies = {"HTTP_PROXY": "http://127.0.0.1:9", "ALL_PROXY": "socks5://127.0.0.1:9"}
    with answering(404, b"") as url:
        ended = call(tmp_path, "list", "--json", PREFECT_API_URL=f"{url}/api", **proxies)
    # The server is reached; through the proxy, where nothing listens, it would not be.
    assert "is not the API of a Prefect server" in json.loads(ended.stdout)["error"]["message"]


def test_blanks_around_variables_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("K8S_SECRET_KEY", " s3cret\n")
    monkeypatch.setenv("K8S_APP_ID", "3290\n")
    monkeypatch.setenv("K8S_KEY_ID", "\n")
    found = cloud_environment()
    assert found.secret_key
    assert (found.secret_key.get_secret_value(), found.app_id, found.key_id) == ("s3cret", "3290", None)


# ---- one net ------------------------------------------------------------------------------------


def ran(
    monkeypatch: pytest.MonkeyPatch, command: Callable[[], object], *arguments: str
) -> tuple[output.Ended, str]:
    """Return how a command ends in the net, and what it printed."""
    printed = io.StringIO()
    for module in (output, __main__):
        monkeypatch.setattr(module, "err", Console(file=printed, width=80))
    monkeypatch.setattr(sys, "argv", ["prefect-rollout", *arguments])
    app = App()
    app.default(command)
    return __main__._ended(app, []), printed.getvalue()


def fails() -> None:
    raise KeyError("what nobody foresaw")


def test_an_unforeseen_error_is_one_sentence_and_its_traceback_needs_debug(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ended, printed = ran(monkeypatch, fails)
    assert ended.code == 1
    assert ended.document["error"]["type"] == "UnforeseenError"
    assert "KeyError" in printed
    assert "--debug" in printed
    assert "Traceback" not in printed
    _, printed = ran(monkeypatch, fails, "--debug")
    assert "Traceback" in printed


def test_a_failed_run_is_shown_line_by_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class DiagnosedError(ReleaseFailedError):
        @property
        def diagnosis(self) -> Diagnosis:
            return Diagnosis.of(
                Category.IMAGE_PULL_ERROR, cluster="c1", pod="web-1", reported="not found", seconds=9
            )

    error: RolloutError = DiagnosedError("after 9 s: 0 of 2 new pods ready in c1", advice="Push it.")
    error.step = "wait for pods"
    error.result = ReleaseResult(outcome=Outcome.FAILED, app_id=1, deployment="web", release_id="r")
    error.saw("c1 has template 5 online")

    def command() -> None:
        raise error

    ended, printed = ran(monkeypatch, command)
    assert ended.code == 1
    lines = [" ".join(line.split()) for line in printed.splitlines()]
    assert lines[:5] == [
        "Failed: wait for pods",
        "what after 9 s: 0 of 2 new pods ready in c1",
        "where c1, pod web-1",
        "reported ImagePullError for 9 s: not found",
        "to do Push it. Retry the run to continue where it stopped.",
    ]
    assert lines[5].endswith("c1 has template 5 online")


# ---- K8S_TEMPLATE_ID ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "used"),
    [
        ({"app_id": "1", "deployment": "web"}, "7"),
        ({"app_id": "1", "deployment": "web", "template_id": "8"}, "8"),
        ({"app_id": "1", "deployment": "other"}, None),
        ({"app_id": "2", "deployment": "web"}, None),
    ],
)
def test_the_variables_template_is_for_the_variables_deployment(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], given: dict[str, str], used: str
) -> None:
    for name, value in (("APP_ID", "1"), ("DEPLOY_NAME", "web"), ("TEMPLATE_ID", "7")):
        monkeypatch.setenv(f"K8S_{name}", value)
    assert request_of(ReleaseRequest, given).template_id == used
    assert ("K8S_TEMPLATE_ID is not used" in capsys.readouterr().err) is (used is None)


def test_an_error_names_the_variable_with_the_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("K8S_APP_ID", "..")
    with pytest.raises(InputError) as caught:
        request_of(ReleaseRequest, {"app_id": "..", "deployment": "web"})
    assert "K8S_APP_ID is set to it" in str(caught.value)


# ---- lists --------------------------------------------------------------------------------------

CHANGE = Change(
    when=datetime(2026, 11, 27, 8, tzinfo=UTC),
    app_id="3290",
    deployment="a-deployment-with-quite-a-long-name-of-its-own",
    action="deploy",
    outcome="timed-out, rolled back",
    cloud="https://k8s.qihoo.net",
    target="container-cloud/default",
    cluster="pub-bjwdt",
    before="1343102",
    after="1343170",
    why="每周发布 " * 30,
    run_id="896bd4f6-e7bd-4326-a672-84d8fae09e98",
)


def test_the_history_is_readable_on_80_columns_with_its_time_zone(monkeypatch: pytest.MonkeyPatch) -> None:
    printed = io.StringIO()
    monkeypatch.setattr(lists, "out", Console(file=printed, width=80, force_terminal=True, color_system=None))
    lists.show_changes([CHANGE])
    text = printed.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    for whole in ("2026-11-27 08:00 UTC", CHANGE.deployment, "1343102 → 1343170 in pub-bjwdt", CHANGE.run_id):
        assert whole in text


def test_any_encoding_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    monkeypatch.setattr(sys, "stdout", stream)
    output.accept_all_characters()
    monkeypatch.setattr(lists, "out", Console(file=stream, width=80))
    lists.show_changes([CHANGE])
    text = stream.buffer.getvalue().decode("ascii")
    assert "1343102 -> 1343170" in text
    assert r"\u6bcf\u5468" in text


@pytest.mark.server
@pytest.mark.parametrize("variables", [{"PYTHONIOENCODING": "ascii"}, {"LANG": "C", "PYTHONUTF8": "0"}])
def test_the_help_and_errors_are_shown_on_any_encoding(tmp_path: Path, variables: dict[str, str]) -> None:
    shown = call(tmp_path, "--help", **variables)
    assert shown.returncode == 0, shown.stderr
    assert "deploy" in shown.stdout


# ---- ports --------------------------------------------------------------------------------------


def test_the_ui_has_the_port_that_is_preferred_if_it_is_free(tmp_path: Path) -> None:
    with listen("127.0.0.1", 0) as taken:
        port = int(taken.getsockname()[1])
        endpoint.prefer_port(tmp_path, port)
        assert not (tmp_path / endpoint.PORT).exists()
    endpoint.prefer_port(tmp_path, port)
    with daemon.listen(tmp_path) as listening:
        assert listening.getsockname()[1] == port


@pytest.mark.server
def test_up_and_mcp_name_a_port_in_use_before_anything_else(tmp_path: Path) -> None:
    with listen("127.0.0.1", 0) as taken:
        port = str(taken.getsockname()[1])
        for command in (["up"], ["mcp", "--http"]):
            ended = call(tmp_path, *command, "--port", port, PREFECT_ROLLOUT_MCP_TOKEN="0123456789abcdef")
            assert ended.returncode == 2, ended.stderr
            assert f"cannot listen on 127.0.0.1 port {port}" in ended.stderr
            assert "http://" not in ended.stderr
            assert "Traceback" not in ended.stderr


def test_results_are_of_the_same_kind_for_every_command() -> None:
    ended = results.end(None, InputError("x: wrong", field="x"))
    assert ended.code == output.WRONG_USE
    assert ended.document["error"]["field"] == "x"
