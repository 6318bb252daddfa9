"""A client of one registry. It reads manifests, configurations and tags, and writes nothing.

Source: the OCI distribution specification 1.1. oras-py, the best-kept library, is synchronous, has no HEAD
and no choice of platform, and reports every refusal as a ValueError.
"""

import asyncio
import difflib
import hashlib
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import httpx

from prefect_rollout.errors import ConfigurationError, RolloutError
from prefect_rollout.platforms.http import trust, untrusted
from prefect_rollout.platforms.registry.answers import (
    CONFIGS,
    INDEXES,
    MANIFESTS,
    Descriptor,
    ImageConfig,
    M,
    Manifest,
    TagPage,
    read,
    refuse,
    unknown_repository,
)
from prefect_rollout.platforms.registry.authentication import RegistryAuth
from prefect_rollout.platforms.registry.credentials import Credentials
from prefect_rollout.release.image_errors import (
    ImageNotFoundError,
    RegistryError,
    RegistryUnreachableError,
    UnsuitableImageError,
)
from prefect_rollout.release.image_facts import ImageFacts, NodePlatform
from prefect_rollout.release.images import Reference
from prefect_rollout.text import one_line

MAX_BYTES = 16 * 1024 * 1024
PAGE_SIZE = 500
MAX_TAGS = 100_000
SEARCHED_TAGS = 5000  # for similar names
_HUB = {"docker.io": "registry-1.docker.io"}


class _Found(NamedTuple):
    content: bytes
    digest: str
    media_type: str


