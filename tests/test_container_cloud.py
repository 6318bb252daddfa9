import asyncio
import gzip
import json
import ssl
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
import respx
from pydantic import ValidationError

from prefect_rollout.errors import (
    AccessDeniedError,
    AppNotFoundError,
    AuthenticationError,
    ConfigurationError,
    ConflictError,
    DeploymentNotFoundError,
    ForeignTemplateError,
    InputError,
    NotFoundError,
    OverloadedError,
    QuotaExceededError,
    RejectedError,
    RolloutError,
    ServerFaultError,
    TemplateNotFoundError,
    UnreachableError,
    UnusableAnswerError,
    UpgradeError,
)
from prefect_rollout.platforms.container_cloud import exchange
from prefect_rollout.platforms.container_cloud.client import ContainerCloudClient
from prefect_rollout.platforms.container_cloud.exchange import PathTable
from prefect_rollout.platforms.container_cloud.signing import StarkHmacSigner
from prefect_rollout.platforms.port import Platform
from prefect_rollout.release.workload import Applied, Change, Revision, Workload

URL = "https://cloud.example"
API = f"{URL}/openapi/v1"
HOME = Workload(app_id=3290, app="qapm", id=7, name="qapm-home")
SIGNER = StarkHmacSigner(key_id="key", secret_key="s3cret", env="prod")


def client(**options: Any) -> ContainerCloudClient:
    return ContainerCloudClient(exchange.Exchange(URL, signer=SIGNER, **options))


def change(revision: int) -> Change:
    return Change(base=revision, images={}, revision=revision)


def answering(response: httpx.Response) -> ContainerCloudClient:
    return client(transport=httpx.MockTransport(lambda _: response))


def data(value: object) -> httpx.Response:
    return httpx.Response(200, json={"data": value})


def page(items: list[Any] | None, number: int = 1, total: int | None = 1) -> httpx.Response:
    return data({"pageNo": number, "pageSize": 100, "totalPage": total, "list": items})


def refusal(
    status: int, sub_code: int = 0, msg: str = "", headers: dict[str, str] | None = None
) -> httpx.Response:
    body = {"code": status, "subCode": sub_code, "msg": msg, "requestId": "r-1"}
    return httpx.Response(status, json=body, headers=headers)


def httpx_exceptions() -> list[type[Exception]]:
    named = [getattr(httpx, name) for name in httpx.__all__]
    return [kind for kind in named if isinstance(kind, type) and issubclass(kind, Exception)]


def raised(kind: type[Exception]) -> Exception:
    request = httpx.Request("GET", URL)
    if kind is httpx.HTTPStatusError:
        return httpx.HTTPStatusError("x", request=request, response=httpx.Response(500))
    try:
        return kind("x")
    except TypeError:
        return kind()


def test_the_client_is_a_platform() -> None:
    assert isinstance(client(), Platform)


@pytest.mark.parametrize("kind", httpx_exceptions())
async def test_no_exception_of_httpx_leaks(kind: type[Exception]) -> None:
    def fail(_: httpx.Request) -> httpx.Response:
        raise raised(kind)

    async with client(transport=httpx.MockTransport(fail)) as cloud:
        with pytest.raises(RolloutError) as caught:
            await cloud.app(1)
        assert isinstance(caught.value.__cause__, kind)


@pytest.mark.parametrize(
    "kind",
    [httpx.ConnectError, httpx.ReadError, httpx.WriteError, httpx.ReadTimeout, httpx.RemoteProtocolError],
)
async def test_no_answer_is_worth_another_try(kind: type[Exception]) -> None:
    def fail(_: httpx.Request) -> httpx.Response:
        raise kind("x")

    async with client(transport=httpx.MockTransport(fail)) as cloud:
        with pytest.raises(UnreachableError) as caught:
            await cloud.apply(HOME, "c", change(1), replicas=1, over=None, key="k")
    assert caught.value.retryable
    assert caught.value.data["cluster"] == "c"


