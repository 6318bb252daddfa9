"""One local Prefect server for the command line and assistants: real processes in a home of their own."""

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import UUID

import httpx
import psutil
import pytest
from prefect.blocks.system import Secret
from prefect.client.schemas.sorting import FlowRunSort

from prefect_rollout.execution import endpoint
from prefect_rollout.mcp import flow_runs, follow, submit
from prefect_rollout.mcp.connection import Api, opened
from prefect_rollout.mcp.policy import Policy
from prefect_rollout.release.request import ReleaseRequest
from servers import forget_events, new_prefect_home
from support import BIN, Cloud, eventually

pytestmark = pytest.mark.server

COMMAND = BIN / "prefect-rollout"


@pytest.fixture(scope="module")
def home() -> Iterator[Path]:
    """A home directory that other users may enter; its service starts from the template database."""
    with TemporaryDirectory(prefix="prefect-rollout-home-", ignore_cleanup_errors=True) as made:
        home = Path(made)
        home.chmod(0o755)
        new_prefect_home(folder(home) / endpoint.PREFECT_HOME)
        yield home
        forget_events()
        stopped = services(home)
        for process in stopped:
            process.terminate()
        assert psutil.wait_procs(stopped, timeout=60)[1] == []


def folder(home: Path) -> Path:
    return home / ".prefect-rollout" / "local"


def services(home: Path) -> list[psutil.Process]:
    """The processes of the service of a home."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []  # of one that has ended and whose parent lives, none
        if "prefect_rollout.execution.daemon" in line and str(folder(home)) in line:
            found.append(process)
    return found


def environment(home: Path, cloud: Cloud) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "K8S_"))}
    return {**kept, **cloud.environment, "K8S_APP_ID": "3290", "HOME": str(home), "DO_NOT_TRACK": "1"}


def call(cloud: Cloud, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [COMMAND, *arguments],
        env=environment(home, cloud),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def begun(cloud: Cloud, home: Path, deployment: str, *options: str) -> "subprocess.Popen[str]":
    """A release of the command line, as a shell starts it: in a process group of its own."""
    patient = ("--poll-seconds", "0.1", "--poll-attempts", "1000")
    return subprocess.Popen(
        [COMMAND, "deploy", "--deployment", deployment, *patient, *options],
        env=environment(home, cloud),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def read_until(process: "subprocess.Popen[str]", wanted: str) -> str:
    assert process.stderr
    said = ""
    while wanted not in said:
        said += (line := process.stderr.readline())
        assert line, said
    return said


@pytest.mark.promise("One release at a time")
async def test_assistants_and_the_command_line_share_lock_history_and_retry(
    make_cloud: Any, home: Path
) -> None:
    cloud = make_cloud(speed=5)
    slow = [{"kind": "slow_start", "seconds": 36_000}]
    cloud.control("PUT", "apps/3290/deployments/slow-start/behaviour", json=slow)
    request = ReleaseRequest.of(
        app_id=3290, deployment="slow-start", poll_seconds=0.2, poll_attempts=1000, reason="the assistant's"
    )
    async with opened(folder(home)) as api:
        held = request.model_copy(update={"target": await api.target_of("")})
        run, _ = await submit.submit(api, "deploy-latest-image", held, attempt=1)

        async def published() -> bool:
            return len(cloud.writes) == 2

        await eventually(published)
        deploy = ("deploy", "--deployment", "slow-start", "--lock-wait-seconds", "0", "--reason", "mine")
        refused = await asyncio.to_thread(call, cloud, home, *deploy)
        assert refused.returncode == 1, refused.stderr
        assert str(run.id) in refused.stderr
        assert "Starting" not in refused.stderr  # it finds the service
        await submit.cancel(api, await flow_runs.find(api, Policy(), str(run.id)))
        await follow.wait(lambda: _same(api), Policy(), str(run.id), 60, _ignore)
    cloud.control("POST", "advance", json={"seconds": 80_000})
    retried = call(cloud, home, "retry", str(run.id))
    assert retried.returncode == 0, retried.stderr
    listed = call(cloud, home, "history", "--json")
    assert listed.returncode == 0, listed.stderr
    rows = json.loads(listed.stdout)["changes"]
    assert {(row["trigger"], row["why"], row["outcome"]) for row in rows} == {
        ("mcp", "the assistant's", "cancelled"),
        ("mcp", "the assistant's", "released"),
        ("cli", "mine", "failed"),
    }
    assert [entry["kind"] for entry in cloud.record] == ["template", "publish"]
    assert len(services(home)) == 1


async def _same(api: Api) -> Api:
    return api


async def _ignore(_release: object) -> None: ...


STRANGER = """
import json, pathlib, socket, sys, urllib.error, urllib.request
folder, api = pathlib.Path(sys.argv[1]), sys.argv[2]
found = {}
for name in ("password", "service.json", "key", "prefect/prefect.db", "server.log"):
    try:
        (folder / name).read_bytes()
        found[name] = "read"
    except OSError as error:
        found[name] = type(error).__name__
