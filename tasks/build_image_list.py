"""Step 4: build the list of images."""

from collections.abc import Mapping

from prefect_rollout.errors import ContainerNotFoundError, InputError
from prefect_rollout.images import usable_image
from prefect_rollout.models import Version
from prefect_rollout.tasks.step import say, step
from prefect_rollout.text import one_line


@step("build image list", "list images of template {template.id}")
async def build_image_list(template: Version, images: Mapping[str, str] | None = None) -> dict[str, str]:
    """`{container: image}` of the template's containers that have a name and an image.

    Args:
        template: as step 3 found it.
        images: replaces the images of the containers it names, as `kubectl set image` does.

    Raises:
        ContainerNotFoundError: the template has no container, or none of a name in `images`; the
            error lists those that exist.
        InputError: one of `images` is no image reference.
    """
    chosen = choose_images(template, images)
    say("build image list", ", ".join(one_line(image, 120) for image in chosen.values()))
    return chosen


def choose_images(template: Version, images: Mapping[str, str] | None = None) -> dict[str, str]:
    """What `build_image_list` returns, and the same errors."""
    listed = template.images
    where = f"in template {one_line(template.id, 80)}"
    if not listed:
        raise ContainerNotFoundError(f"there is no container with a name and an image {where}")
    for container, image in (images or {}).items():
        if container not in listed:
            raise ContainerNotFoundError.named(container, list(listed), where)
        try:
            usable_image(image)
        except ValueError as error:
            raise InputError(f"images.{one_line(container, 80)}: {error}", field="images") from None
    return {**listed, **(images or {})}
