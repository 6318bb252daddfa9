"""Step 7: wait until the new pods are ready, or the polls are used up."""

import asyncio
import math
import time
from collections.abc import Sequence

from prefect.cache_policies import NO_CACHE

from prefect_rollout.blocks import open_target
from prefect_rollout.errors import (
    PlatformError,
    ReleaseError,
    ReleaseFailedError,
    ReleaseTimedOutError,
)
from prefect_rollout.models import Deployment
from prefect_rollout.progress import Progress, tell
from prefect_rollout.settings import patience
from prefect_rollout.tasks.before import still_online
from prefect_rollout.tasks.step import may_have_run_before, run_logger, step
from prefect_rollout.turns import resting
from prefect_rollout.verdict import Ending, Expected, Grace, Look, Verdict, judge


# Never from an earlier try: what was live then may have been undone since.
@step("wait for pods", "wait for pods of {deployment.name}", cache_policy=NO_CACHE)
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
    seconds after the first. A poll that is not answered is logged, and the next tick polls again, or
    the first after the time that the platform asked to wait.

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
    return await watch(
        "wait for pods",
        deployment,
        expected,
        poll_seconds=poll_seconds,
        poll_attempts=poll_attempts,
        grace=Grace(seconds=grace_seconds),
        target=target,
    )


async def watch(
    step_name: str,
    deployment: Deployment,
    expected: Sequence[Expected],
    *,
    poll_seconds: float,
    poll_attempts: int,
    grace: Grace,
    target: str,
) -> Verdict:
    """Do what `wait_for_pods` says, as the step of that name."""
    clusters = [cluster.cluster for cluster in expected]
    longest_wait = patience().longest_retry_after_seconds
    logger = run_logger()
    verdict: Verdict | None = None
    said = ""
    async with open_target(target) as platform:
        if may_have_run_before():
            await still_online(platform, deployment, expected)
        async with resting():
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
                # No poll before a Retry-After has passed, even where the last one comes late by that.
                wait = (unanswered.retry_after or 0) if unanswered else 0
                last = tick >= poll_attempts or wait > longest_wait
                tick = max(tick, math.ceil((at - started + wait) / poll_seconds))
                verdict = judge(expected, Look(at=at, clusters=now), verdict, grace=grace, last=last)
                if not unanswered:
                    tell(Progress(step_name, "running", verdict.counts, aloud=True))
                if verdict.ending is Ending.RELEASED:
                    logger.info("All new pods are ready: %s", verdict.counts)
                    return verdict
                if verdict.ending is not Ending.WAITING:
                    raise _error(verdict, unanswered, at - started)
                if not unanswered and said != (said := verdict.explain()):
                    logger.info("Waiting: %s", said)
                await asyncio.sleep(max(0.0, started + tick * poll_seconds - time.monotonic()))


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
