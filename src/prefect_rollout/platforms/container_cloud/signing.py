"""Signatures of requests to the container cloud: `STARK-HMAC-SHA256` (contract, Authentication).

For a cloud with other signatures, write an `httpx.Auth` with the constructor of `StarkHmacSigner` and name
it in the block's `signer`, as `package.module:Class`.
"""

import hashlib
import hmac
import secrets
from collections.abc import Generator
from datetime import UTC, datetime
from typing import Protocol
from urllib.parse import quote, unquote

import httpx

ALGORITHM = "STARK-HMAC-SHA256"


class SignerFactory(Protocol):
    """Factory of the signer of a client."""

    def __call__(self, *, key_id: str, secret_key: str, env: str) -> httpx.Auth:
        """Return the signer for a key; `env` is the cloud's name of the environment."""
        ...


def canonical_query(query: str) -> str:
    """Return the pairs of `query`, percent-encoded by RFC 3986 and sorted by key, then by value."""
    pairs = (pair.partition("=") for pair in query.split("&") if pair)
    encoded = sorted(
        (quote(unquote(key), safe=""), quote(unquote(value), safe="")) for key, _, value in pairs
    )
    return "&".join(f"{key}={value}" for key, value in encoded)


def string_to_sign(
    *, method: str, path: str, query: str, date: str, nonce: str, env: str, body: bytes
) -> str:
    """Return the text to sign. `path` and `query` are percent-encoded; `body` is the bytes of the request."""
    digest = hashlib.sha256(body).hexdigest()
    lines = [ALGORITHM, method.upper(), path, canonical_query(query), date, nonce, env, digest]
    return "\n".join(lines)


def signature(secret_key: str, text: str) -> str:
    """Return the HMAC-SHA256 of `text` under the secret, as 64 hex digits."""
    return hmac.new(secret_key.encode(), text.encode(), hashlib.sha256).hexdigest()


class StarkHmacSigner(httpx.Auth):
    """Signer of requests: each one, retries included, gets a new time and nonce right before it is sent."""

    requires_request_body = True

    def __init__(self, *, key_id: str, secret_key: str, env: str) -> None:
        self._key_id = key_id
        self._secret_key = secret_key
        self._env = env

    def __repr__(self) -> str:
        return "StarkHmacSigner(key_id='********', secret_key='********')"

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        """Add the four headers of the contract."""
        path, _, query = request.url.raw_path.decode("ascii").partition("?")
        date = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
        nonce = secrets.token_urlsafe(24)
        method, body, env = request.method, request.content, self._env
        text = string_to_sign(
            method=method, path=path, query=query, date=date, nonce=nonce, env=env, body=body
        )
        signed = signature(self._secret_key, text)
        request.headers["X-Stark-Date"] = date
        request.headers["X-Stark-Nonce"] = nonce
        request.headers["X-Stark-Env"] = self._env
        request.headers["Authorization"] = f"{ALGORITHM} KeyId={self._key_id}, Signature={signed}"
        yield request
