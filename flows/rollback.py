"""The flow that returns a deployment to the revision before, and the rollback of a release that failed."""

from collections.abc import Sequence
from typing import Any

import prefect.runtime
from prefect import flow, get_run_logger

from prefect_rollout.errors import ConfigurationError, ReleaseError, RollbackFailedError, RolloutError
from prefect_rollout.ids import Id, same_id
from prefect_rollout.release.parameters import takes
from prefect_rollout.release.progress import ROLL_BACK, Progress, silence, tell
from prefect_rollout.release.request import Action, RollbackRequest
from prefect_rollout.release.result import ReleaseResult
from prefect_rollout.release.workload import Baseline, Published, Revision
from prefect_rollout.runs.allowed_images import refuse_forbidden_images
from prefect_rollout.runs.flow_runs import ROLLED_BACK
from prefect_rollout.runs.lifecycle import first_name, run_release
from prefect_rollout.runs.moves import Move
from prefect_rollout.runs.run import Run
from prefect_rollout.tasks import (
    check_deployment,
    choose_rollback,
    find_where_live,
    images_that_ran,
    parse_metadata,
    pause,
    plan_release,
    publish_deployment,
    read_baseline,
    report_release,
    roll_back_deployment,
    wait_for_pods,
    wait_for_rollback,
)
from prefect_rollout.text import one_line
from prefect_rollout.verdict.diagnosis import Category, Diagnosis
from prefect_rollout.verdict.expected import Expected


@flow(name="rollback", flow_run_name=first_name("roll back"), persist_result=True, validate_parameters=False)
@takes(RollbackRequest)
async def rollback(app_id: Id, deployment: str, **options: Any) -> ReleaseResult:
    """Roll a deployment back: each cluster to the last template that was released there before.

    Templates whose release failed or was rolled back are skipped. No template is created: an earlier one is
    published again, and its pods are watched as in a release.

    Raises:
        NoPreviousTemplateError: the history has no earlier released template.
        RolloutError: any other failure; `error.result` is the result so far.
    """
    request = RollbackRequest.of(app_id=app_id, deployment=deployment, **options)
    return await run_release(Action.ROLLBACK, request, _rollback, report=report_release)


async def _rollback(run: Run, request: RollbackRequest) -> None:
    target, result = request.target, run.result

    async def way_back() -> list[str]:
        """Return the clusters in which the revision to return to was live before."""
        if request.to_template in {None, ""}:
            return run.clusters  # each returns to what was released there
        with silence():  # it precedes the steps that a rollback shows
            return await find_where_live(run.workload, run.clusters, request.to_template, target=target)

    checked = await run.reading(check_deployment)(request.app_id, request.deployment, target=target)
    run.found(checked.workload, checked.platform)
    placement = await run.reading(parse_metadata)(run.workload, request.clusters, target=target)
    if await run.begin(placement, way_back, lock=request.writes):
        return await _rollback(run, request)  # it has waited for a release window or another release

    baseline = await run.reading(read_baseline)(run.workload, run.clusters, target=target)
    chosen = await run.reading(choose_rollback)(run.workload, baseline, request.to_template, target=target)
    result.notes = [note for each in chosen.values() for note in each.notes]
    if request.to_template not in {None, ""}:
        for revision in chosen.values():
            await refuse_forbidden_images(
                target, revision.images, {}, lambda: images_that_ran(run.workload, target=target)
            )
    ids = {str(revision.id): revision for revision in chosen.values()}
    if len(ids) == 1:
        (revision,) = ids.values()
        result.template_id, result.images = revision.id, revision.images
    what = "roll back" if request.writes else "plan to roll back"
    await run.guard.rename(f"{what} {one_line(request.deployment, 80)} → {one_line(', '.join(ids), 80)}")

    plan = run.plan(baseline, chosen)
    if not request.writes:
        run.planned(await plan_release(run.workload, plan, target=target))
        return None
    run.hold_to(plan)
    moves = run.moves(plan, baseline, chosen)
    # A revision that a newer one replaces still counts as released.
    back = [move for move in moves if chosen[move.cluster].is_older_than(move.before.revision)]
    await run.record([("left", move.before.online, move.cluster) for move in back])

    async def publish(move: Move) -> Published:
        return await publish_deployment(
            run.workload,
            await run.platform.revert(run.workload, chosen[move.cluster]),
            move.cluster,
            move.replicas,
            over=move.before.online,
            release_id=result.release_id,
            unblock=request.unblock,
            target=target,
        )

    await run.roll_out(moves, publish, wait_for_pods, pause)
    return None


# ---- after a release that failed ----------------------------------------------------------------


