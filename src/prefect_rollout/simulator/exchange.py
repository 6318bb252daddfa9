"""One HTTP exchange as bytes: an answer, and how to get one from an ASGI application."""

import json
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from prefect_rollout.simulator.refusal import Refusal

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer. `headers` has no Content-Length: it follows from the body when sent."""

    status: int
    body: bytes
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class StoredAnswer:
    """An answer kept for repeats: from when it is (simulated seconds) and the digest of its request."""

    at: float
    request: bytes
    answer: Answer


class ClientGone(Exception):  # noqa: N818 - nobody is left to answer, which is no error
    """The client hung up before its request was whole."""


def json_answer(status: int, content: object) -> Answer:
    """An answer in JSON."""
    body = json.dumps(content, ensure_ascii=False).encode()
    return Answer(status, body, [(b"content-type", b"application/json")])


def error_content(refusal: Refusal, request_id: str | None) -> dict[str, object]:
    """The contract's error object."""
    content: dict[str, object] = {
        "code": refusal.status,
        "subCode": refusal.sub_code,
        "msg": refusal.message,
    }
    return content if request_id is None else {**content, "requestId": request_id}


def header_map(scope: Scope) -> dict[str, str]:
    """The request's headers, names in small letters; of one that is repeated, the last."""
    return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}


async def ask(application: Application, scope: Scope, body: bytes) -> Answer:
    """The application's answer to a request whose body has been read."""
    status, headers, parts = 0, [], bytearray()
    unread = True

    async def receive() -> Message:
        nonlocal unread
        if unread:
            unread = False
            return {"type": "http.request", "body": body, "more_body": False}
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        nonlocal status, headers
        if message["type"] == "http.response.start":
            status = message["status"]
            headers = [pair for pair in message["headers"] if pair[0].lower() != b"content-length"]
        elif message["type"] == "http.response.body":
            parts.extend(message.get("body", b""))

    await application(scope, receive, send)
    return Answer(status, bytes(parts), headers)
