"""Chooses what each cluster goes back to."""

from collections.abc import Mapping

from prefect_rollout.blocks import open_target
from prefect_rollout.errors import ForeignTemplateError, NoPreviousTemplateError
from prefect_rollout.models import Deployment, Id, Template, Version, same_id
from prefect_rollout.platforms.port import Platform
from prefect_rollout.tasks.before import Before
from prefect_rollout.tasks.step import say, step
from prefect_rollout.text import one_line


@step("choose rollback", "choose what {deployment.name} goes back to")
async def choose_rollback(
    deployment: Deployment,
    before: Mapping[str, Before],
    to_template: int | str | None = None,
    *,
    target: str,
) -> dict[str, Version]:
    """`{cluster: version}`: `to_template`, or what was online in each cluster before what is now.

    As with `kubectl rollout undo`, what was rolled back from is the previous one of the next rollback.

    Args:
        deployment: as step 1 found it.
        before: what is online in each cluster.
        to_template: one template for all clusters; `None` and empty text mean each cluster's previous.
        target: the block document `type-slug/name` of the platform.

    Raises:
        NoPreviousTemplateError: the history has no other template for a cluster.
        TemplateNotFoundError: there is no such template, or not any more.
        ForeignTemplateError: `to_template` belongs to another deployment.
        UnreadableTemplateError: it is not an apps/v1 Deployment.
    """
    online = {cluster: each.template_id for cluster, each in before.items()}
    async with open_target(target) as platform:
        templates = await find_previous(platform, deployment, online, to_template)
    found = {cluster: template.version for cluster, template in templates.items()}
    say(
        "choose rollback",
        ", ".join(f"{one_line(name, 80)} to template {one_line(v.id, 40)}" for name, v in found.items()),
    )
    return found


async def find_previous(
    platform: Platform,
    deployment: Deployment,
    online: Mapping[str, Id | None],
    to_template: Id | None = None,
) -> dict[str, Template]:
    """The templates that `choose_rollback` tells of, and the same errors; their texts may hold secrets.

    Args:
        platform: where to look.
        deployment: as step 1 found it.
        online: `{cluster: template}` of what is online.
        to_template: one template for all clusters; `None` and empty text mean each cluster's previous.
    """
    if to_template in {None, ""}:
        chosen = await _previous(platform, deployment, online)
    else:
        chosen = dict.fromkeys(online, to_template)
    templates: dict[str, Template] = {}
    for template_id in {str(each): each for each in chosen.values()}.values():
        template = await platform.template(deployment, template_id)
        if template.deployment_id is not None and not same_id(template.deployment_id, deployment.id):
            raise ForeignTemplateError(
                f"template {one_line(template_id, 120)} is not one of {one_line(deployment.name, 120)}'s",
                template_id=template_id,
            )
        templates[str(template_id)] = template
    return {cluster: templates[str(template_id)] for cluster, template_id in chosen.items()}


async def _previous(
    platform: Platform, deployment: Deployment, online: Mapping[str, Id | None]
) -> dict[str, Id]:
    found: dict[str, Id] = {}
    async for publication in platform.history(deployment):
        cluster = publication.cluster
        if cluster not in online or cluster in found or publication.status != 1:
            continue
        now = online[cluster]
        if now is not None and not same_id(publication.template_id, now):
            found[cluster] = publication.template_id
            if len(found) == len(online):
                break
    missing = [one_line(cluster, 80) for cluster in online if cluster not in found]
    if missing:
        raise NoPreviousTemplateError(
            f"the history of {one_line(deployment.name, 120)} has no earlier template for "
            f"{', '.join(missing)}",
            clusters=missing,
        )
    return {cluster: found[cluster] for cluster in online}