async def roll_back(run: Run, moves: Sequence[Move], failure: RolloutError) -> None:
    """Return every cluster that was written to, the last one first, to what was released there before.

    That is the revision that was online before, or an earlier one if that was not released. A cluster in
    which another change followed keeps it. `failure` says what was rolled back.

    Raises:
        RollbackFailedError: it failed in at least one cluster; the others were tried.
    """
    run.failed(failure)
    if not run.result.wrote:
        return
    await run.look()
    superseded = _superseded(failure)
    touched = [move for move in reversed(moves) if move.cluster not in superseded and _touched(run, move)]
    if superseded and not touched:
        return
    tell(Progress(ROLL_BACK, "running", "to what was released before", aloud=True))
    try:
        await run.record([("left", move.revision, move.cluster) for move in touched], {ROLLED_BACK: "yes"})
    except ConfigurationError as error:  # the rollback matters more
        get_run_logger().warning("The run could not be marked as rolled back: %s", one_line(error))
    ways = await _ways_back(run, touched)
    problems: list[str] = []
    found: list[Diagnosis] = []
    expected: list[Expected] = []
    for move in touched:
        revision = ways.get(move.cluster)
        if revision is None:
            run.cluster(move.cluster).rolled_back = False
            nothing = "no template that was released there before is on record"
            if move.before.online is None:
                nothing = "what was online before is not known, or nothing was"
            problems.append(f"{one_line(move.cluster, 60)}: {nothing}")
            continue
        try:
            expected.append(await _return(run, move, revision))
        except RolloutError as error:
            run.cluster(move.cluster).rolled_back = False
            problems.append(f"{one_line(move.cluster, 60)}: {error.problem}")
            found.append(error.diagnosis)
    if problems:  # even if the last cluster succeeded
        tell(Progress(ROLL_BACK, "failed", "; ".join(problems)))
    if expected and (failed_watch := await _watch(run, expected)):
        problems.append(failed_watch.problem)
        found.insert(0, failed_watch.diagnosis)
    if problems:
        failed = RollbackFailedError(
            f"ROLLBACK FAILED: {'; '.join(problems)}; it was tried because {failure.problem}"
        )
        failed.found, failed.cause = next(iter(found), None), failure.to_dict()
        raise failed from failure
    if run.result.rolled_back:
        failure.problem += "; rolled back"


async def _return(run: Run, move: Move, revision: Revision) -> Expected:
    """Publish an earlier revision to a cluster again; return the state that the cluster has to reach."""
    cluster, accepted = run.cluster(move.cluster), run.guard.accepted
    if move.replicas is not None and move.before.desired is not None:
        cluster.replicas = move.before.desired
    attempt: int = prefect.runtime.flow_run.run_count
    key = "rollback" if attempt < 2 else f"rollback-{attempt}"  # each attempt of the run rolls back again
    done = await roll_back_deployment(
        run.workload,
        await run.platform.revert(run.workload, revision),
        move.cluster,
        cluster.replicas,
        over=move.revision,
        key=f"{run.result.release_id}:{key}:{move.cluster}",
        unblock=run.request.unblock,
        target=run.request.target,
    )
    run.tell_published(cluster, done.applied.revision, since=accepted, rollback=True)
    pods = done.pods
    if pods is None and cluster.running is not None:
        # An earlier attempt wrote; the last observed pods may be from before or after that write.
        pods = {pod.name: pod.state for pod in cluster.pods}
    # Old pods that still run belong to the revision that returns.
    old = move.before.pods
    baseline = pods and {pod: state for pod, state in pods.items() if pod not in (old or {})}
    update = {
        "replicas": cluster.replicas,
        "before": Baseline(),
        "changed": move.changed or not same_id(revision.id, move.before.online),
    }
    back = move.model_copy(update=update).expected(done.applied, baseline)
    return back.model_copy(update={"mixed": old is None})


def _superseded(failure: RolloutError) -> set[str]:
    """Return the clusters in which another change followed the release."""
    verdict = failure.verdict if isinstance(failure, ReleaseError) else None
    return {
        each.cluster
        for each in (verdict.clusters if verdict else ())
        if any(condition.category is Category.SUPERSEDED for condition in each.conditions)
    }


def _touched(run: Run, move: Move) -> bool:
    """Return whether a rollback has to write to the cluster: not if another release is online now."""
    cluster = run.cluster(move.cluster)
    ours = {str(move.revision), str(move.before.online)}
    others = cluster.online_known and str(cluster.online) not in ours
    return cluster.published is not False and not others


async def _ways_back(run: Run, moves: Sequence[Move]) -> dict[str, Revision]:
    """Return the revision that each cluster returns to; clusters that had nothing online are absent."""
    back = [move for move in moves if move.before.online is not None]
    before = {move.cluster: move.before for move in back}
    if not back:
        return {}
    over: dict[str, Id] = {move.cluster: move.revision for move in back}
    try:
        with silence():  # a deploy shows no such step
            chosen = await choose_rollback(run.workload, before, over=over, target=run.request.target)
    except RolloutError as error:
        get_run_logger().warning(
            "Rolling back to what was online before, released or not: %s", one_line(error)
        )
        return {
            name: each.revision or Revision(id=each.online)
            for name, each in before.items()
            if each.online is not None
        }
    run.result.notes += [note for each in chosen.values() for note in each.notes]
    return dict(chosen)


async def _watch(run: Run, expected: Sequence[Expected]) -> RolloutError | None:
    """Wait for the pods of the rollback, record in the result where it succeeded, and return its error."""
    try:
        await run.watch(wait_for_rollback, expected)
    except RolloutError as error:
        verdict = error.verdict if isinstance(error, ReleaseError) else None
        if verdict:
            run.note(verdict)
        back = {judged.cluster for judged in verdict.clusters if judged.released} if verdict else set()
        for each in expected:
            run.cluster(each.cluster).rolled_back = each.cluster in back
        return error
    for each in expected:
        run.cluster(each.cluster).rolled_back = True
    return None
