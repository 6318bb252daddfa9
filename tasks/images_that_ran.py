"""Which registries and namespaces a deployment has had its images from."""

from prefect_rollout.blocks import open_target
from prefect_rollout.errors import TemplateError
from prefect_rollout.images import Reference, is_reference
from prefect_rollout.models import Deployment
from prefect_rollout.tasks.step import say, step

_PUBLICATIONS = 100  # the newest ones are enough to know where images come from


@step("build image list", "look up where images of {deployment.name} come from")
async def images_that_ran(deployment: Deployment, *, target: str) -> list[str]:
    """Return the registries and namespaces, such as `harbor.example/team`, of what was published before.

    Args:
        deployment: as step 1 found it.
        target: the block document `type-slug/name` of the platform.
    """
    async with open_target(target) as platform:
        ran = {str(entry.template_id) for entry in await platform.online(deployment)}
        seen = 0
        async for publication in platform.history(deployment):
            if publication.status == 1:
                ran.add(str(publication.template_id))
            if (seen := seen + 1) >= _PUBLICATIONS:
                break
        found: set[str] = set()
        async for template in platform.templates(deployment):
            if str(template.id) in ran:
                ran.remove(str(template.id))
                try:
                    images = template.workload.images.values()
                except TemplateError:  # it ran, and cannot be read any more
                    continue
                found |= {Reference.parse(image).namespace for image in images if is_reference(image)}
            if not ran:
                break
    say("build image list", f"images came from {', '.join(sorted(found)) or 'nowhere'}")
    return sorted(found)
