"""Step 3: get the template to release."""

from prefect_rollout.blocks import open_target
from prefect_rollout.errors import ForeignTemplateError, NoTemplateError, TemplateNotFoundError
from prefect_rollout.models import Deployment, Id, Template, Version, marked, newest_first, same_id
from prefect_rollout.platforms.port import Platform
from prefect_rollout.tasks.step import say, step
from prefect_rollout.text import one_line


@step("get template", "get template of {deployment.name}")
async def get_template(
    deployment: Deployment,
    template_id: int | str | None = None,
    *,
    release_id: str | None = None,
    target: str,
) -> Version:
    """Finds the template with that id, or the newest by id where none is named.

    What it returns is kept with the flow run's results; the template's text is not, for its
    environment values may be secrets.

    Args:
        deployment: as step 1 found it.
        template_id: a number or text, compared as text; `None` and empty text mean the newest.
        release_id: names this release; a template that it created itself is no base for it.
        target: the block document `type-slug/name` of the platform.

    Raises:
        NoTemplateError: the deployment has no template.
        TemplateNotFoundError: there is no template with that id.
        ForeignTemplateError: the template belongs to another deployment.
        UnreadableTemplateError: the template is not an apps/v1 Deployment.
    """
    async with open_target(target) as platform:
        template = await find_template(platform, deployment, template_id, release_id)
    version = template.version
    say("get template", f"template {one_line(template.id, 80)}")
    return version


async def find_template(
    platform: Platform, deployment: Deployment, template_id: Id | None, release_id: str | None
) -> Template:
    """The template that `get_template` tells of, and the same errors; its text may hold secrets."""
    if template_id is None or template_id == "":
        return await _newest(platform, deployment, release_id)
    return await _by_id(platform, deployment, template_id)


def _belongs(template: Template, deployment: Deployment) -> bool:
    return template.deployment_id is None or same_id(template.deployment_id, deployment.id)


async def _newest(platform: Platform, deployment: Deployment, release_id: str | None) -> Template:
    newest: Template | None = None
    # Not the first of the answer: a platform may sort otherwise, or not at all.
    async for template in platform.templates(deployment):
        if release_id is not None and marked(template, release_id):
            continue
        if _belongs(template, deployment) and (
            newest is None or newest_first(template.id) > newest_first(newest.id)
        ):
            newest = template
    if newest is None:
        raise NoTemplateError(f"deployment {one_line(deployment.name, 120)} has no template")
    return newest


async def _by_id(platform: Platform, deployment: Deployment, template_id: Id) -> Template:
    async for template in platform.templates(deployment):
        if same_id(template.id, template_id) and _belongs(template, deployment):
            return template
    # Not among the deployment's own: either another deployment's, or nobody's.
    template = await platform.template(deployment, template_id)
    if not same_id(template.id, template_id):
        raise TemplateNotFoundError.named(template_id, (), f"of {one_line(deployment.name, 120)}")
    raise ForeignTemplateError(
        f"template {one_line(template_id, 120)} is not one of {one_line(deployment.name, 120)}'s",
        template_id=template_id,
    )
