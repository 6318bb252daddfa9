"""Step 5: upgrade the deployment, that is create the template that will be published."""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from prefect_rollout.blocks import open_target
from prefect_rollout.errors import NotFoundError, TemplateError, UpgradeError
from prefect_rollout.models import ClusterStatus, Deployment, Id, Template, marked, release_mark, same_id
from prefect_rollout.platforms.port import Platform
from prefect_rollout.tasks.step import may_have_run_before, run_logger, say, step
from prefect_rollout.text import one_line


class Before(BaseModel):
    """What stood in a cluster before a release.

    Attributes:
        template_id: the template that was online, if any.
        images: its images, if it can still be read.
        pods: `{pod: state}`; `None` where the platform did not say, or where this release was published
            already when it was looked at.
        generation: the cluster's generation, where it is reported.
        changed: whether the pods of what goes out differ from it; unknown counts as yes.
    """

    template_id: Id | None = None
    images: dict[str, str] | None = None
    pods: dict[str, str | None] | None = None
    generation: int | None = None
    changed: bool = True


class Upgrade(BaseModel):
    """The template that an upgrade created, and what stood in each cluster before it goes out."""

    template_id: Id
    before: dict[str, Before]


@step("upgrade deployment", "upgrade {deployment.name} from template {template.id}")
async def upgrade_deployment(
    deployment: Deployment,
    template: Template,
    clusters: Sequence[str],
    images: Mapping[str, str],
    *,
    release_id: str,
    reason: str = "",
    target: str,
) -> Upgrade:
    """Creates one template for all clusters, after noting what is online in each.

    An upgrade that is sent twice creates two templates. So every description ends in
    `release=<release_id>`, and a second try first looks for a template with that mark (contract,
    Idempotency).

    Args:
        deployment: as step 1 found it.
        template: what to upgrade from.
        clusters: where it will be published.
        images: `{container: image}` of the new template.
        release_id: names this release; a repeat with the same id creates nothing new.
        reason: why, for the template's description.
        target: the block document `type-slug/name` of the platform.

    Raises:
        UpgradeError: the platform created no template, or several. Nothing is published then.
    """
    async with open_target(target) as platform:
        created = await _created(platform, deployment, release_id) if may_have_run_before() else []
        before = await _look(platform, deployment, template, clusters, images, created)
        if created:
            run_logger().info("Template %s of this release exists: not created again", one_line(created[0]))
        else:
            created = await platform.upgrade(
                deployment,
                template_id=template.id,
                clusters=clusters,
                images=images,
                description=f"{one_line(reason, 200)} {release_mark(release_id)}".strip(),
                key=f"{release_id}:upgrade",
            )
    if len(created) != 1:
        listed = ", ".join(one_line(template_id, 40) for template_id in created) or "none"
        raise UpgradeError(
            f"the upgrade should leave one new template for all clusters, and left {listed}",
            template_ids=list(created),
        )
    say("upgrade deployment", f"template {one_line(created[0], 80)}")
    return Upgrade(template_id=created[0], before=before)


async def _created(platform: Platform, deployment: Deployment, release_id: str) -> list[Id]:
    return [template.id async for template in platform.templates(deployment) if marked(template, release_id)]


async def _look(
    platform: Platform,
    deployment: Deployment,
    base: Template,
    clusters: Sequence[str],
    images: Mapping[str, str],
    created: Sequence[Id],
) -> dict[str, Before]:
    online = {entry.cluster: entry.template_id for entry in await platform.online(deployment)}
    status = await platform.status(deployment, clusters)
    templates: dict[str, Template | None] = {str(base.id): base}
    before = {}
    for cluster in clusters:
        now = status.get(cluster)
        template = None
        if any(same_id(online.get(cluster, ""), own) for own in created):
            # This release was published here in an earlier run: what stood before it is not known.
            before[cluster] = Before()
            continue
        if cluster in online:
            key = str(online[cluster])
            if key not in templates:
                templates[key] = await _template(platform, deployment, online[cluster])
            template = templates[key]
        before[cluster] = Before(
            template_id=online.get(cluster),
            images=None if template is None else _images(template),
            pods=_listed(now, anything_online=cluster in online),
            generation=now.generation if now else None,
            changed=template is None or _pods_of(template) != _pods_of(base, images),
        )
    return before


def _listed(status: ClusterStatus | None, *, anything_online: bool) -> dict[str, str | None] | None:
    if status is None or status.pods is None:
        return None if anything_online else {}
    return {pod.name: pod.state for pod in status.pods}


async def _template(platform: Platform, deployment: Deployment, template_id: Id) -> Template | None:
    try:
        return await platform.template(deployment, template_id)
    except NotFoundError as error:
        # Deleted since it was published. It only serves to tell what changes.
        run_logger().warning("What was online before cannot be read: %s", error)
        return None


def _images(template: Template) -> dict[str, str] | None:
    try:
        return template.workload.images
    except TemplateError:
        return None


def _pods_of(template: Template, images: Mapping[str, str] | None = None) -> dict[str, Any] | None:
    """The pod template as JSON, with `images` in place of its own; `None` if it cannot be read."""
    try:
        pods = template.workload.spec.template.model_copy(deep=True)
    except TemplateError:
        return None
    for container in pods.spec.containers:
        if container and container.name and container.image:
            container.image = (images or {}).get(container.name, container.image)
    return pods.model_dump(mode="json", by_alias=True)
