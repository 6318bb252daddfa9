"""The commands: releases, their history, servers, and a simulated cloud to try it out.

Exit codes: 0 released, 1 failed, 2 wrong use or configuration, 3 timed out, 4 skipped, 130 cancelled.
Prefect is imported inside the commands that need it, so that `--help` answers at once.
"""

import itertools
import os
import shlex
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Group, Parameter
from cyclopts.types import Port, PositiveInt
from rich.prompt import Prompt

from prefect_rollout.batch.plan import BatchRequest
from prefect_rollout.cli import run
from prefect_rollout.cli.lists import run_document, show_changes, show_live, show_runs, show_templates
from prefect_rollout.cli.options import WHAT, Command, command_of, request_of, set_by_variable, with_json
from prefect_rollout.cli.output import Ended, command_line, err, label, program, say, waiting
from prefect_rollout.errors import ConfigurationError, InputError, NotFoundError
from prefect_rollout.execution import endpoint, prefect_api
from prefect_rollout.release.request import Checked, ReleaseRequest, Request, RollbackRequest, ScaleRequest
from prefect_rollout.text import one_line

if TYPE_CHECKING:
    from prefect.client.orchestration import PrefectClient
    from prefect.client.schemas.objects import FlowRun

    from prefect_rollout.execution.deployments import Live, Templates

RELEASES, DEPLOYMENTS, SERVERS, SETUP = (
    Group(name, sort_key=number)
    for number, name in enumerate(("Releases", "Deployments", "Servers", "Set up and try"))
)

AppId = Annotated[str, Parameter(name=("--app-id", "--app"))]
ThisApp = Annotated[str, Parameter(name=("--app-id", "--app"), env_var="K8S_APP_ID")]
ThisDeployment = Annotated[str, Parameter(env_var="K8S_DEPLOY_NAME")]
Clusters = Annotated[list[str] | None, Parameter(negative="")]
Flag = Annotated[bool, Parameter(negative="", show_default=False)]
RunId = Annotated[str, Parameter(help="ID of the flow run, its first characters, or its link.", group=WHAT)]

_CANCEL_SECONDS = 60.0

app = command_line("Release applications on a container cloud as Prefect flows.", group_parameters=WHAT)
app["--help"].group = app["--version"].group = Group("Help", sort_key=9)

_order = itertools.count()


def _command(group: Group, name: str | None = None, help: str | None = None) -> Callable[[Command], Command]:  # noqa: A002
    """Register a command in its group, in the order of this module."""

    def register(function: Command) -> Command:
        app.command(with_json(function), name=name, help=help, group=group, sort_key=next(_order))
        return function

    return register


def _flow_command(name: str, flow: str, model: type[Checked], text: str) -> None:
    """Register the command that runs the flow of that name."""

    def command(given: dict[str, Any]) -> Ended:
        request = request_of(model, given)
        try:
            return run.run_flow(flow, request)
        except NotFoundError as error:
            error.advice = f"{error.advice} {set_by_variable(error.kind, given)}".rstrip()
            raise

    _command(RELEASES, name, text)(command_of(model, command))


for each in (
    (
        *("deploy", "deploy-latest-image", ReleaseRequest),
        "Release a template, by default the newest, to all clusters of a deployment.",
    ),
    (
        *("batch", "deploy-batch", BatchRequest),
        "Release many deployments from a plan, in waves, each as its own flow run.",
    ),
    (
        *("rollback", "rollback", RollbackRequest),
        "Roll each cluster back to the last template that was released there before.",
    ),
    ("restart", "restart", Request, "Replace the pods of a deployment with new ones of the same template."),
    ("scale", "scale", ScaleRequest, "Change the number of pods in each cluster, until the next release."),
):
    _flow_command(*each)


@_command(RELEASES)
def retry(run_id: RunId, /) -> Ended:
    """Continue a run that failed, timed out, crashed or was cancelled."""
    return run.retry(run_id)


@_command(RELEASES)
def cancel(run_id: RunId, /) -> Ended:
    """Stop a run before its next write, and show how it ended."""

    async def stop(client: "PrefectClient") -> "FlowRun":
        from prefect_rollout.execution import releases
        from prefect_rollout.runs import flow_runs

        found = await releases.find(client, run_id)
        await flow_runs.cancel(client, found.run)
        return await releases.ended(client, found.run.id, _CANCEL_SECONDS)

    stopped = run.with_client(stop, "Cancelling")
    state = stopped.state
    name = one_line(state.name if state else "unknown", 40)
    say(f"{name}: {one_line(stopped.name, 200)}")
    if state and state.message:
        label("what", state.message)
    if state and not state.is_final():
        label("to do", f"It is still stopping: `{program('prefect-rollout')} list` shows when it has ended.")
    return Ended(0, run_document(stopped))


