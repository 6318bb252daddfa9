"""How a fault spoils an answer: what stands in its place, and how the connection ends."""

import asyncio
import contextlib
import os
import socket
import struct
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

from prefect_rollout.simulator.exchange import Answer, Receive, Send, error_content, json_answer
from prefect_rollout.simulator.fault import Fault
from prefect_rollout.simulator.refusal import Refusal

_HTML = (
    "<!DOCTYPE html><html><head><title>{title}</title></head>"
    "<body><center><h1>{title}</h1></center><hr><center>nginx</center></body></html>\n"
)

_JSON = [(b"content-type", b"application/json")]


def in_place_of(truth: Answer | None, fault: Fault, request_id: str | None) -> Answer:
    """The answer that a fault puts in place of the true one, or that one where it does not.

    `truth` is None where the call did not do its work.
    """
    if fault.kind == "status":
        return _error(fault, request_id)
    if fault.kind == "html":
        return _page(200, "登录")
    if fault.kind in {"empty", "endless"} or truth is None:
        return Answer(200, b"", _JSON)
    return truth


def _error(fault: Fault, request_id: str | None) -> Answer:
    status = fault.status or 500
    refusal = Refusal(status, fault.message, fault.sub_code)
    answer = (
        _page(status, str(status)) if fault.html else json_answer(status, error_content(refusal, request_id))
    )
    if fault.retry_after is None:
        return answer
    kind, _, seconds = fault.retry_after.rpartition(":")
    value = seconds
    if kind:
        value = format_datetime(datetime.now(UTC) + timedelta(seconds=int(seconds)), usegmt=True)
    return Answer(answer.status, answer.body, [*answer.headers, (b"retry-after", value.encode())])


def _page(status: int, title: str) -> Answer:
    return Answer(
        status, _HTML.format(title=title).encode(), [(b"content-type", b"text/html; charset=utf-8")]
    )


async def _send(send: Send, answer: Answer) -> None:
    await _begin(send, answer, len(answer.body))
    await send({"type": "http.response.body", "body": answer.body})


async def _begin(send: Send, answer: Answer, length: int | None) -> None:
    headers = list(answer.headers)
    if length is not None:
        headers.append((b"content-length", str(length).encode()))
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})


async def deliver(fault: Fault | None, answer: Answer, receive: Receive, send: Send) -> None:
    """Gives the answer in the way that the fault says."""
    kind = fault.kind if fault else None
    half = answer.body[: len(answer.body) // 2]
    if kind in {None, "delay", "status", "html", "empty"}:
        await _send(send, answer)
    elif kind == "malformed":
        await _send(send, Answer(answer.status, half, answer.headers))
    elif kind == "cut":
        await _begin(send, answer, len(answer.body))
        await send({"type": "http.response.body", "body": half, "more_body": True})
        _transport(send).abort()
        await _disconnected(receive)
    elif kind in {"reset_before", "reset_after"}:
        _reset(send)
        await _disconnected(receive)
    elif kind == "never":
        await _disconnected(receive)
    else:
        await _without_end(answer, receive, send)


def _transport(send: Send) -> asyncio.Transport:
    """The connection beneath a request.

    ASGI has no way to break a connection. uvicorn hands its application a bound method of the object
    that runs the request, and that object has the transport; so this must be the outermost layer,
    where `send` is still uvicorn's own.
    """
    transport = getattr(getattr(send, "__self__", None), "transport", None)
    if not isinstance(transport, asyncio.Transport):
        raise TypeError("this fault breaks the connection, which only works under uvicorn")
    return transport


def _reset(send: Send) -> None:
    """Ends the connection with a TCP reset, as a crashed server or a load balancer does."""
    transport = _transport(send)
    connection: socket.socket = transport.get_extra_info("socket")
    # Lingering for 0 seconds makes the close send RST in place of FIN.
    connection.setsockopt(
        socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("hh" if os.name == "nt" else "ii", 1, 0)
    )
    transport.abort()


async def _disconnected(receive: Receive) -> None:
    """Waits until the client is gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


@contextlib.asynccontextmanager
async def _watch(receive: Receive) -> AsyncIterator[asyncio.Task[None]]:
    """A task that is done when the client is gone."""
    task = asyncio.create_task(_disconnected(receive))
    try:
        yield task
    finally:
        task.cancel()


async def _without_end(answer: Answer, receive: Receive, send: Send) -> None:
    """Sends a JSON text that never closes, as fast as the client reads, until it hangs up."""
    chunk: dict[str, Any] = {"type": "http.response.body", "body": b"a" * 65_536, "more_body": True}
    async with _watch(receive) as gone:
        await _begin(send, answer, None)
        await send({**chunk, "body": b'{"data":"'})
        while not gone.done():
            await send(chunk)
            await asyncio.sleep(0)
