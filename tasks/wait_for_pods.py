"""Step 7: wait until the new pods are ready, or the polls are used up."""

import asyncio
import math
import time
from collections.abc import Sequence

from prefect_rollout.blocks import open_target
from prefect_rollout.errors import PlatformError, ReleaseError, ReleaseFailedError, ReleaseTimedOutError
from prefect_rollout.models import Deployment
from prefect_rollout.progress import Progress, tell
from prefect_rollout.tasks.step import run_logger, step
from prefect_rollout.verdict import Ending, Expected, Look, Verdict, judge


@step("wait for pods", "wait for pods of {deployment.name}")
async def wait_for_pods(
    deployment: Deployment,
    expected: Sequence[Expected],
    *,
    poll_seconds: float = 5,
    poll_attempts: int = 20,
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
        target: the block document `type-slug/name` of the platform.

    Raises:
        ReleaseFailedError: the platform or a new pod says that the release cannot succeed.
        ReleaseTimedOutError: what was still missing, in which clusters; as with the other, its
            `verdict` is the last look.
    """
    clusters = [cluster.cluster for cluster in expected]
    logger = run_logger()
    verdict: Verdict | None = None
    said = ""
    async with open_target(target) as platform:
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
            verdict = judge(expected, Look(at=at, clusters=now), verdict, last=tick >= poll_attempts)
            if not unanswered:
                tell(Progress("wait for pods", "running", verdict.counts))
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
