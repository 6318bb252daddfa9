"""Image registries as Prefect blocks, the choice of one for an image, and the look-ups of a release."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, ClassVar, Self, TypeVar

from prefect.blocks.abstract import CredentialsBlock
from pydantic import ConfigDict, Field, HttpUrl, SecretStr, field_validator, model_validator

from prefect_rollout.blocks.load import load, load_values, shared
from prefect_rollout.errors import ConfigurationError
from prefect_rollout.platforms.http import is_local
from prefect_rollout.platforms.registry.client import RegistryClient
from prefect_rollout.platforms.registry.credentials import Credentials, find_credentials
from prefect_rollout.release.image_errors import RegistryUnreachableError
from prefect_rollout.release.image_facts import ImageFacts
from prefect_rollout.release.images import Reference
from prefect_rollout.text import one_line

T = TypeVar("T")
Seconds = Annotated[float, Field(gt=0, le=3600)]

_HUB = {"index.docker.io", "registry-1.docker.io", "registry.hub.docker.com", "hub.docker.com"}
_DOCKER = "docker-registry-credentials"  # of prefect-docker, which need not be installed here

# A registry that nobody configured may be out of reach behind a firewall that drops packets.
UNCONFIGURED_CONNECT_SECONDS = 2.0
UNCONFIGURED_REQUEST_SECONDS = 10.0

SHARED_SECONDS = 60.0
"""Seconds for which releases of a batch share what a registry answered."""

UNREACHABLE_SECONDS = 60.0
"""Seconds for which a process does not try again to reach a registry that does not answer."""

_unreachable: dict[str, tuple[float, str, str]] = {}  # since when, why, and what to do


class ImageRegistry(CredentialsBlock):
    """Address and credentials of an image registry.

    Example:
        Load a saved block and look an image up:
        ```python
        from prefect_rollout.blocks import ImageRegistry

        registry = ImageRegistry.load("BLOCK_NAME")
        async with registry.get_client() as client:
            print(await client.image("registry.example/shop/web:1.2"))
        ```
    """

    _block_type_name: ClassVar[str] = "Image Registry"
    _block_type_slug: ClassVar[str] = "image-registry"
    _description = "Check images in a registry before they are released."
    _logo_url = HttpUrl(
        "https://cdn.sanity.io/images/3ugk85nk/production/"
        "2d0b896006ad463b49c28aaac14f31e00e32cfab-250x250.png"
    )
    _documentation_url = HttpUrl("https://pypi.org/project/prefect-rollout/")

    # An error in one field must not print the other fields, such as the password.
    model_config = ConfigDict(hide_input_in_errors=True, extra="forbid")

    host: str = Field(
        title="Host",
        description="Registry as images name it, such as registry.example:5000; docker.io for Docker Hub.",
    )
    username: str = Field(
        default="",
        title="User name",
        description="User name; empty for public images. Many registries take any name with a token.",
    )
    password: SecretStr = Field(
        default=SecretStr(""),
        title="Password or token",
        description="Password, or an access token that may pull images.",
    )
    ca_file: Path | None = Field(
        default=None,
        title="CA file",
        description="PEM file of certificates to trust instead of the system's, on every worker.",
    )
    plain_http: bool = Field(
        default=False,
        title="Plain HTTP",
        description="Use http:// instead of https://. Allowed only for a registry on this machine.",
    )
    connect_timeout_seconds: Seconds = Field(
        default=5, title="Connect time-out", description="Timeout for a connection, in seconds."
    )
    request_timeout_seconds: Seconds = Field(
        default=30,
        title="Request time-out",
        description="Timeout for a request, until the last byte of its answer, in seconds.",
    )

    @field_validator("host")
    @classmethod
    def _named_as_in_images(cls, value: str) -> str:
        try:
            return registry_of(value)
        except ValueError:
            raise ValueError(
                "must be a registry as images name it, such as registry.example:5000 or docker.io, without a "
                "path, user name and password"
            ) from None

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if bool(self.username) != bool(self.password.get_secret_value()):
            raise ValueError("username and password: give both, or neither for public images")
        if ":" in self.username or not self.username.isprintable():
            raise ValueError("username: must be printable and hold no colon")
        if self.plain_http and not is_local(f"//{self.host}"):
            raise ValueError("plain_http: anyone on the network could read the password; use https")
        return self

    def get_client(self, *_: Any, source: str = "the block image-registry", **__: Any) -> RegistryClient:
        """Return a client with its own connection pool, for `async with`.

        Args:
            source: name of the credentials in messages.

        Raises:
            ConfigurationError: the CA file cannot be loaded.
        """
        password = self.password.get_secret_value()
        return RegistryClient(
            self.host,
            credentials=Credentials(self.username, password, source=source) if password else None,
            ca_file=self.ca_file,
            plain_http=self.plain_http,
            connect_timeout_seconds=self.connect_timeout_seconds,
            request_timeout_seconds=self.request_timeout_seconds,
        )


def registry_of(address: str) -> str:
    """Return the registry of an address, as images name it: `docker.io` for `https://index.docker.io/v1/`.

    Raises:
        ValueError: there is none in it, or it holds a user name.
    """
    scheme, _, rest = address.strip().rpartition("://")
    host, _, path = rest.partition("/")
    if path and host not in _HUB:  # such as harbor.example/team: images of other paths have no credentials
        raise ValueError("a path")
    if scheme not in {"", "http", "https"} or "@" in host:
        raise ValueError("no registry")
    found = Reference.parse(f"{host}/a/b").domain
    if found == "docker.io" and host not in {"docker.io", *_HUB}:
        raise ValueError("a part of a name on Docker Hub")
    return "docker.io" if found in _HUB else found


async def open_registry(registry: str, blocks: Sequence[str] = ()) -> RegistryClient:
    """Return a client of the registry of an image, for `async with`.

    Args:
        registry: the registry as `Reference.domain` has it.
        blocks: blocks image-registry/name or docker-registry-credentials/name; the first one for this
            registry counts. Without one, the credentials are those of `docker login`, if there are any.

    Raises:
        ConfigurationError: a block does not exist, has another type or cannot be used.
        RegistryAccessError: the files of `docker login` cannot be read.
    """
    for each in blocks:
        block = await _load(each)
        if block.host == registry:
            return block.get_client(source=f"the block {one_line(each, 120)}")
    known = await find_credentials(registry)
    return RegistryClient(
        registry,
        credentials=known,
        plain_http=is_local(f"//{registry}"),  # as `docker` does
        connect_timeout_seconds=UNCONFIGURED_CONNECT_SECONDS,
        request_timeout_seconds=UNCONFIGURED_REQUEST_SECONDS,
    )


class Registries:
    """The registries of a release's images, for `async with`.

    Args:
        blocks: as in `open_registry`.
        insist: try again to reach a registry that did not answer a short time ago.
    """

    def __init__(self, blocks: Sequence[str], *, insist: bool) -> None:
        self._blocks = tuple(blocks)
        self._insist = insist
        self._stack = AsyncExitStack()
        self._clients: dict[str, asyncio.Future[RegistryClient]] = {}

    async def __aenter__(self) -> Self:
        """Return the registries."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the connections."""
        await self._stack.aclose()

    async def image(self, image: str, platform: str) -> ImageFacts:
        """Return the facts of an image; see `RegistryClient.image` and `open_registry` for the errors."""
        domain = Reference.parse(image).domain
        return await self._asked(domain, ("image", image, platform), lambda of: of.image(image, platform))

    async def tags(self, image: str) -> list[str]:
        """Return the tags of the repository of an image; see `RegistryClient.tags`."""
        domain, path, *_ = Reference.parse(image)
        return await self._asked(domain, ("tags", domain, path), lambda of: of.tags(path))

    async def _asked(
        self, registry: str, key: tuple[str, ...], read: Callable[[RegistryClient], Awaitable[T]]
    ) -> T:
        async def now() -> T:
            since, why, advice = _unreachable.get(registry, (float("-inf"), "", ""))
            if not self._insist and time.monotonic() - since < UNREACHABLE_SECONDS:
                raise RegistryUnreachableError(why, advice=advice, registry=registry)
            try:
                found = await read(await self._client(registry))
            except RegistryUnreachableError as error:
                if "status" not in error.data:
                    _unreachable[registry] = time.monotonic(), error.problem, error.advice
                raise
            _unreachable.pop(registry, None)
            return found

        return await shared((*key, *self._blocks), SHARED_SECONDS, now)

    async def _client(self, registry: str) -> RegistryClient:
        if registry not in self._clients:
            opening = asyncio.ensure_future(open_registry(registry, self._blocks))
            self._clients[registry] = opening
            await self._stack.enter_async_context(await opening)
        return await self._clients[registry]


