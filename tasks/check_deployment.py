"""Step 1: check the deployment."""

from pydantic import BaseModel

from prefect_rollout.blocks import open_target
from prefect_rollout.models import App, Deployment
from prefect_rollout.tasks.step import say, step
from prefect_rollout.text import one_line


class Checked(BaseModel):
    """An app and the one of its deployments that a release is about, and the `identity` of their platform."""

    app: App
    deployment: Deployment
    platform: str


@step("check deployment", "check {deployment} of app {app_id}")
async def check_deployment(app_id: int | str, deployment: str, *, target: str) -> Checked:
    """Finds the app by its id and the deployment by its exact name.

    Args:
        app_id: the app's id.
        deployment: the deployment's name.
        target: the block document `type-slug/name` of the platform.

    Raises:
        AppNotFoundError: the platform has no such app.
        DeploymentNotFoundError: the app has no such deployment; the error lists near names.
    """
    async with open_target(target) as platform:
        app = await platform.app(app_id)
        found = await platform.deployment(app_id, deployment)
    say("check deployment", f"app {one_line(app.name, 80)}, deployment id {one_line(found.id, 80)}")
    return Checked(app=app, deployment=found, platform=platform.identity)
