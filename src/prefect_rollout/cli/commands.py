"""The commands: releases, their history, servers, and a simulated cloud to try it out.

Exit codes: 0 released, 1 failed, 2 wrong use or configuration, 3 timed out, 4 skipped, 130 cancelled.
Prefect is imported inside the commands that need it, so that `--help` answers at once.
"""

import asyncio
import os
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Group, Parameter
from cyclopts.validators import Number
from rich.prompt import Prompt

from prefect_rollout.batch.plan import BatchRequest
from prefect_rollout.cli.options import OUTPUT, WHAT, AsJson, options, request_of
from prefect_rollout.cli.output import WRONG_USE, QuietConsole, command_line, complain, err, say
from prefect_rollout.cli.results import end, history_table, program, stdout_for_json
from prefect_rollout.cli.run import at_the_api, call_flow, conduct, retry_run, run_flow
from prefect_rollout.errors import ConfigurationError, InputError, RolloutError
from prefect_rollout.execution import endpoint, prefect_api
from prefect_rollout.release.request import ReleaseRequest, Request, RollbackRequest, ScaleRequest
from prefect_rollout.text import json_line, one_line

if TYPE_CHECKING:
    from prefect_rollout.runs.history import Change, Wanted

RELEASES, SERVERS, SETUP = (
    Group(name, sort_key=number) for number, name in enumerate(("Releases", "Servers", "Set up and try"))
)

app = command_line("Release applications on a container cloud as Prefect flows.")
app["--help"].group = app["--version"].group = Group("Help", sort_key=9)


@app.command(group=RELEASES, sort_key=1)
@options(ReleaseRequest)
def deploy(*, as_json: bool = False, **given: Any) -> int:
    """Release a template, by default the newest, to all clusters of a deployment."""
    return run_flow("deploy_latest_image", lambda: request_of(ReleaseRequest, given), as_json)


@app.command(group=RELEASES, sort_key=2)
@options(BatchRequest)
def batch(plan: Path, *, as_json: bool = False, **given: Any) -> int:
    """Release many deployments from a plan, in waves, each as its own flow run."""
    return run_flow("deploy_batch", lambda: request_of(BatchRequest, {"plan": plan, **given}), as_json)


@app.command(group=RELEASES, sort_key=3)
@options(RollbackRequest)
def rollback(*, as_json: bool = False, **given: Any) -> int:
    """Roll each cluster back to the last template that was released there before."""
    return run_flow("rollback", lambda: request_of(RollbackRequest, given), as_json)


@app.command(group=RELEASES, sort_key=4)
@options(Request)
def restart(*, as_json: bool = False, **given: Any) -> int:
    """Replace the pods of a deployment with new ones of the same template."""
    return run_flow("restart", lambda: request_of(Request, given), as_json)


@app.command(group=RELEASES, sort_key=5)
@options(ScaleRequest)
def scale(*, as_json: bool = False, **given: Any) -> int:
    """Change the number of pods in each cluster, until the next release."""
    return run_flow("scale", lambda: request_of(ScaleRequest, given), as_json)


@app.command(group=RELEASES, sort_key=6)
def retry(
    run_id: Annotated[str, Parameter(help="ID of the flow run.", group=WHAT)],
    /,
    *,
    as_json: AsJson = False,
) -> int:
    """Continue a run that failed, timed out, crashed or was cancelled."""
    return retry_run(run_id, as_json)


