"""The client of 360's container cloud: its paths, envelope, pages and errors, behind the port.

Every path, header and field name of that cloud stands in this module and in `signing`. Sources: the
Open API contract, whose [X] paths an installation replaces through the path table.
"""

import asyncio
import difflib
import re
import ssl
import traceback
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cache
from ipaddress import ip_address
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Self, TypeVar
from urllib.parse import quote, urlencode

import httpx
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator
from pydantic_core import from_json, to_json

from prefect_rollout.errors import (
    AccessDeniedError,
    AppNotFoundError,
    AuthenticationError,
    ConfigurationError,
    ConflictError,
    DeploymentNotFoundError,
    InputError,
    NotFoundError,
    OverloadedError,
    PlatformError,
    QuotaExceededError,
    RejectedError,
    RolloutError,
    ServerFaultError,
    TemplateNotFoundError,
    UnreachableError,
    UnusableAnswerError,
)
from prefect_rollout.models import (
    App,
    ClusterStatus,
    Deployment,
    Id,
    OnlineTemplate,
    Payload,
    Publication,
    Template,
    first_mistake,
    same_id,
    usable_id,
)
from prefect_rollout.text import address, masked, one_line, with_scheme

T = TypeVar("T")
PayloadT = TypeVar("PayloadT", bound=Payload)

PAGE_SIZE = 100  # the most that the contract allows
MAX_PAGES = 1000
MAX_BODY_BYTES = 32 * 1024 * 1024


class PathTable(BaseModel):
    """The cloud's paths below `api_url`, by call. `{…}` stand for percent-encoded ids."""

    model_config = ConfigDict(extra="forbid")

    app: str = "/openapi/v1/apps/{app_id}"
    deployments: str = "/openapi/v1/apps/{app_id}/deployments"
    templates: str = "/openapi/v1/apps/{app_id}/deployments/tpls"
    template: str = "/openapi/v1/apps/{app_id}/deployments/tpls/{template_id}"
    upgrade: str = "/openapi/v1/apps/{app_id}/deployments/{deployment_id}/upgrade"
    publish: str = (
        "/openapi/v1/apps/{app_id}/deployments/{deployment_id}/tpls/{template_id}/clusters/{cluster}"
    )
    status: str = "/openapi/v1/apps/{app_id}/deployments/{deployment_id}/status"
    online: str = "/openapi/v1/publishstatus"
    history: str = "/openapi/v1/publish/histories"
    restart: str = "/openapi/v1/apps/{app_id}/deployments/{deployment_id}/clusters/{cluster}/restart"
    scale: str = "/openapi/v1/apps/{app_id}/deployments/{deployment_id}/clusters/{cluster}/scale"

    @field_validator("*")
    @classmethod
    def _known_places(cls, path: str) -> str:
        places = {"app_id": "1", "deployment_id": "1", "template_id": "1", "cluster": "c"}
        try:
            filled = path.format(**places)
        except (KeyError, IndexError, ValueError, AttributeError) as error:
            raise ValueError(
                f"{path!r} may hold {', '.join('{' + place + '}' for place in places)} only"
            ) from error
        if not re.fullmatch(r"/[\w./~%:@!$&'()*+,;=-]*", filled, re.ASCII):
            raise ValueError(f"{path!r} must start with / and hold neither ? nor #, percent-encoded")
        return path


def cloud_identity(api_url: str) -> str:
    """Return the host and port of an address, the same however it is written.

    Case, a final dot, the default port, the ways to write an IP address and to name this machine make no
    other cloud. Two names of the same host do: no one asks the DNS.
    """
    try:
        url = httpx.URL(api_url)
    except httpx.InvalidURL:
        return api_url
    if not (host := url.raw_host.decode("ascii").rstrip(".")):
        return api_url
    with suppress(ValueError):
        ip = ip_address(host)
        ip = getattr(ip, "ipv4_mapped", None) or ip
        host = "localhost" if ip.is_loopback else f"[{ip}]" if ip.version == 6 else str(ip)
    return host if url.port is None else f"{host}:{url.port}"


