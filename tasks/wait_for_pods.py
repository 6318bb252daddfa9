"""Step 7: wait until the new pods are ready, or the deadline has passed."""

import time
from collections.abc import Sequence
from contextlib import aclosing

from prefect.cache_policies import NO_CACHE

from prefect_rollout.blocks import open_target
from prefect_rollout.errors import (
    PlatformError,
    ReleaseError,
    ReleaseFailedError,
    ReleaseTimedOutError,
)
from prefect_rollout.release.progress import WAIT_FOR_ROLLBACK, Progress, tell
from prefect_rollout.release.workload import Workload
from prefect_rollout.runs.moves import still_online
from prefect_rollout.runs.step import may_have_run_before, run_logger, step
from prefect_rollout.runs.throttle import slot_released
from prefect_rollout.settings import rollout_settings
from prefect_rollout.verdict.expected import Expected, Grace
from prefect_rollout.verdict.judge import judge
from prefect_rollout.verdict.verdict import Ending, Verdict


# Not cached: the result of an earlier attempt may have been undone since.
@step("wait for pods", "wait for pods of {workload.name}", cache_policy=NO_CACHE)
async def wait_for_pods(
    workload: Workload,
    expected: Sequence[Expected],
    *,
    poll_seconds: float = 5,
    poll_attempts: int = 20,
    grace_seconds: float = 30,
    target: str,
) -> Verdict:
    """Observe the clusters until the verdict has an ending (article: 20 polls, 5 s apart).

    The deadline is `poll_seconds * (poll_attempts - 1)` seconds after the start, however long the polls take.
    An observation without an answer is logged and ignored.

    Args:
        workload: from step 1.
        expected: the state that each cluster has to reach.
        poll_seconds: seconds between observations.
        poll_attempts: observations until the deadline.
        grace_seconds: seconds that a new pod may be in trouble before the release has failed.
        target: block of the platform, as type-slug/name.

    Raises:
        ConflictError: a retry finds that another release, or a rollback, was published since.
        ReleaseFailedError: the platform or a new pod shows that the release cannot succeed.
        ReleaseTimedOutError: not all clusters were released by the deadline. This error and
            ReleaseFailedError have the last `verdict`.
    """
    return await _watch(
        "wait for pods", workload, expected, poll_seconds, poll_attempts, grace_seconds, target
    )


@step(WAIT_FOR_ROLLBACK, "wait for rollback of {workload.name}", cache_policy=NO_CACHE)
async def wait_for_rollback(
    workload: Workload,
    expected: Sequence[Expected],
    *,
    poll_seconds: float,
    poll_attempts: int,
    grace_seconds: float,
    target: str,
) -> Verdict:
    """Observe the clusters until the rollback has an ending; see `wait_for_pods`."""
    return await _watch(
        WAIT_FOR_ROLLBACK, workload, expected, poll_seconds, poll_attempts, grace_seconds, target
    )


async def _watch(
    step_name: str,
    workload: Workload,
    expected: Sequence[Expected],
    poll_seconds: float,
    poll_attempts: int,
    grace_seconds: float,
    target: str,
) -> Verdict:
    clusters, grace = [each.cluster for each in expected], Grace(seconds=grace_seconds)
    longest_wait, logger = rollout_settings().longest_retry_after_seconds, run_logger()
    verdict: Verdict | None = None
    explained = ""
    async with open_target(target) as platform:
        if may_have_run_before():
            await still_online(platform, workload, expected)
        started = time.monotonic()
        async with slot_released(), aclosing(platform.watch(workload, clusters, poll_seconds)) as looks:
            async for look in looks:
                error = look.error if isinstance(look.error, PlatformError) else None
                if error:
                    logger.warning("No status: %s", error)
                wait = (error.retry_after or 0) if error else 0
                last = look.at - started >= poll_seconds * (poll_attempts - 1) or wait > longest_wait
                verdict = judge(expected, look, verdict, grace=grace, last=last)
                if not error:
                    tell(Progress(step_name, "running", verdict.progress, aloud=True))
                if verdict.ending is Ending.RELEASED:
                    logger.info("All new pods are ready: %s", verdict.counts)
                    return verdict
                if verdict.ending is not Ending.WAITING:
                    if (found := verdict.diagnosis) and found.cluster:
                        shown = platform.commands(workload, found.cluster, found.pod, found.container)
                        verdict.diagnosis = found.model_copy(update={"commands": tuple(shown)})
                    raise _error(verdict, error, look.at - started)
                if not error and explained != (explained := verdict.explain()):
                    logger.info("Waiting: %s", explained)
    raise RuntimeError("the watch ended before the rollout did")


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
