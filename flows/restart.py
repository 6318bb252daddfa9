"""The flow that replaces a deployment's pods with new ones of the same revision."""

from collections.abc import Awaitable, Callable
from typing import Any

from prefect import flow

from prefect_rollout.errors import NoTemplateError
from prefect_rollout.ids import Id
from prefect_rollout.release.parameters import takes
from prefect_rollout.release.request import Action, Request
from prefect_rollout.release.result import ReleaseResult
from prefect_rollout.release.workload import Baseline, Published, Revision
from prefect_rollout.runs.lifecycle import first_name, run_release
from prefect_rollout.runs.moves import Move
from prefect_rollout.runs.run import Run
from prefect_rollout.tasks import (
    check_deployment,
    parse_metadata,
    pause,
    plan_release,
    read_baseline,
    report_release,
    restart_deployment,
    wait_for_pods,
)
from prefect_rollout.text import one_line


@flow(name="restart", flow_run_name=first_name("restart"), persist_result=True, validate_parameters=False)
@takes(Request)
async def restart(app_id: Id, deployment: str, **options: Any) -> ReleaseResult:
    """Restart a deployment: replace its pods with new ones of the same template, and watch them.

    Raises:
        RolloutError: any failure; `error.result` is the result so far.
    """
    request = Request.of(app_id=app_id, deployment=deployment, **options)
    return await run_release(Action.RESTART, request, _restart, report=report_release)


async def _restart(run: Run, request: Request) -> None:
    async def write(move: Move) -> Published:
        return await restart_deployment(
            run.workload,
            move.cluster,
            move.revision,
            before=move.before,
            release_id=run.result.release_id,
            target=request.target,
        )

    await change_pods(run, write)


async def change_pods(run: Run, write: Callable[[Move], Awaitable[Published]]) -> None:
    """Plan and carry out a change of pods that keeps the revision of each cluster."""
    request, target = run.request, run.request.target
    checked = await run.reading(check_deployment)(request.app_id, request.deployment, target=target)
    run.found(checked.workload, checked.platform)
    placement = await run.reading(parse_metadata)(run.workload, request.clusters, target=target)
    if await run.begin(placement, lock=request.writes):  # it has waited for a window or another release
        return await change_pods(run, write)

    baseline = await run.reading(read_baseline)(run.workload, run.clusters, target=target)
    online = {cluster: _online(run, cluster, before) for cluster, before in baseline.items()}
    plan = run.plan(baseline, online)
    if not request.writes:
        run.planned(await plan_release(run.workload, plan, target=target))
        return None
    run.hold_to(plan)
    await run.roll_out(run.moves(plan, baseline, online), write, wait_for_pods, pause)
    return None


def _online(run: Run, cluster: str, before: Baseline) -> Revision:
    if before.online is None:
        raise NoTemplateError(
            f"nothing of {one_line(run.workload.name, 120)} is online in {one_line(cluster, 80)}",
            advice="Release it there first.",
            cluster=cluster,
        )
    return before.revision or Revision(id=before.online)
