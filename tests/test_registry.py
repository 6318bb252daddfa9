import base64
import ssl
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import httpx
import pytest
import respx

from prefect_rollout.errors import ConfigurationError, RolloutError
from prefect_rollout.platforms.http import untrusted
from prefect_rollout.platforms.registry import client as client_module
from prefect_rollout.platforms.registry.client import RegistryClient
from prefect_rollout.platforms.registry.credentials import Credentials
from prefect_rollout.release.image_errors import (
    ImageNotFoundError,
    RegistryAccessError,
    RegistryError,
    RegistryLimitError,
    RegistryUnreachableError,
    UnsuitableImageError,
)
from prefect_rollout.release.image_facts import NodePlatform, pin_digest
from tiny_images import MANIFEST, TinyImage, image, index, written

WEB = "registry.example/shop/web"
BASE = "https://registry.example/v2/shop/web"
KEY = Credentials("robot", "s3cret", source="the block image-registry/shop")


@pytest.fixture
async def client() -> AsyncIterator[RegistryClient]:
    async with RegistryClient("registry.example") as opened:
        yield opened


@pytest.fixture
async def robot() -> AsyncIterator[RegistryClient]:
    async with RegistryClient("registry.example", credentials=KEY) as opened:
        yield opened


def serve(router: respx.MockRouter, tag: str, made: TinyImage, base: str = BASE) -> None:
    """Answer for `made` under `tag`, as a registry does."""
    for manifest in made.manifests:
        names = {manifest.digest, tag} if manifest is made.manifests[0] else {manifest.digest}
        headers = {"Content-Type": manifest.media_type, "Docker-Content-Digest": manifest.digest}
        for name in names:
            router.get(f"{base}/manifests/{name}").respond(content=manifest.content, headers=headers)
            router.head(f"{base}/manifests/{name}").respond(headers=headers)
    for blob in made.blobs:
        router.get(f"{base}/blobs/{blob.digest}").respond(content=blob.content)


# ---- images -------------------------------------------------------------------------------------


async def test_an_image_is_told_with_digest_platform_time_and_size(
    client: RegistryClient, respx_mock: respx.MockRouter
) -> None:
    made = image()
    serve(respx_mock, "1.2", made)
    respx_mock.head(f"{BASE}/manifests/{made.digest}").pass_through()
    found = await client.image(f"{WEB}:1.2")
    assert (found.image, found.digest, found.platform) == (f"{WEB}:1.2", made.digest, "linux/amd64")
    assert found.created == datetime(2026, 11, 20, 10, tzinfo=UTC)
    assert found.size == made.size
    assert found.days_old(datetime(2026, 11, 27, 9, tzinfo=UTC)) == 6
    assert "application/vnd.oci.image.index.v1+json" in respx_mock.calls[0].request.headers["Accept"]


@pytest.mark.parametrize("created", [None, "1970-01-01T00:00:00Z", "yesterday"])
async def test_a_time_of_build_that_is_not_recorded_is_unknown(
    client: RegistryClient, respx_mock: respx.MockRouter, created: str | None
) -> None:
    serve(respx_mock, "1.2", image(created=created))
    found = await client.image(f"{WEB}:1.2")
    assert (found.created, found.days_old(datetime.now(UTC))) == (None, None)


async def test_an_index_leads_to_the_image_of_the_nodes_platform_and_keeps_its_own_digest(
    client: RegistryClient, respx_mock: respx.MockRouter
) -> None:
    made = index("linux/amd64", "linux/arm64/v8")
    serve(respx_mock, "1.2", made)
    found = await client.image(f"{WEB}:1.2", "linux/arm64")
    assert (found.digest, found.platform) == (made.digest, "linux/arm64")
    assert made.manifests[2].digest in str(respx_mock.calls[1].request.url)


@pytest.mark.parametrize("made", [image("linux/arm64"), index("linux/arm64", "windows/amd64")])
async def test_an_image_without_the_nodes_platform_is_refused_with_those_that_it_has(
    client: RegistryClient, respx_mock: respx.MockRouter, made: TinyImage
) -> None:
    serve(respx_mock, "1.2", made)
    with pytest.raises(
        UnsuitableImageError, match=r"not built for linux/amd64: its platforms are linux/arm64"
    ):
        await client.image(f"{WEB}:1.2")


