"""Step 7: wait until the new pods are ready, or the polls are used up."""

import asyncio
import math
import time
from collections.abc import Sequence

from prefect_rollout.blocks import open_target
from prefect_rollout.errors import (
    ConflictError,
    PlatformError,
    ReleaseError,
    ReleaseFailedError,
    ReleaseTimedOutError,
)
from prefect_rollout.models import Deployment, same_id
from prefect_rollout.platforms.port import Platform
from prefect_rollout.progress import Progress, tell
from prefect_rollout.tasks.step import may_have_run_before, run_logger, step
from prefect_rollout.text import one_line
from prefect_rollout.verdict import Ending, Expected, Grace, Look, Verdict, judge


@step("wait for pods", "wait for pods of {deployment.name}")
async def wait_for_pods(
    deployment: Deployment,
    expected: Sequence[Expected],
    *,
    poll_seconds: float = 5,
    poll_attempts: int = 20,
    grace_seconds: float = 30,
    target: str,
) -> Verdict:
    """Polls the clusters until the verdict has an ending: at once, then every `poll_seconds`.

    The end is measured on the clock: the last poll starts `poll_seconds * (poll_attempts - 1)`
    seconds after the first. A poll that is not answered is logged, and the next tick polls again.

    Args:
        deployment: as step 1 found it.
        expected: what each cluster has to show.
        poll_seconds: seconds between polls.
        poll_attempts: polls at the most.
        grace_seconds: seconds that a new pod may be in trouble before the release has failed.
        target: the block document `type-slug/name` of the platform.

    Raises:
        ConflictError: a retry finds that another release, or a rollback, has followed this one.
        ReleaseFailedError: the platform or a new pod says that the release cannot succeed.
        ReleaseTimedOutError: what was still missing, in which clusters; as with the other, its
            `verdict` is the last look.
    """
    clusters = [cluster.cluster for cluster in expected]
    grace = Grace(seconds=grace_seconds)
    logger = run_logger()
    verdict: Verdict | None = None
    said = ""
    async with open_target(target) as platform:
        if may_have_run_before():
            await _still_online(platform, deployment, expected)
        started = time.monotonic()
        tick = 0
        while True:
            unanswered: PlatformError | None = None
            try:
                now = await platform.status(deployment, clusters)
            except PlatformError as error:
                logger.warning("Poll %d of %d: %s", tick + 1, poll_attempts, error)
                unanswered, now = error, None
            at = time.monotonic()
            # The tick after the one that is running by now: polls that took long are not made up for.
            tick = max(tick + 1, math.ceil((at - started) / poll_seconds))
            look, last = Look(at=at, clusters=now), tick >= poll_attempts
            verdict = judge(expected, look, verdict, grace=grace, last=last)
            if not unanswered:
                tell(Progress("wait for pods", "running", verdict.counts, aloud=True))
            if verdict.ending is Ending.RELEASED:
                logger.info("All new pods are ready: %s", verdict.counts)
                return verdict
            if verdict.ending is not Ending.WAITING:
                raise _error(verdict, unanswered, at - started)
            if not unanswered and said != (said := verdict.explain()):
                logger.info("Waiting: %s", said)
            await asyncio.sleep(max(0.0, started + tick * poll_seconds - time.monotonic()))


async def _still_online(platform: Platform, deployment: Deployment, expected: Sequence[Expected]) -> None:
    """Raises where a retry would watch for something that is not asked for any more."""
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


def _error(verdict: Verdict, unanswered: PlatformError | None, seconds: float) -> ReleaseError:
    kind = ReleaseFailedError if verdict.ending is Ending.FAILED else ReleaseTimedOutError
    last = f"; the last poll was not answered: {unanswered.problem}" if unanswered else ""
    error = kind(
        f"after {seconds:.0f} s: {verdict.explain()}{last}",
        advice=verdict.diagnosis.resolution if verdict.diagnosis else None,
        not_ready={
            cluster.cluster: [{"pod": pod.name, "state": pod.state} for pod in cluster.not_ready]
            for cluster in verdict.clusters
            if not cluster.released
        },
    )
    error.verdict = verdict
    return error
