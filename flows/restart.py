"""The flow that replaces a deployment's pods with new ones of the same revision."""

from typing import Any

from prefect import flow

from prefect_rollout.ids import Id
from prefect_rollout.release.parameters import takes
from prefect_rollout.release.request import Action, Request
from prefect_rollout.release.result import ReleaseResult
from prefect_rollout.release.workload import Published
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
    target = request.target
    checked = await run.reading(check_deployment)(request.app_id, request.deployment, target=target)
    run.found(checked.workload, checked.platform)
    placement = await run.reading(parse_metadata)(run.workload, request.clusters, target=target)
    if await run.begin(placement):
        return await _restart(run, request)
    if request.writes and await run.lock():  # it has waited for another release
        return await _restart(run, request)

    baseline = await run.reading(read_baseline)(run.workload, run.clusters, target=target)
    online = run.online(baseline)
    plan = run.plan(baseline, online)
    if not request.writes:
        run.planned(await plan_release(run.workload, plan, target=target))
        return None
    run.hold_to(plan)

    async def write(move: Move) -> Published:
        return await restart_deployment(
            run.workload,
            move.cluster,
            move.revision,
            before=move.before,
            release_id=run.result.release_id,
            target=target,
        )

    await run.roll_out(run.moves(plan, baseline, online), write, wait_for_pods, pause)
    return None