class RegistryClient:
    """A client of one registry over one pool of connections. It does not retry.

    Args:
        registry: the registry as images name it, such as `registry.example:5000` or `docker.io`.
        credentials: sent when the registry asks for them; `None` to read what is public.
        ca_file: certificates to trust instead of the system's; a PEM file.
        plain_http: use http; for a registry on this machine.
        connect_timeout_seconds: seconds to connect.
        request_timeout_seconds: seconds for a whole exchange, with its token and redirects.
        transport: replaces the network, for tests.

    Raises:
        ConfigurationError: `ca_file` cannot be used.
    """

    def __init__(
        self,
        registry: str,
        *,
        credentials: Credentials | None = None,
        ca_file: Path | None = None,
        plain_http: bool = False,
        connect_timeout_seconds: float = 5,
        request_timeout_seconds: float = 30,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.registry = registry
        self._credentials = credentials
        self._seconds = request_timeout_seconds
        self._schemes = {"https", "http"} if plain_http else {"https"}
        scheme = "http" if plain_http else "https"
        self._http = httpx.AsyncClient(
            base_url=f"{scheme}://{_HUB.get(registry, registry)}/v2/",
            auth=RegistryAuth(registry, credentials, plain_http=plain_http),
            verify=trust(ca_file),
            timeout=httpx.Timeout(request_timeout_seconds, connect=connect_timeout_seconds),
            # A small compressed answer could expand without bound.
            headers={"Accept-Encoding": "identity"},
            event_hooks={"request": [self._same_security], "response": [self._bounded]},
            limits=httpx.Limits(max_connections=10),
            max_redirects=3,
            transport=transport,
        )

    async def __aenter__(self) -> Self:
        """Return the client."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def image(self, image: str, platform: str = "linux/amd64") -> ImageFacts:
        """Return the facts of an image, as nodes of `platform` will run it.

        Args:
            image: a reference to this registry; without tag and digest, the tag is `latest`.
            platform: os/architecture of the nodes.

        Raises:
            ImageNotFoundError: the registry has no such repository, tag or digest.
            UnsuitableImageError: it has no image for `platform`.
            RegistryError: the registry did not say whether it has the image.
        """
        reference, wanted = Reference.parse(image), NodePlatform.parse(platform)
        found = await self._manifest(reference, reference.digest or reference.tag or "latest")
        manifest = self._read(Manifest, found.content, reference)
        if manifest.manifests is not None or found.media_type in INDEXES:
            entry = self._entry(manifest.manifests or [], wanted, reference)
            inner = await self._manifest(reference, entry.digest)
            manifest = self._read(Manifest, inner.content, reference)
        if manifest.config is None or manifest.config.media_type not in CONFIGS:
            kind = one_line(manifest.config.media_type if manifest.config else found.media_type, 80)
            raise UnsuitableImageError(
                f"{image} is no container image, but {kind or 'something of unknown type'}",
                advice="Name a container image. Nothing was written.",
            )
        response = await self._get(f"{reference.path}/blobs/{manifest.config.digest}", reference)
        if response.status_code != httpx.codes.OK:
            refuse(response, self.registry, f"the configuration of {_named(reference)}", self._credentials)
        self._verify(response.content, manifest.config.digest, reference)
        config = self._read(ImageConfig, response.content, reference)
        built = NodePlatform.of(config.os, config.architecture, config.variant)
        if not _runs(built, wanted):
            raise self._unsuitable(image, wanted, [built])
        return ImageFacts(
            image=image,
            digest=found.digest,
            platform=str(wanted),
            # Reproducible builds record the beginning of Unix time.
            created=config.created if config.created and config.created.timestamp() > 0 else None,
            size=manifest.config.size + sum(layer.size for layer in manifest.layers),
        )

    async def digest(self, image: str) -> str:
        """Return the digest that the image's tag has now. Docker Hub does not count this as a pull.

        Raises:
            ImageNotFoundError: the registry has no such repository, tag or digest.
            RegistryError: the registry did not say whether it has the image.
        """
        reference = Reference.parse(image)
        wanted = reference.digest or reference.tag or "latest"
        path = f"{reference.path}/manifests/{wanted}"
        response = await self._get(path, reference, method="HEAD", accept=(*INDEXES, *MANIFESTS))
        named = response.headers.get("Docker-Content-Digest", "")
        if response.status_code == httpx.codes.OK and named.startswith("sha256:"):
            return str(named)
        # The answer to a HEAD has no body that could explain a refusal.
        return (await self._manifest(reference, wanted)).digest

    async def tags(self, repository: str, *, limit: int = MAX_TAGS) -> list[str]:
        """Return the tags of a repository, in the order of the registry.

        Args:
            repository: path of the repository in this registry, such as `shop/web`.
            limit: stop after the page that reaches this number.

        Raises:
            ImageNotFoundError: the registry has no such repository.
            RegistryError: the registry did not list its tags, or has more than `MAX_TAGS`.
        """
        found: list[str] = []
        async for page in self._pages(Reference(self.registry, repository)):
            found += page
            if len(found) > MAX_TAGS:
                raise RegistryError(
                    f"{self.registry}/{repository} has more than {MAX_TAGS} tags", registry=self.registry
                )
            if len(found) >= limit:
                break
        return list(dict.fromkeys(found))

    async def _pages(self, reference: Reference) -> AsyncIterator[list[str]]:
        what = f"the tags of {reference.path}"
        url = httpx.URL(f"{reference.path}/tags/list", params={"n": PAGE_SIZE})
        seen: set[httpx.URL] = set()
        while url not in seen:
            seen.add(url)
            response = await self._get(url, reference)
            if response.status_code == httpx.codes.NOT_FOUND:
                raise self._no_repository(reference)
            if response.status_code != httpx.codes.OK:
                refuse(response, self.registry, what, self._credentials)
            yield read(TagPage, response.content, what, self.registry).tags or []
            following = response.links.get("next", {}).get("url")
            if not following:
                return
            url = response.url.join(following)
            if (url.scheme, url.netloc) != (response.url.scheme, response.url.netloc):
                raise RegistryError(
                    f"{self.registry} continues {what} at another address", registry=self.registry
                )
        raise RegistryError(f"{self.registry} repeats a page of {what}", registry=self.registry)

    async def _manifest(self, reference: Reference, tag: str) -> _Found:
        path = f"{reference.path}/manifests/{tag}"
        response = await self._get(path, reference, accept=(*INDEXES, *MANIFESTS))
        if response.status_code == httpx.codes.NOT_FOUND:
            raise (
                self._no_repository(reference)
                if unknown_repository(response)
                else await self._no_tag(reference, tag)
            )
        if response.status_code != httpx.codes.OK:
            refuse(response, self.registry, _named(reference), self._credentials)
        named = response.headers.get("Docker-Content-Digest", "")
        digest = tag if ":" in tag else named
        if not digest.startswith(("sha256:", "sha384:", "sha512:")):
            digest = f"sha256:{hashlib.sha256(response.content).hexdigest()}"
        self._verify(response.content, digest, reference)
        media_type = response.headers.get("Content-Type", "").partition(";")[0].strip()
        return _Found(response.content, digest, media_type)

    def _verify(self, content: bytes, digest: str, reference: Reference) -> None:
        algorithm, _, wanted = digest.partition(":")
        known = algorithm in {"sha256", "sha384", "sha512"}
        if not known or hashlib.new(algorithm, content).hexdigest() != wanted:
            raise RegistryError(
                f"{self.registry} answered {_named(reference)} with content of another digest",
                advice="Give this message to the registry's operators: its content may be damaged.",
                registry=self.registry,
            )

    def _read(self, shape: type[M], content: bytes, reference: Reference) -> M:
        return read(shape, content, _named(reference), self.registry)

    def _entry(self, entries: Sequence[Descriptor], wanted: NodePlatform, reference: Reference) -> Descriptor:
        found = [
            (NodePlatform.of(each.platform.os, each.platform.architecture, each.platform.variant), each)
            for each in entries
            if each.platform and each.platform.os != "unknown"  # attestations of a build
        ]
        fitting = [(built, each) for built, each in found if _runs(built, wanted)]
        if not fitting:
            raise self._unsuitable(_named(reference), wanted, [built for built, _ in found])
        return max(fitting, key=lambda each: (each[0] == wanted, each[0].variant))[1]

    def _unsuitable(
        self, image: str, wanted: NodePlatform, built: Sequence[NodePlatform]
    ) -> UnsuitableImageError:
        platforms = ", ".join(dict.fromkeys(one_line(each, 60) for each in built)) or "none"
        return UnsuitableImageError(
            f"{one_line(image, 300)} is not built for {wanted}: its platforms are {platforms}",
            advice=f"Build and push it for {wanted}, or correct the nodes' platform in the target's block. "
            "Nothing was written.",
            platforms=[str(each) for each in built],
        )

    def _no_repository(self, reference: Reference) -> ImageNotFoundError:
        return ImageNotFoundError(
            f"{self.registry} has no repository {reference.path!r}", registry=self.registry
        )

    async def _no_tag(self, reference: Reference, tag: str) -> RolloutError:
        try:
            tags = await self.tags(reference.path, limit=SEARCHED_TAGS)
        except ImageNotFoundError as error:
            return error
        except RegistryError:  # the tag is missing all the same
            tags = []
        near = [] if ":" in tag else difflib.get_close_matches(tag, tags, n=8, cutoff=0.4)
        kind = "digest" if ":" in tag else "tag"
        problem = f"{reference.repository} has no {kind} {one_line(tag, 140)!r}"
        if not near:
            return ImageNotFoundError(problem, registry=self.registry)
        return ImageNotFoundError(
            problem,
            advice=f"Similar tags: {', '.join(one_line(each, 128) for each in near)}. Nothing was written.",
            known=near,
            registry=self.registry,
        )

    async def _get(
        self, path: httpx.URL | str, reference: Reference, *, method: str = "GET", accept: Sequence[str] = ()
    ) -> httpx.Response:
        """Send one request; blobs may be answered with a redirect to a storage."""
        with self._as_ours(_named(reference)):
            async with asyncio.timeout(self._seconds):
                return await self._http.request(
                    method,
                    path,
                    headers={"Accept": ", ".join(accept)} if accept else {},
                    extensions={"repository": reference.path},
                    follow_redirects=True,
                )

    async def _same_security(self, request: httpx.Request) -> None:
        if request.url.scheme not in self._schemes:
            raise RegistryError(
                f"{self.registry} redirects to an address without https", registry=self.registry
            )
        # A redirect of the token server could take the refresh token elsewhere.
        if request.extensions.get("only_at", request.url.netloc) != request.url.netloc:
            raise RegistryError(f"the token server of {self.registry} redirects", registry=self.registry)

    async def _bounded(self, response: httpx.Response) -> None:
        encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
        if encoding not in {"", "identity"}:
            raise RegistryError(
                f"{self.registry} answered with compressed content, which was not requested",
                registry=self.registry,
            )
        response.stream = _Bounded(response.stream, self.registry)

    @contextmanager
    def _as_ours(self, what: str) -> Iterator[None]:
        """Convert errors of httpx. Nothing else does this."""
        known: dict[str, Any] = {"registry": self.registry}
        try:
            yield
        except (TimeoutError, httpx.TimeoutException) as error:
            raise RegistryUnreachableError(
                f"{self.registry} did not answer in time, asked for {what}", **known
            ) from error
        except (httpx.InvalidURL, httpx.UnsupportedProtocol, httpx.LocalProtocolError) as error:
            raise ConfigurationError(
                f"{self.registry} cannot be asked for {what}: {type(error).__name__}",
                advice="Correct the name of the registry, or its user name and password.",
                **known,
            ) from None  # its text may quote a header
        except httpx.TooManyRedirects as error:
            raise RegistryError(f"{self.registry} redirects too often", **known) from error
        except httpx.TransportError as error:
            if untrusted(error):
                raise RegistryUnreachableError(
                    f"the certificate of {self.registry} is not trusted: {one_line(error, 160)}",
                    advice="Save a block image-registry that names the file of your private CA as ca_file.",
                    retryable=False,
                    **known,
                ) from error
            cause = one_line(error, 120) or type(error).__name__
            raise RegistryUnreachableError(f"{self.registry} cannot be reached: {cause}", **known) from error
        except httpx.HTTPError as error:
            raise RegistryError(f"{self.registry} cannot be read: {type(error).__name__}", **known) from error


class _Bounded(httpx.AsyncByteStream):
    """A body that ends with an error after `MAX_BYTES`."""

    def __init__(self, stream: Any, registry: str) -> None:
        self._stream, self._registry = stream, registry

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """Yield the parts of the body."""
        size = 0
        async for part in self._stream:
            size += len(part)
            if size > MAX_BYTES:
                raise RegistryError(
                    f"an answer of {self._registry} is longer than {MAX_BYTES // 1024**2} MiB",
                    registry=self._registry,
                )
            yield part

    async def aclose(self) -> None:
        """Close the connection's body."""
        await self._stream.aclose()


def _named(reference: Reference) -> str:
    tag = f"@{reference.digest}" if reference.digest else f":{reference.tag or 'latest'}"
    return f"{reference.repository}{tag}"


def _runs(built: NodePlatform, wanted: NodePlatform) -> bool:
    """Return True if nodes of `wanted` run an image for `built`, as linux/arm/v7 runs v6.

    The variant of nodes without one is unknown: they count as able to run any.
    """
    return built[:2] == wanted[:2] and (not wanted.variant or built.variant <= wanted.variant)
