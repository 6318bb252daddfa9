"""The flow that releases one deployment of an app."""

from collections.abc import Sequence
from typing import Any

import prefect.runtime
from prefect import flow

from prefect_rollout.difference import hold_to
from prefect_rollout.errors import LockLostError, RolloutError
from prefect_rollout.flows.allowed import check_images
from prefect_rollout.flows.approval import approve, question, refuse_where_nobody_answers
from prefect_rollout.flows.conduct import Move, Run, conduct, rename
from prefect_rollout.flows.planning import hold, hold_moves, plan_only, plan_to_approve
from prefect_rollout.models import (
    Action,
    Approval,
    ApprovalSeconds,
    LateMinutes,
    OnFailure,
    Order,
    Person,
    PlanHash,
    PollAttempts,
    PollSeconds,
    Reason,
    ReleaseRequest,
    ReleaseResult,
    Seconds,
    Version,
    WindowWait,
)
from prefect_rollout.tasks import (
    build_image_list,
    get_template,
    publish_deployment,
    upgrade_deployment,
)
from prefect_rollout.text import one_line


def _first_name() -> str:
    parameters: dict[str, Any] = prefect.runtime.flow_run.parameters
    template = parameters.get("template_id")
    asked = "newest" if template in (None, "") else f"template {one_line(template, 40)}"
    plan = "plan " if parameters.get("dry_run") else ""
    return f"{plan}{one_line(parameters.get('deployment'), 80)} → {asked}"


@flow(name="deploy-latest-image", flow_run_name=_first_name, persist_result=True, validate_parameters=False)
async def deploy_latest_image(
    app_id: int | str,
    deployment: str,
    template_id: int | str | None = None,
    target: str = "",
    clusters: list[str] | None = None,
    images: dict[str, str] | None = None,
    reason: str = "",
    on_failure: OnFailure = "stop",
    order: Order = "together",
    canary: str | None = None,
    pause_seconds: Seconds = 0,
    poll_seconds: PollSeconds = 5,
    poll_attempts: PollAttempts = 20,
    grace_seconds: Seconds = 30,
    lock_wait_seconds: Seconds = 600,
    approval: Approval = "none",
    approval_seconds: ApprovalSeconds = 86_400,
    dry_run: bool = False,
    expect_plan: PlanHash = "",
    requested_by: Person = "",
    window_wait_seconds: WindowWait = 0,
    break_glass: Reason = "",
    late_minutes: LateMinutes = 60,
) -> ReleaseResult:
    """Release a deployment: the images of a template, the newest by default, to all its clusters.

    The eight steps of the article, each a task that is retried by itself. The flow run is green only
    when every cluster runs the new template with the replicas wanted and nothing else. Templates whose
    release failed, or that were rolled back, are not taken for the newest.

    Args:
        app_id: Id of the app, such as 3290.
        deployment: Exact name of the deployment, such as qapm-home.
        template_id: Template to release from, even if its release failed; empty for the newest released one.
        target: Block with the platform's credentials, as type-slug/name; environment for the K8S_ variables.
            Empty for container-cloud/default, or for the variables if nobody saved it.
        clusters: Release only these clusters; empty for all that the metaData names.
        images: Images in place of the template's, by container: {"qapm-home": "registry/name:tag"}.
        reason: Why; kept in the new template's description and in the report.
        on_failure: stop leaves everything as it is; rollback puts every cluster that was touched back.
        order: together publishes everywhere and then watches; one-by-one goes on when a cluster is ready.
        canary: Cluster that is published and watched before all others.
        pause_seconds: Seconds between one cluster's being ready and the next publish.
        poll_seconds: Seconds between looks at the pods.
        poll_attempts: Looks at the pods before the release counts as timed out.
        grace_seconds: Seconds that a new pod may be in trouble before the release has failed.
        lock_wait_seconds: Seconds to wait for another release of the deployment; 0 refuses at once.
        approval: before-release waits, suspended, until a person has approved what would change.
        approval_seconds: Seconds after which a release that nobody approved fails.
        dry_run: Read everything and write nothing: report what would change, and the plan's hash.
        expect_plan: Hash of a dry run; the release is refused where something has changed since.
        requested_by: Who asks for it; kept in the report and in the history.
        window_wait_seconds: Seconds to wait where a release window is closed; 0 refuses at once.
        break_glass: Why it passes a closed release window all the same; kept in the history.
        late_minutes: Minutes after its scheduled time at which a run skips itself; 0 for never.

    Raises:
        ReleaseFailedError: the platform or a pod says that it cannot succeed.
        ReleaseTimedOutError: the pods were not all ready within the polls allowed.
        RollbackFailedError: it failed, and so did the rollback.
        NotApprovedError: a person rejected it, or nobody approved it in time.
        RolloutError: whatever else ended the release; `error.result` is the result so far.
    """
    request = ReleaseRequest.of(**locals())
    return await conduct(Action.DEPLOY, request, _deploy)


