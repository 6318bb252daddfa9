"""The flow that changes the replicas of a deployment."""

from typing import Any

from prefect import flow

from prefect_rollout.flows.restart import change_pods
from prefect_rollout.ids import Id
from prefect_rollout.release.parameters import takes
from prefect_rollout.release.request import Action, ScaleRequest
from prefect_rollout.release.result import ReleaseResult
from prefect_rollout.release.workload import Published
from prefect_rollout.runs.lifecycle import first_name, run_release
from prefect_rollout.runs.moves import Move
from prefect_rollout.runs.run import Run
from prefect_rollout.tasks import report_release, scale_deployment


@flow(name="scale", flow_run_name=first_name("scale"), persist_result=True, validate_parameters=False)
@takes(ScaleRequest)
async def scale(app_id: Id, deployment: str, replicas: int, **options: Any) -> ReleaseResult:
    """Change the number of pods in each cluster, and watch them as in a release.

    The next release restores the number of replicas that the platform has on record for the deployment.

    Raises:
        RolloutError: any failure; `error.result` is the result so far.
    """
    request = ScaleRequest.of(app_id=app_id, deployment=deployment, replicas=replicas, **options)
    return await run_release(Action.SCALE, request, _scale, report=report_release)


async def _scale(run: Run, request: ScaleRequest) -> None:
    async def write(move: Move) -> Published:
        return await scale_deployment(
            run.workload,
            move.cluster,
            request.replicas,
            move.revision,
            release_id=run.result.release_id,
            target=request.target,
        )

    await change_pods(run, write)
