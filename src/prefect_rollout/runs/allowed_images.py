"""Checks of a run's images against its target's block and the MCP server that started it."""

from collections.abc import Awaitable, Callable, Mapping, Sequence

from prefect_rollout.blocks import opened_as
from prefect_rollout.blocks.target import Chosen
from prefect_rollout.release.images import ALLOW, RAN_BEFORE, refuse_images
from prefect_rollout.runs.step import tags_of_the_run


async def refuse_forbidden_images(
    target: str,
    coming: Mapping[str, str],
    named: Mapping[str, str],
    ran: Callable[[], Awaitable[Sequence[str]]],
) -> None:
    """Check that the images of a release, by container, are allowed. Call it before anything is written.

    Of them, the request has `named` some. `ran` reads the registries and namespaces of earlier images.

    Raises:
        InputError: an image is not allowed; the message names who decides and how to allow it.
    """
    chosen = await opened_as(target)
    refuse_by_block(chosen, coming)
    # The patterns of the MCP server that started the run, if one did.
    patterns = {tag.removeprefix(ALLOW) for tag in tags_of_the_run() if tag.startswith(ALLOW)}
    if not patterns:
        return
    advice = "Who runs the MCP server allows its registry or repository with --allow-image."
    if RAN_BEFORE not in patterns:
        refuse_images(coming, patterns, by="this MCP server", advice=advice)
    elif named:
        where = {*patterns, *chosen.block.registries, *await ran()} - {RAN_BEFORE}
        refuse_images(named, where, by="this MCP server, by what ran before,", advice=advice)


def refuse_by_block(chosen: Chosen, images: Mapping[str, str]) -> None:
    """Check that the target's block allows the images, by container.

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