async def test_an_untrusted_certificate_is_a_matter_of_configuration() -> None:
    def fail(_: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("x") from ssl.SSLCertVerificationError("self-signed certificate")

    async with client(transport=httpx.MockTransport(fail)) as cloud:
        with pytest.raises(ConfigurationError, match="ca_file") as caught:
            await cloud.app(1)
    assert not caught.value.retryable


@pytest.mark.parametrize(
    ("response", "kind", "retryable"),
    [
        (refusal(400), RejectedError, False),
        (refusal(401, 401003), AuthenticationError, False),
        (refusal(403), AccessDeniedError, False),
        (refusal(403, 403001), QuotaExceededError, False),
        (refusal(404), NotFoundError, False),
        (refusal(409, 409001), ConflictError, True),
        (refusal(409, 409002), ConflictError, False),
        (refusal(418), RejectedError, False),
        (refusal(429), OverloadedError, True),
        (refusal(503), OverloadedError, True),
        (refusal(500), ServerFaultError, True),
        (refusal(502), ServerFaultError, True),
        (refusal(504), ServerFaultError, True),
        (refusal(501), ServerFaultError, False),
        (httpx.Response(500), ServerFaultError, True),
        (httpx.Response(502, html="<html>Bad Gateway</html>"), ServerFaultError, True),
        (httpx.Response(401, text="token is invalid"), AuthenticationError, False),
        (httpx.Response(200, json={"code": 500, "msg": "x"}), ServerFaultError, True),
        (httpx.Response(302, headers={"Location": "/login"}), UnusableAnswerError, False),
        (httpx.Response(200), UnusableAnswerError, True),
        (httpx.Response(200, html="<html>Please log in</html>"), UnusableAnswerError, True),
        (httpx.Response(200, content=b'{"data": {"id": 1, "na'), UnusableAnswerError, True),
        (httpx.Response(200, content=b"\xff\xfe"), UnusableAnswerError, True),
        (httpx.Response(200, content=b"[" * 10_000 + b"]" * 10_000), UnusableAnswerError, True),
        (httpx.Response(200, json={}), UnusableAnswerError, False),
        (httpx.Response(200, json=[]), UnusableAnswerError, False),
        (httpx.Response(200, json={"data": None}), UnusableAnswerError, False),
        (httpx.Response(200, json={"data": {"id": [], "name": "x"}}), UnusableAnswerError, False),
        (httpx.Response(403, json={"subCode": "403001", "requestId": 7}), QuotaExceededError, False),
        (
            httpx.Response(200, headers={"Content-Encoding": "gzip"}, content=gzip.compress(b"{}")),
            UnusableAnswerError,
            True,
        ),
    ],
)
async def test_an_answer_becomes_the_error_that_the_contract_names(
    response: httpx.Response, kind: type[RolloutError], retryable: bool
) -> None:
    async with answering(response) as cloud:
        with pytest.raises(kind) as caught:
            await cloud.app(1)
    assert caught.value.retryable is retryable
    if response.status_code >= 400:
        assert caught.value.data["status"] == response.status_code


async def test_a_refusal_keeps_the_clouds_chinese_words_and_its_request_id() -> None:
    async with answering(refusal(403, 403001, "配额不足，请联系管理员")) as cloud:
        with pytest.raises(QuotaExceededError, match="配额不足，请联系管理员") as caught:
            await cloud.apply(HOME, "pub-bjwdt", change(1), replicas=1, over=None, key="k")
    assert caught.value.data == {
        "status": 403,
        "code": 403001,
        "request_id": "r-1",
        "cluster": "pub-bjwdt",
    }


async def test_a_skewed_clock_is_told_apart_from_a_wrong_key() -> None:
    async with answering(refusal(401, 401004, "时钟偏差")) as cloud:
        with pytest.raises(AuthenticationError, match=r"时钟偏差.*clock"):
            await cloud.app(1)


async def test_retry_after_is_kept_in_seconds_and_as_a_date() -> None:
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=90), usegmt=True)
    cases: list[tuple[str, Callable[[float | None], bool]]] = [
        ("7", lambda seconds: seconds == 7),
        (later, lambda seconds: seconds is not None and 60 < seconds <= 90),
        ("Wed, 21 Oct 2015 07:28:00 GMT", lambda seconds: seconds == 0),
        ("soon", lambda seconds: seconds is None),
        ("-5", lambda seconds: seconds is None),
        ("Mon, 01 Jan 2024 00:00:00 +99999999999999", lambda seconds: seconds is None),
    ]
    for header, expected in cases:
        async with answering(refusal(503, headers={"Retry-After": header})) as cloud:
            with pytest.raises(OverloadedError) as caught:
                await cloud.app(1)
        assert expected(caught.value.retry_after), header


