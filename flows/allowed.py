"""Checks the images of a run against its target's block and the MCP server that started it."""

from collections.abc import Mapping

from prefect_rollout.blocks import opened_as
from prefect_rollout.blocks.target import Chosen
from prefect_rollout.flows.conduct import Run
from prefect_rollout.images import ALLOW, RAN_BEFORE, refuse_images
from prefect_rollout.tasks import images_that_ran
from prefect_rollout.tasks.step import tags_of_the_run


async def check_images(run: Run, coming: Mapping[str, str], named: Mapping[str, str]) -> None:
    """Return if the images may be released. Call it before anything is written.

    Args:
        run: has begun.
        coming: all images that are to run, by container.
        named: those of them that were named in place of a template's.

    Raises:
        InputError: one is not allowed; it says by whom, and how it can be allowed.
    """
    target = run.request.target
    chosen = await opened_as(target)
    refuse_by_block(chosen, coming)
    if not (patterns := _of_the_server()):
        return
    advice = "Who runs the MCP server allows its registry or repository with --allow-image."
    if RAN_BEFORE not in patterns:
        refuse_images(coming, patterns, by="this MCP server", advice=advice)
    elif named:
        ran = await images_that_ran(run.deployment, target=target)
        where = {*patterns, *chosen.block.registries, *ran} - {RAN_BEFORE}
        refuse_images(named, where, by="this MCP server, by what ran before,", advice=advice)


def refuse_by_block(chosen: Chosen, images: Mapping[str, str]) -> None:
    """Return if the target's block allows the images, by container.

    Raises:
        InputError: it does not allow one.
    """
    if chosen.block.allowed_images:
        refuse_images(
            images,
            chosen.block.allowed_images,
            by=f"the block {chosen.name}",
            advice="Add its registry or repository to the block's allowed_images in the Prefect UI.",
        )


def _of_the_server() -> set[str]:
    """The patterns of the MCP server that started the run; none if it was started in another way."""
    return {tag.removeprefix(ALLOW) for tag in tags_of_the_run() if tag.startswith(ALLOW)}
