"""The local service towards strangers: its endpoint, its port, its server's pages, the user's proxy."""

import asyncio
import errno
import json
import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from prefect_rollout.errors import ConfigurationError
from prefect_rollout.execution import daemon, endpoint, local_server, prefect_api
from prefect_rollout.runs.guard import guarding

# ---- the endpoint -----------------------------------------------------------------------------------


@asynccontextmanager
async def served(home: Path) -> AsyncIterator[tuple[daemon.Daemon, int]]:
    """Open the endpoint of a service whose server is ready; yield the service and the endpoint's port."""
    with daemon.listen(home) as listener:
        made = daemon.Daemon(home, listener)
        made._ready.set()
        endpoint.secret_of(home / endpoint.PASSWORD)
        async with await made._open_endpoint() as opened:
            yield made, opened.sockets[0].getsockname()[1]
            for writer in made._clients:
                writer.close()


async def connected(home: Path) -> endpoint.Endpoint | None:
    return await endpoint._connect(home, asyncio.get_running_loop().time() + 30)


async def test_a_client_that_knows_the_token_is_given_the_address(tmp_path: Path) -> None:
    async with served(tmp_path) as (made, _):
        lease = await connected(tmp_path)
        assert lease
        assert lease.address.api == made._api
        assert lease.address.password == (tmp_path / endpoint.PASSWORD).read_text()
        assert len(made._clients) == 1
        await lease.close()
        while made._clients:  # noqa: ASYNC110 - the service notices
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    "said",
    [
        b"\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"nonce " + endpoint.proof("guessed", b"client", b"nonce") + b"\n",
        b"nonce \xff\n",
        b"x" * 100_000,
        b"half a line",
    ],
)
async def test_a_stranger_is_told_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: bytes
) -> None:
    monkeypatch.setattr(daemon, "_UNPROVED_SECONDS", 0.2)
    async with served(tmp_path) as (made, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(said)
        with suppress(ConnectionResetError):  # it has not read all of it
            assert await reader.read() == b""
        writer.close()
        assert not made._unproved
        assert not made._clients


async def test_unproved_without_end_keep_no_client_out(tmp_path: Path) -> None:
    async with served(tmp_path) as (made, port):
        silent = [await asyncio.open_connection("127.0.0.1", port) for _ in range(100)]
        lease = await connected(tmp_path)
        assert lease
        assert len(made._unproved) <= daemon._MOST_UNPROVED
        for _, writer in silent:
            writer.close()
        await lease.close()


def echo(line: bytes) -> bytes:
    return line.partition(b" ")[2]


@pytest.mark.parametrize(
    "answer",
    [
        echo,
        lambda line: echo(line) + b"http://127.0.0.1:1/api " + echo(line),
        lambda _line: b"[" * 200_000 + b"\n",
        lambda _line: b"",
        lambda _line: b'{"service": "x", "api": "http://127.0.0.1:1/api"}\n' * 2,
    ],
)
async def test_an_impostor_on_the_port_of_a_service_that_has_ended_learns_and_redirects_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: Callable[[bytes], bytes]
) -> None:
    monkeypatch.setattr(endpoint, "_PROOF_SECONDS", 0.2)
    heard: list[bytes] = []

    async def impostor(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.append(await reader.readline())
        writer.write(answer(heard[0]))
        heard.append(await reader.read())
        writer.close()

    password = endpoint.secret_of(tmp_path / endpoint.PASSWORD)
    async with await asyncio.start_server(impostor, "127.0.0.1", 0) as listening:
        port = listening.sockets[0].getsockname()[1]
        (tmp_path / endpoint.ENDPOINT).write_text(json.dumps({"port": port, "token": "the-token"}))
        assert await connected(tmp_path) is None
        assert heard[0]
        assert b"the-token" not in b"".join(heard)
        assert password.encode() not in b"".join(heard)


async def test_a_client_that_gives_up_waiting_does_not_keep_the_service_up(tmp_path: Path) -> None:
    ended = asyncio.Event()

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        waiting.cancel()
        assert await reader.read() == b""
        writer.close()
        ended.set()

    async with await asyncio.start_server(silent, "127.0.0.1", 0) as listening:
        port = listening.sockets[0].getsockname()[1]
        (tmp_path / endpoint.ENDPOINT).write_text(json.dumps({"port": port, "token": "the-token"}))
        waiting = asyncio.create_task(connected(tmp_path))
        async with asyncio.timeout(30):
            await ended.wait()
        assert waiting.cancelled()


async def test_the_folder_of_another_user_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid + 1)
    with pytest.raises(ConfigurationError, match="belongs to another user"):
        await endpoint.connect(tmp_path)


async def test_a_setting_of_the_service_that_cannot_be_used_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_ROLLOUT_LINGER_SECONDS", "soon")
    with pytest.raises(ConfigurationError, match="linger_seconds"):
        await endpoint.connect(tmp_path)


# ---- the port ---------------------------------------------------------------------------------------


def test_nobody_takes_the_port_from_its_choice_to_the_end_of_the_service(tmp_path: Path) -> None:
    with daemon.listen(tmp_path) as listener:
        port = listener.getsockname()[1]
        for host in ("127.0.0.1", "0.0.0.0"):
            with socket.socket() as thief:
                thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                with pytest.raises(OSError) as refused:  # noqa: PT011 - its number is checked
                    thief.bind((host, port))
                assert refused.value.errno == errno.EADDRINUSE