@_command(RELEASES, name="list")
def list_runs(
    *,
    app_id: AppId | None = None,
    deployment: str | None = None,
    running: Flag = False,
    limit: PositiveInt = 20,
) -> Ended:
    """List the runs, newest first, with the ids that retry and cancel take.

    Args:
        app_id: Only this app.
        deployment: Only this deployment.
        running: Only runs that have not ended.
        limit: Maximum number of runs.
    """

    async def read(client: "PrefectClient") -> "list[FlowRun]":
        from prefect_rollout.execution import releases
        from prefect_rollout.runs.flow_runs import Wanted

        wanted = Wanted(app_id or "", deployment or "", running or None, dry_runs=True)
        return await releases.listed(client, wanted, limit)

    found = run.with_client(read)
    show_runs(found)
    if not found:
        say("No run is on record.")
    return Ended(0, {"runs": [run_document(each) for each in found]})


@_command(RELEASES)
def history(
    *,
    app_id: AppId | None = None,
    deployment: str | None = None,
    cluster: str | None = None,
    since: str | None = None,
    limit: PositiveInt = 50,
) -> Ended:
    """List the changes, newest first: what, when, who, why and how each was started.

    Args:
        app_id: Only this app.
        deployment: Only this deployment.
        cluster: Only this cluster.
        since: Only changes since then: 7d, 36h, 2026-11-01 (UTC) or 2026-11-01T08:00+08:00.
        limit: Maximum number of changes.
    """
    prefect_api.prepare()
    with waiting("Loading Prefect"):
        from prefect_rollout.runs import history

    after = None if since is None else history.since_of(since, datetime.now(UTC))
    wanted = history.Wanted(app_id, deployment, cluster, after, limit)
    found = run.with_client(lambda client: history.read(client, wanted))
    show_changes(found)
    if not found:
        asked = {"app": app_id, "deployment": deployment, "cluster": cluster, "since": since}
        fits = ", ".join(f"{name} {one_line(value, 80)}" for name, value in asked.items() if value)
        say(f"No release{' of ' if fits else ''}{fits} is on record.")
    return Ended(0, {"changes": [change.model_dump(mode="json") for change in found]})


@_command(DEPLOYMENTS)
def status(
    *, app_id: ThisApp, deployment: ThisDeployment, cluster: Clusters = None, target: str = ""
) -> Ended:
    """Show what runs now in each cluster of a deployment, and the state of its pods.

    Args:
        app_id: ID of the app.
        deployment: Exact name of the deployment.
        cluster: Only this cluster; may be repeated.
        target: Block with the platform's credentials, as type-slug/name, or environment.
    """
    request = Request.of(app_id=app_id, deployment=deployment, clusters=cluster, target=target)

    async def read(_: "PrefectClient") -> "Live":
        from prefect_rollout.execution import deployments

        return await deployments.live(request.target, request.app_id, request.deployment, request.clusters)

    found = run.with_client(read, "Reading the deployment")
    return Ended(0, show_live(found))


@_command(DEPLOYMENTS)
def templates(
    *, app_id: ThisApp, deployment: ThisDeployment, target: str = "", limit: PositiveInt = 10
) -> Ended:
    """List the newest templates of a deployment: images, where they run, and which are not released.

    Args:
        app_id: ID of the app.
        deployment: Exact name of the deployment.
        target: Block with the platform's credentials, as type-slug/name, or environment.
        limit: Maximum number of templates.
    """
    request = Request.of(app_id=app_id, deployment=deployment, target=target)

    async def read(client: "PrefectClient") -> "Templates":
        from prefect_rollout.execution import deployments

        return await deployments.templates(request.target, request.app_id, request.deployment, limit, client)

    return Ended(0, show_templates(run.with_client(read, "Reading the deployment")))


app.command(
    "prefect_rollout.mcp.command:mcp", name="mcp", group=SERVERS, help="Run the MCP server for an assistant."
)
app.command(
    "prefect_rollout.mcp.command:up",
    name="up",
    group=SERVERS,
    help="Run a Prefect server with its UI, a worker and the MCP server.",
)


@_command(SETUP)
def demo() -> Ended:
    """Release an example app on a simulated cloud, with its own local Prefect server."""
    home = prefect_api.DEMO_HOME
    prefect_api.isolate(home / endpoint.PREFECT_HOME)
    from prefect_rollout.simulator import Scenario, SimulatorServer

    scenario = Scenario()
    with SimulatorServer(scenario) as cloud:
        for name in [name for name in os.environ if name.startswith("K8S_")]:
            del os.environ[name]
        os.environ["K8S_API_URL"] = cloud.url
        os.environ["K8S_KEY_ID"] = scenario.key_id
        os.environ["K8S_SECRET_KEY"] = scenario.secret_key
        say(f"A simulated container cloud listens on {cloud.url}.")
        say("Releasing the deployment qapm-home of app 3290.")
        request = ReleaseRequest.of(app_id=3290, deployment="qapm-home", reason="demo", check_images="off")
        ended = run.run_flow("deploy-latest-image", request, home)
    prefect_home = shlex.quote(str(home / endpoint.PREFECT_HOME))
    ours, prefect = program("prefect-rollout"), program("prefect")
    say(
        "\nTry next:\n"
        f"  {ours} simulate    in one shell: a cloud that keeps running, and variables to export\n"
        f"  {ours} deploy --deployment bad-image    in another: a release that fails, and its diagnosis\n"
        f"  PREFECT_HOME={prefect_home} {prefect} server start    this release in the Prefect UI"
    )
    return ended