with socket.socket() as thief:
    try:
        thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        thief.bind(("127.0.0.1", int(api.rpartition(":")[2].partition("/")[0])))
        found["port"] = "taken"
    except OSError as error:
        found["port"] = type(error).__name__
asked = {"block_documents": {}, "include_secrets": True}
request = urllib.request.Request(
    f"{api}/block_documents/filter", json.dumps(asked).encode(), {"Content-Type": "application/json"}
)
try:
    found["secrets"] = urllib.request.urlopen(request, timeout=30).read().decode()
except urllib.error.HTTPError as error:
    found["secrets"] = error.code
print(json.dumps(found))
"""


async def test_a_release_of_the_command_line_is_open_to_nobody_and_ends_in_good_order_by_ctrl_c(
    make_cloud: Any, home: Path
) -> None:
    cloud = make_cloud(speed=5)
    process = begun(cloud, home, "never-ready", "--approval", "before-release")
    try:
        said = await asyncio.to_thread(read_until, process, "waiting for a person")
        assert f"Its UI asks for the password in {folder(home) / endpoint.PASSWORD}\n" in said
        api = str(re.findall(r"Prefect API: (http://127\.0\.0\.1:\d+/api)\n", said)[0])
        async with opened(folder(home)) as known:
            with known.in_force():
                await Secret(value=SECRET).asave("secret", overwrite=True)
            (run,) = await known.client.read_flow_runs(sort=FlowRunSort.START_TIME_DESC, limit=1)

            async def paused() -> bool:
                return (await known.client.read_flow_run(run.id)).state_name == "Paused"

            await eventually(paused)
            shown = await follow.look(known, await flow_runs.find(known, Policy(), str(run.id)))
            assert "password" in shown.next
            decision = {"decision": "approve", "name": "lisi", "comment": ""}
            await known.client.resume_flow_run(run.id, run_input=decision)
        password = (folder(home) / endpoint.PASSWORD).read_text()
        await attack(api, password, run.id)
        # There is a UI, in which a person can approve.
        page = httpx.get(shown.ui_link, headers={"Accept": "text/html"}, follow_redirects=True)
        assert page.headers["content-type"].startswith("text/html")
        for each in psutil.process_iter(["cmdline"]):
            assert password not in " ".join(each.info["cmdline"] or [])
        for path in files(home):
            assert path.name == endpoint.PASSWORD or password.encode() not in path.read_bytes(), path

        said += await asyncio.to_thread(read_until, process, "wait for pods running")
        before = services(home)
        os.killpg(process.pid, signal.SIGINT)
        said += (await asyncio.to_thread(process.communicate))[1]
        assert process.returncode == 130
    finally:
        process.kill()
    assert "Cancelled: cancelled by Ctrl-C" in said
    assert re.search(r"live now +[0-9 :-]+ UTC: pub-bjwdt has template 1343170 online", said)
    assert "Traceback" not in said
    assert password not in said
    # Ctrl-C does not reach the service, which others may use.
    assert services(home) == before
    async with opened(folder(home)) as known:
        assert (await known.client.read_flow_run(run.id)).state_name == "Cancelled"


SECRET = "a-secret-of-a-block"


async def attack(api: str, password: str, run_id: UUID) -> None:
    """Asks the server as other users, other pages and pages under a name of their own do."""
    secrets = {"block_documents": {}, "include_secrets": True}
    right, wrong = httpx.BasicAuth(*password.split(":")), httpx.BasicAuth("rollout", "guessed")
    async with httpx.AsyncClient(base_url=api, timeout=60) as client:

        async def status(auth: httpx.Auth, **headers: str) -> int:
            answer = await client.post("/block_documents/filter", json=secrets, auth=auth, headers=headers)
            assert (SECRET in answer.text) == answer.is_success
            return answer.status_code

        assert await status(right) == 200
        assert await status(right, Origin=api.removesuffix("/api")) == 200
        assert await status(httpx.Auth()) == 401
        assert await status(wrong) == 401
        assert await status(right, Host="evil.example") == 421
        assert await status(right, Origin="http://evil.example") == 403
        cancel = {"state": {"type": "CANCELLING"}}
        assert (await client.post(f"/flow_runs/{run_id}/set_state", json=cancel)).status_code == 401


def files(home: Path) -> list[Path]:
    """The files of the service that are its own, and not Prefect's."""
    return [path for path in folder(home).iterdir() if path.is_file()]


