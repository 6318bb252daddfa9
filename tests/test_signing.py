import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from prefect_rollout.platforms.container_cloud.signing import (
    StarkHmacSigner,
    canonical_query,
    signature,
    string_to_sign,
)

VECTORS = json.loads((Path(__file__).parent / "data" / "signature-vectors.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["name"])
def test_the_contracts_vector_is_signed_as_it_says(vector: dict[str, Any]) -> None:
    query = str(httpx.QueryParams([tuple(pair) for pair in vector["params"]]))
    text = string_to_sign(
        method=vector["method"],
        path=vector["path"],
        query=query,
        date=vector["date"],
        nonce=vector["nonce"],
        env=vector["env"],
        body=vector["body"].encode(),
    )
    assert canonical_query(query) == vector["canonical_query"]
    assert text == vector["string_to_sign"]
    assert signature(vector["secret"], text) == vector["signature"]


def sign(request: httpx.Request) -> httpx.Headers:
    signer = StarkHmacSigner(key_id="key", secret_key="s3cret", env="test")
    return next(signer.auth_flow(request)).headers


def test_every_try_has_a_nonce_of_its_own() -> None:
    request = httpx.Request("GET", "https://cloud/openapi/v1/apps/1")
    first = dict(sign(request))
    second = dict(sign(request))
    assert first["x-stark-nonce"] != second["x-stark-nonce"]
    assert first["authorization"] != second["authorization"]


def test_what_is_signed_is_what_is_sent() -> None:
    url = "https://cloud/openapi/v1/apps/a%2Fb?cluster=a%2Cb%20c"
    headers = sign(httpx.Request("POST", url, content=b'{"replicas":1}'))
    text = string_to_sign(
        method="POST",
        path="/openapi/v1/apps/a%2Fb",
        query="cluster=a%2Cb%20c",
        date=headers["x-stark-date"],
        nonce=headers["x-stark-nonce"],
        env="test",
        body=b'{"replicas":1}',
    )
    assert headers["authorization"] == (f"STARK-HMAC-SHA256 KeyId=key, Signature={signature('s3cret', text)}")


def test_the_secret_is_not_in_the_signers_repr() -> None:
    assert "s3cret" not in repr(StarkHmacSigner(key_id="key", secret_key="s3cret", env="prod"))
