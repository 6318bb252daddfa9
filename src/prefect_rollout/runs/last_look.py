"""The last look at the live state, for a run that does not succeed."""

import asyncio
from collections.abc import Awaitable

from prefect import get_run_logger

from prefect_rollout.errors import PlatformError
from prefect_rollout.ids import same_id
from prefect_rollout.platforms.port import Platform
from prefect_rollout.release.result import ReleaseResult
from prefect_rollout.release.workload import Workload
from prefect_rollout.runs.endings import LAST_SECONDS
from prefect_rollout.text import one_line
from prefect_rollout.verdict.status import running


async def last_look(
    result: ReleaseResult, platform: Platform, workload: Workload, *, unanswered: bool
) -> None:
    """Record the live state in the result, as far as the platform answers in time.

    An `unanswered` write was interrupted, and may still take effect.
    """
    for cluster in result.clusters:
        # An older value does not count as live.
        cluster.online, cluster.online_known, cluster.running = None, False, None
        cluster.desired = None

    async def revisions() -> None:
        online = await platform.online(workload)
        for cluster in result.clusters:
            cluster.online, cluster.online_known = online.get(cluster.cluster), True
            if cluster.published is None and not same_id(cluster.template_before, cluster.template):
                arrived = same_id(cluster.online, cluster.template)
                cluster.published = arrived or (None if unanswered else False)

    async def pods() -> None:
        status = await platform.status(workload, [cluster.cluster for cluster in result.clusters])
        for cluster in result.clusters:
            now = status.get(cluster.cluster)
            cluster.desired = now.desired if now else None
            if now is not None and now.pods is not None:
                cluster.pods, cluster.running = now.pods, running(now.pods)

    await asyncio.gather(_in_time(revisions()), _in_time(pods()))


async def _in_time(look: Awaitable[None]) -> None:
    """Run a part of the last look, unless the platform does not answer in time."""
    try:
        async with asyncio.timeout(LAST_SECONDS):
            await look
    except (PlatformError, TimeoutError) as error:
        get_run_logger().warning("The last look at what is live failed: %s", one_line(error))
