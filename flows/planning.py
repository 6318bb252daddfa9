"""What a run would do, before it does it: dry runs, and runs that are held to a plan."""

from collections.abc import Mapping, Sequence

from prefect.cache_policies import INPUTS, RUN_ID

from prefect_rollout.difference import hold_choice, hold_online, hold_to
from prefect_rollout.flows.conduct import Move, Run
from prefect_rollout.models import (
    ClusterResult,
    Id,
    Outcome,
    Procedure,
    ReleasePlan,
    ReleaseRequest,
    Request,
    RollbackRequest,
    ScaleRequest,
)
from prefect_rollout.tasks import check_plan, plan_release
from prefect_rollout.tasks.before import Before
from prefect_rollout.tasks.plan_release import Asked


async def plan(run: Run) -> ReleasePlan:
    """What the run would do as things stand now, and the hash for `expect_plan`. Writes nothing.

    A person is shown it by `report.render_plan`. The run has begun, and needs no lock.

    Raises:
        RolloutError: what keeps the run from being done at all, such as an unknown template.
    """
    return await plan_release(_asked(run), target=run.request.target)


async def plan_to_approve(run: Run) -> ReleasePlan:
    """The plan that a person is asked about. A run that goes on after the answer keeps what was shown."""
    kept = plan_release.with_options(persist_result=True, cache_policy=INPUTS + RUN_ID)
    return await kept(_asked(run), target=run.request.target)


async def plan_only(run: Run, request: Request) -> None:
    """Ends a dry run: the plan is the result.

    Raises:
        PlanChangedError: it is not the one that was expected.
    """
    found = await plan(run)
    result = run.result
    result.plan, result.base_template_id = found, found.base_template_id
    result.clusters = [
        ClusterResult(
            cluster=each.cluster,
            replicas=each.replicas,
            template=each.template,
            template_before=each.template_before,
            images_before=each.images_before,
        )
        for each in found.clusters
    ]
    hold_to(found, request.expect_plan)
    result.outcome = Outcome.PLANNED


async def hold(run: Run, request: Request, choice: Mapping[str, tuple[Id, Mapping[str, str]]]) -> None:
    """Returns where a run may write: its plan is the one that is expected, or none is.

    Args:
        run: under its lock.
        request: with the hash.
        choice: what the run goes by, `{cluster: (template or base, images)}`.

    Raises:
        PlanChangedError: nothing may be written.
    """
    if not request.expect_plan:
        return
    found = await check_plan(_asked(run), request.expect_plan, target=request.target)
    run.result.plan = found
    replicas = {cluster.cluster: cluster.replicas for cluster in run.result.clusters}
    hold_choice(found, {cluster: (*chosen, replicas[cluster]) for cluster, chosen in choice.items()})


async def hold_in_place(run: Run, request: Request, moves: Sequence[Move]) -> None:
    """`hold` and `hold_moves` of a run whose clusters keep the templates that are online.

    Raises:
        PlanChangedError: nothing may be written.
    """
    kept = {move.cluster: (move.template_id, _images(move)) for move in moves}
    await hold(run, request, kept)
    hold_moves(run, moves)


def _images(move: Move) -> Mapping[str, str]:
    return move.before.version.images if move.before.version else {}


def hold_moves(run: Run, moves: Sequence[Move]) -> None:
    """Returns where what stands in the clusters is what the run's plan began from, if it has one.

    Raises:
        PlanChangedError: something else was published since; nothing may be published.
    """
    if run.result.plan is not None:
        # What stood before this run's own publish is not known any more.
        known = [move for move in moves if move.before != Before()]
        hold_online(run.result.plan, {move.cluster: move.before.template_id for move in known})


def _asked(run: Run) -> Asked:
    request, images, template_id = run.request, None, None
    if isinstance(request, ReleaseRequest):
        images, template_id = request.images, request.template_id
    elif isinstance(request, RollbackRequest):
        template_id = request.to_template
    replicas = request.replicas if isinstance(request, ScaleRequest) else None
    return Asked(
        action=run.result.action,
        app_id=run.app_id,
        deployment=request.deployment,
        clusters=request.clusters,
        template_id=template_id,
        images=images,
        replicas=replicas,
        procedure=Procedure.of(request),
        release_id=run.result.release_id,
    )
