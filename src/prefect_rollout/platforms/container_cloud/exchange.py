"""HTTP exchanges with the container cloud: its paths, envelope, pages and errors.

Every path, header and field name of that cloud is in this package. Source: the Open API contract. An
installation can replace its [X] paths through the path table.
"""

import asyncio
import re
import traceback
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Self, TypeVar
from urllib.parse import quote, urlencode

import httpx
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator
from pydantic_core import from_json, to_json

from prefect_rollout.errors import (
    AccessDeniedError,
    AuthenticationError,
    ConfigurationError,
    ConflictError,
    InputError,
    NotFoundError,
    OverloadedError,
    PlatformError,
    QuotaExceededError,
    RejectedError,
    RolloutError,
    ServerFaultError,
    UnreachableError,
    UnusableAnswerError,
)
from prefect_rollout.ids import CamelCase, Id, first_mistake, usable_id
from prefect_rollout.platforms.http import seconds_to_wait, trust, untrusted
from prefect_rollout.text import masked, one_line

T = TypeVar("T")
PayloadT = TypeVar("PayloadT", bound=CamelCase)

PAGE_SIZE = 100  # the maximum in the contract
MAX_PAGES = 1000
MAX_BODY_BYTES = 32 * 1024 * 1024


class PathTable(BaseModel):
    """The cloud's paths below `api_url`, by call. `{…}` are percent-encoded ids."""

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
                f"{path!r} may only contain {', '.join('{' + place + '}' for place in places)}"
            ) from error
        if not re.fullmatch(r"/[\w./~%:@!$&'()*+,;=-]*", filled, re.ASCII):
            raise ValueError(f"{path!r} must start with /, be percent-encoded, and contain neither ? nor #")
        return path


class Exchange:
    """Exchanges with the cloud over one pool of connections.

    It does not retry, and raises no errors of httpx, json or pydantic. An exchange takes at most
    `request_timeout_seconds`, an answer has at most `MAX_BODY_BYTES`.

    `api_url` may have a path, to which the paths of the path table are added. `secrets` are masked in errors.
    `ca_file` is a PEM file with the certificates to trust instead of the system's. `transport` replaces the
    network in tests.

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
        connect_timeout_seconds: float = 5,
        request_timeout_seconds: float = 30,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.base = api_url.rstrip("/")
        self._paths = paths or PathTable()
        self._secrets = tuple(secrets)
        self._seconds = request_timeout_seconds
        with _as_ours("connect"):
            self._http = httpx.AsyncClient(
                auth=signer,
                verify=trust(ca_file),
                timeout=httpx.Timeout(request_timeout_seconds, connect=connect_timeout_seconds),
                # A redirect would send the signature to another address.
                follow_redirects=False,
                event_hooks={"request": [_sendable]},
                # A small compressed answer could expand without bound.
                headers={"Accept": "application/json", "Accept-Encoding": "identity"},
                limits=httpx.Limits(max_connections=50, max_keepalive_connections=20),
                transport=transport,
            )

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def pages(
        self,
        model: type[PayloadT],
        call: str,
        places: Mapping[str, Id | None],
        query: Mapping[str, str],
    ) -> AsyncIterator[PayloadT]:
        """Yield the items of a list, page by page."""
        for number in range(1, MAX_PAGES + 1):
            paged = {**query, "pageNo": str(number), "pageSize": str(PAGE_SIZE)}
            page = read(_Page, await self.call(call, places, paged))
            for item in page.items or []:
                yield read(model, item)
            if not page.items or (page.total_page is not None and number >= page.total_page):
                return
        raise UnusableAnswerError(f"the list of {call} does not end after {MAX_PAGES} pages", retryable=False)

    async def call(
        self,
        call: str,
        places: Mapping[str, Id | None],
        query: Mapping[str, str] | None = None,
        *,
        body: Mapping[str, Any] | None = None,
        key: str | None = None,
    ) -> Any:
        """Send one request and return the `data` of its answer.

        `call` is a field of the path table, and `places` fill its path. A request with a JSON `body` is a
        write, and may have an idempotency `key`.

        Raises:
            PlatformError: the request did not succeed.
            ConfigurationError: the request cannot be signed or sent.
        """
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
                    self.base + path + encoded,
                    headers=headers,
                    content=content,
                ) as response:
                    text = await _bounded(response, call)
        return _data(call, response, text, cluster=cluster, secrets=self._secrets)


class _Page(CamelCase):
    items: list[Any] | None = Field(default=None, alias="list")
    total_page: int | None = None


class _Refusal(NamedTuple):
    """The refusal in an answer's envelope, as far as it can be read."""

    code: int
    sub_code: int
    msg: str
    request_id: str | None

    @classmethod
    def of(cls, answer: Any, response: httpx.Response, secrets: Sequence[str]) -> Self:
        """Return the refusal in an answer, with `secrets` masked; it is empty if there is none."""
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