@pytest.mark.parametrize(
    ("built", "nodes", "runs"),
    [
        ("linux/arm64/v8", "linux/arm64", True),
        ("linux/arm64", "linux/arm64/v8", True),
        ("linux/aarch64", "linux/arm64", True),
        ("linux/arm/v6", "linux/arm/v7", True),
        ("linux/arm/v6", "linux/arm", True),
        ("linux/arm/v7", "linux/arm/v6", False),
        ("linux/amd64/v3", "linux/amd64", True),
        ("linux/amd64/v3", "linux/amd64/v2", False),
        ("windows/amd64", "linux/amd64", False),
    ],
)
async def test_variants_run_as_containerd_runs_them(
    client: RegistryClient, respx_mock: respx.MockRouter, built: str, nodes: str, runs: bool
) -> None:
    serve(respx_mock, "1", image(built))
    if runs:
        assert (await client.image(f"{WEB}:1", nodes)).platform == str(NodePlatform.parse(nodes))
    else:
        with pytest.raises(UnsuitableImageError):
            await client.image(f"{WEB}:1", nodes)


async def test_a_helm_chart_is_no_image(client: RegistryClient, respx_mock: respx.MockRouter) -> None:
    config = written("application/vnd.cncf.helm.config.v1+json", {})
    chart = written(MANIFEST, {"schemaVersion": 2, "config": config.descriptor(), "layers": []})
    serve(respx_mock, "1", TinyImage([chart], [config]))
    with pytest.raises(UnsuitableImageError, match=r"is no container image, but application/vnd\.cncf\.helm"):
        await client.image(f"{WEB}:1")


async def test_names_of_docker_hub_are_looked_up_there(respx_mock: respx.MockRouter) -> None:
    made = image()
    serve(respx_mock, "latest", made, "https://registry-1.docker.io/v2/library/nginx")
    async with RegistryClient("docker.io") as hub:
        assert (await hub.image("nginx")).digest == made.digest


async def test_the_digest_of_a_tag_costs_one_head_request(
    client: RegistryClient, respx_mock: respx.MockRouter
) -> None:
    made = image()
    headers = {"Docker-Content-Digest": made.digest}
    respx_mock.head(f"{BASE}/manifests/1.2").respond(headers=headers)
    assert await client.digest(f"{WEB}:1.2") == made.digest


async def test_a_registry_that_names_no_digest_is_asked_for_the_content(
    client: RegistryClient, respx_mock: respx.MockRouter
) -> None:
    made = image()
    respx_mock.head(f"{BASE}/manifests/1.2").respond()
    respx_mock.get(f"{BASE}/manifests/1.2").respond(content=made.manifests[0].content)
    assert await client.digest(f"{WEB}:1.2") == made.digest


async def test_content_of_another_digest_is_refused(
    client: RegistryClient, respx_mock: respx.MockRouter
) -> None:
    made, other = image(), image(text="other")
    respx_mock.get(f"{BASE}/manifests/{other.digest}").respond(content=made.manifests[0].content)
    with pytest.raises(RegistryError, match="content of another digest"):
        await client.image(f"{WEB}@{other.digest}")
    config = made.blobs[0]
    respx_mock.get(f"{BASE}/manifests/1").respond(content=made.manifests[0].content)
    respx_mock.get(f"{BASE}/blobs/{config.digest}").respond(content=config.content + b" ")
    with pytest.raises(RegistryError, match="content of another digest"):
        await client.image(f"{WEB}:1")


async def test_a_blob_may_come_from_a_storage_that_gets_no_credentials(
    robot: RegistryClient, respx_mock: respx.MockRouter
) -> None:
    made = image()
    manifest, config = made.manifests[0], made.blobs[0]
    challenge = {"WWW-Authenticate": 'Basic realm="registry"'}
    respx_mock.get(f"{BASE}/manifests/1", headers={"Authorization": KEY.basic}).respond(
        content=manifest.content
    )
    respx_mock.get(f"{BASE}/manifests/1").respond(401, headers=challenge)
    respx_mock.get(f"{BASE}/blobs/{config.digest}").respond(
        307, headers={"Location": "https://storage.example/x"}
    )
    storage = respx_mock.get("https://storage.example/x").respond(content=config.content)
    assert (await robot.image(f"{WEB}:1")).digest == made.digest
    assert "Authorization" not in storage.calls.last.request.headers
    storage.respond(401, headers={"WWW-Authenticate": 'Bearer realm="https://evil.example/token"'})
    with pytest.raises(RegistryAccessError):
        await robot.image(f"{WEB}:1")


