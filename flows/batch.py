"""The flow that releases many deployments from a plan, in waves."""

from typing import Any

import prefect.runtime
from prefect import flow

from prefect_rollout.batch.plan import BatchRequest, Plan
from prefect_rollout.batch.result import BatchResult, plans_in_words
from prefect_rollout.flows.deploy import deploy_latest_image
from prefect_rollout.release.parameters import takes
from prefect_rollout.runs.approval import refuse_where_nobody_answers
from prefect_rollout.runs.batch import Batch, run_batch
from prefect_rollout.tasks import pause


def _first_name() -> str:
    plan = prefect.runtime.flow_run.parameters.get("plan")
    if isinstance(plan, Plan):
        plan = plan.model_dump()
    releases = plan.get("releases") if isinstance(plan, dict) else None
    count = len(releases) if isinstance(releases, list) else "?"
    what = "plan" if prefect.runtime.flow_run.parameters.get("dry_run") else "batch"
    return f"{what} of {count} release{'' if count == 1 else 's'}"


@flow(name="deploy-batch", flow_run_name=_first_name, persist_result=True, validate_parameters=False)
@takes(BatchRequest)
async def deploy_batch(plan: Plan, **options: Any) -> BatchResult:
    """Release many deployments in waves, each as a flow run with its own lock and report.

    The run completes only when every release of the plan succeeds. A failed release does not stop the
    others until the failure budget of the plan is used up; then no new release starts. A retry of the run
    continues with the releases that did not succeed.

    Raises:
        PlanError: the plan has mistakes; the error lists all of them.
        BatchFailedError: not all releases succeeded; `error.result` has a row for each.
        RolloutError: any other failure.
    """
    return await run_batch(BatchRequest.of(plan=plan, **options), _deploy, deploy_latest_image)


async def _deploy(batch: Batch) -> None:
    """Check the targets, plan, get the approval, release wave after wave."""
    request = batch.request
    await batch.check_targets()
    if request.only_failed:
        await batch.leave_out_released()
    if request.approval != "none" and not request.dry_run:
        refuse_where_nobody_answers()
    expected: dict[str, str] = {}
    if request.dry_run or request.expect_plan or request.approval == "before-release":
        expected = await batch.plan_releases()
    if request.dry_run:
        return
    if request.approval == "before-release":
        await batch.get_approval("the batch", "batch", plans_in_words(batch.result))
    await batch.release_waves(expected, pause)
