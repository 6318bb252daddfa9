"""Look up the registries and namespaces of a deployment's earlier images."""

from itertools import count

from prefect_rollout.blocks import open_target
from prefect_rollout.release.images import Reference, is_reference
from prefect_rollout.release.workload import Workload
from prefect_rollout.runs.step import say, step

_WRITES = 100  # the newest ones are enough to know the registries


@step("build image list", "look up the registries of {workload.name}")
async def images_that_ran(workload: Workload, *, target: str) -> list[str]:
    """Return the registries and namespaces, such as `harbor.example/team`, of published revisions."""
    async with open_target(target) as platform:
        ran = {str(revision) for revision in (await platform.online(workload)).values()}
        number = count(1)
        async for _, revision in platform.published(workload):
            ran.add(str(revision))
            if next(number) >= _WRITES:
                break
        revisions = await platform.revisions(workload)
    images = [image for each in revisions if str(each.id) in ran for image in each.images.values()]
    found = sorted({Reference.parse(image).namespace for image in images if is_reference(image)})
    say("build image list", f"images came from {', '.join(found) or 'nowhere'}")
    return found
