"""The flow that has a deployment's pods replaced by new ones of the same template."""

from prefect import flow

from prefect_rollout.flows.conduct import Move, Run, conduct, first_name
from prefect_rollout.flows.planning import hold_in_place, plan_only
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
    Request,
    Seconds,
    WindowWait,
)
from prefect_rollout.tasks import restart_deployment


@flow(name="restart", flow_run_name=first_name("restart"), persist_result=True, validate_parameters=False)
async def restart(
    app_id: int | str,
    deployment: str,
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
    """Restart a deployment: new pods of the template that is online, watched as in a release.

    Args:
        app_id: Id of the app, such as 3290.
        deployment: Exact name of the deployment, such as qapm-home.
        target: Block with the platform's credentials, as type-slug/name; environment for the K8S_ variables.
            Empty for container-cloud/default, or for the variables if nobody saved it.
        clusters: Restart only these clusters; empty for all that the metaData names.
        reason: Why; kept in the report.
        order: together restarts everywhere and then watches; one-by-one goes on when a cluster is ready.
        canary: Cluster that is restarted and watched before all others.
        pause_seconds: Seconds between one cluster's being ready and the next restart.
        poll_seconds: Seconds between looks at the pods.
        poll_attempts: Looks at the pods before the restart counts as timed out.
        grace_seconds: Seconds that a new pod may be in trouble before the restart has failed.
        lock_wait_seconds: Seconds to wait for another release of the deployment; 0 refuses at once.
        dry_run: Read everything and write nothing: report what would change, and the plan's hash.
        expect_plan: Hash of a dry run; the restart is refused where something has changed since.
        requested_by: Who asks for it; kept in the report and in the history.
        window_wait_seconds: Seconds to wait where a release window is closed; 0 refuses at once.
        break_glass: Why it passes a closed release window all the same; kept in the history.
        late_minutes: Minutes after its scheduled time at which a run skips itself; 0 for never.

    Raises:
        RolloutError: what ended it; `error.result` is the result so far.
    """
    request = Request.of(**locals())
    return await conduct(Action.RESTART, request, _restart)


async def _restart(run: Run, request: Request) -> None:
    await run.begin()
    if not request.writes:
        await plan_only(run, request)
        return
    await run.lock()
    moves = await run.moves_in_place(restarted=True)
    await hold_in_place(run, request, moves)

    async def write(move: Move) -> None:
        await restart_deployment(
            run.deployment,
            move.cluster,
            before=move.before,
            release_id=run.result.release_id,
            target=request.target,
        )

    await run.roll(moves, write)
