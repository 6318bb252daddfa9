"""Whether a request is signed as the contract asks: `STARK-HMAC-SHA256`.

Written from the contract and not from the client, so that each checks the other.
"""

import hashlib
import hmac
import re
import time
from collections import deque
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from urllib.parse import quote, unquote_to_bytes

from prefect_rollout.simulator.refusal import Refusal
from prefect_rollout.simulator.scenario import Credential

ALGORITHM = "STARK-HMAC-SHA256"
MAX_SKEW_SECONDS = 300

_AUTHORIZATION = re.compile(rf"{ALGORITHM} KeyId=([^,\s]+), ?Signature=([0-9a-f]{{64}})")
_DATE = re.compile(r"\d{8}T\d{6}Z")
_NONCE = re.compile(r"[A-Za-z0-9_-]{16,64}")


def canonical_query(query: str) -> str:
    """The pairs of a raw query, percent-encoded by RFC 3986 and sorted. A `+` is a plus, not a blank."""
    pairs = [pair.partition("=") for pair in query.split("&") if pair]
    return "&".join(
        f"{key}={value}" for key, value in sorted((_encoded(k), _encoded(v)) for k, _, v in pairs)
    )


def _encoded(text: str) -> str:
    # Over bytes: what is no UTF-8 must not become equal to something else.
    return quote(unquote_to_bytes(text), safe="")


def string_to_sign(
    *, method: str, path: str, query: str, date: str, nonce: str, env: str, body: bytes
) -> str:
    """The lines that are signed; `path` and `query` raw as they were sent."""
    digest = hashlib.sha256(body).hexdigest()
    return "\n".join([ALGORITHM, method.upper(), path, canonical_query(query), date, nonce, env, digest])


def sign(secret_key: str, text: str) -> str:
    """HMAC-SHA256 as 64 hex digits."""
    return hmac.new(secret_key.encode(), text.encode(), hashlib.sha256).hexdigest()


class Doorkeeper:
    """Lets signed requests in, each once.

    The date of a request is held against real time, whatever the simulation's speed: clients sign
    with the real date.

    Args:
        wall: seconds since 1970.
    """

    def __init__(self, wall: Callable[[], float] = time.time) -> None:
        self._wall = wall
        self._nonces: dict[tuple[str, str], float] = {}
        self._by_age: deque[tuple[float, tuple[str, str]]] = deque()

    def admit(
        self,
        keys: Mapping[str, Credential],
        *,
        method: str,
        path: str,
        query: str,
        headers: Mapping[str, str],
        body: bytes,
    ) -> Credential:
        """The key that signed the request.

        Args:
            keys: the keys there are, by id.
            method: as sent.
            path: as sent, percent-encoded.
            query: as sent, percent-encoded.
            headers: names in small letters.
            body: as sent.

        Raises:
            Refusal: 401 with the contract's sub-code.
        """
        date = headers.get("x-stark-date")
        nonce = headers.get("x-stark-nonce")
        env = headers.get("x-stark-env")
        found = _AUTHORIZATION.fullmatch(headers.get("authorization", ""))
        if found is None or date is None or nonce is None or env is None:
            raise Refusal(401, "请求未签名: missing Authorization or X-Stark-* header", 401001)
        key = keys.get(found[1])
        if key is None or key.expired:
            raise Refusal(401, f"APIKey {found[1]} 不存在或已过期", 401002)
        now = self._wall()
        if not _is_near(date, now):
            raise Refusal(401, f"X-Stark-Date {date} 与服务器时间相差超过 {MAX_SKEW_SECONDS} 秒", 401004)
        if not _NONCE.fullmatch(nonce):
            raise Refusal(401, "X-Stark-Nonce must be 16 to 64 of A-Z a-z 0-9 - _", 401005)
        text = string_to_sign(
            method=method, path=path, query=query, date=date, nonce=nonce, env=env, body=body
        )
        if not hmac.compare_digest(sign(key.secret_key, text), found[2]):
            raise Refusal(401, "签名不一致: signature differs", 401003)
        self._use_up((key.key_id, nonce), now)
        return key

    def _use_up(self, nonce: tuple[str, str], now: float) -> None:
        # A nonce can come back only while its date is still near enough, on either side of now.
        while self._by_age and self._by_age[0][0] < now - 2 * MAX_SKEW_SECONDS:
            del self._nonces[self._by_age.popleft()[1]]
        if nonce in self._nonces:
            raise Refusal(401, "X-Stark-Nonce 已使用过: nonce seen before", 401005)
        self._nonces[nonce] = now
        self._by_age.append((now, nonce))


def _is_near(date: str, now: float) -> bool:
    if not _DATE.fullmatch(date):
        return False
    try:
        moment = datetime.strptime(date, "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
    except ValueError:
        return False
    return abs(moment.timestamp() - now) <= MAX_SKEW_SECONDS
