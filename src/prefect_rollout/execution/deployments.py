"""Read deployments from the platform: the live state and the templates."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from prefect.client.orchestration import PrefectClient

from prefect_rollout.blocks import open_target, opened_as
from prefect_rollout.ids import Id
from prefect_rollout.release.replicas import Replicas
from prefect_rollout.release.replicas import now as replicas_now
from prefect_rollout.release.revisions import why_not
from prefect_rollout.release.workload import ListedRevision, Workload
from prefect_rollout.runs.records import known_here
from prefect_rollout.verdict.status import Pod


class LiveCluster(NamedTuple):
    """State of a deployment in one cluster; `online` and `pods` are `None` if they are unknown or none."""

    name: str
    online: Id | None
    replicas: Replicas
    pods: Sequence[Pod] | None


class Live(NamedTuple):
    """State of a deployment; `cloud` names the platform and the block."""

    cloud: str
    workload: Workload
    clusters: list[LiveCluster]


class Templates(NamedTuple):
    """The newest templates of a deployment; the text says why one is not released by default."""

    cloud: str
    workload: Workload
    newest: list[tuple[ListedRevision, str]]
    more: int
    online: Mapping[str, Id]


async def live(target: str, app_id: int | str, name: str, clusters: list[str] | None) -> Live:
    """Return the current state of a deployment.

    Raises:
        RolloutError: the platform did not answer, or its block cannot be used.
    """
    async with open_target(target) as platform:
        workload = await platform.workload(app_id, name)
        replicas = platform.placement(workload, clusters).replicas
        online, status = await asyncio.gather(
            platform.online(workload), platform.status(workload, list(replicas))
        )
        cloud = (await opened_as(target)).words
    found = []
    for cluster, configured in replicas.items():
        now = status.get(cluster)
        wanted = replicas_now(now.desired if now else None, configured)
        found.append(LiveCluster(cluster, online.get(cluster), wanted, now.pods if now else None))
    return Live(cloud, workload, found)


async def templates(
    target: str, app_id: int | str, name: str, limit: int, client: PrefectClient
) -> Templates:
    """Return the newest templates of a deployment.

    Raises:
        RolloutError: the platform did not answer, or its block cannot be used.
    """
    async with open_target(target) as platform:
        workload = await platform.workload(app_id, name)
        online = await platform.online(workload)
        found = await platform.revisions(workload)
        newest = found[:limit]
        known = await known_here(platform, workload, newest, online, client=client)
        cloud = (await opened_as(target)).words
    reasons = [(each, why_not(known[str(each.id)], None)) for each in newest]
    return Templates(cloud, workload, reasons, len(found) - len(newest), online)