@app.command(group=RELEASES, sort_key=7)
def history(
    *,
    app_id: Annotated[
        str | None, Parameter(name=("--app-id", "--app"), group=WHAT, help="Only this app.")
    ] = None,
    deployment: Annotated[str | None, Parameter(group=WHAT, help="Only this deployment.")] = None,
    cluster: Annotated[str | None, Parameter(group=WHAT, help="Only this cluster.")] = None,
    since: Annotated[
        str | None,
        Parameter(
            group=WHAT, help="Only changes since then: 7d, 36h, 2026-11-01 (UTC) or 2026-11-01T08:00+08:00."
        ),
    ] = None,
    limit: Annotated[
        int, Parameter(group=OUTPUT, help="Maximum number of changes.", validator=Number(gte=1))
    ] = 50,
    as_json: Annotated[AsJson, Parameter(help="Print one JSON object per line on standard output.")] = False,
) -> int:
    """List the changes, newest first: what, when, who, why and how each was started."""
    prefect_api.prepare()
    with stdout_for_json(as_json) as stdout:
        from prefect_rollout.runs import history

        after = None if since is None else history.since_of(since, datetime.now(UTC))
        wanted = history.Wanted(app_id, deployment, cluster, after, limit)
        found = asyncio.run(at_the_api(lambda: _history(wanted)))
        if stdout:
            stdout.writelines(json_line(change.model_dump(mode="json")) + "\n" for change in found)
        elif found:
            # A pipe has no width.
            out = QuietConsole(highlight=False, emoji=False, width=None if sys.stdout.isatty() else 250)
            out.print(history_table(found))
    if not found:
        asked = {"app": app_id, "deployment": deployment, "cluster": cluster, "since": since}
        fits = ", ".join(f"{name} {one_line(value, 80)}" for name, value in asked.items() if value)
        say(f"No release{' of ' if fits else ''}{fits} is on record.")
    return 0


async def _history(wanted: "Wanted") -> "list[Change]":
    from prefect import get_client

    from prefect_rollout.runs import history

    async with get_client() as client:
        return await history.read(client, wanted)


app.command(
    "prefect_rollout.mcp.command:mcp", name="mcp", group=SERVERS, help="Run the MCP server for an assistant."
)
app.command(
    "prefect_rollout.mcp.command:up",
    name="up",
    group=SERVERS,
    help="Run a Prefect server with its UI, a worker and the MCP server.",
)


@app.command(group=SETUP, sort_key=1)
def demo() -> int:
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
        err.print(f"A simulated container cloud listens on {cloud.url}.")
        err.print("Releasing the deployment qapm-home of app 3290.")
        request = ReleaseRequest.of(app_id=3290, deployment="qapm-home", reason="demo")
        code = conduct(lambda: call_flow("deploy_latest_image", request), None, home)
    prefect_home = shlex.quote(str(home / endpoint.PREFECT_HOME))
    ours, prefect = program("prefect-rollout"), program("prefect")
    for line in (
        "",
        "Try next:",
        f"  {ours} simulate    in one shell: a cloud that keeps running, and variables to export",
        f"  {ours} deploy --deployment bad-image    in another: a release that fails, and its diagnosis",
        f"  PREFECT_HOME={prefect_home} {prefect} server start    this release in the Prefect UI",
    ):
        say(line)
    return code


