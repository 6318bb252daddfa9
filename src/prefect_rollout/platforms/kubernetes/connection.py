"""Exchanges with the API server of one cluster.

Every request goes through `Connection`, which raises only errors of this package.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple, NoReturn
from urllib.parse import urlencode

import httpx
from pydantic_core import from_json, to_json

from prefect_rollout.errors import (
    AccessDeniedError,
    AuthenticationError,
    ConfigurationError,
    ConflictError,
    NotFoundError,
    OverloadedError,
    QuotaExceededError,
    RejectedError,
    RolloutError,
    ServerFaultError,
    UnreachableError,
    UnusableAnswerError,
)
from prefect_rollout.platforms.http import host_of, seconds_to_wait, untrusted
from prefect_rollout.platforms.kubernetes.credentials import Login, Logins
from prefect_rollout.text import one_line

WATCH_SECONDS = 60
"""Time after which a watch is opened again, so that a connection that died silently does not last."""


class ExpiredError(Exception):
    """410: the resource version of a watch is too old. List again."""


class Answer(NamedTuple):
    """An object or a list, and the API server's time when it answered."""

    data: dict[str, Any]
    at: datetime


class Connection:
    """Exchanges with the API server of one cluster, over one pool of connections. It does not retry.

    A request that is answered with 401 is sent once more with new credentials: an exec plugin may have
    returned a token that has expired since. A 401 has no effect.

    Args:
        cluster: the cluster's name, for errors.
        login: returns address and credentials.
        connect_timeout_seconds: seconds to connect.
        request_timeout_seconds: seconds for a whole exchange.
        options: options with which kubectl reaches the cluster, for people.
        transport: replaces the network, for tests.
    """

    def __init__(
        self,
        cluster: str,
        login: Logins,
        *,
        connect_timeout_seconds: float = 5,
        request_timeout_seconds: float = 30,
        options: Sequence[str] = (),
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.cluster, self.options = cluster, tuple(options)
        self._login_again = login
        self._transport = transport
        self._connect, self._seconds = connect_timeout_seconds, request_timeout_seconds
        self._open: tuple[Login, httpx.AsyncClient] | None = None
        self._opening = asyncio.Lock()

    async def host(self) -> str:
        """Return the normalized host and port of the API server.

        Raises:
            ConfigurationError: the credentials cannot be loaded.
        """
        login, _ = await self._client(again=False)
        return host_of(login.host)

    async def aclose(self) -> None:
        """Close the connections."""
        if self._open:
            await self._open[1].aclose()
            self._open = None

    async def call(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None = None,
        *,
        body: Any = None,
        content_type: str = "application/json",
    ) -> Answer:
        """Send one request and return its answer.

        Raises:
            PlatformError: the request did not succeed.
            NotFoundError: there is no such object.
            ConfigurationError: the credentials cannot be loaded, or the server's certificate is not trusted.
        """
        response = await self._exchange(method, path, query, body, content_type)
        return Answer(self._object(f"{method} {path}", response.content), _date(response))

    async def text(self, path: str, query: Mapping[str, str]) -> str:
        """Return a text, such as the output of a container."""
        return (await self._exchange("GET", path, query)).content.decode("utf-8", "replace")

    async def items(self, path: str, query: Mapping[str, str] | None = None) -> Answer:
        """Return a whole list, page by page; `items` is never absent."""
        pages: list[Any] = []
        token = ""
        while True:
            answer = await self.call("GET", path, {**(query or {}), "limit": "500", "continue": token})
            pages += answer.data.get("items") or []
            token = (answer.data.get("metadata") or {}).get("continue") or ""
            if not token:
                return Answer({**answer.data, "items": pages}, answer.at)

    async def changes(self, path: str, query: Mapping[str, str], since: str) -> AsyncIterator[dict[str, Any]]:
        """Yield the events of a watch, until the API server ends it.

        Raises:
            ExpiredError: `since` is too old.
            PlatformError: the watch broke off.
        """
        what = f"WATCH {path}"
        asked = {
            **query,
            "watch": "1",
            "resourceVersion": since,
            "allowWatchBookmarks": "true",
            "timeoutSeconds": str(WATCH_SECONDS),
        }
        with self._as_ours(what):
            async with self._send("GET", path, asked, None, "", read_seconds=WATCH_SECONDS + 5) as response:
                if response.status_code == 410:
                    raise ExpiredError
                if response.status_code >= 400:
                    self._refuse(what, response, await response.aread())
                async for line in response.aiter_lines():
                    event = self._object(what, line.encode())
                    if event.get("type") == "ERROR":
                        code = (event.get("object") or {}).get("code")
                        if code == 410:
                            raise ExpiredError
                        self._refuse(what, response, to_json(event.get("object")), code)
                    yield event

    # ---- the wire ---------------------------------------------------------------------------

    async def _exchange(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None,
        body: Any = None,
        content_type: str = "",
    ) -> httpx.Response:
        """Send one request and return its answer, which has been read and is no refusal."""
        what = f"{method} {path}"
        with self._as_ours(what):
            async with (
                asyncio.timeout(self._seconds),
                self._send(method, path, query, body, content_type) as response,
            ):
                await response.aread()
        if response.status_code >= 300:
            self._refuse(what, response, response.content)
        return response

    @asynccontextmanager
    async def _send(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None,
        body: Any,
        content_type: str,
        *,
        read_seconds: float | None = None,
    ) -> AsyncIterator[httpx.Response]:
        for attempt in (1, 2):
            login, http = await self._client(again=attempt == 2)
            headers = {"Accept": "application/json", **await login.headers()}
            if body is not None:
                headers["Content-Type"] = content_type
            given = {name: value for name, value in (query or {}).items() if value}
            request = http.build_request(
                method,
                f"{login.host}{path}" + (f"?{urlencode(given)}" if given else ""),
                headers=headers,
                content=None if body is None else to_json(body),
                extensions={"sni_hostname": login.server_name} if login.server_name else None,
            )
            if read_seconds:
                request.extensions["timeout"] = {**request.extensions["timeout"], "read": read_seconds}
            response = await http.send(request, stream=True)
            try:
                if response.status_code == 401 and attempt == 1:
                    continue
                yield response
                return
            finally:
                await response.aclose()

    async def _client(self, *, again: bool) -> tuple[Login, httpx.AsyncClient]:
        async with self._opening:
            if again:
                await self.aclose()
            if self._open is None:
                login = await self._login_again()
                self._open = (
                    login,
                    httpx.AsyncClient(
                        verify=login.verify,
                        proxy=login.proxy,
                        timeout=httpx.Timeout(self._seconds, connect=self._connect),
                        follow_redirects=False,
                        transport=self._transport,
                        limits=httpx.Limits(max_connections=50, max_keepalive_connections=20),
                    ),
                )
            return self._open

    def _object(self, what: str, text: bytes) -> dict[str, Any]:
        try:
            answer = from_json(text)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise UnusableAnswerError(
                f"{what} in {one_line(self.cluster, 60)} was answered with something that is not the JSON "
                "expected",
                advice="Is the address of the cluster its API server's, and not a login page's or a proxy's?",
                retryable=answer is None,
                cluster=self.cluster,
            )
        return answer

    def _refuse(self, what: str, response: httpx.Response, text: bytes, code: int | None = None) -> NoReturn:
        """Raise the error for a status code, with the API server's own message."""
        try:
            said = from_json(text)
        except ValueError:
            said = {}
        message = one_line(said.get("message") or "", 600) if isinstance(said, dict) else ""
        status = code or response.status_code
        where = one_line(self.cluster, 60)
        problem = f"{where}: {message}" if message else f"{where} refused {what}"
        details: dict[str, Any] = {"status": status, "cluster": self.cluster}
        retry_after = seconds_to_wait(response.headers.get("Retry-After"))
        error: RolloutError
        match status:
            case 401:
                advice = "Sign in again, or renew the token or certificate of the kubeconfig or block."
                error = AuthenticationError(
                    f"{where} does not accept the credentials", advice=advice, **details
                )
            case 403 if "exceeded quota" in message:
                error = QuotaExceededError(problem, **details)
            case 403:
                advice = "Grant it with the Role of deploy/kubernetes-rbac.yaml, or use other credentials."
                error = AccessDeniedError(problem, advice=advice, **details)
            case 404:
                error = NotFoundError(problem, **details)
            case 409:
                advice = "Look at who changed the workload, and start a new release."
                error = ConflictError(problem, advice=advice, **details)
            case 429 | 503:
                error = OverloadedError(problem, retry_after=retry_after, **details)
            case 500 | 502 | 504:
                error = ServerFaultError(problem, retry_after=retry_after, **details)
            case _ if 300 <= status < 400:
                error = UnusableAnswerError(
                    f"{what} in {where} was answered with a redirect", retryable=False, **details
                )
            case _:
                error = RejectedError(problem, **details)
        raise error

    @contextmanager
    def _as_ours(self, what: str) -> Iterator[None]:
        """Convert errors of httpx to errors of this package."""
        where, data = one_line(self.cluster, 60), dict[str, Any](cluster=self.cluster)
        advice = f"Check the network, and the address of the cluster {where} in the kubeconfig or block."
        try:
            yield
        except (TimeoutError, httpx.TimeoutException) as error:
            raise UnreachableError(f"{where} did not answer {what} in time", advice=advice, **data) from error
        except (httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
            raise ConfigurationError(
                f"{where}: the address cannot be used: {one_line(error, 120)}", **data
            ) from error
        except httpx.TransportError as error:
            if untrusted(error):
                raise ConfigurationError(
                    f"{where}: the API server's certificate is not trusted: {one_line(error, 160)}",
                    advice="Add the cluster's certificate-authority to the kubeconfig or block.",
                    **data,
                ) from error
            kind = one_line(error, 120) or type(error).__name__
            raise UnreachableError(
                f"{where} cannot be reached for {what}: {kind}", advice=advice, **data
            ) from error
        except (httpx.HTTPError, httpx.StreamError) as error:
            raise UnusableAnswerError(
                f"{what} in {where} failed: {type(error).__name__} {one_line(error, 120)}",
                retryable=True,
                **data,
            ) from error


def _date(response: httpx.Response) -> datetime:
    """Return the API server's time; pods' ages are compared with it, and not with this machine's clock."""
    try:
        return parsedate_to_datetime(response.headers["Date"]).astimezone(UTC)
    except (KeyError, ValueError):
        return datetime.now(UTC)