async def test_no_redirect_leads_to_plain_http(client: RegistryClient, respx_mock: respx.MockRouter) -> None:
    respx_mock.get(f"{BASE}/manifests/1").respond(307, headers={"Location": "http://storage.example/x"})
    with pytest.raises(RegistryError, match="redirects to an address without https"):
        await client.image(f"{WEB}:1")


# ---- what is missing ----------------------------------------------------------------------------


def errors(code: str, message: str = "") -> dict[str, Any]:
    return {"errors": [{"code": code, "message": message}]}


async def test_a_missing_tag_is_told_with_similar_ones(
    client: RegistryClient, respx_mock: respx.MockRouter
) -> None:
    respx_mock.get(f"{BASE}/manifests/1.22").respond(404, json=errors("MANIFEST_UNKNOWN"))
    tags = {"name": "shop/web", "tags": ["1.2", "1.21", "latest", "nightly"]}
    respx_mock.get(f"{BASE}/tags/list").respond(json=tags)
    with pytest.raises(ImageNotFoundError) as caught:
        await client.image(f"{WEB}:1.22")
    assert str(caught.value) == (f"{WEB} has no tag '1.22'. Similar tags: 1.2, 1.21. Nothing was written.")
    assert caught.value.data["known"] == ["1.2", "1.21"]
    assert caught.value.diagnosis.category == "ImagePullError"


async def test_a_missing_tag_is_told_even_if_no_tags_can_be_listed(
    client: RegistryClient, respx_mock: respx.MockRouter
) -> None:
    respx_mock.get(f"{BASE}/manifests/1.22").respond(404, json=errors("MANIFEST_UNKNOWN"))
    respx_mock.get(f"{BASE}/tags/list").respond(403, json=errors("DENIED"))
    with pytest.raises(ImageNotFoundError, match=r"has no tag '1\.22'\. Was the image built"):
        await client.image(f"{WEB}:1.22")


@pytest.mark.parametrize("at", ["manifest", "tags"])
async def test_a_missing_repository_is_not_a_missing_tag(
    client: RegistryClient, respx_mock: respx.MockRouter, at: str
) -> None:
    code = "NAME_UNKNOWN" if at == "manifest" else "MANIFEST_UNKNOWN"
    respx_mock.get(f"{BASE}/manifests/1").respond(404, json=errors(code))
    if at == "tags":
        respx_mock.get(f"{BASE}/tags/list").respond(404, json=errors("NAME_UNKNOWN"))
    with pytest.raises(ImageNotFoundError, match=r"registry\.example has no repository 'shop/web'"):
        await client.image(f"{WEB}:1")


# ---- errors -------------------------------------------------------------------------------------

REFUSALS: list[tuple[httpx.Response, type[RolloutError], str, bool]] = [
    (httpx.Response(401), RegistryAccessError, "needs credentials or does not exist", False),
    (httpx.Response(403, json=errors("DENIED", "no pull")), RegistryAccessError, "no pull", False),
    (
        httpx.Response(
            429, json=errors("TOOMANYREQUESTS", "slow"), headers={"RateLimit-Limit": "100;w=21600"}
        ),
        RegistryLimitError,
        "the rate limit of 100;w=21600 of registry.example is reached: slow",
        True,
    ),
    (httpx.Response(403, json=errors("TOOMANYREQUESTS")), RegistryLimitError, "the rate limit of", True),
    (httpx.Response(500), RegistryUnreachableError, "registry.example failed when asked for", True),
    (httpx.Response(503, text="<html>"), RegistryUnreachableError, "failed", True),
    (httpx.Response(400, json=errors("UNSUPPORTED", "no")), RegistryError, "refused .*: no", False),
    (httpx.Response(304), RegistryError, "redirect", False),
    (httpx.Response(200, text="<html>login</html>"), RegistryError, "an HTML page", False),
    (httpx.Response(200, text="[]"), RegistryError, "an unexpected answer", False),
    (httpx.Response(200, headers={"Content-Encoding": "gzip"}), RegistryError, "compressed", False),
]


