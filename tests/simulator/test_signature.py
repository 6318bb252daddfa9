import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from prefect_rollout.simulator.refusal import Refusal
from prefect_rollout.simulator.scenario import Credential
from prefect_rollout.simulator.signature import Doorkeeper, string_to_sign
from simulator.caller import Caller, Calling, Signer, refusal, signed_headers

VECTORS: list[dict[str, Any]] = json.loads(
    (Path(__file__).parent.parent / "data" / "signature-vectors.json").read_text(encoding="utf-8")
)
PATH = "/openapi/v1/apps/3290"


@pytest.mark.parametrize("vector", VECTORS, ids=[vector["name"] for vector in VECTORS])
def test_every_vector_of_the_contract_is_admitted(vector: dict[str, Any]) -> None:
    query = "&".join(f"{quote(name, safe='')}={quote(value, safe='')}" for name, value in vector["params"])
    body = vector["body"].encode()
    request = {"method": vector["method"], "path": vector["path"], "query": query}
    signed = {name: vector[name] for name in ("date", "nonce", "env")}
    assert string_to_sign(**request, **signed, body=body) == vector["string_to_sign"]
    then = datetime.strptime(vector["date"], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
    doorkeeper = Doorkeeper(wall=then.timestamp)
    headers = {
        **{f"x-stark-{name}": value for name, value in signed.items()},
        "authorization": f"STARK-HMAC-SHA256 KeyId=k, Signature={vector['signature']}",
    }
    keys = {"k": Credential(key_id="k", secret_key=vector["secret"])}
    assert doorkeeper.admit(keys, **request, headers=headers, body=body).key_id == "k"
    with pytest.raises(Refusal, match="seen before"):
        doorkeeper.admit(keys, **request, headers=headers, body=body)


def test_vectors_are_the_test_helpers_too() -> None:
    for vector in VECTORS:
        query = "&".join(f"{name}={quote(value)}" for name, value in vector["params"])
        headers = signed_headers(
            vector["method"],
            f"{vector['path']}?{query}",
            vector["body"].encode(),
            secret=vector["secret"],
            **{name: vector[name] for name in ("date", "nonce", "env")},
        )
        assert headers["Authorization"].endswith(vector["signature"])


def ask(caller: Caller, headers: dict[str, str], path: str = PATH) -> tuple[int, int]:
    return refusal(httpx.get(f"http://{caller.http.base_url.netloc.decode()}{path}", headers=headers))


@pytest.mark.parametrize("missing", ["Authorization", "X-Stark-Date", "X-Stark-Nonce", "X-Stark-Env"])
def test_a_request_without_one_of_the_headers_is_401001(caller: Caller, missing: str) -> None:
    headers = signed_headers("GET", PATH)
    del headers[missing]
    assert ask(caller, headers) == (401, 401001)


def test_another_scheme_is_401001(caller: Caller) -> None:
    assert ask(caller, {**signed_headers("GET", PATH), "Authorization": "Bearer x"}) == (401, 401001)


def test_an_unknown_key_is_401002(caller: Caller) -> None:
    assert ask(caller, signed_headers("GET", PATH, key="nobody")) == (401, 401002)


def test_an_expired_key_is_401002(calling: Calling) -> None:
    caller = calling(extra_keys=[{"key_id": "old", "secret_key": "s", "expired": True}])
    assert ask(caller, signed_headers("GET", PATH, key="old", secret="s")) == (401, 401002)


def test_another_secret_path_query_body_or_env_is_401003(caller: Caller) -> None:
    for headers in (
        signed_headers("GET", PATH, secret="other"),
        signed_headers("GET", f"{PATH}/deployments"),
        signed_headers("GET", f"{PATH}?a=1"),
        signed_headers("GET", PATH, b"{}"),
        signed_headers("POST", PATH),
        {**signed_headers("GET", PATH), "X-Stark-Env": "prod"},
    ):
        assert ask(caller, headers) == (401, 401003)


@pytest.mark.parametrize("skew", [-310, 310])
def test_a_clock_over_300_seconds_off_is_401004(caller: Caller, skew: int) -> None:
    assert ask(caller, signed_headers("GET", PATH, skew=skew)) == (401, 401004)
    ok = httpx.get(
        str(caller.http.base_url).removesuffix("/") + "/apps/3290",
        headers=signed_headers("GET", PATH, skew=skew * 0.9),
    )
    assert ok.status_code == 200


@pytest.mark.parametrize("date", ["yesterday", "20261399T101500Z", "2026-11-23T10:15:00Z"])
def test_a_date_of_another_form_is_401004(caller: Caller, date: str) -> None:
    assert ask(caller, signed_headers("GET", PATH, date=date)) == (401, 401004)


@pytest.mark.parametrize("nonce", ["short", "x" * 65, "sixteen letters!!"])
def test_a_nonce_of_another_form_is_401005(caller: Caller, nonce: str) -> None:
    assert ask(caller, signed_headers("GET", PATH, nonce=nonce)) == (401, 401005)


def test_a_nonce_seen_before_is_401005(caller: Caller) -> None:
    headers = signed_headers("GET", PATH)
    url = f"http://{caller.http.base_url.netloc.decode()}{PATH}"
    assert httpx.get(url, headers=headers).status_code == 200
    assert ask(caller, headers) == (401, 401005)


def test_a_read_only_key_reads_and_may_not_write(calling: Calling) -> None:
    caller = calling(extra_keys=[{"key_id": "reader", "secret_key": "s", "read_only": True}])
    caller.http.auth = Signer("reader", "s")
    assert caller.data("/apps/3290")["name"] == "qapm"
    assert refusal(caller.upgrade()) == (403, 0)
    assert caller.cloud.record() == []


def test_any_env_is_fine(caller: Caller) -> None:
    url = f"http://{caller.http.base_url.netloc.decode()}{PATH}"
    assert httpx.get(url, headers=signed_headers("GET", PATH, env="whatever")).status_code == 200


def test_an_unsigned_request_learns_nothing_of_what_exists(caller: Caller) -> None:
    assert ask(caller, {}, "/openapi/v1/no/such/path") == (401, 401001)
