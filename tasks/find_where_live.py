"""Find the clusters in which a revision was released."""

from collections.abc import Collection

from prefect.cache_policies import NO_CACHE

from prefect_rollout.blocks import open_target
from prefect_rollout.ids import same_id
from prefect_rollout.release.revisions import Known
from prefect_rollout.release.workload import Workload
from prefect_rollout.runs.records import known_here
from prefect_rollout.runs.step import step


# Judged again under the lock: a release or a rollback may have happened in the meantime.
@step("choose rollback", "look where template {template_id} was live", cache_policy=NO_CACHE)
async def find_where_live(
    workload: Workload, clusters: Collection[str], template_id: int | str, *, target: str
) -> list[str]:
    """Return the clusters in which the template was released at any time.

    Raises:
        ConfigurationError: the Prefect API did not answer.
    """
    published: set[str] = set()
    known: dict[str, Known] = {}
    async with open_target(target) as platform:
        async for cluster, revision in platform.published(workload):
            if same_id(revision, template_id):
                published.add(cluster)
                if published >= set(clusters):
                    break
        if published:
            found = await platform.revision(workload, template_id)
            known = (await known_here(platform, workload, [found], {}))[str(found.id)]
    return [
        cluster
        for cluster in clusters
        if cluster in published and (cluster not in known or known[cluster].was_live)
    ]
