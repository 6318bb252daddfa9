"""Step 1: check the deployment."""

from pydantic import BaseModel

from prefect_rollout.blocks import open_target
from prefect_rollout.release.workload import Workload
from prefect_rollout.runs.step import say, step
from prefect_rollout.text import one_line


class Checked(BaseModel):
    """A deployment of an app, and the `identity` of its platform."""

    workload: Workload
    platform: str


@step("check deployment", "check {deployment} of app {app_id}")
async def check_deployment(app_id: int | str, deployment: str, *, target: str) -> Checked:
    """Find the app by its id and the deployment by its exact name.

    Raises:
        AppNotFoundError: the platform has no such app.
        DeploymentNotFoundError: the app has no such deployment; the error lists similar names.
    """
    async with open_target(target) as platform:
        workload = await platform.workload(app_id, deployment)
        checked = Checked(workload=workload, platform=platform.identity)
    say("check deployment", f"app {one_line(workload.app, 80)}, deployment id {one_line(workload.id, 80)}")
    return checked
