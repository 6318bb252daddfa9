"""What stood in each cluster before a write: noted, so that the verdict and a rollback know it."""

import asyncio
from collections.abc import Mapping, Sequence

from pydantic import BaseModel

from prefect_rollout.blocks import open_target
from prefect_rollout.errors import ConflictError, NoTemplateError, NotFoundError, TemplateError
from prefect_rollout.models import ClusterStatus, Deployment, Id, Version, same_id
from prefect_rollout.platforms.port import Platform
from prefect_rollout.settings import patience
from prefect_rollout.tasks.step import run_logger, say, step
from prefect_rollout.text import one_line
from prefect_rollout.turns import resting
from prefect_rollout.verdict import Expected

# How often pods that are not reported are looked for again; the pause doubles each time.
_LOOKS_AGAIN = 3


class Before(BaseModel):
    """What stood in a cluster before a release.

    Attributes:
        template_id: the template that was online, if any.
        version: what is known of it; `None` where it cannot be read any more.
        pods: `{pod: state}`; `None` where the platform did not say, or where this release was published
            already when it was looked at.
        generation: the cluster's generation, where it is reported.
        desired: how many pods the platform was asked for, where it is reported.
    """

    template_id: Id | None = None
    version: Version | None = None
    pods: dict[str, str | None] | None = None
    generation: int | None = None
    desired: int | None = None

    def differs_from(self, version: Version) -> bool:
        """Whether the pods of `version` differ from those that were online; unknown counts as yes."""
        return self.version is None or (self.version.digest, self.version.images) != (
            version.digest,
            version.images,
        )


@step("note what is online", "note what is online of {deployment.name}")
async def note_online(deployment: Deployment, clusters: Sequence[str], *, target: str) -> dict[str, Before]:
    """What stands in each cluster now, before a rollback, restart or scaling.

    Args:
        deployment: as step 1 found it.
        clusters: where to look.
        target: the block document `type-slug/name` of the platform.
    """
    async with open_target(target) as platform:
        before = await look_before(platform, deployment, clusters)
    listed = (f"{one_line(name, 80)} {one_line(found.template_id, 40)}" for name, found in before.items())
    say("note what is online", ", ".join(listed))
    return before


async def look_before(
    platform: Platform,
    deployment: Deployment,
    clusters: Sequence[str],
    known: Sequence[Version] = (),
    own: Sequence[Id] = (),
) -> dict[str, Before]:
    """What stands in each cluster now.

    Args:
        platform: where to look.
        deployment: as step 1 found it.
        clusters: the clusters.
        known: versions that need not be asked for.
        own: templates of this release. What stood before one that is online already is not known.
    """
    online = {entry.cluster: entry.template_id for entry in await platform.online(deployment)}
    live = [
        cluster
        for cluster, template_id in online.items()
        if cluster in clusters and not any(same_id(template_id, each) for each in own)
    ]
    status = await seen(platform, deployment, clusters, live)
    versions: dict[str, Version | None] = {str(version.id): version for version in known}
    before = {}
    for cluster in clusters:
        template_id, now = online.get(cluster), status.get(cluster)
        if template_id is not None:
            if any(same_id(template_id, each) for each in own):
                before[cluster] = Before()
                continue
            if str(template_id) not in versions:
                versions[str(template_id)] = await _version(platform, deployment, template_id)
        pods = pods_of(now)
        before[cluster] = Before(
            template_id=template_id,
            version=None if template_id is None else versions[str(template_id)],
            pods={} if pods is None and template_id is None else pods,
            generation=now.generation if now else None,
            desired=now.desired if now else None,
        )
    return before


async def seen(
    platform: Platform, deployment: Deployment, clusters: Sequence[str], live: Sequence[str]
) -> dict[str, ClusterStatus]:
    """Return the status of each cluster; looks again, for some seconds, where pods are not reported.

    Args:
        platform: where to look.
        deployment: as step 1 found it.
        clusters: the clusters.
        live: those where pods are to be expected.
    """
    status = await platform.status(deployment, clusters)
    pause = patience().retry_delay_seconds
    for _ in range(_LOOKS_AGAIN):
        unseen = [cluster for cluster in live if pods_of(status.get(cluster)) is None]
        if not unseen:
            break
        async with resting():
            await asyncio.sleep(pause)
        status |= await platform.status(deployment, unseen)
        pause *= 2
    return status


def pods_of(status: ClusterStatus | None) -> dict[str, str | None] | None:
    """`{pod: state}`; `None` where the platform does not say."""
    if status is None or status.pods is None:
        return None
    return {pod.name: pod.state for pod in status.pods}


async def still_online(platform: Platform, deployment: Deployment, expected: Sequence[Expected]) -> None:
    """Returns where what a try before this one published is still asked for.

    Raises:
        ConflictError: another release, or a rollback, has followed in a cluster.
    """
    if not expected:
        return
    online = {entry.cluster: entry.template_id for entry in await platform.online(deployment)}
    for each in expected:
        now = online.get(each.cluster)
        if now is not None and not same_id(now, each.template_id):
            raise ConflictError(
                f"template {one_line(each.template_id, 40)} is not online in {one_line(each.cluster, 80)} "
                f"any more, template {one_line(now, 40)} is: it was rolled back, or another release followed",
                advice="Start a new release if it should go out again.",
                cluster=each.cluster,
            )


def online_everywhere(deployment: Deployment, online: Mapping[str, Id | None]) -> dict[str, Id]:
    """`online`, once it is known that it names a template for each cluster.

    Raises:
        NoTemplateError: nothing is online in one of them.
    """
    found: dict[str, Id] = {}
    for cluster, template_id in online.items():
        if template_id is None:
            raise NoTemplateError(
                f"nothing of {one_line(deployment.name, 120)} is online in {one_line(cluster, 80)}",
                advice="Release it there first.",
                cluster=cluster,
            )
        found[cluster] = template_id
    return found


async def _version(platform: Platform, deployment: Deployment, template_id: Id) -> Version | None:
    try:
        return (await platform.template(deployment, template_id)).version
    except (NotFoundError, TemplateError) as error:
        # Deleted or spoilt since it was published. It only serves to tell what changes.
        run_logger().warning("What was online before cannot be read: %s", error)
        return None
