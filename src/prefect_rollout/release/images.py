"""Image references by the OCI grammar, and patterns of allowed images. Pure.

Docker and the kubelet read images by the same grammar, github.com/distribution/reference.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Literal, NamedTuple, Self

from prefect_rollout.errors import InputError
from prefect_rollout.text import one_line

LONGEST_REPOSITORY = 255

CheckImages = Literal["auto", "require", "warn", "off"]
"""Effect of an image that its registry does not have; see `ReleaseRequest.check_images`."""

EXAMPLE = "registry.example/team/web:1.2"

_HOST = r"[A-Za-z0-9]+(?:-+[A-Za-z0-9]+)*"
_DOMAIN = rf"(?:{_HOST}(?:\.{_HOST})*|\[[0-9A-Fa-f:]+\])(?::[0-9]+)?"
_PART = r"[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*"
_NAME = re.compile(rf"(?:{_DOMAIN}/)?{_PART}(?:/{_PART})*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_DIGEST = re.compile("sha256:[0-9a-f]{64}|sha384:[0-9a-f]{96}|sha512:[0-9a-f]{128}")
_PATTERN = re.compile(r"(?:[A-Za-z0-9._*-]+|\[[0-9A-Fa-f:*]+\])(?::[0-9*]+)?(?:/[a-z0-9._*-]+)*")

_HUB = "docker.io"
_IS_REGISTRY = "[.:]|^localhost$"  # first part of a name; any other name is on Docker Hub


class Reference(NamedTuple):
    """A parsed image reference."""

    domain: str  # registry, in lower case and without the default port; by default docker.io
    path: str  # repository in that registry
    tag: str = ""
    digest: str = ""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the reference in `text`.

        Raises:
            ValueError: `text` is not a reference; the message names the likely cause.
        """
        if cause := _cause(text):
            raise ValueError(f"{_shown(text)} is not an image reference: {cause}")
        name, tag, digest = _split(text)
        return cls(*_placed(name), tag or "", digest or "")

    @property
    def repository(self) -> str:
        """Registry and repository, such as `docker.io/library/nginx`."""
        return f"{self.domain}/{self.path}"

    @property
    def namespace(self) -> str:
        """Registry and first part of the repository, such as `harbor.example/team`."""
        return f"{self.domain}/{self.path.partition('/')[0]}"


def usable_image(text: str) -> str:
    """Return `text` if it is a reference that cannot be a tag alone.

    Raises:
        ValueError: it is not; the message names the likely cause.
    """
    Reference.parse(text)
    if not re.search("[/:@]", text):
        raise ValueError(
            f"{_shown(text)} may be a tag without its repository: give repository:tag, such as {EXAMPLE}"
        )
    return text


def with_tag(image: str, tag: str) -> str:
    """Return `image` with another tag, and without a digest."""
    return f"{_split(image)[0]}:{tag}"


def is_reference(text: str) -> bool:
    """Return True if a kubelet would try to pull `text`."""
    return not _cause(text)


# ---- what is allowed ----------------------------------------------------------------------------

ALLOW = "allow-image:"
"""Prefix of a flow run's tags that name a pattern of images that it may release."""

UNLISTED = "names-unlisted"
"""Tag of a run whose errors do not list known names: its starter may not be allowed to see them."""

RAN_BEFORE = "(ran before)"
"""Placeholder in a list of patterns for the registries and namespaces of a deployment's earlier images."""


def usable_pattern(text: str) -> str:
    """Return the pattern in the form that `allows` reads: with its registry, in lower case.

    Raises:
        ValueError: it is not a pattern.
    """
    if text == "*":
        return text
    if not _PATTERN.fullmatch(text.rstrip("/")):
        raise ValueError(
            f"{one_line(text, 120)!r} is not an image pattern: give registry/repository, without a scheme, "
            "a tag or a digest; `*` matches any letters of one part, and by itself all images"
        )
    first, slash, rest = text.rstrip("/").partition("/")
    if re.search(_IS_REGISTRY, first, re.IGNORECASE):
        return f"{_registry(first)}{slash}{rest}"
    return "/".join(_placed(f"{first}{slash}{rest}"))


def registry_patterns(registry_url: str | None) -> list[str]:
    """Return the pattern of the images in a registry; empty if `registry_url` is not one."""
    try:
        return [usable_pattern(re.sub("^[a-z]+://", "", registry_url))] if registry_url else []
    except ValueError:
        return []


