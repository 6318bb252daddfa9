"""Answers of a registry: manifests, configurations, refusals."""

from contextlib import suppress
from datetime import datetime
from typing import Any, NoReturn, TypeVar

import httpx
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.alias_generators import to_camel
from pydantic_core import from_json

from prefect_rollout.ids import Lenient, first_mistake
from prefect_rollout.platforms.http import seconds_to_wait
from prefect_rollout.platforms.registry.credentials import Credentials
from prefect_rollout.release.image_errors import (
    RegistryAccessError,
    RegistryError,
    RegistryLimitError,
    RegistryUnreachableError,
)
from prefect_rollout.text import masked, one_line

INDEXES = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)
MANIFESTS = (
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)
CONFIGS = ("application/vnd.oci.image.config.v1+json", "application/vnd.docker.container.image.v1+json")

M = TypeVar("M", bound=BaseModel)


class _Answer(BaseModel):
    model_config = ConfigDict(extra="ignore", alias_generator=to_camel)


class ManifestPlatform(BaseModel):
    """The platform of an index's entry."""

    os: str = ""
    architecture: str = ""
    variant: str = ""


class Descriptor(_Answer):
    """A reference to content by its digest."""

    media_type: str = ""
    digest: str
    size: int = Field(ge=0)
    platform: ManifestPlatform | None = None


class Manifest(_Answer):
    """An index, with `manifests`, or the manifest of one image, with `config` and `layers`."""

    media_type: str = ""
    manifests: list[Descriptor] | None = None
    config: Descriptor | None = None
    layers: list[Descriptor] = []


class ImageConfig(BaseModel):
    """The configuration of an image, as far as a release needs it."""

    os: str = ""
    architecture: str = ""
    variant: str = ""
    created: Lenient[datetime] = None


class TagPage(BaseModel):
    """A page of a list of tags."""

    tags: list[str] | None = None


def read(shape: type[M], content: bytes, what: str, registry: str) -> M:
    """Return an answer as `shape`; raise `RegistryError` if it is something else."""
    try:
        return shape.model_validate_json(content)
    except ValidationError as error:
        page = content.lstrip()[:1] == b"<"
        cause = "an HTML page" if page else f"an unexpected answer: {first_mistake(error)}"
        raise RegistryError(f"{registry} answered {what} with {cause}", registry=registry) from None


def refuse(response: httpx.Response, registry: str, what: str, known: Credentials | None) -> NoReturn:
    """Raise the error for a refusal.

    Args:
        response: the answer, with a status other than 200.
        registry: the registry, as images name it.
        what: the object that was requested, such as `shop/web:1.2`.
        known: the credentials that were at hand.
    """
    status = response.status_code
    code, message = _first_error(response.content)
    message = masked(message, known.secrets if known else ())
    said = f": {one_line(message, 160)}" if message else ""
    details: dict[str, Any] = {
        "registry": registry,
        "status": status,
        "retry_after": seconds_to_wait(response.headers.get("Retry-After")),
    }
    if status == 429 or code == "TOOMANYREQUESTS":
        limit = response.headers.get("RateLimit-Limit", "")
        of = f" of {one_line(limit, 40)}" if limit else ""
        raise RegistryLimitError(f"the rate limit{of} of {registry} is reached{said}", **details)
    if status == 401:
        if known is None:
            problem = f"{what} at {registry} needs credentials or does not exist; no credentials were found"
        else:
            problem = f"{registry} does not accept the credentials of {known.source} for {what}"
        raise RegistryAccessError(f"{problem}{said}", **details)
    if status == 403:
        by = f" by the credentials of {known.source}" if known else " without credentials"
        raise RegistryAccessError(f"{what} at {registry} may not be read{by}{said}", **details)
    if status >= 500:
        raise RegistryUnreachableError(f"{registry} failed when asked for {what}{said}", **details)
    if 300 <= status < 400:
        raise RegistryError(f"{registry} answered {what} with a redirect, which is not followed", **details)
    raise RegistryError(f"{registry} refused {what}{said}", **details)


def _first_error(content: bytes) -> tuple[str, str]:
    """Return the code and the message of a refusal; empty if it has none."""
    answer: Any = None
    with suppress(ValueError):
        answer = from_json(content)
    errors = answer.get("errors") if isinstance(answer, dict) else None
    first = errors[0] if isinstance(errors, list) and errors else None
    if isinstance(first, dict):
        return str(first.get("code") or ""), str(first.get("message") or "")
    # Token servers answer {"details": "…"}, as Docker Hub's, or {"error": "…"}.
    said = (answer.get("details") or answer.get("error")) if isinstance(answer, dict) else None
    return "", str(said or "")


def unknown_repository(response: httpx.Response) -> bool:
    """Return True if a 404 means that the repository is unknown, and not only the tag."""
    return _first_error(response.content)[0] == "NAME_UNKNOWN"