async def _deploy(run: Run, request: ReleaseRequest) -> None:
    """Steps 1 to 7. The result is filled as they go, so that it is true wherever they end."""
    result = run.result
    asks = request.approval != "none" and request.writes
    if asks:
        refuse_where_nobody_answers()
    await run.begin()
    if request.writes and not asks:
        await run.lock()

    template = await get_template(
        run.deployment, request.template_id, release_id=result.release_id, target=request.target
    )
    result.base_template_id, result.notes = template.id, list(template.notes)

    result.images = await build_image_list(template, request.images)
    await check_images(run, result.images, request.images or {})
    await rename(_name(request, result))
    if not request.writes:
        await plan_only(run, request)
        return
    if asks:
        # Others may release while a person thinks it over; then it is not what was approved any more.
        request = request.model_copy(update={"expect_plan": await _approved(run, request)})
        await run.lock()
    await hold(run, request, {each.cluster: (template.id, result.images) for each in result.clusters})

    upgrade = await upgrade_deployment(
        run.deployment,
        template,
        [cluster.cluster for cluster in result.clusters],
        result.images,
        release_id=result.release_id,
        reason=request.reason,
        target=request.target,
    )
    result.template_id = upgrade.template_id
    version = Version(id=upgrade.template_id, images=result.images, digest=template.digest)
    moves = run.moves_to({cluster.cluster: version for cluster in result.clusters}, upgrade.before)
    hold_moves(run, moves)
    try:
        await run.roll(moves, lambda move: publish(run, move))
    except RolloutError as error:
        # Without the lock nothing may be written, be it to undo something.
        if request.on_failure == "rollback" and not isinstance(error, LockLostError):
            await _back(run, moves, error)
        raise


async def _approved(run: Run, request: ReleaseRequest) -> str:
    """Returns once a person has approved the release, and notes who; the hash of what was approved."""
    result = run.result
    plan = await plan_to_approve(run)
    hold_to(plan, request.expect_plan)
    decision = await approve(
        question(request, result, plan),
        key="release",
        seconds=request.approval_seconds,
        requested_by=request.requested_by,
    )
    result.approved_by, result.approval_comment = decision.name, decision.comment
    return plan.plan_hash


async def publish(run: Run, move: Move) -> dict[str, str | None] | None:
    """Step 6 for one move."""
    return await publish_deployment(
        run.deployment,
        move.template_id,
        move.cluster,
        move.replicas,
        over=move.before.template_id,
        release_id=run.result.release_id,
        target=run.request.target,
    )


async def _back(run: Run, moves: Sequence[Move], error: RolloutError) -> None:
    """Rolls back what was touched, and says so in `error`."""
    run.failed(error)
    if not run.result.wrote:
        return
    await run.look()
    await run.roll_back(moves, error)
    if run.result.rolled_back:
        error.problem += "; rolled back"


def _name(request: ReleaseRequest, result: ReleaseResult) -> str:
    tags = sorted(
        {image.rpartition("/")[2].partition(":")[2] or "latest" for image in result.images.values()}
    )
    more = f" +{len(tags) - 1}" if len(tags) > 1 else ""
    plan = "" if request.writes else "plan "
    return f"{plan}{one_line(request.deployment, 80)} → {one_line(tags[0], 80)}{more}"
