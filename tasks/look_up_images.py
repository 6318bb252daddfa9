"""Look the images of a release up in their registries: newest tags, digests, platforms."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import NamedTuple

from pydantic import BaseModel

from prefect_rollout.blocks import Registries, open_target, opened_as
from prefect_rollout.errors import InputError
from prefect_rollout.platforms.port import Platform
from prefect_rollout.release.image_errors import ImageNotFoundError, RegistryError, UnsuitableImageError
from prefect_rollout.release.image_facts import CheckedImage, image_warnings, pin_digest
from prefect_rollout.release.images import CheckImages, Reference, is_reference, with_tag
from prefect_rollout.release.newest import newest
from prefect_rollout.release.request import NewestPolicy
from prefect_rollout.release.revisions import why_not
from prefect_rollout.release.workload import Revision, Workload
from prefect_rollout.runs.records import known_here
from prefect_rollout.runs.step import run_logger, say, step
from prefect_rollout.text import one_line


class LookedUp(BaseModel):
    """The images of a release, `{container: image}`, and what their registries say about each."""

    images: dict[str, str]
    checked: list[CheckedImage]


@step("build image list", "look up images of {workload.name}")
async def look_up_images(
    workload: Workload,
    images: Mapping[str, str],
    named: Mapping[str, str] | None = None,
    *,
    check: CheckImages = "auto",
    policy: NewestPolicy | None = None,
    pin: bool = False,
    target: str,
) -> LookedUp:
    """Check that the registries have the images, for the platform of the nodes.

    Args:
        workload: from step 1.
        images: from step 4.
        named: the images that the request names.
        check: see `ReleaseRequest.check_images`.
        policy: chooses the newest tag of the named images without a tag; without `named`, of the only
            container.
        pin: return the images with their digests.
        target: block of the platform, as type-slug/name.

    Raises:
        ImageNotFoundError: a registry has no such image, or no tag that the policy accepts.
        UnsuitableImageError: an image is not built for the platform of the nodes.
        RegistryError: a registry did not answer, and `check` or another argument needs its answer.
        InputError: the policy does not say for which container it is, or an image is not a reference.
    """
    block = (await opened_as(target)).block
    insist = pin or check == "require"
    listed: list[CheckedImage] = []
    async with Registries(block.image_registries, insist=insist or policy is not None) as registries:
        choices: dict[str, _Choice] = {}
        if policy:
            async with open_target(target) as platform:
                revisions = await platform.revisions(workload)
                for container in containers_to_choose(images, named):
                    tags = await registries.tags(images[container])
                    failure = partial(_failure, platform, workload, revisions, container)
                    choices[container] = await _choose(policy, images[container], tags, failure)
        chosen = {**images, **{container: choice.image for container, choice in choices.items()}}
        if pin or check != "off":
            read = partial(_read, registries, platform=block.node_platform, check=check, insist=insist)
            found = await asyncio.gather(*(read(*each) for each in chosen.items()), return_exceptions=True)
            for each in found:
                if isinstance(each, BaseException):
                    raise each
                listed.append(each)
        else:
            listed = [CheckedImage(container=name, image=choice.image) for name, choice in choices.items()]
    for each in listed:
        each.choice = choices[each.container].why if each.container in choices else ""
        if pin:
            each.image = chosen[each.container] = pin_digest(each.image, each.digest)
    for warning in image_warnings(listed):
        run_logger().warning("%s", warning)
    say("build image list", ", ".join(one_line(image, 120) for image in chosen.values()))
    return LookedUp(images=chosen, checked=listed)


async def _read(
    registries: Registries, container: str, image: str, *, platform: str, check: CheckImages, insist: bool
) -> CheckedImage:
    """Return the image of a container with its facts, or with its problem if that is only a warning."""
    try:
        facts = await registries.image(image, platform)
    except (ImageNotFoundError, UnsuitableImageError) as error:
        if insist or check != "warn":
            raise
        problem = f"{error.problem}. {error.advice}".removesuffix(" Nothing was written.").rstrip(".")
    except RegistryError as error:
        if insist:
            raise
        problem = f"not checked, because {error.problem}. {error.advice}".rstrip(".")
    except ValueError as error:  # such as an image of the template that no node can pull
        if insist:
            raise InputError(f"images.{one_line(container, 80)}: {error}", field="images") from None
        problem = f"not checked, because {error}"
    else:
        return CheckedImage.of(container, facts, datetime.now(UTC))
    return CheckedImage(container=container, image=image, problem=problem)


# ---- the newest tag -----------------------------------------------------------------------------


class _Choice(NamedTuple):
    """An image with the newest tag, and the reasons for the choice."""

    image: str
    why: str


def containers_to_choose(images: Mapping[str, str], named: Mapping[str, str] | None) -> list[str]:
    """Return the containers whose tag is to be chosen."""
    if not named and len(images) > 1:
        raise InputError(
            f"newest: the template has the containers {', '.join(one_line(each, 80) for each in images)}",
            advice="Name the repository of each that gets its newest tag, without a tag, in images.",
            field="newest",
        )
    if not named:
        return list(images)
    return [container for container, image in named.items() if not any(Reference.parse(image)[2:])]


async def _choose(
    policy: NewestPolicy, image: str, tags: Sequence[str], failure: Callable[[str], Awaitable[str]]
) -> _Choice:
    """Return the newest image whose release did not fail."""
    failed: dict[str, str] = {}
    repository = Reference.parse(image).repository
    while True:
        # In a thread: a pattern may take long.
        found = await asyncio.to_thread(newest, policy, tags, repository=repository, failed=failed)
        chosen = with_tag(image, found.tag)
        why = await failure(chosen)
        if not why:
            return _Choice(chosen, found.why(policy))
        failed[found.tag] = why


async def _failure(
    platform: Platform, workload: Workload, revisions: Sequence[Revision], container: str, image: str
) -> str:
    """Return why the last release of an image failed, or has not ended; empty if it did not fail."""
    wanted = Reference.parse(image)[:3]
    for revision in revisions:
        ran = revision.images.get(container, "")
        if is_reference(ran) and Reference.parse(ran)[:3] == wanted:
            known = await known_here(platform, workload, [revision])
            return why_not(known[str(revision.id)], None)
    return ""