@pytest.mark.parametrize(("response", "kind", "problem", "retryable"), REFUSALS)
async def test_every_refusal_has_its_error_and_a_next_step(
    client: RegistryClient,
    respx_mock: respx.MockRouter,
    response: httpx.Response,
    kind: type[RolloutError],
    problem: str,
    retryable: bool,
) -> None:
    respx_mock.get(f"{BASE}/manifests/1").mock(return_value=response)
    with pytest.raises(kind, match=problem) as caught:
        await client.image(f"{WEB}:1")
    assert type(caught.value) is kind
    assert caught.value.retryable is retryable
    assert caught.value.data["registry"] == "registry.example"
    assert caught.value.advice.endswith(".")


@pytest.mark.parametrize(
    ("cause", "kind"),
    [
        (httpx.ConnectError("refused"), RegistryUnreachableError),
        (httpx.ConnectTimeout(""), RegistryUnreachableError),
        (httpx.ReadTimeout(""), RegistryUnreachableError),
        (httpx.ReadError("reset"), RegistryUnreachableError),
        (httpx.RemoteProtocolError("broken"), RegistryUnreachableError),
        (httpx.LocalProtocolError("Illegal header value b'Basic s3cret'"), ConfigurationError),
        (TimeoutError(), RegistryUnreachableError),
    ],
)
async def test_no_exception_of_httpx_leaves_the_client(
    client: RegistryClient, respx_mock: respx.MockRouter, cause: Exception, kind: type[RolloutError]
) -> None:
    respx_mock.get(f"{BASE}/manifests/1").mock(side_effect=cause)
    with pytest.raises(kind) as caught:
        await client.image(f"{WEB}:1")
    assert "s3cret" not in str(caught.value)


def test_causes_that_lead_back_to_an_error_end() -> None:
    one, two = OSError("one"), OSError("two")
    one.__cause__, two.__context__ = two, one
    assert not untrusted(one)
    two.__cause__ = ssl.SSLCertVerificationError("self-signed")
    assert untrusted(one)


