"""The flow that has a deployment's pods replaced by new ones of the same template."""

from typing import Annotated, Literal

from prefect import flow
from pydantic import Field

from prefect_rollout.flows.conduct import Move, Run, conduct, first_name
from prefect_rollout.models import Action, ReleaseResult, Request
from prefect_rollout.tasks import restart_deployment


@flow(name="restart", flow_run_name=first_name("restart"), persist_result=True, validate_parameters=False)
async def restart(
    app_id: int | str,
    deployment: str,
    target: str = "container-cloud/default",
    clusters: list[str] | None = None,
    reason: str = "",
    order: Literal["together", "one-by-one"] = "together",
    canary: str | None = None,
    pause_seconds: Annotated[float, Field(ge=0, le=86_400)] = 0,
    poll_seconds: Annotated[float, Field(ge=0.01, le=3600)] = 5,
    poll_attempts: Annotated[int, Field(ge=1, le=100_000)] = 20,
    grace_seconds: Annotated[float, Field(ge=0, le=86_400)] = 30,
    lock_wait_seconds: Annotated[float, Field(ge=0, le=86_400)] = 600,
) -> ReleaseResult:
    """Restart a deployment: new pods of the template that is online, watched as in a release.

    Args:
        app_id: Id of the app, such as 3290.
        deployment: Exact name of the deployment, such as qapm-home.
        target: Block with the platform's credentials, as type-slug/name.
        clusters: Restart only these clusters; empty for all that the metaData names.
        reason: Why; kept in the report.
        order: together restarts everywhere and then watches; one-by-one goes on when a cluster is ready.
        canary: Cluster that is restarted and watched before all others.
        pause_seconds: Seconds between one cluster's being ready and the next restart.
        poll_seconds: Seconds between looks at the pods.
        poll_attempts: Looks at the pods before the restart counts as timed out.
        grace_seconds: Seconds that a new pod may be in trouble before the restart has failed.
        lock_wait_seconds: Seconds to wait for another release of the deployment; 0 refuses at once.

    Raises:
        RolloutError: what ended it; `error.result` is the result so far.
    """
    request = Request.of(**locals())
    return await conduct(Action.RESTART, request, _restart)


async def _restart(run: Run, request: Request) -> None:
    await run.begin()
    moves = await run.moves_in_place(restarted=True)

    async def write(move: Move) -> None:
        await restart_deployment(
            run.deployment,
            move.cluster,
            before=move.before,
            release_id=run.result.release_id,
            target=request.target,
        )

    await run.roll(moves, write)
