"""Find the clusters in which a revision was released."""

from collections.abc import Collection
from contextlib import suppress

from prefect.cache_policies import NO_CACHE

from prefect_rollout.blocks import open_target
from prefect_rollout.errors import TemplateNotFoundError
from prefect_rollout.ids import same_id
from prefect_rollout.platforms.port import revision_groups
from prefect_rollout.release.workload import Revision, Workload
from prefect_rollout.runs.records import known_here
from prefect_rollout.runs.step import step


# Judged again under the lock: a release or a rollback may have happened in the meantime.
@step("choose rollback", "look where template {template_id} was live", cache_policy=NO_CACHE)
async def find_where_live(
    workload: Workload, clusters: Collection[str], template_id: int | str, *, target: str
) -> list[str]:
    """Return the clusters in which the template was released at any time.

    Raises:
        ForeignTemplateError: the template belongs to another deployment.
        ConfigurationError: the Prefect API did not answer.
    """
    published: set[str] = set()
    wanted: dict[str, Revision] = {}
    async with open_target(target) as platform:
        for group, where in revision_groups(platform, list(clusters)):
            with suppress(TemplateNotFoundError):  # the next step says so
                wanted |= dict.fromkeys(group, await platform.revision(workload, template_id, where))
        async for cluster, revision in platform.published(workload):
            if cluster in wanted and same_id(revision, wanted[cluster].id):
                published.add(cluster)
                if published >= set(clusters):
                    break
        known = await known_here(platform, workload, list(wanted.values()), {}) if published else {}

    def was_live(cluster: str) -> bool:
        of_revision = known[str(wanted[cluster].id)]
        return cluster not in of_revision or of_revision[cluster].was_live

    return [cluster for cluster in clusters if cluster in published and was_live(cluster)]