async def test_an_untrusted_certificate_names_the_field_of_the_block() -> None:
    def answer(_: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("verify failed") from ssl.SSLCertVerificationError("self-signed")

    async with RegistryClient("registry.example", transport=httpx.MockTransport(answer)) as client:
        with pytest.raises(RegistryUnreachableError, match="ca_file") as caught:
            await client.image(f"{WEB}:1")
    assert not caught.value.retryable


async def test_the_time_to_wait_is_kept(client: RegistryClient, respx_mock: respx.MockRouter) -> None:
    respx_mock.get(f"{BASE}/manifests/1").respond(429, headers={"Retry-After": "90"})
    with pytest.raises(RegistryLimitError) as caught:
        await client.image(f"{WEB}:1")
    assert caught.value.retry_after == 90


async def test_an_answer_without_end_is_cut(
    client: RegistryClient, respx_mock: respx.MockRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "MAX_BYTES", 1000)
    for status in (200, 401):
        headers = {"WWW-Authenticate": 'Bearer realm="https://auth.example/token"'}
        respx_mock.get(f"{BASE}/manifests/1").respond(status, content=b" " * 1001, headers=headers)
        with pytest.raises(RegistryError, match="longer than"):
            await client.image(f"{WEB}:1")


# ---- authentication -----------------------------------------------------------------------------

CHALLENGE = 'Bearer realm="https://auth.example/token?a=1",service="registry.example",scope="repository:shop/web:pull"'


def ask_for_tokens(router: respx.MockRouter, made: TinyImage) -> respx.Route:
    """Answer only requests that have the token T; return the route of the token server."""
    manifest = made.manifests[0]
    headers = {"Authorization": "Bearer T"}
    found = {"Docker-Content-Digest": manifest.digest}
    router.head(f"{BASE}/manifests/1", headers=headers).respond(headers=found)
    router.head(f"{BASE}/manifests/1").respond(401, headers={"WWW-Authenticate": CHALLENGE})
    return router.route(host="auth.example", path="/token").respond(json={"token": "T", "expires_in": 300})


async def test_a_token_is_fetched_once_for_a_repository(
    robot: RegistryClient, respx_mock: respx.MockRouter
) -> None:
    made = image()
    tokens = ask_for_tokens(respx_mock, made)
    assert await robot.digest(f"{WEB}:1") == await robot.digest(f"{WEB}:1") == made.digest
    assert tokens.call_count == 1
    request = tokens.calls.last.request
    assert dict(request.url.params) == {
        "a": "1",
        "service": "registry.example",
        "scope": "repository:shop/web:pull",
    }
    assert base64.b64decode(request.headers["Authorization"].removeprefix("Basic ")) == b"robot:s3cret"


async def test_what_is_public_is_read_with_an_anonymous_token(
    client: RegistryClient, respx_mock: respx.MockRouter
) -> None:
    made = image()
    tokens = ask_for_tokens(respx_mock, made)
    assert await client.digest(f"{WEB}:1") == made.digest
    assert "Authorization" not in tokens.calls.last.request.headers


async def test_a_refresh_token_of_docker_login_is_exchanged(respx_mock: respx.MockRouter) -> None:
    made = image()
    tokens = ask_for_tokens(respx_mock, made)
    tokens.respond(json={"access_token": "T"})
    known = Credentials(identity_token="refresh", source="config.json")
    async with RegistryClient("registry.example", credentials=known) as client:
        assert await client.digest(f"{WEB}:1") == made.digest
    request = tokens.calls.last.request
    assert request.method == "POST"
    assert b"refresh_token=refresh" in request.content
    tokens.respond(307, headers={"Location": "https://evil.example/"})
    async with RegistryClient("registry.example", credentials=known) as client:
        with pytest.raises(RegistryError, match=r"token server of registry\.example redirects"):
            await client.digest(f"{WEB}:1")


async def test_an_expired_token_is_renewed(robot: RegistryClient, respx_mock: respx.MockRouter) -> None:
    made = image()
    tokens = ask_for_tokens(respx_mock, made)
    await robot.digest(f"{WEB}:1")
    auth = robot._http.auth
    auth._tokens["shop/web"] = ("Bearer old", float("inf"))  # type: ignore[union-attr]
    assert await robot.digest(f"{WEB}:1") == made.digest
    assert tokens.call_count == 2


@pytest.mark.parametrize(
    ("answer", "kind", "problem"),
    [
        (
            httpx.Response(401, json={"details": "wrong s3cret"}),
            RegistryAccessError,
            r"image-registry/shop.*\*\*",
        ),
        (httpx.Response(429), RegistryLimitError, "rate limit"),
        (httpx.Response(500), RegistryUnreachableError, "failed"),
        (httpx.Response(200, json={}), RegistryError, "without a token"),
        (httpx.Response(200, json={"token": "a\nb"}), RegistryError, "without a token"),
        (httpx.Response(200, text="<html>"), RegistryError, "without a token"),
    ],
)
async def test_a_token_server_that_gives_none_is_told(
    robot: RegistryClient,
    respx_mock: respx.MockRouter,
    answer: httpx.Response,
    kind: type[RolloutError],
    problem: str,
) -> None:
    ask_for_tokens(respx_mock, image()).mock(return_value=answer)
    with pytest.raises(kind, match=problem) as caught:
        await robot.digest(f"{WEB}:1")
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("realm", ["http://auth.example/token", "auth", "", "file:///etc/passwd"])
async def test_credentials_go_to_no_token_server_without_https(
    robot: RegistryClient, respx_mock: respx.MockRouter, realm: str
) -> None:
    headers = {"WWW-Authenticate": f'Bearer realm="{realm}"'}
    respx_mock.head(f"{BASE}/manifests/1").respond(401, headers=headers)
    with pytest.raises(RegistryAccessError, match="token server without https"):
        await robot.digest(f"{WEB}:1")
    assert respx_mock.calls.call_count == 1


async def test_basic_credentials_are_sent_when_they_are_asked_for_and_from_then_on(
    robot: RegistryClient, respx_mock: respx.MockRouter
) -> None:
    made = image()
    respx_mock.head(f"{BASE}/manifests/1", headers={"Authorization": KEY.basic}).respond(
        headers={"Docker-Content-Digest": made.digest}
    )
    first = respx_mock.head(f"{BASE}/manifests/1").respond(
        401, headers={"WWW-Authenticate": 'Basic realm="r"'}
    )
    for _ in range(2):
        assert await robot.digest(f"{WEB}:1") == made.digest
    assert first.call_count == 1


async def test_wrong_basic_credentials_are_told_with_their_source(
    robot: RegistryClient, respx_mock: respx.MockRouter
) -> None:
    respx_mock.get(f"{BASE}/manifests/1").respond(401, headers={"WWW-Authenticate": 'Basic realm="r"'})
    with pytest.raises(
        RegistryAccessError, match="does not accept the credentials of the block image-registry/shop"
    ):
        await robot.image(f"{WEB}:1")
    assert respx_mock.calls.call_count == 2


def test_credentials_are_never_printed() -> None:
    assert "s3cret" not in repr(KEY) + str(KEY) + f"{KEY}"


# ---- tags ---------------------------------------------------------------------------------------


async def test_tags_are_read_page_by_page(client: RegistryClient, respx_mock: respx.MockRouter) -> None:
    second = {"Link": '</v2/shop/web/tags/list?last=1.1&n=500>; rel="next"'}
    respx_mock.get(f"{BASE}/tags/list", params={"last": "1.1"}).respond(json={"tags": ["1.1", "1.2"]})
    respx_mock.get(f"{BASE}/tags/list", params={"n": "500"}).respond(
        json={"tags": ["1.0", "1.1"]}, headers=second
    )
    assert await client.tags("shop/web") == ["1.0", "1.1", "1.2"]
    assert await client.tags("shop/web", limit=2) == ["1.0", "1.1"]


async def test_a_repository_may_have_no_tags(client: RegistryClient, respx_mock: respx.MockRouter) -> None:
    respx_mock.get(f"{BASE}/tags/list").respond(json={"name": "shop/web", "tags": None})
    assert await client.tags("shop/web") == []


@pytest.mark.parametrize(
    ("link", "problem"),
    [
        ("https://evil.example/v2/shop/web/tags/list?n=500", "at another address"),
        ("/v2/shop/web/tags/list?n=500", "repeats a page"),
    ],
)
async def test_pages_that_lead_away_or_nowhere_are_refused(
    robot: RegistryClient, respx_mock: respx.MockRouter, link: str, problem: str
) -> None:
    headers = {"Link": f'<{link}>; rel="next"'}
    respx_mock.get(f"{BASE}/tags/list").respond(json={"tags": ["1"]}, headers=headers)
    with pytest.raises(RegistryError, match=problem):
        await robot.tags("shop/web")


async def test_a_list_without_end_is_refused(
    client: RegistryClient, respx_mock: respx.MockRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "MAX_TAGS", 2)
    respx_mock.get(f"{BASE}/tags/list").respond(json={"tags": ["1", "2", "3"]})
    with pytest.raises(RegistryError, match="more than 2 tags"):
        await client.tags("shop/web")


# ---- pins ---------------------------------------------------------------------------------------

DIGEST, OTHER = f"sha256:{'a' * 64}", f"sha256:{'b' * 64}"


@pytest.mark.parametrize(
    ("given", "pinned"),
    [
        (f"{WEB}:1.2", f"{WEB}:1.2@{DIGEST}"),
        (WEB, f"{WEB}@{DIGEST}"),
        ("nginx", f"nginx@{DIGEST}"),
        (f"{WEB}@{DIGEST}", f"{WEB}@{DIGEST}"),
        (f"{WEB}:1@{DIGEST}", f"{WEB}:1@{DIGEST}"),
        ("registry.example:5000/web", f"registry.example:5000/web@{DIGEST}"),
    ],
)
def test_a_pinned_image_keeps_its_name_and_tag(given: str, pinned: str) -> None:
    assert pin_digest(given, DIGEST) == pinned


@pytest.mark.parametrize(
    ("given", "digest"), [(f"{WEB}@{OTHER}", DIGEST), (WEB, "sha256:1"), (WEB, ""), ("", DIGEST)]
)
def test_what_cannot_be_pinned_is_refused(given: str, digest: str) -> None:
    with pytest.raises(ValueError, match=r"digest|reference"):
        pin_digest(given, digest)


@pytest.mark.parametrize("text", ["", "linux", "linux/", "linux/arm/v7/x", "linux amd64", "/amd64"])
def test_what_is_no_platform_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="linux/amd64"):
        NodePlatform.parse(text)