def test_the_port_of_the_last_time_is_used_again_unless_it_is_taken(tmp_path: Path) -> None:
    with daemon.listen(tmp_path) as listener:
        port = listener.getsockname()[1]
    with daemon.listen(tmp_path) as listener:
        assert listener.getsockname()[1] == port
        with daemon.listen(tmp_path) as other:
            assert other.getsockname()[1] != port


def test_a_server_serves_the_socket_that_it_is_handed_and_ends_with_its_service(tmp_path: Path) -> None:
    """The service is this process; without a Prefect home, so that the server ends before it serves."""
    with daemon.listen(tmp_path) as listener, (tmp_path / "log").open("wb") as log:
        process = local_server.start(listener, log)
        assert process.stdin
        process.stdin.close()
        process.kill()
        process.wait(30)
        # Its end does not free the port: the service still holds it.
        with socket.socket() as thief, pytest.raises(OSError, match="in use"):
            thief.bind(listener.getsockname())


# ---- the server's own pages -------------------------------------------------------------------------

OWN = "127.0.0.1:4200"


async def fine(_scope: Any, _receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"secret"})


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ([("Host", OWN)], 200),
        ([("Host", OWN), ("Origin", f"http://{OWN}")], 200),
        ([("Host", "evil.example:4200")], 421),
        ([("Host", "127.0.0.1:4200.evil.example")], 421),
        ([("Host", "localhost:4200")], 421),
        ([("Host", "127.0.0.1")], 421),
        ([("Host", OWN), ("Host", "evil.example")], 421),
        ([("Host", "")], 421),
        ([("Host", OWN), ("Origin", "http://evil.example")], 403),
        ([("Host", OWN), ("Origin", "http://127.0.0.1:3000")], 403),
        ([("Host", OWN), ("Origin", f"https://{OWN}")], 403),
        ([("Host", OWN), ("Origin", "null")], 403),
    ],
)
async def test_requests_of_other_pages_are_refused(headers: list[tuple[str, str]], status: int) -> None:
    app = local_server.OwnPages(fine, OWN)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app)) as client:
        answer = await client.get(f"http://{OWN}/api/flows", headers=headers)
    assert answer.status_code == status
    assert (b"secret" in answer.content) == (status == 200)


async def test_a_websocket_of_another_page_is_refused() -> None:
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {"type": "websocket", "headers": [(b"host", OWN.encode()), (b"origin", b"http://evil.example")]}
    await local_server.OwnPages(fine, OWN)(scope, None, send)
    assert sent[0]["status"] == 403


# ---- the user's proxy -------------------------------------------------------------------------------


async def test_the_password_passes_no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[bytes] = []

    async def proxy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.1 204 No Content\r\n\r\n")
        writer.close()

    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    async with await asyncio.start_server(proxy, "127.0.0.1", 0) as listening:
        address = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
        monkeypatch.setenv("http_proxy", address)
        monkeypatch.setenv("NO_PROXY", "internal.example")
        monkeypatch.setattr(os, "environ", os.environ.copy())
        prefect_api._bypass_proxies()
        prefect_api._bypass_proxies()
        assert os.environ["no_proxy"] == "internal.example,127.0.0.1,localhost,::1"
        async with httpx.AsyncClient() as client:
            # Straight there: what listens is asked for a path, not for another server's address.
            await client.get(address, headers={"Authorization": "Basic x"})
            await client.get("http://cloud.example/")
    assert [each.partition(b"\r\n")[0] for each in heard] == [
        b"GET / HTTP/1.1",
        b"GET http://cloud.example/ HTTP/1.1",
    ]


# ---- what is configured, and what was before --------------------------------------------------------


async def test_a_flow_without_a_configured_api_is_refused() -> None:
    with (
        temporary_settings(restore_defaults={PREFECT_API_URL}),
        pytest.raises(ConfigurationError, match="shares no lock") as refused,
    ):
        async with guarding():
            pass
    assert "PREFECT_API_URL" in refused.value.advice


def test_what_is_set_for_another_server_does_not_concern_the_local_one(tmp_path: Path) -> None:
    from prefect import settings

    from prefect_rollout.runs.lifecycle import run_link

    run_id = uuid4()
    foreign = {
        settings.PREFECT_API_KEY: "key",
        settings.PREFECT_UI_URL: "https://prefect.example",
        settings.PREFECT_DEFAULT_RESULT_STORAGE_BLOCK: "s3-bucket/results",
    }
    address = endpoint.Address("http://127.0.0.1:4201/api", "rollout:password", tmp_path)
    with temporary_settings(foreign), temporary_settings(prefect_api.settings_of(address)):
        assert run_link(run_id) == f"http://127.0.0.1:4201/runs/flow-run/{run_id}"
        assert not settings.PREFECT_API_KEY.value()
        assert not settings.PREFECT_DEFAULT_RESULT_STORAGE_BLOCK.value()
        assert settings.PREFECT_LOCAL_STORAGE_PATH.value() == tmp_path / "prefect" / "storage"
