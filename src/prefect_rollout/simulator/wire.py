"""The outermost layer: records every request and spoils answers as the faults say.

Raw paths are routed as they were sent, still percent-encoded, so that `%2F` stays within its segment.
"""

import re
from urllib.parse import parse_qs, unquote

from prefect_rollout.simulator.cloud import Cloud
from prefect_rollout.simulator.exchange import (
    Answer,
    ClientGone,
    Receive,
    Scope,
    Send,
    error_content,
    header_map,
    json_answer,
)
from prefect_rollout.simulator.fault import Fault
from prefect_rollout.simulator.gate import Gate
from prefect_rollout.simulator.refusal import Refusal
from prefect_rollout.simulator.shapes import RequestSeen
from prefect_rollout.simulator.spoil import deliver, in_place_of

MAX_BODY_BYTES = 1024 * 1024
_SHOWN_BODY = 16_384

_DEPLOYMENT = r"/apps/[^/]+/deployments/(?P<deployment>[^/]+)"
_CLUSTER = r"/clusters/(?P<cluster>[^/]+)"
# In this order: `tpls` would pass for a deployment's id.
_CALLS = [
    ("app", "GET", re.compile(r"/apps/[^/]+")),
    ("deployments", "GET", re.compile(r"/apps/[^/]+/deployments")),
    ("templates", "GET", re.compile(r"/apps/[^/]+/deployments/tpls")),
    ("template", "GET", re.compile(r"/apps/[^/]+/deployments/tpls/(?P<template>[^/]+)")),
    ("upgrade", "POST", re.compile(_DEPLOYMENT + "/upgrade")),
    ("publish", "POST", re.compile(_DEPLOYMENT + "/tpls/[^/]+" + _CLUSTER)),
    ("status", "GET", re.compile(_DEPLOYMENT + "/status")),
    ("restart", "POST", re.compile(_DEPLOYMENT + _CLUSTER + "/restart")),
    ("scale", "POST", re.compile(_DEPLOYMENT + _CLUSTER + "/scale")),
    ("online", "GET", re.compile("/publishstatus")),
    ("history", "GET", re.compile("/publish/histories")),
]


class Wire:
    """Answers HTTP requests through the gate, or badly.

    Args:
        gate: gives the true answers.
        cloud: has the faults, and keeps the requests.
        prefix: of the Open API's paths, the only ones that faults strike.
    """

    def __init__(self, gate: Gate, cloud: Cloud, prefix: str) -> None:
        self._gate = gate
        self._cloud = cloud
        self._prefix = prefix

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        raw_path = scope.get("raw_path") or scope["path"].encode()
        scope["path"] = raw_path.decode("latin-1")
        try:
            body = await _read(receive)
        except ClientGone:
            return
        call, clusters, deployment = self._identify(scope)
        faults = self._cloud.faults
        fault = faults.strike(call, clusters, deployment) if call else None
        request = dict(scope)  # as it arrived; the layers below change theirs
        answer = await self._answer(scope, body, fault)
        if request["path"].startswith(self._prefix):
            self._note(request, body, call, fault, answer)
        await faults.delay(fault)
        await deliver(fault, answer, receive, send)

    async def _answer(self, scope: Scope, body: bytes | None, fault: Fault | None) -> Answer:
        """The answer to give: the true one, unless the fault puts another in its place."""
        if body is None:
            refusal = Refusal(413, f"请求体超过 {MAX_BODY_BYTES} 字节: body too long")
            return json_answer(413, error_content(refusal, self._cloud.request_id()))
        if fault is None:
            return await self._gate.answer(scope, body)
        truth = await self._gate.answer(scope, body) if fault.effective else None
        return in_place_of(truth, fault, self._cloud.request_id())

    def _identify(self, scope: Scope) -> tuple[str | None, list[str], str | None]:
        """`(call, clusters, deployment name)` of a request; `(None, [], None)` for any other."""
        path = scope["path"]
        if not path.startswith(self._prefix):
            return None, [], None
        query = parse_qs(scope["query_string"].decode("latin-1").replace("+", "%2B"))
        for call, method, pattern in _CALLS:
            found = pattern.fullmatch(path, len(self._prefix))
            if found and method == scope["method"]:
                named = found.groupdict()
                clusters = [unquote(named["cluster"])] if "cluster" in named else []
                clusters += query.get("cluster", [""])[0].split(",")
                return call, clusters, self._deployment_name(named, query)
        return None, [], None

    def _deployment_name(self, named: dict[str, str], query: dict[str, list[str]]) -> str | None:
        for wish in query.get("filter", []):
            return wish.partition("=")[2]
        deployments = [named.get("deployment"), *query.get("deploymentId", []), *query.get("resourceId", [])]
        return self._cloud.deployment_name(
            deployment_id=_number(*deployments), template_id=_number(named.get("template"))
        )

    def _note(
        self, scope: Scope, body: bytes | None, call: str | None, fault: Fault | None, answer: Answer
    ) -> None:
        query = scope["query_string"].decode("latin-1")
        headers = header_map(scope)
        headers.pop("authorization", None)
        unanswered = fault is not None and fault.kind in {"reset_before", "reset_after", "never"}
        self._cloud.note_request(
            RequestSeen(
                number=0,
                at=self._cloud.now(),
                method=scope["method"],
                path=scope["path"] + (f"?{query}" if query else ""),
                call=call,
                status=None if unanswered else answer.status,
                fault=fault.kind if fault else None,
                headers=headers,
                body=(body or b"").decode("utf-8", "replace")[:_SHOWN_BODY],
            )
        )


async def _read(receive: Receive) -> bytes | None:
    """The body; None when it is too long, after reading it to its end without keeping it."""
    body, more, too_long = bytearray(), True, False
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        body += message.get("body", b"")
        more = message.get("more_body", False)
        if len(body) > MAX_BODY_BYTES:
            too_long = True
            body.clear()
    return None if too_long else bytes(body)


def _number(*texts: str | None) -> int | None:
    for text in texts:
        if text and text.isascii() and text.isdigit() and len(text) < 18:
            return int(text)
    return None