@pytest.mark.parametrize(
    ("app_id", "path"),
    [
        ("a/b", b"/openapi/v1/apps/a%2Fb"),
        ("../..", b"/openapi/v1/apps/..%2F.."),
        ("%2e", b"/openapi/v1/apps/%252e"),
        ("3290?x=1", b"/openapi/v1/apps/3290%3Fx%3D1"),
        ("a#b c", b"/openapi/v1/apps/a%23b%20c"),
        ("🚀", b"/openapi/v1/apps/%F0%9F%9A%80"),
    ],
)
async def test_an_id_never_leaves_its_segment(app_id: str, path: bytes) -> None:
    seen = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request.url.raw_path)
        return refusal(404)

    async with client(transport=httpx.MockTransport(answer)) as cloud:
        with pytest.raises(AppNotFoundError):
            await cloud.app(app_id)
    assert seen == [path]


@pytest.mark.parametrize("app_id", ["", ".", "..", "x" * 10_000, "a\x00b"])
async def test_an_id_that_cannot_be_a_segment_is_not_sent(app_id: str) -> None:
    async with client(transport=httpx.MockTransport(lambda _: pytest.fail("sent"))) as cloud:
        with pytest.raises(InputError, match="app_id"):
            await cloud.app(app_id)


@respx.mock
async def test_every_page_is_followed_to_the_last() -> None:
    route = respx.get(f"{API}/apps/3290/deployments/tpls").mock(
        side_effect=lambda request: page(
            [{"id": int(request.url.params["pageNo"]) * 10}], int(request.url.params["pageNo"]), 3
        )
    )
    async with client() as cloud:
        ids = [revision.id for revision in await cloud.revisions(HOME)]
    assert ids == [30, 20, 10]  # newest first, in whatever order they come
    assert dict(route.calls.last.request.url.params) == {
        "deploymentId": "7",
        "sortby": "-id",
        "pageNo": "3",
        "pageSize": "100",
    }


@pytest.mark.parametrize("items", [None, []])
async def test_an_empty_list_may_be_null(items: list[Any] | None) -> None:
    async with answering(page(items)) as cloud:
        assert await cloud.revisions(HOME) == []


async def test_pages_without_a_total_end_at_the_first_empty_one() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        number = int(request.url.params["pageNo"])
        return page([{"id": number}] if number < 3 else None, number, None)

    async with client(transport=httpx.MockTransport(answer)) as cloud:
        assert [revision.id for revision in await cloud.revisions(HOME)] == [2, 1]


async def test_pages_without_end_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "MAX_PAGES", 5)
    async with answering(page([{"id": 1}], 1, 10**9)) as cloud:
        with pytest.raises(UnusableAnswerError, match="does not end"):
            await cloud.revisions(HOME)


async def test_a_deployment_is_found_by_its_exact_name_or_near_names_are_listed() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path.endswith("/3290"):
            return data({"id": 3290, "name": "qapm"})
        # A cloud whose filter means "contains".
        return page(
            [{"id": 1, "name": "qapm-home-beta"}, {"id": 2, "name": "qapm-home"}, {"id": 3, "name": "zzz"}]
        )

    async with client(transport=httpx.MockTransport(answer)) as cloud:
        found = await cloud.workload(3290, "qapm-home")
        assert (found.id, found.name, found.app_id, found.app) == (2, "qapm-home", 3290, "qapm")
        with pytest.raises(DeploymentNotFoundError) as caught:
            await cloud.workload(3290, "qapm-hom")
    assert caught.value.data["known"] == ["qapm-home", "qapm-home-beta", "zzz"]


async def test_an_app_that_answers_under_another_id_is_not_the_app() -> None:
    async with answering(data({"id": 3290, "name": "qapm"})) as cloud:
        assert (await cloud.app("3290")).name == "qapm"
        with pytest.raises(AppNotFoundError):
            await cloud.app("03290")


