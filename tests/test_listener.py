"""The HTTP listeners of MCP and of the local Prefect server against clients that use them up."""

import asyncio
import logging
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
import uvicorn
from mcp.server import MCPServer
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidMessage

from prefect_rollout.errors import ConfigurationError
from prefect_rollout.execution import listener, sockets
from prefect_rollout.mcp.policy import Policy
from prefect_rollout.mcp.serve import http, warnings_of

HALF = b"POST /mcp HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Half: "
WHOLE = b"GET /mcp HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"


@asynccontextmanager
async def serving() -> AsyncIterator[int]:
    """Serve an MCP server of the SDK, and yield its port."""
    listening = sockets.listen("127.0.0.1", 0)
    port = int(listening.getsockname()[1])
    serving = asyncio.create_task(listener.serve(MCPServer("test").streamable_http_app(), listening))
    yield port
    serving.cancel()
    await asyncio.wait([serving])


async def answer(port: int, request: bytes = WHOLE) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    async with asyncio.timeout(30):
        line = await reader.readline()
    writer.close()
    return line


async def until_closed(reader: asyncio.StreamReader) -> None:
    with suppress(ConnectionResetError):
        assert await reader.read() == b""


async def test_half_sent_headers_keep_nobody_out_and_are_closed_in_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(listener, "MOST_CONNECTIONS", 20)
    monkeypatch.setattr(listener.BoundedProtocol, "request_seconds", 1.0)
    async with serving() as port:
        held = [await asyncio.open_connection("127.0.0.1", port) for _ in range(60)]
        for _, writer in held:
            writer.write(HALF)
        assert (await answer(port)).startswith(b"HTTP/1.1 4")
        async with asyncio.timeout(60):
            await asyncio.gather(*(until_closed(reader) for reader, _ in held))
        assert (await answer(port)).startswith(b"HTTP/1.1 4")


@pytest.mark.parametrize(
    "sent",
    [
        b"",  # nothing at all
        HALF,
        b"POST /mcp HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 9\r\n\r\n{",  # half a body
    ],
)
async def test_a_request_that_does_not_arrive_in_time_ends_its_connection(
    monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    monkeypatch.setattr(listener.BoundedProtocol, "request_seconds", 0.2)
    async with serving() as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(sent)
        async with asyncio.timeout(30):
            with suppress(ConnectionResetError):
                await reader.read()
        writer.close()


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Accept a web socket, and send back what it says first."""
    assert scope["type"] == "websocket"
    await receive()
    await send({"type": "websocket.accept"})
    said = await receive()
    await send({"type": "websocket.send", "text": said["text"]})


async def test_a_web_socket_has_no_deadline_and_leaves_connections_for_requests(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(listener, "MOST_CONNECTIONS", 4)
    monkeypatch.setattr(listener.BoundedProtocol, "request_seconds", 0.1)
    listening = sockets.listen("127.0.0.1", 0)
    address = f"ws://127.0.0.1:{listening.getsockname()[1]}/"
    server = uvicorn.Server(
        uvicorn.Config(echo, http=listener.bounded(), ws="websockets-sansio", lifespan="off", log_config=None)
    )
    serving = asyncio.create_task(server.serve(sockets=[listening]))
    async with connect(address) as first, connect(address):
        with pytest.raises((InvalidMessage, OSError)):
            await connect(address)
        await asyncio.sleep(0.3)
        await first.send("still open")
        assert await first.recv() == "still open"
    server.should_exit = True
    await serving


async def test_a_client_that_disconnects_in_mid_body_logs_one_line(caplog: pytest.LogCaptureFixture) -> None:
    head = (
        b"POST /mcp HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nContent-Type: application/json\r\n"
        b"Accept: application/json, text/event-stream\r\nContent-Length: 500\r\n\r\n{"
    )
    async with serving() as port:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head % port)
        await writer.drain()
        await asyncio.sleep(0.1)
        writer.close()
        async with asyncio.timeout(30):
            while not caplog.records:  # noqa: ASYNC110 - the server logs when it notices
                await asyncio.sleep(0.02)
    (record,) = caplog.records
    assert logging.Formatter().format(record) == "A client disconnected before its request was complete"


def test_a_port_in_use_is_an_error_before_any_address_is_printed() -> None:
    said: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigurationError, match=f"cannot listen on 127.0.0.1 port {port}.*--port"):
            http(Policy(), host="127.0.0.1", port=port, allowed_hosts=(), token="t" * 20, said=said.append)
    assert said == []


@pytest.mark.parametrize(
    ("host", "warns"),
    [("127.0.0.1", False), ("::1", False), ("localhost", False), ("0.0.0.0", True), ("10.1.2.3", True)],
)
def test_listening_beyond_this_machine_warns_of_plain_http(host: str, warns: bool) -> None:
    warned: Any = warnings_of(host)
    assert bool(warned) is warns
    assert not warned or "TLS" in warned[0]
