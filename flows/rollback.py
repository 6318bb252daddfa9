"""The flow that puts a deployment back to what was online before."""

from prefect import flow

from prefect_rollout.flows.allowed import check_images
from prefect_rollout.flows.conduct import Move, Run, conduct, first_name, rename
from prefect_rollout.flows.deploy import publish
from prefect_rollout.flows.planning import hold, hold_moves, plan_only
from prefect_rollout.models import (
    Action,
    LateMinutes,
    Order,
    Person,
    PlanHash,
    PollAttempts,
    PollSeconds,
    Reason,
    ReleaseResult,
    RollbackRequest,
    Seconds,
    WindowWait,
    newest_first,
)
from prefect_rollout.tasks import choose_rollback, note_online
from prefect_rollout.text import one_line


@flow(name="rollback", flow_run_name=first_name("roll back"), persist_result=True, validate_parameters=False)
async def rollback(
    app_id: int | str,
    deployment: str,
    to_template: int | str | None = None,
    target: str = "",
    clusters: list[str] | None = None,
    reason: str = "",
    order: Order = "together",
    canary: str | None = None,
    pause_seconds: Seconds = 0,
    poll_seconds: PollSeconds = 5,
    poll_attempts: PollAttempts = 20,
    grace_seconds: Seconds = 30,
    lock_wait_seconds: Seconds = 600,
    dry_run: bool = False,
    expect_plan: PlanHash = "",
    requested_by: Person = "",
    window_wait_seconds: WindowWait = 0,
    break_glass: Reason = "",
    late_minutes: LateMinutes = 60,
) -> ReleaseResult:
    """Roll a deployment back: each cluster to the last template that was released there before.

    Templates whose release failed, or that were rolled back, are skipped. Nothing is created: an earlier
    template is published again, and watched as in a release.

    Args:
        app_id: Id of the app, such as 3290.
        deployment: Exact name of the deployment, such as qapm-home.
        to_template: Template to go back to in every cluster; empty for the last one released in each.
        target: Block with the platform's credentials, as type-slug/name; environment for the K8S_ variables.
            Empty for container-cloud/default, or for the variables if nobody saved it.
        clusters: Roll back only these clusters; empty for all that the metaData names.
        reason: Why; kept in the report.
        order: together publishes everywhere and then watches; one-by-one goes on when a cluster is ready.
        canary: Cluster that is published and watched before all others.
        pause_seconds: Seconds between one cluster's being ready and the next publish.
        poll_seconds: Seconds between looks at the pods.
        poll_attempts: Looks at the pods before the rollback counts as timed out.
        grace_seconds: Seconds that a new pod may be in trouble before the rollback has failed.
        lock_wait_seconds: Seconds to wait for another release of the deployment; 0 refuses at once.
        dry_run: Read everything and write nothing: report what would change, and the plan's hash.
        expect_plan: Hash of a dry run; the rollback is refused where something has changed since.
        requested_by: Who asks for it; kept in the report and in the history.
        window_wait_seconds: Seconds to wait where a release window is closed; 0 refuses at once.
        break_glass: Why it passes a closed release window all the same; kept in the history.
        late_minutes: Minutes after its scheduled time at which a run skips itself; 0 for never.

    Raises:
        NoPreviousTemplateError: the history has nothing that was released to go back to.
        RolloutError: whatever else ended it; `error.result` is the result so far.
    """
    request = RollbackRequest.of(**locals())
    return await conduct(Action.ROLLBACK, request, _rollback)


async def _rollback(run: Run, request: RollbackRequest) -> None:
    result = run.result
    await run.begin()
    if request.writes:
        await run.lock()
    names = [cluster.cluster for cluster in result.clusters]
    before = await note_online(run.deployment, names, target=request.target)
    versions = await choose_rollback(run.deployment, before, request.to_template, target=request.target)
    result.notes = [note for each in versions.values() for note in each.notes]
    if request.to_template not in {None, ""}:
        for version in versions.values():
            await check_images(run, version.images, {})
    ids = {str(version.id): version for version in versions.values()}
    if len(ids) == 1:
        (version,) = ids.values()
        result.template_id, result.images = version.id, version.images
    what = "roll back" if request.writes else "plan to roll back"
    await rename(f"{what} {one_line(request.deployment, 80)} → {one_line(', '.join(ids), 80)}")
    if not request.writes:
        await plan_only(run, request)
        return
    await hold(run, request, {cluster: (each.id, each.images) for cluster, each in versions.items()})
    moves = run.moves_to(versions, before)
    hold_moves(run, moves)
    # Nothing is wrong with what gives way to a newer template.
    await run.record([("left", move.before.template_id, move.cluster) for move in moves if _is_back(move)])
    await run.roll(moves, lambda move: publish(run, move))


def _is_back(move: Move) -> bool:
    before = move.before.template_id
    return before is not None and newest_first(move.template_id) < newest_first(before)