async def test_an_unknown_template_is_named() -> None:
    async with answering(refusal(404)) as cloud:
        with pytest.raises(TemplateNotFoundError, match="'99'"):
            await cloud.revision(HOME, 99)


STATUS_A = {"cluster": "a", "pods": [{"name": "p", "state": "Running"}]}


@respx.mock
async def test_clusters_are_asked_for_in_one_call_joined_by_commas() -> None:
    route = respx.get(f"{API}/apps/3290/deployments/7/status").mock(
        return_value=data([STATUS_A, {"cluster": "b"}])
    )
    async with client() as cloud:
        found = await cloud.status(HOME, ["a", "b"])
    assert list(found) == ["a", "b"]
    assert route.call_count == 1
    assert route.calls.last.request.url.query == b"cluster=a%2Cb"


async def test_pods_are_never_credited_to_a_cluster_by_guess() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        clusters = request.url.params["cluster"].split(",")
        return data([{"pods": [{"name": f"pod-of-{name}", "state": "Running"}]} for name in clusters])

    async with client(transport=httpx.MockTransport(answer)) as cloud:
        found = await cloud.status(HOME, ["a", "b"])
    assert {name: [pod.name for pod in status.pods or []] for name, status in found.items()} == {
        "a": ["pod-of-a"],
        "b": ["pod-of-b"],
    }


@pytest.mark.parametrize("answer", [None, [], [None], [{"cluster": "elsewhere", "pods": []}]])
async def test_a_status_that_says_nothing_of_the_cluster_is_absent(answer: object) -> None:
    async with answering(data(answer)) as cloud:
        assert await cloud.status(HOME, ["a"]) == {}


@respx.mock
async def test_writes_carry_the_contracts_bodies_and_keys() -> None:
    upgrade = respx.post(f"{API}/apps/3290/deployments/7/upgrade").mock(
        return_value=data({"templateIds": [9]})
    )
    publish = respx.post(f"{API}/apps/3290/deployments/7/tpls/9/clusters/pub%2Fa").mock(
        return_value=data("ok")
    )
    restart = respx.post(f"{API}/apps/3290/deployments/7/clusters/a/restart").mock(return_value=data("ok"))
    scale = respx.post(f"{API}/apps/3290/deployments/7/clusters/a/scale").mock(return_value=data("ok"))
    async with client() as cloud:
        created = await cloud.prepare(
            HOME,
            Revision(id=8),
            {"web": "r/w:1"},
            clusters=["a"],
            release_id="x",
            note="发布",
            requested_by="ada",
            key="x:upgrade",
        )
        assert await cloud.apply(HOME, "pub/a", created, replicas=2, over=8, key="x:publish:集群") == Applied(
            revision=9
        )
        assert await cloud.restart(HOME, "a", online=9, key="x:restart:a") == Applied(revision=9)
        assert await cloud.scale(HOME, "a", 3, online=9, key="x:scale:a") == Applied(revision=9)
    assert created == Change(base=8, images={"web": "r/w:1"}, revision=9)
    sent = upgrade.calls.last.request
    assert json.loads(sent.content) == {
        "templateId": 8,
        "clusters": ["a"],
        "images": {"web": "r/w:1"},
        "description": "发布 release=x",
    }
    assert sent.headers["Idempotency-Key"] == "x:upgrade"
    assert publish.calls.last.request.headers["Idempotency-Key"] == "x:publish:%E9%9B%86%E7%BE%A4"
    assert json.loads(publish.calls.last.request.content) == {"replicas": 2}
    assert restart.called
    assert json.loads(scale.calls.last.request.content) == {"replicas": 3}


@pytest.mark.parametrize("created", [None, [], [9, 10]])
async def test_an_upgrade_that_does_not_create_one_template_is_an_error(created: list[int] | None) -> None:
    async with answering(data({"templateIds": created})) as cloud:
        with pytest.raises(UpgradeError) as caught:
            await cloud.prepare(
                HOME,
                Revision(id=8),
                {},
                clusters=["a"],
                release_id="x",
                note="",
                requested_by="ada",
                key="x:upgrade",
            )
    assert caught.value.data["template_ids"] == (created or [])