@_command(SETUP)
def configure(
    *, name: str = "default", app_id: Annotated[str | None, Parameter(env_var="K8S_APP_ID")] = None
) -> Ended:
    """Save the credentials of a cloud as a block, from K8S_ variables or prompts.

    Args:
        name: Name of the block container-cloud/NAME.
        app_id: App to read with the key before the block is saved.
    """
    prefect_api.prepare()
    from prefect_rollout.settings import cloud_environment

    environment = cloud_environment()
    if not environment.api_url:
        os.environ["K8S_API_URL"] = _ask("K8S_API_URL", "Address of the cloud", "https://k8s.qihoo.net")
    if not environment.key_id:
        os.environ["K8S_KEY_ID"] = _ask("K8S_KEY_ID", "Key ID")
    if not environment.secret_key:
        os.environ["K8S_SECRET_KEY"] = _ask("K8S_SECRET_KEY", "Secret key (not shown)", secret=True)
    app_id = app_id or _ask("K8S_APP_ID", "ID of an app to read")
    return run.in_prefect(lambda: _configure(name, app_id))


async def _configure(name: str, app_id: str) -> Ended:
    from prefect_rollout.blocks import ContainerCloud

    block = ContainerCloud.from_environment()
    if block is None:
        raise ConfigurationError("neither K8S_KEY_ID nor K8S_SECRET_KEY is set")
    # Tried before it is saved: a mistyped secret must not replace a block that works.
    async with block.get_client() as client:
        found = await client.app(app_id)
    say(f"It works: app {one_line(found.id, 80)} is {one_line(found.name, 120)}.")
    try:
        await block.asave(name, overwrite=True)
    except ValueError as error:
        raise InputError(f"name: {one_line(error)}", field="name") from error
    api = prefect_api.api_in_use()
    say(f"Saved the block container-cloud/{name} in {api}.")
    return Ended(0, {"block": f"container-cloud/{name}", "prefect_api": api})


def _ask(variable: str, question: str, default: str = "", *, secret: bool = False) -> str:
    """Return the user's answer; without a terminal, raise an error that names the variable."""
    if sys.stdin.isatty():
        answer = ""
        while not answer:
            answer = Prompt.ask(question, console=err, password=secret, default=default)
        return answer
    if default:
        return default
    raise ConfigurationError(
        f"{variable} is not set, and there is no terminal to ask on",
        advice=f"Set {variable}, or run `prefect-rollout configure` in a terminal.",
        field=variable,
    )


@_command(SETUP)
def init(
    *,
    pool_type: Annotated[str, Parameter(name="--type")] = "rollout",
    batches: PositiveInt | None = None,
    write: Path | None = None,
) -> Ended:
    """Set up the work pool, its queues, the deployments and the block types in Prefect.

    Args:
        pool_type: Type of the work pool, such as process.
        batches: Batches that run at once; 4 if no limit is set.
        write: Folder to write prefect.yaml and automations to, to change them; nothing else is done.
    """
    prefect_api.prepare()
    with waiting("Loading Prefect"):
        from prefect_rollout.execution import daemon, setup

    if write:
        files = [str(path) for path in setup.write(write)]
        for path in files:
            say(f"created    {one_line(path)}")
        prefect = program("prefect")
        say(
            "Next: change the files, then apply them in that folder:\n"
            f"  {prefect} --no-prompt deploy --all\n"
            f"  {prefect} automation create --from-file automations/failed.yaml"
        )
        return Ended(0, {"files": files})
    local = not prefect_api.configured()
    pool = daemon.POOL if local else setup.POOL  # a worker of the local server's pool runs in its daemon
    done = []

    async def apply(client: "PrefectClient") -> str:
        async for each in setup.apply(client, pool, pool_type, batches):
            fields = f" ({', '.join(each.fields)})" if each.fields else ""
            say(f"{each.change:<9}  {each.kind} {each.name}{fields}")
            done.append(each._asdict())
        return prefect_api.api_in_use()

    api = run.with_client(apply, "Setting up")
    if local:
        following = f"{program('prefect-rollout')} up"
        say("Next: keep the local server and its worker running:")
    else:
        following = f"{program('prefect')} worker start --pool {pool}"
        say("Next: start a worker, on any machine with prefect-rollout installed:")
    say(f"  {following}")
    return Ended(0, {"prefect_api": api, "done": done, "next": following})


@app.command(group=SETUP, sort_key=next(_order))
def simulate(
    *, host: str = "127.0.0.1", port: Port = 8360, scenario: Path | None = None, speed: float = 1
) -> int:
    """Run a simulated container cloud until Ctrl-C.

    Args:
        host: Address to listen on.
        port: Port to listen on; 0 for any free port.
        scenario: YAML or JSON file of apps, behaviours and faults.
        speed: Simulated seconds per second.
    """
    from prefect_rollout.simulator import Scenario, load_scenario, run

    run(host, port, load_scenario(scenario) if scenario else Scenario(), speed)
    return 0