def _segment(place: str, value: Id | None) -> str:
    """Return `value`, percent-encoded as one path segment."""
    try:
        return quote(str(usable_id("" if value is None else value)), safe="")
    except ValueError as error:
        raise InputError(f"{place}: {error}", field=place) from None


async def _sendable(request: httpx.Request) -> None:
    """Refuse an invalid header of a signer, before httpcore logs it at debug level."""
    if any(re.search(rb"[\0\r\n]|^\s|\s$", value) for _, value in request.headers.raw):
        raise httpx.LocalProtocolError("a header cannot be sent")


async def _bounded(response: httpx.Response, call: str) -> bytes:
    # A compressed answer was not requested, and could expand without bound.
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


def read(shape: type[PayloadT] | TypeAdapter[T], data: Any) -> PayloadT | T:
    """Return `data` as `shape`. A mismatch is not retryable, because the JSON is complete."""
    try:
        return shape.validate_python(data) if isinstance(shape, TypeAdapter) else shape.model_validate(data)
    except ValidationError as error:
        raise UnusableAnswerError(
            f"the answer does not have the contract's structure: {first_mistake(error)}",
            retryable=False,
        ) from None  # pydantic's text would show values of the answer in the log


def _data(
    call: str, response: httpx.Response, text: bytes, *, cluster: Id | None, secrets: Sequence[str]
) -> Any:
    """Return the `data` of an answer, or raise the error for its status or its envelope."""
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
            f"{call} was answered with {kind or 'something other than the expected JSON'}",
            # A retry may help after a truncated answer or a proxy's page, but not after complete JSON.
            retryable=answer is None,
            **known,
        )
    return answer["data"]


def _refuse(
    call: str, status: int, refusal: _Refusal, response: httpx.Response, known: dict[str, Any]
) -> NoReturn:
    """Raise the error for `status` and the sub-code, by the contract's table of errors."""
    sub_code = refusal.sub_code or None
    said = f": {one_line(refusal.msg)}" if refusal.msg else ""
    problem = f"the cloud refused {call}{said}"
    retry_after = seconds_to_wait(response.headers.get("Retry-After"))
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


@contextmanager
def _as_ours(call: str, **data: Any) -> Iterator[None]:
    """Convert errors of httpx and of a signer to errors of this package. Nothing else does this."""
    try:
        yield
    except RolloutError:
        raise
    except (TimeoutError, httpx.TimeoutException) as error:
        raise UnreachableError(f"the cloud did not answer {call} in time", **data) from error
    except httpx.LocalProtocolError as error:
        raise ConfigurationError(
            f"{call} cannot be sent: it is not valid HTTP",
            advice="Check the headers that the block's signer adds; the log does not show them.",
            field="signer",
            **data,
        ) from type(error)("not shown")  # its text quotes the header, which may contain the key
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
        if untrusted(error):
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
    except Exception as error:  # noqa: BLE001 - a third-party signer may raise anything
        (*_, last) = traceback.extract_tb(error.__traceback__)
        raise ConfigurationError(
            f"{call} cannot be signed and sent: {type(error).__name__} in {Path(last.filename).name}, "
            f"line {last.lineno}",
            advice="Look at the block's signer; its message is not shown because it may contain the key.",
            field="signer",
            **data,
        ) from None
