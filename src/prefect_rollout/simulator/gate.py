"""What stands before the calls: the signature, the key's scope, and the Idempotency-Key."""

import asyncio
import hashlib

from prefect_rollout.simulator.cloud import Cloud
from prefect_rollout.simulator.exchange import (
    Answer,
    Application,
    Scope,
    StoredAnswer,
    ask,
    error_content,
    header_map,
    json_answer,
)
from prefect_rollout.simulator.refusal import Refusal

IDEMPOTENCY_SECONDS = 24 * 3600.0  # of simulated time


class Gate:
    """Admits requests to the Open API. What is not below its prefix passes unsigned.

    Args:
        application: answers what is admitted.
        cloud: has the keys and the time.
        prefix: of the Open API's paths.
    """

    def __init__(self, application: Application, cloud: Cloud, prefix: str) -> None:
        self._application = application
        self._cloud = cloud
        self._prefix = prefix
        # One write at a time: two with one Idempotency-Key must not both find no stored answer.
        self._writing = asyncio.Lock()

    async def answer(self, scope: Scope, body: bytes) -> Answer:
        """The answer to a request; a refusal where it is not admitted."""
        if not scope["path"].startswith(self._prefix):
            return await ask(self._application, scope, body)
        try:
            return await self._admitted(scope, body)
        except Refusal as refusal:
            return json_answer(refusal.status, error_content(refusal, self._cloud.request_id()))

    async def _admitted(self, scope: Scope, body: bytes) -> Answer:
        headers = header_map(scope)
        key = self._cloud.doorkeeper.admit(
            self._cloud.scenario.keys(),
            method=scope["method"],
            path=scope["path"],
            query=scope["query_string"].decode("latin-1"),
            headers=headers,
            body=body,
        )
        if key.read_only and scope["method"] != "GET":
            raise Refusal(403, f"APIKey {key.key_id} 没有写权限: read only")
        scope["simulator.key_id"] = key.key_id
        # FastAPI reads a `+` as a blank, as forms have it; the contract's encoding is RFC 3986's.
        scope["query_string"] = scope["query_string"].replace(b"+", b"%2B")
        idempotency_key = headers.get("idempotency-key")
        if scope["method"] != "POST" or not idempotency_key or not self._cloud.scenario.idempotency:
            return await ask(self._application, scope, body)
        async with self._writing:
            return await self._once((key.key_id, idempotency_key), scope, body)

    async def _once(self, key: tuple[str, str], scope: Scope, body: bytes) -> Answer:
        """The stored answer to a repeat, or a new one."""
        request = hashlib.sha256(f"{scope['method']} {scope['path']}\n".encode() + body).digest()
        now = self._cloud.now()
        stored = self._cloud.answers.get(key)
        if stored is not None and now - stored.at < IDEMPOTENCY_SECONDS:
            if stored.request != request:
                raise Refusal(409, "Idempotency-Key 已用于另一个请求", 409002)
            return stored.answer
        answer = await ask(self._application, scope, body)
        # Only what took effect: a refusal may end otherwise the next time.
        if answer.status < 300:
            self._cloud.answers[key] = StoredAnswer(now, request, answer)
        return answer
