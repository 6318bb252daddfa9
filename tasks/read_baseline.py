"""Read the state of each cluster before a write."""

import asyncio
from collections.abc import Sequence

from prefect_rollout.blocks import open_target
from prefect_rollout.errors import NotFoundError, TemplateError
from prefect_rollout.ids import Id
from prefect_rollout.platforms.port import Platform
from prefect_rollout.release.workload import Baseline, Revision, Workload
from prefect_rollout.runs.step import run_logger, step
from prefect_rollout.runs.throttle import slot_released
from prefect_rollout.settings import rollout_settings
from prefect_rollout.text import one_line
from prefect_rollout.verdict.status import Status

# Attempts to list pods that are not reported; the pause doubles each time.
_ATTEMPTS = 3


@step("read baseline", "read what is online of {workload.name}", quiet=True)
async def read_baseline(workload: Workload, clusters: Sequence[str], *, target: str) -> dict[str, Baseline]:
    """Read what each cluster runs, for the verdict to recognize new pods and for a rollback to restore it.

    A retry of the flow run uses the first result: its own writes do not change it.
    """
    async with open_target(target) as platform:
        return await baseline_of(platform, workload, clusters)


async def baseline_of(
    platform: Platform, workload: Workload, clusters: Sequence[str], known: Sequence[Revision] = ()
) -> dict[str, Baseline]:
    """Return the state of each cluster; `known` revisions are not read again."""
    online = await platform.online(workload)
    live = [cluster for cluster in clusters if cluster in online]
    status = await _status(platform, workload, clusters, live)
    revisions: dict[str, Revision | None] = {str(revision.id): revision for revision in known}
    for revision in (online[cluster] for cluster in live):
        if str(revision) not in revisions:
            revisions[str(revision)] = await _revision(platform, workload, revision)
    found = {cluster: _baseline(online.get(cluster), revisions, status.get(cluster)) for cluster in clusters}
    listed = (f"{one_line(name, 80)} {one_line(each.online, 40)}" for name, each in found.items())
    run_logger().info("online: %s", ", ".join(listed))
    return found


def _baseline(online: Id | None, revisions: dict[str, Revision | None], status: Status | None) -> Baseline:
    pods = status.pod_states if status else None
    return Baseline(
        online=online,
        revision=None if online is None else revisions[str(online)],
        revision_object=status.revision_object if status else "",
        pods={} if pods is None and online is None else pods,
        generation=status.generation if status else None,
        desired=status.desired if status else None,
    )


async def _status(
    platform: Platform, workload: Workload, clusters: Sequence[str], live: Sequence[str]
) -> dict[str, Status]:
    """Return the status of each cluster; ask again for some seconds if pods of `live` ones are missing."""
    status = await platform.status(workload, clusters)
    pause = rollout_settings().retry_delay_seconds
    for _ in range(_ATTEMPTS):
        missing = [name for name in live if name not in status or status[name].pods is None]
        if not missing:
            break
        async with slot_released():
            await asyncio.sleep(pause)
        status |= await platform.status(workload, missing)
        pause *= 2
    return status


async def _revision(platform: Platform, workload: Workload, revision: Id) -> Revision | None:
    try:
        found = await platform.revision(workload, revision)
    except (NotFoundError, TemplateError) as error:  # deleted since it was published
        run_logger().warning("What is online cannot be read: %s", error)
        return None
    if found.problem:
        run_logger().warning("What is online cannot be read: %s", found.problem)
        return None
    return found