async def test_a_change_is_found_again_by_the_release_in_its_description() -> None:
    marked = [{"id": 9, "description": "发布 release=x"}, {"id": 8, "description": "release=xy"}, {"id": 7}]
    async with answering(page(marked)) as cloud:
        found = await cloud.prepared(HOME, "x")
        assert found is not None
        assert found.revision == 9
        assert await cloud.prepared(HOME, "y") is None
        assert [revision.made_by for revision in await cloud.revisions(HOME)] == ["x", "xy", None]
    async with answering(page([*marked, {"id": 10, "description": "release=x"}])) as cloud:
        with pytest.raises(UpgradeError, match="9, 10"):
            await cloud.prepared(HOME, "x")


@pytest.mark.parametrize(
    ("deployment_id", "listed", "owned"),
    [(7, [], True), ("7", [], True), (8, [9], False), (None, [9], True), (None, [8], False)],
)
async def test_a_revision_of_another_deployment_is_refused(
    deployment_id: int | str | None, listed: list[int], owned: bool
) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path.endswith("/tpls/9"):
            return data({"id": 9, "deploymentId": deployment_id})
        return page([{"id": each} for each in listed])

    async with client(transport=httpx.MockTransport(answer)) as cloud:
        if owned:
            assert (await cloud.revision(HOME, 9)).id == 9
        else:
            with pytest.raises(ForeignTemplateError, match="template 9 does not belong to qapm-home"):
                await cloud.revision(HOME, 9)


async def test_only_accepted_writes_count_as_published() -> None:
    entries = [
        {"templateId": 9, "cluster": "a", "status": 0},
        {"templateId": 8, "cluster": "a", "status": 1},
        {"templateId": 7, "cluster": "b"},
        {"templateId": "6", "cluster": "b", "status": 1},
    ]
    async with answering(page(entries)) as cloud:
        assert [entry async for entry in cloud.published(HOME)] == [("a", 8), ("b", "6")]


@respx.mock
async def test_paths_can_be_replaced_one_by_one() -> None:
    respx.get(f"{URL}/v2/application/1").mock(return_value=data({"id": 1, "name": "x"}))
    async with client(paths=PathTable(app="/v2/application/{app_id}")) as cloud:
        assert (await cloud.app(1)).name == "x"


@pytest.mark.parametrize(
    "path", ["apps/{app_id}", "/apps/{other}", "/a?b={app_id}", "/{app_id.__class__}", "/{", "/é"]
)
def test_a_path_that_cannot_work_is_refused(path: str) -> None:
    with pytest.raises(ValidationError):
        PathTable(app=path)


class Dripping(httpx.AsyncByteStream):
    """A body without end: `size` bytes every `seconds`."""

    def __init__(self, size: int, seconds: float) -> None:
        self.size, self.seconds = size, seconds

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while True:
            yield b"x" * self.size
            await asyncio.sleep(self.seconds)


async def test_an_answer_without_end_is_cut_at_a_size() -> None:
    async with answering(httpx.Response(200, stream=Dripping(1024 * 1024, 0))) as cloud:
        with pytest.raises(UnusableAnswerError, match="longer than 32 MiB"):
            await cloud.app(1)


async def test_an_answer_that_drips_is_cut_at_a_time() -> None:
    stream = Dripping(1, 0.01)
    transport = httpx.MockTransport(lambda _: httpx.Response(200, stream=stream))
    async with client(transport=transport, request_timeout_seconds=0.1) as cloud:
        with pytest.raises(UnreachableError, match="in time"):
            await cloud.app(1)


@pytest.mark.parametrize("content", [None, "not a certificate"])
def test_a_ca_file_that_cannot_be_read_is_refused_at_once(tmp_path: Path, content: str | None) -> None:
    file = tmp_path / "ca.pem"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigurationError, match="ca_file"):
        client(ca_file=file)


@respx.mock
async def test_an_error_whose_causes_lead_back_to_it_is_reported() -> None:
    error = httpx.ConnectError("connection refused")
    error.__cause__ = OSError("refused")
    error.__cause__.__context__ = error
    respx.get(f"{API}/apps/3290").mock(side_effect=error)
    async with client() as cloud:
        with pytest.raises(UnreachableError, match="connection refused"):
            await cloud.workload(3290, "web")
