"""The newest tag of a repository by a policy, as Flux's ImagePolicy chooses it. Pure.

A registry does not list tags by age, and the time of a build needs a request for each image. So the order is
that of the tags: versions, numbers or text.

Unlike Flux, a tag that the order cannot read is left out instead of failing the policy, and numbers in parts,
such as 20240729-12, are compared part by part.
"""

import re
import time
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

import nodesemver
import regex

from prefect_rollout.release.image_errors import ImageNotFoundError
from prefect_rollout.release.request import GROUP_REFERENCE, NewestPolicy
from prefect_rollout.text import one_line

SHOWN = 5
"""Number of tags that an explanation names in each group."""

PATTERN_SECONDS = 2.0
_NUMBERS = re.compile(r"\d+(?:[._-]\d+)*", re.ASCII)
_TEXTUAL_NUMBER = re.compile(r"[A-Za-z-]+\d+")


class Newest(NamedTuple):
    """The newest tag, and the reasons for the choice.

    Attributes:
        tag: the newest tag.
        fitting: the first `SHOWN` tags that the policy accepts, newest first.
        total: number of tags that it accepts.
        left_out: the tags that it does not accept, `{reason: tags}`; at most `SHOWN` of each.
        counts: the number of tags for each reason.
        notes: what the user may not expect.
    """

    tag: str
    fitting: tuple[str, ...]
    total: int
    left_out: dict[str, tuple[str, ...]]
    counts: dict[str, int]
    notes: tuple[str, ...] = ()

    def why(self, policy: NewestPolicy) -> str:
        """Return the reasons as sentences, such as `1.4.2 is the highest version in ^1 …`."""
        after = f"; next: {_listed(self.fitting[1:], self.total - 1)}" if self.total > 1 else ""
        parts = [f"{one_line(self.tag, 128)} is {policy}, of {self.total} such tags{after}"]
        if self.left_out:
            parts.append(f"Left out: {_reasons(self.left_out, self.counts)}")
        return ". ".join([*parts, *self.notes])


def newest(
    policy: NewestPolicy, tags: Collection[str], *, repository: str, failed: Mapping[str, str] | None = None
) -> Newest:
    """Return the newest of `tags`.

    Args:
        policy: the rule.
        tags: all tags of the repository.
        repository: its name, for errors.
        failed: tags whose release failed, with the reason; they are left out.

    Raises:
        ImageNotFoundError: the policy accepts none of the tags; the error says why.
    """
    keyed: list[tuple[Any, str]] = []
    left_out: dict[str, list[str]] = {}
    for tag, text in _extracted(policy, tags, left_out):
        key, reason = _KEYS[policy.by](policy, text)
        if not reason and failed and tag in failed:
            reason = f"failed before ({one_line(failed[tag], 80)})"
        if reason:
            left_out.setdefault(reason, []).append(tag)
        else:
            keyed.append((key, tag))
    counts = {reason: len(found) for reason, found in left_out.items()}
    shown = {reason: tuple(sorted(found, reverse=True)[:SHOWN]) for reason, found in left_out.items()}
    if not keyed:
        why = f"Left out: {_reasons(shown, counts)}." if counts else "The repository has no tags."
        raise ImageNotFoundError(
            f"no tag of {one_line(repository, 255)} is {policy}",
            advice=f"{why} Push such an image, or correct the policy. Nothing was written.",
            counts=counts or None,
        )
    # Of tags that are equal, such as 1.2.3 and v1.2.3, the choice must not depend on the registry's order.
    ordered = [tag for _, tag in sorted(keyed, key=lambda each: (each[0], each[1]), reverse=True)]
    return Newest(
        ordered[0], tuple(ordered[:SHOWN]), len(ordered), shown, counts, tuple(_notes(policy, ordered))
    )


def _extracted(
    policy: NewestPolicy, tags: Iterable[str], left_out: dict[str, list[str]]
) -> Iterable[tuple[str, str]]:
    """Yield the tags that match the pattern, each with the text that is compared."""
    pattern = regex.compile(policy.pattern)
    end = time.monotonic() + PATTERN_SECONDS
    for tag in tags:
        try:
            found = pattern.search(tag, timeout=max(0.001, end - time.monotonic()))
        except TimeoutError:
            raise ImageNotFoundError(
                f"the pattern {one_line(policy.pattern, 200)!r} takes too long",
                advice="Simplify it: a repetition inside a repetition is slow. Nothing was written.",
            ) from None
        if found is None:
            left_out.setdefault("do not match the pattern", []).append(tag)
        else:
            yield tag, _expanded(policy.extract, found) if policy.extract else tag


def _expanded(extract: str, found: Any) -> str:
    def value(reference: re.Match[str]) -> str:
        braced, bare, dollar = reference.groups()
        if dollar:
            return "$"
        name = braced or bare
        return str(found.group(int(name) if name.isdigit() else name) or "")

    return GROUP_REFERENCE.sub(value, extract)


def _version(policy: NewestPolicy, text: str) -> tuple[Any, str]:
    try:
        version = nodesemver.make_semver(text, False)
    except ValueError:
        return None, "are no versions"
    if version.prerelease and not policy.prereleases:
        return None, "are pre-releases"
    plain = policy.range.replace(",", " ")
    if not nodesemver.satisfies(text, plain, False, policy.prereleases):
        return None, f"are outside {policy.range}"
    return nodesemver.full_key_function(text), ""


def _numbers(_: NewestPolicy, text: str) -> tuple[Any, str]:
    if not _NUMBERS.fullmatch(text):
        return None, "are no numbers"
    return tuple(int(part) for part in re.split("[._-]", text)), ""


def _text(_: NewestPolicy, text: str) -> tuple[Any, str]:
    return (text, "") if text else (None, "have nothing to compare")


_KEYS = {"semver": _version, "numerical": _numbers, "alphabetical": _text}


def _notes(policy: NewestPolicy, ordered: list[str]) -> Iterable[str]:
    if policy.by == "semver" and policy.prereleases:
        # SemVer compares rc9 and rc10 as text: a frequent surprise among users of Flux.
        parts = {part for tag in ordered for part in tag.partition("-")[2].split(".")}
        stems = [re.sub(r"\d+$", "", part) for part in parts if _TEXTUAL_NUMBER.fullmatch(part)]
        if len(stems) != len(set(stems)):
            yield "Pre-releases such as rc9 and rc10 are compared as text: name them rc.9 and rc.10"


def _listed(tags: Collection[str], count: int) -> str:
    more = f" and {count - len(tags)} more" if count > len(tags) else ""
    return ", ".join(one_line(tag, 128) for tag in tags) + more


def _reasons(left_out: Mapping[str, Collection[str]], counts: Mapping[str, int]) -> str:
    return "; ".join(
        f"{counts[reason]} {reason}: {_listed(tags, counts[reason])}" for reason, tags in left_out.items()
    )
