"""Authentication at a registry: Basic, and the token flow of the distribution specification."""

import time
from collections.abc import AsyncGenerator
from urllib.request import parse_http_list, parse_keqv_list

import httpx
from pydantic import BaseModel, ValidationError

from prefect_rollout.platforms.registry.answers import refuse
from prefect_rollout.platforms.registry.credentials import Credentials
from prefect_rollout.release.image_errors import RegistryAccessError, RegistryError
from prefect_rollout.text import shown_address

_SECONDS = 60  # validity of a token that names none, by the specification
_MARGIN = 10  # seconds before its end at which a token is renewed


class _Token(BaseModel):
    token: str = ""
    access_token: str = ""
    expires_in: float = _SECONDS


class RegistryAuth(httpx.Auth):
    """Answers a registry's challenge. It sends no credentials before the registry asks for them.

    Tokens are kept per repository in memory. Credentials go to the registry itself, and to the token server
    that it names, which must use https unless the registry is on this machine.
    """

    def __init__(self, registry: str, credentials: Credentials | None, *, plain_http: bool = False) -> None:
        self.registry = registry
        self.credentials = credentials
        self._schemes = {"https", "http"} if plain_http else {"https"}
        self._basic = False
        self._tokens: dict[str, tuple[str, float]] = {}

    async def async_auth_flow(self, request: httpx.Request) -> AsyncGenerator[httpx.Request, httpx.Response]:
        """Send the request, answer a challenge once, and send the request again."""
        repository = request.extensions.get("repository", "")
        sent = self._known(repository)
        if sent:
            request.headers["Authorization"] = sent
        response = yield request
        if response.status_code != httpx.codes.UNAUTHORIZED or response.history:
            return  # a storage that the registry redirects to gets no credentials
        challenges = dict(_challenge(each) for each in response.headers.get_list("WWW-Authenticate"))
        if (bearer := challenges.get("bearer")) is not None:
            token = self._token_request(bearer, repository)
            answer = yield token
            await answer.aread()
            request.headers["Authorization"] = self._read_token(answer, repository)
        elif "basic" in challenges and self._secret and not sent.startswith("Basic"):
            self._basic = True
            request.headers["Authorization"] = self._known(repository)
        else:
            return  # the client raises the error for 401
        yield request

    @property
    def _secret(self) -> str:
        return self.credentials.password if self.credentials else ""

    def _known(self, repository: str) -> str:
        if self._basic and self.credentials:
            return self.credentials.basic
        token, until = self._tokens.get(repository, ("", 0.0))
        return token if time.monotonic() < until else ""

    def _token_request(self, challenge: dict[str, str], repository: str) -> httpx.Request:
        try:
            url = httpx.URL(challenge.get("realm", ""))
        except httpx.InvalidURL:
            url = httpx.URL("")
        if url.scheme not in self._schemes or not url.host:
            raise RegistryAccessError(
                f"{self.registry} names a token server without https: {shown_address(str(url))}",
                advice="Nothing was sent there. Ask the registry's operators for its https address.",
                registry=self.registry,
            )
        scope = challenge.get("scope") or f"repository:{repository}:pull"
        wanted = {"service": challenge.get("service", ""), "scope": scope}
        wanted = {name: value for name, value in wanted.items() if value}
        known = self.credentials
        here = {"only_at": url.netloc}
        if known and known.identity_token:
            form = {
                **wanted,
                "grant_type": "refresh_token",
                "client_id": "prefect-rollout",
                "refresh_token": known.identity_token,
            }
            return httpx.Request("POST", url, data=form, extensions=here)
        url = url.copy_merge_params(wanted)  # the realm may already have a query
        headers = {"Authorization": known.basic} if known and known.password else {}
        return httpx.Request("GET", url, headers=headers, extensions=here)

    def _read_token(self, answer: httpx.Response, repository: str) -> str:
        if answer.status_code != httpx.codes.OK:
            refuse(answer, self.registry, f"a token for {repository}", self.credentials)
        try:
            token = _Token.model_validate_json(answer.content)
        except ValidationError:
            token = _Token()
        text = token.token or token.access_token
        if not text or not text.isascii() or not text.isprintable():
            raise RegistryError(
                f"the token server of {self.registry} answered without a token",
                registry=self.registry,
            )
        header = f"Bearer {text}"
        self._tokens[repository] = (header, time.monotonic() + max(token.expires_in, _SECONDS) - _MARGIN)
        return header


def _challenge(header: str) -> tuple[str, dict[str, str]]:
    """Return the scheme and the parameters of a `WWW-Authenticate` header."""
    scheme, _, rest = header.strip().partition(" ")
    pairs = [pair for pair in parse_http_list(rest) if "=" in pair]
    return scheme.lower(), {name.lower(): value for name, value in parse_keqv_list(pairs).items()}