async def _load(named: str) -> ImageRegistry:
    slug, _, name = named.partition("/")
    shown = one_line(named, 120)
    if slug == ImageRegistry.get_block_type_slug() and name:
        found = await load(ImageRegistry, name, field="image_registries")
    elif slug == _DOCKER and name:
        found = await _of_prefect_docker(name)
    else:
        raise ConfigurationError(
            f"image_registries: {shown!r} names no registry",
            advice=f"Give image-registry/name or {_DOCKER}/name.",
            field="image_registries",
        )
    if found is None:
        raise ConfigurationError(
            f"image_registries: there is no block {shown}",
            advice="Save a block of that name in the Prefect UI, or correct the name.",
            field="image_registries",
        )
    return found


async def _of_prefect_docker(name: str) -> ImageRegistry | None:
    """Return the registry of a block DockerRegistryCredentials; `None` if it is not saved."""
    given = await load_values(_DOCKER, name, field="image_registries")
    if given is None:
        return None
    try:
        return ImageRegistry(
            host=registry_of(str(given.get("registry_url") or "docker.io")),
            username=str(given.get("username") or ""),
            password=SecretStr(str(given.get("password") or "")),
        )
    except ValueError:
        raise ConfigurationError(
            f"image_registries: the block {_DOCKER}/{one_line(name, 120)} cannot be used",
            advice="Check its registry URL, user name and password in the Prefect UI.",
            field="image_registries",
        ) from None  # the text may hold a value
