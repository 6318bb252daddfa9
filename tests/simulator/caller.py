"""A client that signs: the signature is written here once more, from the contract alone."""

import hashlib
import hmac
import itertools
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol
from urllib.parse import parse_qsl, quote, urlencode

import httpx

from prefect_rollout.simulator.cloud import Cloud

_numbers = itertools.count(1)


def signed_headers(
    method: str,
    raw_path: str,
    body: bytes = b"",
    *,
    key: str = "demo-key",
    secret: str = "demo-secret",
    date: str | None = None,
    nonce: str | None = None,
    env: str = "test",
    skew: float = 0,
) -> dict[str, str]:
    """The headers for a request to `raw_path`, path and query as they are sent."""
    path, _, query = raw_path.partition("?")
    pairs = parse_qsl(query.replace("+", "%2B"), keep_blank_values=True)
    encoded = sorted((quote(name, safe=""), quote(value, safe="")) for name, value in pairs)
    date = date or (datetime.now(UTC) + timedelta(seconds=skew)).strftime("%Y%m%dT%H%M%SZ")
    nonce = nonce or f"nonce-{next(_numbers):016d}"
    lines = [
        "STARK-HMAC-SHA256",
        method,
        path,
        "&".join(f"{name}={value}" for name, value in encoded),
        date,
        nonce,
        env,
        hashlib.sha256(body).hexdigest(),
    ]
    signature = hmac.new(secret.encode(), "\n".join(lines).encode(), hashlib.sha256).hexdigest()
    return {
        "X-Stark-Date": date,
        "X-Stark-Nonce": nonce,
        "X-Stark-Env": env,
        "Authorization": f"STARK-HMAC-SHA256 KeyId={key}, Signature={signature}",
    }


class Signer(httpx.Auth):
    requires_request_body = True

    def __init__(self, key: str = "demo-key", secret: str = "demo-secret") -> None:
        self.key = key
        self.secret = secret

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        raw_path = request.url.raw_path.decode()
        request.headers.update(
            signed_headers(request.method, raw_path, request.content, key=self.key, secret=self.secret)
        )
        yield request


@dataclass
class Caller:
    """The contract's calls about app 3290, by default about `qapm-home`, over a real socket."""

    http: httpx.Client
    cloud: Cloud

    def data(self, path: str, **query: object) -> Any:
        # Encoded here: httpx writes a blank as `+`, which by RFC 3986 is a plus.
        pairs = urlencode({name: str(value) for name, value in query.items()}, quote_via=quote, safe="")
        answer = self.http.get(f"{path}?{pairs}" if pairs else path)
        assert answer.status_code == 200, answer.text
        return answer.json()["data"]

    def upgrade(
        self,
        deployment: int = 20771,
        template: object = 1343169,
        headers: Mapping[str, str] | None = None,
        **body: object,
    ) -> httpx.Response:
        return self.http.post(
            f"/apps/3290/deployments/{deployment}/upgrade",
            json={"templateId": template, "clusters": ["pub-bjwdt"], "images": {}, **body},
            headers=headers,
        )

    def publish(
        self,
        deployment: int = 20771,
        template: int = 1343169,
        cluster: str = "pub-bjwdt",
        replicas: object = 1,
        headers: Mapping[str, str] | None = None,
    ) -> httpx.Response:
        return self.http.post(
            f"/apps/3290/deployments/{deployment}/tpls/{template}/clusters/{quote(cluster, safe='')}",
            json={"replicas": replicas},
            headers=headers,
        )

    def status(self, deployment: int = 20771, cluster: str = "pub-bjwdt") -> Any:
        return self.data(f"/apps/3290/deployments/{deployment}/status", cluster=cluster)

    def states(self, deployment: int = 20771, cluster: str = "pub-bjwdt") -> list[str]:
        return [pod["state"] for pod in self.status(deployment, cluster)[0]["pods"]]

    def deployment(self, name: str) -> int:
        found = self.data("/apps/3290/deployments", filter=f"name__exact={name}")["list"]
        return int(found[0]["id"])

    def newest(self, deployment: int) -> int:
        found = self.data("/apps/3290/deployments/tpls", deploymentId=deployment, sortby="-id")["list"]
        return int(found[0]["id"])


class Calling(Protocol):
    """Begins anew with a scenario and returns a caller."""

    def __call__(self, **scenario: object) -> Caller: ...


def refusal(answer: httpx.Response) -> tuple[int, int]:
    """`(status, subCode)` of an error in the contract's shape."""
    error = answer.json()
    assert error["code"] == answer.status_code
    assert set(error) == {"code", "subCode", "msg", "requestId"}
    assert error["msg"]
    return answer.status_code, error["subCode"]