@pytest.mark.skipif(
    os.name != "posix" or os.geteuid() != 0 or not shutil.which("setpriv"), reason="needs a second user"
)
async def test_another_user_of_the_machine_learns_and_takes_nothing(make_cloud: Any, home: Path) -> None:
    make_cloud()
    async with opened(folder(home)) as known:
        api = str(known.client.api_url).rstrip("/")
        stranger = await asyncio.to_thread(
            subprocess.run,
            [
                *("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"),
                *(_python(), "-I", "-c", STRANGER, str(folder(home)), api),
            ],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            cwd="/",
        )
    assert stranger.returncode == 0, stranger.stderr
    assert json.loads(stranger.stdout) == {
        "password": "PermissionError",
        "service.json": "PermissionError",
        "key": "PermissionError",
        "prefect/prefect.db": "PermissionError",
        "server.log": "PermissionError",
        "port": "OSError",
        "secrets": 401,
    }


def _python() -> str:
    """An interpreter that other users may run, too: the one of a virtual environment may be out of reach."""
    return shutil.which("python3", path="/usr/bin:/usr/local/bin") or os.path.realpath(sys.executable)


async def test_a_killed_release_is_offered_once_by_the_next_command_and_gone_on_with(
    make_cloud: Any, home: Path
) -> None:
    cloud = make_cloud(speed=20)
    cloud.faults({"kind": "never", "call": "publish", "takes_effect": True, "nth": 1})
    process = begun(cloud, home, "qapm-home")

    async def hangs() -> bool:
        assert process.poll() is None
        return any(seen["fault"] for seen in cloud.requests)

    await eventually(hangs, 300)
    process.kill()
    process.communicate()
    cloud.faults()

    listed = call(cloud, home, "history")
    offered = re.search(
        r"A release was killed while it ran: qapm-home.* retry ([0-9a-f-]{36})", listed.stderr
    )
    assert offered, listed.stderr
    ended = call(cloud, home, "retry", offered[1])
    assert ended.returncode == 0, ended.stderr
    assert "Released: qapm-home" in ended.stderr
    assert "was killed" not in ended.stderr
    assert [entry["kind"] for entry in cloud.record] == ["template", "publish"]


async def test_each_start_has_a_password_of_its_own_and_passes_an_impostor_by(
    make_cloud: Any, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_cloud()
    seen = []
    for _ in range(2):
        lease = await endpoint.connect(folder(home))
        seen.append(lease.address)
        stale = (folder(home) / endpoint.ENDPOINT).read_text()
        await lease.close()
        (service,) = services(home)
        service.terminate()
        await asyncio.to_thread(service.wait, 60)
        # As a service leaves it that was killed; its port is another program's, which is silent.
        (folder(home) / endpoint.ENDPOINT).write_text(stale)
        monkeypatch.setattr(endpoint, "_PROOF_SECONDS", 0.5)
        silent = socket.create_server(("127.0.0.1", json.loads(stale)["port"]))
    silent.close()
    assert seen[0].api == seen[1].api
    assert seen[0].password != seen[1].password
