"""The control API: what really happened, and levers to make other things happen. It needs no signature."""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field

from prefect_rollout.errors import ConfigurationError
from prefect_rollout.simulator.cloud import Cloud
from prefect_rollout.simulator.fault import Fault
from prefect_rollout.simulator.params import PathId, PathName
from prefect_rollout.simulator.refusal import Refusal
from prefect_rollout.simulator.scenario import Behaviours, Scenario
from prefect_rollout.simulator.shapes import Now, RequestSeen, Truth, Written

_MONTH = 31 * 24 * 3600


class Jump(BaseModel):
    """How many simulated seconds to jump ahead."""

    model_config = ConfigDict(extra="forbid")

    seconds: float = Field(ge=0, le=_MONTH, allow_inf_nan=False)


def control_routes(cloud: Cloud, errors: dict[int | str, dict[str, Any]]) -> APIRouter:
    """The routes below `/_control`."""
    router = APIRouter(prefix="/_control", tags=["Control"], responses=errors)

    @router.get("/record")
    async def record(kind: Literal["template", "publish", "restart", "scale"] | None = None) -> list[Written]:
        """The writes that took effect, oldest first."""
        return cloud.record(kind)

    @router.get("/requests")
    async def requests(call: str | None = None) -> list[RequestSeen]:
        """The last 10000 requests to the Open API, oldest first."""
        return cloud.requests(call)

    @router.get("/truth")
    async def truth(
        app: Annotated[int | None, Query(ge=1)] = None, deployment: str | None = None
    ) -> list[Truth]:
        """What each rollout has really come to."""
        return cloud.truth(app, deployment)

    @router.put("/scenario")
    async def put_scenario(scenario: Scenario) -> Now:
        """Begins anew with another scenario."""
        try:
            cloud.load(scenario)
        except ConfigurationError as error:
            raise Refusal(400, error.problem) from error
        return Now(now=cloud.now())

    @router.put("/faults")
    async def put_faults(faults: list[Fault]) -> Now:
        """Replaces the faults; their counters start from nothing."""
        cloud.set_faults(faults)
        return Now(now=cloud.now())

    @router.put("/apps/{app_id}/deployments/{name}/behaviour")
    async def put_behaviour(app_id: PathId, name: PathName, behaviour: Behaviours) -> Now:
        """Replaces a deployment's behaviour, one or a list; pods that exist keep their fate."""
        cloud.set_behaviour(app_id, name, behaviour)
        return Now(now=cloud.now())

    @router.post("/reset")
    async def reset() -> Now:
        """Begins anew with the same scenario."""
        cloud.reset()
        return Now(now=cloud.now())

    @router.post("/advance")
    async def advance(jump: Jump) -> Now:
        """Jumps ahead in simulated time."""
        return Now(now=cloud.advance(jump.seconds))

    return router
