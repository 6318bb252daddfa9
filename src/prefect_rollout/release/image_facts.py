"""Images as a registry describes them. Pure."""

import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Annotated, NamedTuple, Self

from pydantic import AfterValidator, BaseModel, Field

from prefect_rollout.release.images import Reference
from prefect_rollout.text import one_line

DEFAULT_PLATFORM = "linux/amd64"

_VARIANTS = {("arm64", "v8"): "", ("amd64", "v1"): "", ("arm", ""): "v7"}  # as containerd normalizes them
_ARCHITECTURES = {"x86_64": "amd64", "x86-64": "amd64", "aarch64": "arm64", "armhf": "arm", "i386": "386"}


class NodePlatform(NamedTuple):
    """Operating system, architecture and variant of nodes or of an image."""

    os: str
    architecture: str
    variant: str = ""

    @classmethod
    def of(cls, os: str, architecture: str, variant: str = "") -> Self:
        """Return the platform in containerd's normal form."""
        architecture = architecture.lower()
        architecture = _ARCHITECTURES.get(architecture, architecture)
        variant = variant.lower()
        return cls(os.lower(), architecture, _VARIANTS.get((architecture, variant), variant))

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the platform in `text`, such as `linux/arm64`.

        Raises:
            ValueError: `text` is not os/architecture or os/architecture/variant.
        """
        if not re.fullmatch(r"[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+){1,2}", text):
            raise ValueError("a platform is os/architecture, such as linux/amd64, or linux/arm/v7")
        return cls.of(*text.split("/"))

    def __str__(self) -> str:
        """Return such as `linux/arm/v7`."""
        return "/".join(part for part in self if part)


def _usable_platform(text: str) -> str:
    return str(NodePlatform.parse(text))


Platform = Annotated[str, AfterValidator(_usable_platform)]
"""A platform in containerd's normal form, such as `linux/amd64`."""


class ImageFacts(BaseModel, frozen=True):
    """An image as its registry describes it."""

    image: str = Field(description="The reference that was looked up.")
    digest: str = Field(description="Digest of the tag: of the index, if the image has several platforms.")
    platform: str = Field(description="Platform that was checked, such as linux/amd64.")
    created: datetime | None = Field(
        default=None, description="Time of the build; null if the image does not record it."
    )
    size: int = Field(description="Bytes that a node downloads if it has no layer of it yet.")

    def days_old(self, now: datetime) -> int | None:
        """Return the age in whole days; `None` if it is unknown."""
        return None if self.created is None else max(0, (now - self.created).days)


class CheckedImage(BaseModel):
    """An image of a release, and what its registry says about it."""

    container: str
    image: str = Field(description="The image to release.")
    digest: str = Field(default="", description="Digest that the registry has for it; empty if unknown.")
    platform: str = Field(default="", description="Platform of the nodes that it is built for.")
    created: datetime | None = Field(default=None, description="Time of its build; null if unknown.")
    days_old: int | None = Field(default=None, description="Age of the build in days; null if unknown.")
    size: int | None = Field(
        default=None, description="Bytes that a node downloads at most; null if unknown."
    )
    choice: str = Field(default="", description="Why this tag is the newest by the policy; else empty.")
    problem: str = Field(default="", description="Why the image may not run, as a clause; else empty.")

    @classmethod
    def of(cls, container: str, facts: ImageFacts, now: datetime) -> Self:
        """Return the image of a container with its facts."""
        return cls(container=container, **facts.model_dump(), days_old=facts.days_old(now))

    @property
    def age(self) -> str:
        """Such as `7 days old`; empty if unknown."""
        return "" if self.days_old is None else f"{self.days_old} day{'' if self.days_old == 1 else 's'} old"

    @property
    def megabytes(self) -> str:
        """Such as `54.1 MB`; empty if unknown."""
        return "" if self.size is None else f"{self.size / 1e6:.1f} MB"

    def __str__(self) -> str:
        """Return such as `sha256:0123456789ab, built 2026-11-20, 7 days old, 54.1 MB, linux/amd64`."""
        built = f"built {self.created:%Y-%m-%d}" if self.created else ""
        return ", ".join(
            filter(None, (short_digest(self.digest), built, self.age, self.megabytes, self.platform))
        )


def short_digest(digest: str) -> str:
    """Return the first characters of a digest, such as `sha256:0123456789ab`."""
    algorithm, colon, value = digest.partition(":")
    return f"{algorithm}{colon}{value[:12]}"


def image_warnings(checked: Sequence[CheckedImage]) -> list[str]:
    """Return a clause for each problem, with the containers that have it."""
    containers: dict[str, list[str]] = {}
    for each in checked:
        if each.problem:
            containers.setdefault(each.problem, []).append(one_line(each.container, 80))
    return [f"image of {', '.join(names)}: {one_line(why, 600)}" for why, names in containers.items()]


def image_notes(checked: Sequence[CheckedImage]) -> Iterator[str]:
    """Yield a clause for each choice of a tag, and for each problem."""
    for each in checked:
        if each.choice:
            yield f"tag of {one_line(each.container, 80)}: {one_line(each.choice, 1000)}"
    yield from image_warnings(checked)


def with_digests(images: Mapping[str, str], checked: Sequence[CheckedImage]) -> dict[str, str]:
    """Return `images` by container, with the digests that were read."""
    digests = {each.image: each.digest for each in checked}
    return {
        container: f"{image}@{digest}" if (digest := digests.get(image)) and "@" not in image else image
        for container, image in images.items()
    }


def pin_digest(image: str, digest: str) -> str:
    """Return `image` with `digest`, such as `registry.example/shop/web:1.2@sha256:…`; keep its tag.

    A runtime pulls by the digest alone, so a tag that is moved later changes nothing.

    Raises:
        ValueError: `image` is not a reference, `digest` is not a digest, or `image` names another digest.
    """
    named = Reference.parse(image).digest
    if named and named != digest:
        raise ValueError(f"the image names the digest {named}, and the registry {digest}")
    pinned = image if named else f"{image}@{digest}"
    Reference.parse(pinned)
    return pinned