@app.command(group=SETUP, sort_key=3)
def init(
    *,
    pool_type: Annotated[
        str, Parameter(name="--type", group=WHAT, help="Type of the work pool, such as process.")
    ] = "rollout",
    batches: Annotated[
        int | None,
        Parameter(
            group=WHAT, help="Batches that run at once; 4 if no limit is set.", validator=Number(gte=1)
        ),
    ] = None,
    write: Annotated[
        Path | None,
        Parameter(
            group=WHAT,
            help="Folder to write prefect.yaml and automations to, to change them; nothing else is done.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Set up the work pool, its queues, the deployments and the block types in Prefect."""
    prefect_api.prepare()
    with stdout_for_json(as_json) as stdout:
        from prefect_rollout.execution import setup

        try:
            if write:
                result: dict[str, Any] = {"files": [str(path) for path in setup.write(write)]}
                for path in result["files"]:
                    say(f"created    {one_line(path)}")
                prefect = program("prefect")
                say("Next: change the files, then apply them in that folder:")
                say(f"  {prefect} --no-prompt deploy --all")
                say(f"  {prefect} automation create --from-file automations/failed.yaml")
            else:
                local = not prefect_api.configured()
                result = asyncio.run(at_the_api(lambda: _init(pool_type, batches, local=local)))
        except RolloutError as error:
            return end(None, error, stdout)
        if stdout:
            stdout.write(json_line(result) + "\n")
    return 0


async def _init(pool_type: str, batches: int | None, *, local: bool) -> dict[str, Any]:
    from prefect import get_client

    from prefect_rollout.execution import daemon, setup

    api = prefect_api.api_in_use()
    say(f"Prefect API: {api}")
    done = []
    async with get_client() as client:
        # The local server has a pool of its own, whose worker runs in its daemon.
        async for each in setup.apply(client, daemon.POOL if local else setup.POOL, pool_type, batches):
            fields = f" ({', '.join(each.fields)})" if each.fields else ""
            say(f"{each.change:<9}  {each.kind} {each.name}{fields}")
            done.append(each._asdict())
    if local:
        following = f"{program('prefect-rollout')} up"
        say("Next: keep the local server and its worker running:")
    else:
        following = f"{program('prefect')} worker start --pool {setup.POOL}"
        say("Next: start a worker, on any machine with prefect-rollout installed:")
    say(f"  {following}")
    return {"prefect_api": api, "done": done, "next": following}


@app.command(group=SETUP, sort_key=4)
def simulate(
    *,
    host: Annotated[str, Parameter(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, Parameter(help="Port to listen on; 0 for any free port.", validator=Number(gte=0, lte=65535))
    ] = 8360,
    scenario: Annotated[
        Path | None, Parameter(help="YAML or JSON file of apps, behaviours and faults.")
    ] = None,
    speed: Annotated[float, Parameter(help="Simulated seconds per second.")] = 1,
) -> int:
    """Run a simulated container cloud until Ctrl-C."""
    from prefect_rollout.simulator import Scenario, load_scenario, run

    run(host, port, load_scenario(scenario) if scenario else Scenario(), speed)
    return 0


@app.command(group=SETUP, sort_key=2)
def configure(
    *,
    name: Annotated[str, Parameter(help="Name of the block container-cloud/NAME.")] = "default",
    app_id: Annotated[
        str | None,
        Parameter(env_var="K8S_APP_ID", help="App to read with the key before the block is saved."),
    ] = None,
) -> int:
    """Save the credentials of a cloud as a block, from K8S_ variables or prompts."""
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
    try:
        asyncio.run(at_the_api(lambda: _configure(name, app_id)))
    except RolloutError as error:
        complain(error)
        err.print("Nothing was saved.")
        return WRONG_USE if isinstance(error, ConfigurationError | InputError) else 1
    return 0


async def _configure(name: str, app_id: str) -> None:
    from prefect_rollout.blocks import ContainerCloud

    block = ContainerCloud.from_environment()
    if block is None:
        raise ConfigurationError("neither K8S_KEY_ID nor K8S_SECRET_KEY is set")
    # Tried before it is saved: a mistyped secret must not replace a block that works.
    async with block.get_client() as client:
        found = await client.app(app_id)
    err.print(f"It works: app {one_line(found.id, 80)} is {one_line(found.name, 120)}.", markup=False)
    try:
        await block.asave(name, overwrite=True)
    except ValueError as error:
        raise InputError(f"name: {one_line(error)}", field="name") from error
    err.print(f"Saved the block container-cloud/{name} in {prefect_api.api_in_use()}.", soft_wrap=True)


def _ask(variable: str, question: str, default: str = "", *, secret: bool = False) -> str:
    """Return the user's answer; without a terminal, raise an error that names the variable."""
    if not sys.stdin.isatty():
        if default:
            return default
        raise ConfigurationError(
            f"{variable} is not set, and there is no terminal to ask on",
            advice=f"Set {variable}, or run `prefect-rollout configure` in a terminal.",
            field=variable,
        )
    question += f" (Enter for {default})" if default else ""
    while True:
        answer = Prompt.ask(question, console=err, password=secret) or default
        if answer:
            return answer
