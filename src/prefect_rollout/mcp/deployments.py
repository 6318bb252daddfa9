"""Read deployments from the platform: the live state and the templates."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from prefect_rollout.blocks import open_target, opened_as
from prefect_rollout.ids import same_id
from prefect_rollout.mcp import types
from prefect_rollout.mcp.connection import Api
from prefect_rollout.mcp.policy import Policy
from prefect_rollout.mcp.untrusted import quoted
from prefect_rollout.platforms.port import Platform
from prefect_rollout.release.replicas import now as replicas_now
from prefect_rollout.release.revisions import why_not
from prefect_rollout.runs.records import known_here
from prefect_rollout.verdict.status import running as running_pods


@asynccontextmanager
async def _platform(api: Api, target: str) -> AsyncIterator[tuple[Platform, str]]:
    """Yield the platform of a target, and its name for an answer."""
    with api.in_force():
        async with open_target(target) as platform:
            yield platform, quoted((await opened_as(target)).words)


async def live(
    api: Api, target: str, app_id: int | str, name: str, clusters: list[str] | None
) -> types.DeploymentStatus:
    """Return the current state of a deployment.

    Raises:
        RolloutError: the platform did not answer, or its block cannot be used.
    """
    async with _platform(api, target) as (platform, cloud):
        workload = await platform.workload(app_id, name)
        replicas = platform.placement(workload, clusters).replicas
        names = list(replicas)
        online, status = await asyncio.gather(platform.online(workload), platform.status(workload, names))
    found = []
    for cluster in names:
        now = status.get(cluster)
        pods, more = types.pods_of((now and now.pods) or [])
        unseen = "the platform does not report its pods" if now is None or now.pods is None else ""
        wanted = replicas_now(now.desired if now else None, replicas[cluster])
        found.append(
            types.Cluster(
                cluster=quoted(cluster),
                online_template=types.id_of(online.get(cluster)),
                online_known=True,
                replicas=wanted.number,
                note="; ".join(filter(None, (wanted.note, unseen))),
                running=None if now is None or now.pods is None else running_pods(now.pods),
                pods=pods,
                more_pods=more,
            )
        )
    return types.DeploymentStatus(
        cloud=cloud,
        app_id=quoted(workload.app_id),
        app=quoted(workload.app),
        deployment=quoted(workload.name),
        clusters=found,
    )


async def templates(
    api: Api, policy: Policy, target: str, app_id: int | str, name: str, limit: int
) -> types.Templates:
    """Return the newest templates of a deployment.

    Raises:
        RolloutError: the platform did not answer, or its block cannot be used.
    """
    async with _platform(api, target) as (platform, cloud):
        workload = await platform.workload(app_id, name)
        online = await platform.online(workload)
        found = await platform.revisions(workload)
        known = await known_here(platform, workload, found[:limit], online, client=api.client)
    return types.Templates(
        cloud=cloud,
        deployment=quoted(workload.name),
        templates=[
            types.TemplateView(
                template_id=types.id_of(each.id) or "",
                images={quoted(name, 253): quoted(image) for name, image in each.images.items()},
                description=quoted(each.note, 500),
                created=quoted(each.created, 60),
                by=quoted(each.author, 120),
                not_released=quoted(why_not(known[str(each.id)], None), 300),
                online_in=[
                    quoted(cluster)
                    for cluster, revision in online.items()
                    if same_id(revision, each.id) and policy.allows_cluster(cluster)
                ],
            )
            for each in found[:limit]
        ],
        more=max(0, len(found) - limit),
    )
