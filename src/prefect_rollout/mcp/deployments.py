"""Answers about deployments: the live state and the templates."""

from prefect_rollout.execution import deployments
from prefect_rollout.ids import same_id
from prefect_rollout.mcp import types
from prefect_rollout.mcp.connection import Api
from prefect_rollout.mcp.policy import Policy
from prefect_rollout.mcp.untrusted import quoted


async def live(
    api: Api, target: str, app_id: int | str, name: str, clusters: list[str] | None
) -> types.DeploymentStatus:
    """Return the current state of a deployment.

    Raises:
        RolloutError: the platform did not answer, or its block cannot be used.
    """
    with api.in_force():
        found = await deployments.live(target, app_id, name, clusters)
    shown = []
    for each in found.clusters:
        unseen = "the platform does not report its pods" if each.pods is None else ""
        shown.append(
            types.cluster_of(
                each.name,
                each.pods,
                online=each.online,
                wanted=each.replicas.number,
                note="; ".join(filter(None, (each.replicas.note, unseen))),
            )
        )
    return types.DeploymentStatus(
        cloud=quoted(found.cloud),
        app_id=quoted(found.workload.app_id),
        app=quoted(found.workload.app),
        deployment=quoted(found.workload.name),
        clusters=shown,
    )


async def templates(
    api: Api, policy: Policy, target: str, app_id: int | str, name: str, limit: int
) -> types.Templates:
    """Return the newest templates of a deployment.

    Raises:
        RolloutError: the platform did not answer, or its block cannot be used.
    """
    with api.in_force():
        found = await deployments.templates(target, app_id, name, limit, api.client)
    return types.Templates(
        cloud=quoted(found.cloud),
        deployment=quoted(found.workload.name),
        templates=[
            types.TemplateView(
                template_id=types.id_of(each.id) or "",
                images={quoted(name, 253): quoted(image) for name, image in each.images.items()},
                description=quoted(each.note, 500),
                created=quoted(each.created, 60),
                by=quoted(each.author, 120),
                not_released=quoted(reason, 300),
                online_in=[
                    quoted(cluster)
                    for cluster, revision in found.online.items()
                    if same_id(revision, each.id) and policy.allows_cluster(cluster)
                ],
            )
            for each, reason in found.newest
        ],
        more=found.more,
    )
