"""Step 7: wait until the new pods are ready, or the polls are used up."""

import asyncio
import math
import time
from collections.abc import Sequence

from prefect_rollout.blocks import open_target
from prefect_rollout.errors import PlatformError, ReleaseTimedOutError
from prefect_rollout.models import ClusterStatus, Deployment
from prefect_rollout.progress import Progress, tell
from prefect_rollout.tasks.step import run_logger, step
from prefect_rollout.verdict import Expected, Verdict, judge


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
    """Polls the clusters until the verdict is released: at once, then every `poll_seconds`.

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
        ReleaseTimedOutError: what was still missing, in which clusters; its `verdict` is the last look.
    """
    clusters = [cluster.cluster for cluster in expected]
    logger = run_logger()
    verdict = judge(expected, {})
    before: dict[str, ClusterStatus] | None = None
    unanswered: PlatformError | None = None
    said = ""
    async with open_target(target) as platform:
        started = time.monotonic()
        tick = 0
        while True:
            try:
                now = await platform.status(deployment, clusters)
            except PlatformError as error:
                logger.warning("Poll %d of %d: %s", tick + 1, poll_attempts, error)
                unanswered, before = error, None
            else:
                unanswered = None
                verdict = judge(expected, now, before)
                before = now
                tell(Progress("wait for pods", "running", verdict.counts))
                if verdict.released:
                    logger.info("All new pods are ready: %s", verdict.counts)
                    return verdict
                if said != (said := verdict.explain()):
                    logger.info("Waiting: %s", said)
            # The tick after the one that is running by now, and after what a Retry-After asked for: polls
            # that took long are not made up for.
            wait = (unanswered.retry_after or 0) if unanswered else 0
            tick = max(tick + 1, math.ceil((time.monotonic() - started + wait) / poll_seconds))
            if tick >= poll_attempts:
                break
            await asyncio.sleep(max(0.0, started + tick * poll_seconds - time.monotonic()))
    raise _timed_out(verdict, unanswered, time.monotonic() - started)


def _timed_out(verdict: Verdict, unanswered: PlatformError | None, seconds: float) -> ReleaseTimedOutError:
    missing = sum(max(0, cluster.wanted - cluster.ready) for cluster in verdict.clusters)
    count = f"{missing} {'pod is' if missing == 1 else 'pods are'} not ready"
    last = f"; the last poll was not answered: {unanswered.problem}" if unanswered else ""
    error = ReleaseTimedOutError(
        f"after {seconds:.0f} s {count if missing else 'the rollout is not over'}: {verdict.explain()}{last}",
        not_ready={
            cluster.cluster: [{"pod": pod.name, "state": pod.state} for pod in cluster.not_ready]
            for cluster in verdict.clusters
            if not cluster.released
        },
    )
    error.verdict = verdict
    return error