class ContainerCloudClient:
    """The container cloud behind the `Platform` port, over one pool of connections.

    Nothing is retried here, nothing of httpx, json or pydantic is raised. Each exchange ends within
    `request_timeout_seconds`, each answer within `MAX_BODY_BYTES`.

    Args:
        api_url: scheme, host and an optional path before the path table's.
        signer: signs each request as it is sent.
        secrets: never shown, should the cloud say them in an error.
        paths: where the calls are.
        ca_file: certificates to trust instead of the system's; a PEM file.
        registry_url: the image registry, for `links` alone.
        connect_timeout_seconds: for a connection to be made.
        request_timeout_seconds: for a whole exchange, from the request to the answer's last byte.
        transport: replaces the network, for tests of other clients' handling.

    Raises:
        ConfigurationError: `api_url` or `ca_file` cannot be used.
    """

    def __init__(
        self,
        api_url: str,
        *,
        signer: httpx.Auth,
        secrets: Sequence[str] = (),
        paths: PathTable | None = None,
        ca_file: Path | None = None,
        registry_url: str | None = None,
        connect_timeout_seconds: float = 5,
        request_timeout_seconds: float = 30,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._base = api_url.rstrip("/")
        self._paths = paths or PathTable()
        self._registry_url = registry_url
        self._secrets = tuple(secrets)
        self._seconds = request_timeout_seconds
        with _as_ours("connect"):
            self._http = httpx.AsyncClient(
                auth=signer,
                verify=_trust(ca_file),
                timeout=httpx.Timeout(request_timeout_seconds, connect=connect_timeout_seconds),
                # A redirect would carry the signature to wherever it points.
                follow_redirects=False,
                event_hooks={"request": [_sendable]},
                # Compression would let a small answer grow without bound while it is read.
                headers={"Accept": "application/json", "Accept-Encoding": "identity"},
                limits=httpx.Limits(max_connections=50, max_keepalive_connections=20),
                transport=transport,
            )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    @property
    def identity(self) -> str:
        return cloud_identity(self._base)

    def links(self) -> dict[str, str]:
        links = {"Container cloud": address(self._base)}
        if self._registry_url:
            links["Image registry"] = address(with_scheme(self._registry_url))
        return links

    # ---- reads ------------------------------------------------------------------------------

    async def app(self, app_id: Id) -> App:
        try:
            app = _read(App, await self._call("app", {"app_id": app_id}))
        except NotFoundError as error:
            raise AppNotFoundError.named(app_id, app_id=app_id, **error.data) from error
        if not same_id(app.id, app_id):
            raise AppNotFoundError.named(app_id, [str(app.id)], app_id=app_id)
        return app

    async def deployment(self, app_id: Id, name: str) -> Deployment:
        places = {"app_id": app_id}
        async for deployment in self._pages(
            Deployment, "deployments", places, {"filter": f"name__exact={name}"}
        ):
            if deployment.name == name and same_id(deployment.app_id or app_id, app_id):
                return deployment.model_copy(update={"app_id": deployment.app_id or app_id})
        names = [other.name async for other in self._pages(Deployment, "deployments", places, {})]
        near = difflib.get_close_matches(name, names, n=10, cutoff=0.4)
        others = sorted(set(names) - set(near))
        raise DeploymentNotFoundError.named(
            name, [*near, *others][:20], f"in app {one_line(app_id, 80)}", app_id=app_id
        )

    def templates(self, deployment: Deployment) -> AsyncIterator[Template]:
        query = {"deploymentId": str(deployment.id), "sortby": "-id"}
        return self._pages(Template, "templates", {"app_id": deployment.app_id}, query)

    async def template(self, deployment: Deployment, template_id: Id) -> Template:
        try:
            return _read(
                Template,
                await self._call("template", {"app_id": deployment.app_id, "template_id": template_id}),
            )
        except NotFoundError as error:
            raise TemplateNotFoundError.named(template_id, **error.data) from error

    async def status(self, deployment: Deployment, clusters: Sequence[str]) -> dict[str, ClusterStatus]:
        found = await self._statuses(deployment, clusters)
        if any(status.cluster is None for status in found):
            # Without the [X] field `cluster`, only a question about one cluster tells whose pods the
            # answer lists.
            found = [one for cluster in clusters for one in await self._statuses(deployment, [cluster])]
        return {status.cluster: status for status in found if status.cluster and status.cluster in clusters}

    async def _statuses(self, deployment: Deployment, clusters: Sequence[str]) -> list[ClusterStatus]:
        data = await self._call("status", _places(deployment), {"cluster": ",".join(clusters)})
        found = [status for status in _read(_STATUSES, data) or [] if status]
        if len(clusters) == 1:
            return [status.model_copy(update={"cluster": status.cluster or clusters[0]}) for status in found]
        return found

    async def online(self, deployment: Deployment) -> list[OnlineTemplate]:
        query = {"type": "0", "resourceId": str(deployment.id)}
        return _read(_ONLINE, await self._call("online", {"app_id": deployment.app_id}, query)) or []

    def history(self, deployment: Deployment) -> AsyncIterator[Publication]:
        query = {"type": "0", "resourceId": str(deployment.id)}
        return self._pages(Publication, "history", {"app_id": deployment.app_id}, query)

    # ---- writes -----------------------------------------------------------------------------

    async def upgrade(
        self,
        deployment: Deployment,
        *,
        template_id: Id,
        clusters: Sequence[str],
        images: Mapping[str, str],
        description: str,
        key: str,
    ) -> list[Id]:
        body = {
            "templateId": template_id,
            "clusters": list(clusters),
            "images": dict(images),
            "description": description,
        }
        data = await self._call("upgrade", _places(deployment), body=body, key=key)
        return _read(_Upgraded, data).template_ids or []

    async def publish(
        self, deployment: Deployment, template_id: Id, cluster: str, replicas: int, *, key: str
    ) -> None:
        places = {**_places(deployment), "template_id": template_id, "cluster": cluster}
        await self._call("publish", places, body={"replicas": replicas}, key=key)

    async def restart(self, deployment: Deployment, cluster: str, *, key: str) -> None:
        await self._call("restart", {**_places(deployment), "cluster": cluster}, body={}, key=key)

    async def scale(self, deployment: Deployment, cluster: str, replicas: int, *, key: str) -> None:
        places = {**_places(deployment), "cluster": cluster}
        await self._call("scale", places, body={"replicas": replicas}, key=key)

    # ---- one exchange -----------------------------------------------------------------------

    async def _pages(
        self,
        model: type[PayloadT],
        call: str,
        places: Mapping[str, Id | None],
        query: Mapping[str, str],
    ) -> AsyncIterator[PayloadT]:
        for number in range(1, MAX_PAGES + 1):
            paged = {**query, "pageNo": str(number), "pageSize": str(PAGE_SIZE)}
            page = _read(_Page, await self._call(call, places, paged))
            for item in page.items or []:
                yield _read(model, item)
            if not page.items or (page.total_page is not None and number >= page.total_page):
                return
        raise UnusableAnswerError(f"the list of {call} does not end after {MAX_PAGES} pages", retryable=False)

    async def _call(
        self,
        call: str,
        places: Mapping[str, Id | None],
        query: Mapping[str, str] | None = None,
        *,
        body: Mapping[str, Any] | None = None,
        key: str | None = None,
    ) -> Any:
        """Sends one request and returns the `data` of its answer."""
        path = getattr(self._paths, call).format(
            **{place: _segment(place, value) for place, value in places.items()}
        )
        encoded = f"?{urlencode(query, quote_via=quote, safe='')}" if query else ""
        headers = {"Idempotency-Key": quote(key, safe=":")} if key else {}
        content = None if body is None else to_json(body)
        if content is not None:
            headers["Content-Type"] = "application/json"
        cluster = places.get("cluster")
        with _as_ours(call, cluster=cluster):
            async with asyncio.timeout(self._seconds):
                async with self._http.stream(
                    "GET" if body is None else "POST",
                    self._base + path + encoded,
                    headers=headers,
                    content=content,
                ) as response:
                    text = await _bounded(response, call)
        return _data(call, response, text, cluster=cluster, secrets=self._secrets)


class _Page(Payload):
    items: list[Any] | None = Field(default=None, alias="list")
    total_page: int | None = None


class _Upgraded(Payload):
    template_ids: list[Id] | None = None


class _Refusal(NamedTuple):
    """What an answer's envelope says, as far as it can be read: a refusal is never lost to its form."""

    code: int
    sub_code: int
    msg: str
    request_id: str | None

    @classmethod
    def of(cls, answer: Any, response: httpx.Response, secrets: Sequence[str]) -> Self:
        """The refusal in an answer; empty where it holds none. What it says of `secrets` is masked."""
        said = answer if isinstance(answer, dict) else {}
        request_id = said.get("requestId") or response.headers.get("X-Request-Id")
        return cls(
            _number(said.get("code")),
            _number(said.get("subCode")),
            masked(str(said.get("msg") or ""), secrets),
            None if request_id is None else masked(str(request_id), secrets),
        )


def _number(value: Any) -> int:
    text = str(value)
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else 0


def _places(deployment: Deployment) -> dict[str, Id | None]:
    return {"app_id": deployment.app_id, "deployment_id": deployment.id}


def _segment(place: str, value: Id | None) -> str:
    """`value` percent-encoded as one path segment."""
    try:
        return quote(str(usable_id("" if value is None else value)), safe="")
    except ValueError as error:
        raise InputError(f"{place}: {error}", field=place) from None


@cache
def _system_trust() -> ssl.SSLContext:
    """Return the trust in the system's authorities: to read them takes longer than a request."""
    return ssl.create_default_context()


def _trust(ca_file: Path | None) -> ssl.SSLContext:
    if ca_file is None:
        return _system_trust()
    try:
        return ssl.create_default_context(cafile=str(ca_file))
    except (OSError, ssl.SSLError) as error:
        raise ConfigurationError(
            f"ca_file: {one_line(ca_file)} cannot be read as PEM certificates",
            advice="Name a readable PEM file, on every machine where releases run.",
            field="ca_file",
        ) from error


async def _sendable(request: httpx.Request) -> None:
    """Refuses a signer's header that is none, before httpcore quotes it in its log at debug level."""
    if any(re.search(rb"[\0\r\n]|^\s|\s$", value) for _, value in request.headers.raw):
        raise httpx.LocalProtocolError("a header cannot be sent")


async def _bounded(response: httpx.Response, call: str) -> bytes:
    # A compressed answer was not asked for, and would grow without bound while it is read.
    if response.headers.get("Content-Encoding", "identity").strip().lower() not in {"", "identity"}:
        return b""
    parts = bytearray()
    async for part in response.aiter_bytes():
        parts += part
        if len(parts) > MAX_BODY_BYTES:
            raise UnusableAnswerError(
                f"the answer to {call} is longer than {MAX_BODY_BYTES // 1024**2} MiB",
                retryable=False,
                status=response.status_code,
            )
    return bytes(parts)


_STATUSES = TypeAdapter(list[ClusterStatus | None] | None)
_ONLINE = TypeAdapter(list[OnlineTemplate] | None)


def _read(shape: type[PayloadT] | TypeAdapter[T], data: Any) -> PayloadT | T:
    """`data` as `shape`, for JSON that arrived whole: a wrong shape will be wrong again."""
    try:
        return shape.validate_python(data) if isinstance(shape, TypeAdapter) else shape.model_validate(data)
    except ValidationError as error:
        raise UnusableAnswerError(
            f"the answer has another shape than the contract's: {first_mistake(error)}",
            retryable=False,
        ) from None  # pydantic's own text would show in the log what the answer holds


def _data(
    call: str, response: httpx.Response, text: bytes, *, cluster: Id | None, secrets: Sequence[str]
) -> Any:
    """The `data` of an answer; raises the error that its status, envelope or lack of one means."""
    status = response.status_code
    try:
        answer = from_json(text)
    except ValueError:
        answer = None
    refusal = _Refusal.of(answer, response, secrets)
    code = refusal.code
    known: dict[str, Any] = {"status": status, "request_id": refusal.request_id, "cluster": cluster}
    if status >= 400 or code >= 400:
        _refuse(call, code if status < 400 else status, refusal, response, known)
    if 300 <= status < 400:
        raise UnusableAnswerError(
            f"{call} was answered with a redirect, which is not followed", retryable=False, **known
        )
    if not isinstance(answer, dict) or "data" not in answer:
        kind = "an HTML page" if text.lstrip()[:1] == b"<" else "an empty body" if not text else ""
        raise UnusableAnswerError(
            f"{call} was answered with {kind or 'something that is not the JSON expected'}",
            # A cut-off answer or a proxy's page may be gone next time; whole JSON stays as it is.
            retryable=answer is None,
            **known,
        )
    return answer["data"]


def _refuse(
    call: str, status: int, refusal: _Refusal, response: httpx.Response, known: dict[str, Any]
) -> NoReturn:
    """Raises what the contract's table of errors says of `status` and the sub-code."""
    sub_code = refusal.sub_code or None
    said = f": {one_line(refusal.msg)}" if refusal.msg else ""
    problem = f"the cloud refused {call}{said}"
    retry_after = _seconds_to_wait(response.headers.get("Retry-After"))
    details: dict[str, Any] = {**known, "code": sub_code, "retry_after": retry_after}
    error: RolloutError
    if status == 401:
        error = AuthenticationError(problem, **details)
        if sub_code == 401004:
            error.advice = "Set this machine's clock; it differs from the cloud's by over 300 seconds."
    elif status == 403:
        kind = QuotaExceededError if sub_code == 403001 else AccessDeniedError
        error = kind(problem, **details)
    elif status == 404:
        error = NotFoundError(problem, **details)
    elif status == 409:
        error = ConflictError(problem, retryable=sub_code == 409001, **details)
        if sub_code != 409001:
            error.advice = "Start a new release: this one's key was used for something else."
    elif status in {429, 503}:
        error = OverloadedError(f"the cloud is overloaded, asked for {call}{said}", **details)
    elif status >= 500:
        retryable = status not in {501, 505}
        error = ServerFaultError(f"the cloud failed at {call}{said}", retryable=retryable, **details)
    else:
        error = RejectedError(problem, **details)
    raise error


def _seconds_to_wait(value: str | None) -> float | None:
    """Seconds that a `Retry-After` header asks for, given in seconds or as an HTTP date."""
    if value is None:
        return None
    if value.strip().isascii() and value.strip().isdigit():
        return float(value.strip()[:9])
    try:
        until = parsedate_to_datetime(value)
        if until.tzinfo is None:
            until = until.replace(tzinfo=UTC)
        return max(0.0, (until - datetime.now(UTC)).total_seconds())
    except (ValueError, OverflowError):
        return None


@contextmanager
def _as_ours(call: str, **data: Any) -> Iterator[None]:
    """Turns whatever httpx and a signer raise into an error of our tree. The one place that does."""
    try:
        yield
    except RolloutError:
        raise
    except (TimeoutError, httpx.TimeoutException) as error:
        raise UnreachableError(f"the cloud did not answer {call} in time", **data) from error
    except httpx.LocalProtocolError as error:
        raise ConfigurationError(
            f"{call} cannot be sent: it would be no valid HTTP",
            advice="Look at the headers that the block's signer makes; the log does not show them.",
            field="signer",
            **data,
        ) from type(error)("not shown")  # its own text quotes the header, and so perhaps the key
    except (httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
        raise ConfigurationError(
            f"{call} cannot be sent: {one_line(error, 120)}", field="api_url", **data
        ) from error
    except httpx.RemoteProtocolError as error:
        raise UnreachableError(
            f"the connection broke off during {call}: {one_line(error, 120)}", **data
        ) from error
    except httpx.DecodingError as error:
        raise UnusableAnswerError(
            f"the answer to {call} cannot be decoded: {one_line(error, 120)}", retryable=True, **data
        ) from error
    except httpx.TransportError as error:
        if _untrusted(error):
            raise ConfigurationError(
                f"the cloud's certificate is not trusted: {one_line(error, 160)}",
                advice="Name the file of your private CA in the block's ca_file.",
                field="ca_file",
                **data,
            ) from error
        raise UnreachableError(
            f"the cloud cannot be reached for {call}: {one_line(error, 120) or type(error).__name__}",
            **data,
        ) from error
    except (httpx.HTTPError, httpx.StreamError, httpx.CookieConflict) as error:
        raise PlatformError(
            f"{call} failed: {type(error).__name__} {one_line(error, 120)}", **data
        ) from error
    except Exception as error:  # noqa: BLE001 - whatever a signer of someone else raises
        (*_, last) = traceback.extract_tb(error.__traceback__)
        raise ConfigurationError(
            f"{call} cannot be signed and sent: {type(error).__name__} in {Path(last.filename).name}, "
            f"line {last.lineno}",
            advice="Look at the block's signer; what it said is not shown, as it may hold the key.",
            field="signer",
            **data,
        ) from None


def _untrusted(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError):
            return True
        error = error.__cause__ or error.__context__
    return False
