"""Step 5: upgrade the deployment, that is create the template that will be published."""

from collections.abc import Mapping, Sequence

from pydantic import BaseModel

from prefect_rollout import guard
from prefect_rollout.blocks import open_target
from prefect_rollout.errors import UpgradeError
from prefect_rollout.models import Deployment, Id, Version, marked, release_mark
from prefect_rollout.platforms.port import Platform
from prefect_rollout.tasks.before import Before, look_before
from prefect_rollout.tasks.step import may_have_run_before, run_logger, say, step
from prefect_rollout.text import one_line


class Upgrade(BaseModel):
    """The template that an upgrade created, and what stood in each cluster before it goes out."""

    template_id: Id
    before: dict[str, Before]


@step("upgrade deployment", "upgrade {deployment.name} from template {template.id}")
async def upgrade_deployment(
    deployment: Deployment,
    template: Version,
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
        before = await look_before(platform, deployment, clusters, [template], created)
        if created:
            run_logger().info("Template %s of this release exists: not created again", one_line(created[0]))
        else:
            created = await guard.write(
                platform.upgrade(
                    deployment,
                    template_id=template.id,
                    clusters=clusters,
                    images=images,
                    description=f"{one_line(reason, 200)} {release_mark(release_id)}".strip(),
                    key=f"{release_id}:upgrade",
                )
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
