"""Step 4: build the list of images, before and after the release."""

from collections.abc import Mapping, Sequence

from pydantic import BaseModel

from prefect_rollout.blocks import open_target
from prefect_rollout.errors import ContainerNotFoundError, InputError
from prefect_rollout.release.images import usable_image
from prefect_rollout.release.workload import Baseline, Revision, Workload
from prefect_rollout.runs.step import say, step
from prefect_rollout.tasks.read_baseline import baseline_of
from prefect_rollout.text import one_line


class ImageList(BaseModel):
    """The images of a release.

    Attributes:
        images: images after the release, `{container: image}`.
        baseline: the state of each cluster before it, with its images.
    """

    images: dict[str, str]
    baseline: dict[str, Baseline]


@step("build image list", "list images of template {template.id}")
async def build_image_list(
    workload: Workload,
    clusters: Sequence[str],
    template: Revision,
    images: Mapping[str, str] | None = None,
    *,
    target: str,
) -> ImageList:
    """List the images of the template's containers, and read what the clusters run now.

    A retry of the flow run uses the first result: its own writes do not change it.

    Args:
        workload: from step 1.
        clusters: the clusters of the release.
        template: from step 3.
        images: images that replace the template's, by container, as `kubectl set image` does.
        target: block of the platform, as type-slug/name.

    Raises:
        ContainerNotFoundError: the template has no container, or lacks one that `images` names; the
            error lists its containers.
        InputError: one of `images` is not an image reference.
    """
    chosen = choose_images(template, images)
    async with open_target(target) as platform:
        baseline = await baseline_of(platform, workload, clusters, [template])
    say("build image list", ", ".join(one_line(image, 120) for image in chosen.values()))
    return ImageList(images=chosen, baseline=baseline)


def choose_images(template: Revision, images: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the images after the release, `{container: image}`; see `build_image_list` for the errors."""
    where = f"in template {one_line(template.id, 80)}"
    if not template.images:
        raise ContainerNotFoundError(f"there is no container with a name and an image {where}")
    for container, image in (images or {}).items():
        if container not in template.images:
            raise ContainerNotFoundError.named(container, list(template.images), where)
        try:
            usable_image(image)
        except ValueError as error:
            raise InputError(f"images.{one_line(container, 80)}: {error}", field="images") from None
    return {**template.images, **(images or {})}