def allows(patterns: Iterable[str], image: str) -> bool:
    """Return True if a pattern names the image's repository or one above it.

    Args:
        patterns: from `usable_pattern`; an empty list allows nothing.
        image: any text; it is not allowed if it is not a reference.
    """
    if not is_reference(image):
        return False
    parts = Reference.parse(image).repository.split("/")
    return any(pattern == "*" or _covers(pattern.split("/"), parts) for pattern in patterns)


def refuse_images(images: Mapping[str, str], patterns: Collection[str], *, by: str, advice: str) -> None:
    """Check that all `images` are allowed.

    Args:
        images: `{container: image}`.
        patterns: from `usable_pattern`.
        by: who allows them, such as `the block container-cloud/default`.
        advice: how to allow another image.

    Raises:
        InputError: an image is not allowed.
    """
    for container, image in images.items():
        if not allows(patterns, image):
            listed = ", ".join(one_line(pattern, 120) for pattern in sorted(patterns)[:20])
            shown = repr(one_line(image, 200)) if is_reference(image) else _shown(image)
            raise InputError(
                f"images.{one_line(container, 80)}: {shown} is not allowed: {by} allows {listed or 'none'}",
                advice=f"{advice} Nothing was written.",
                field="images",
            )


def _covers(pattern: list[str], parts: list[str]) -> bool:
    # Compare part by part: a `*` that matches a slash would allow foreign registries.
    return len(pattern) <= len(parts) and all(
        re.fullmatch(re.escape(wanted).replace(r"\*", ".*"), part)
        for wanted, part in zip(pattern, parts, strict=False)
    )


# ---- the grammar --------------------------------------------------------------------------------


def _split(text: str) -> tuple[str, str | None, str | None]:
    """Return the name, tag and digest; `None`, not empty, if one is absent."""
    rest, at, digest = text.partition("@")
    slash = rest.rfind("/") + 1
    last, colon, tag = rest[slash:].partition(":")
    return rest[:slash] + last, tag if colon else None, digest if at else None


def _placed(name: str) -> tuple[str, str]:
    """Return the registry and repository of a name; the default registry is Docker Hub."""
    first, slash, rest = name.partition("/")
    if slash and re.search(_IS_REGISTRY, first, re.IGNORECASE):
        domain, path = _registry(first), rest
    else:
        domain, path = _HUB, name
    return domain, f"library/{path}" if domain == _HUB and "/" not in path else path


def _registry(domain: str) -> str:
    found = domain.lower().removesuffix(":443")
    return _HUB if found == f"index.{_HUB}" else found


def _cause(text: str) -> str:
    """Return why `text` is not a reference; empty if it is one."""
    name, tag, digest = _split(text)
    repository = _placed(name)[1]
    empty = "perhaps a variable is empty"
    variable = re.search(r"[${}%<>()]", text)
    mistakes = (
        (not text, "it is empty"),
        (re.search(r"\s", text), "it holds a blank"),
        (re.search("[\"'`]", text), "it holds quotes"),
        (variable, f"it holds {variable and variable[0]!r}: perhaps a variable was not replaced"),
        ("://" in text, "leave out the scheme"),
        ("/" in (digest or ""), "a registry has no user name"),
        (
            digest is not None and not _DIGEST.fullmatch(digest),
            "after @ it needs a digest: sha256: and 64 digits, 0-9 and a-f",
        ),
        (not name or name.startswith("/"), f"it begins without a repository: {empty}"),
        ("//" in name or name.endswith("/"), f"a part of the repository is empty: {empty}"),
        (tag == "", f"no tag follows the colon: {empty}"),
        (tag is not None and len(tag) > 128, "its tag has more than 128 characters"),
        (
            tag is not None and not _TAG.fullmatch(tag),
            "its tag may hold letters, digits, '_', '.' and '-', and not begin with '.' or '-'",
        ),
        (repository != repository.lower(), "its repository has to be in lower case"),
        (
            len(repository) > LONGEST_REPOSITORY,
            f"its repository has more than {LONGEST_REPOSITORY} characters",
        ),
        (
            not _NAME.fullmatch(name),
            "each part of its repository is lower-case letters and digits, joined by '.', '_' or '-'",
        ),
        (re.fullmatch("[0-9a-f]{64}", text), "it is the id of an image"),
    )
    return next((cause for wrong, cause in mistakes if wrong), "")


def _shown(text: str) -> str:
    # The text before :// or @ may be a password.
    return "it" if "://" in text or "@" in text else repr(one_line(text, 120))
