"""The command line: releases, what was released, and what it takes to try it out.

Exit codes: 0 released, 1 failed, 2 wrong use or configuration, 3 timed out, 130 cancelled. Prefect is
imported inside the commands that need it, so that `--help` answers at once.
"""

import asyncio
import contextlib
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TextIO, TypeVar
from uuid import UUID

from cyclopts import Parameter
from cyclopts.validators import Number
from rich.box import SIMPLE_HEAD
from rich.prompt import Prompt
from rich.table import Table
from rich.text import Text

from prefect_rollout import earlier, local, prefect_api
from prefect_rollout.console import WRONG_USE, QuietConsole, command_line, complain, err, me, say
from prefect_rollout.difference import plan_lines
from prefect_rollout.errors import (
    ConfigurationError,
    InputError,
    LockLostError,
    RolloutError,
)
from prefect_rollout.live import LiveProgress
from prefect_rollout.models import (
    Action,
    Checked,
    Outcome,
    ReleaseRequest,
    ReleaseResult,
    Request,
    RollbackRequest,
    ScaleRequest,
    cloud_words,
)
from prefect_rollout.text import json_line, one_line

if TYPE_CHECKING:
    from prefect.client.schemas.objects import State

    from prefect_rollout.batch import BatchResult
    from prefect_rollout.ledger import Change, Wanted

T = TypeVar("T")

EXIT_CODES = {
    Outcome.RELEASED: 0,
    Outcome.PLANNED: 0,
    Outcome.FAILED: 1,
    Outcome.TIMED_OUT: 3,
    Outcome.SKIPPED: 4,
    Outcome.CANCELLED: 130,
}


app = command_line("Releases applications on a container cloud as Prefect flows.")


app.command("prefect_rollout.mcp.command:mcp", name="mcp", help="Run the MCP server for an assistant.")
app.command(
    "prefect_rollout.mcp.command:up", name="up", help="Run a Prefect server with its UI, a runner and MCP."
)


@app.command
def demo() -> int:
    """Release the article's app on a simulated cloud, with a local Prefect server of its own."""
    home = prefect_api.DEMO_HOME
    prefect_api.isolate(home / local.PREFECT_HOME)
    from prefect_rollout.simulator import Scenario, SimulatorServer

    scenario = Scenario()
    with SimulatorServer(scenario) as cloud:
        for name in [name for name in os.environ if name.startswith("K8S_")]:
            del os.environ[name]
        os.environ["K8S_API_URL"] = cloud.url
        os.environ["K8S_KEY_ID"] = scenario.key_id
        os.environ["K8S_SECRET_KEY"] = scenario.secret_key
        err.print(f"A simulated container cloud answers on {cloud.url}.")
        err.print("Releasing the deployment qapm-home of app 3290.")
        request = ReleaseRequest.of(app_id=3290, deployment="qapm-home", reason="demo")
        code = _conduct(lambda: _run_flow("deploy_latest_image", request), None, home)
    prefect_home = shlex.quote(str(home / local.PREFECT_HOME))
    ours, prefect = _command("prefect-rollout"), _command("prefect")
    for line in (
        "",
        "Try next:",
        f"  {ours} simulate    in one shell: a cloud that keeps running, and what to export",
        f"  {ours} deploy --deployment bad-image    in another: a release that fails, and says why",
        f"  PREFECT_HOME={prefect_home} {prefect} server start    this release in the Prefect UI",
    ):
        say(line)
    return code


def _command(name: str) -> str:
    """How `name` is called from this shell: bare where it is on the path, else from beside Python."""
    return name if shutil.which(name) else shlex.quote(str(Path(sys.executable).with_name(name)))


@app.command
def simulate(
    *,
    host: Annotated[str, Parameter(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, Parameter(help="Port to listen on; 0 for any that is free.", validator=Number(gte=0, lte=65535))
    ] = 8360,
    scenario: Annotated[
        Path | None, Parameter(help="YAML or JSON file of apps, behaviours and faults.")
    ] = None,
    speed: Annotated[float, Parameter(help="Simulated seconds that pass in one second.")] = 1,
) -> int:
    """Run a simulated container cloud until Ctrl-C."""
    from prefect_rollout.simulator import Scenario, load_scenario, run

    run(host, port, load_scenario(scenario) if scenario else Scenario(), speed)
    return 0


@app.command
def configure(
    *,
    name: Annotated[str, Parameter(help="Name of the block: container-cloud/NAME.")] = "default",
    app_id: Annotated[
        str | None, Parameter(env_var="K8S_APP_ID", help="An app that the key may read, to try the block.")
    ] = None,
) -> int:
    """Save a container-cloud block from K8S_… variables or from prompts, once one read with it succeeds."""
    prefect_api.prepare()
    from prefect_rollout.settings import cloud_environment

    environment = cloud_environment()
    if not environment.api_url:
        os.environ["K8S_API_URL"] = _ask("K8S_API_URL", "Address of the cloud", "https://k8s.qihoo.net")
    if not environment.key_id:
        os.environ["K8S_KEY_ID"] = _ask("K8S_KEY_ID", "Key id")
    if not environment.secret_key:
        os.environ["K8S_SECRET_KEY"] = _ask("K8S_SECRET_KEY", "Secret key (not shown)", secret=True)
    app_id = app_id or _ask("K8S_APP_ID", "App id to try it with")
    try:
        asyncio.run(_at_the_api(lambda: _configure(name, app_id)))
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


AsJson = Annotated[
    bool,
    Parameter(
        name="--json", help="Print the result on standard output, as one JSON object alone.", negative=""
    ),
]


RequestedBy = Annotated[str | None, Parameter(help="Who asks for it; you, if not given.")]
WindowWait = Annotated[
    float, Parameter(help="Seconds to wait where a release window is closed; 0 refuses at once.")
]
BreakGlass = Annotated[
    str, Parameter(help="Why it passes a closed release window all the same; kept in the history.")
]
ApprovalSeconds = Annotated[
    float, Parameter(help="Seconds after which a release that nobody approved fails.")
]
DryRun = Annotated[
    bool,
    Parameter(
        help="Read everything and write nothing: print what would change, and the plan's hash.", negative=""
    ),
]
ExpectPlan = Annotated[str, Parameter(help="Hash of a dry run: refuse where something has changed since.")]


@Parameter(name="*")
@dataclass(kw_only=True)
class Common:
    """What every command that changes a deployment is asked."""

    app_id: Annotated[str, Parameter(env_var="K8S_APP_ID", help="Id of the app.")]
    deployment: Annotated[str, Parameter(env_var="K8S_DEPLOY_NAME", help="Exact name of the deployment.")]
    target: Annotated[
        str,
        Parameter(
            help="Block with the credentials: type-slug/name, or environment for the K8S_… variables; "
            "container-cloud/default, or else the variables, if not given."
        ),
    ] = ""
    cluster: Annotated[
        list[str] | None, Parameter(help="Only this cluster; may be repeated.", negative="")
    ] = None
    reason: Annotated[str, Parameter(help="Why; kept in the report, and in the template's description.")] = ""
    order: Annotated[
        Literal["together", "one-by-one"],
        Parameter(help="All clusters and then watch, or each when the one before is ready."),
    ] = "together"
    canary: Annotated[str | None, Parameter(help="Cluster that goes before all others.")] = None
    pause_seconds: Annotated[
        float, Parameter(help="Seconds between a cluster's being ready and the next.")
    ] = 0
    poll_seconds: Annotated[float, Parameter(help="Seconds between looks at the pods.")] = 5
    poll_attempts: Annotated[int, Parameter(help="Looks before it counts as timed out.")] = 20
    grace_seconds: Annotated[
        float, Parameter(help="Seconds that a new pod may be in trouble before it has failed.")
    ] = 30
    lock_wait_seconds: Annotated[
        float, Parameter(help="Seconds to wait for another release of the deployment; 0 refuses at once.")
    ] = 600
    requested_by: RequestedBy = None
    window_wait_seconds: WindowWait = 0
    break_glass: BreakGlass = ""
    dry_run: DryRun = False
    expect_plan: ExpectPlan = ""

    def values(self) -> dict[str, Any]:
        """The flow's parameters."""
        given = asdict(self)
        given["clusters"] = given.pop("cluster")
        if self.requested_by is None:
            given["requested_by"] = me()
        return given


@app.command
def deploy(
    common: Common,
    *,
    template_id: Annotated[
        str | None,
        Parameter(
            env_var="K8S_TEMPLATE_ID",
            help="Template to release from, even if its release failed; else the newest released one.",
        ),
    ] = None,
    image: Annotated[
        list[str] | None,
        Parameter(help="container=image, in place of the template's; may be repeated.", negative=""),
    ] = None,
    on_failure: Annotated[
        Literal["stop", "rollback"],
        Parameter(help="Leave everything as it is, or put back every cluster that was touched."),
    ] = "stop",
    approval: Annotated[
        Literal["none", "before-release"],
        Parameter(help="Wait until a person has approved in the Prefect UI what would change."),
    ] = "none",
    approval_seconds: ApprovalSeconds = 86_400,
    as_json: AsJson = False,
) -> int:
    """Release a deployment in this process, with the Prefect API that is configured or a local server."""
    return _run(
        "deploy_latest_image",
        lambda: ReleaseRequest.of(
            **common.values(),
            template_id=template_id,
            images=_images(image),
            on_failure=on_failure,
            approval=approval,
            approval_seconds=approval_seconds,
        ),
        as_json,
    )


@app.command
def batch(
    plan: Annotated[Path, Parameter(help="YAML or JSON file of the releases, in waves.")],
    /,
    *,
    run_in: Annotated[
        Literal["process", "work-pool"],
        Parameter(help="Run the releases in this process, or as runs of the child deployment by workers."),
    ] = "process",
    child_deployment: Annotated[
        str, Parameter(help="Deployment of the flow deploy-latest-image for work-pool: flow/deployment.")
    ] = "deploy-latest-image/batch-release",
    only_failed: Annotated[
        bool,
        Parameter(help="Leave out what earlier batches of the same plan have released.", negative=""),
    ] = False,
    approval: Annotated[
        Literal["none", "before-release", "between-waves"],
        Parameter(help="Wait for a person's approval in the Prefect UI."),
    ] = "none",
    approval_seconds: ApprovalSeconds = 86_400,
    dry_run: DryRun = False,
    expect_plan: ExpectPlan = "",
    requested_by: RequestedBy = None,
    window_wait_seconds: WindowWait = 0,
    break_glass: BreakGlass = "",
    as_json: AsJson = False,
) -> int:
    """Release many deployments from a plan, in waves, each as a flow run of its own."""
    asked = {
        "run_in": run_in,
        "child_deployment": child_deployment,
        "only_failed": only_failed,
        "approval": approval,
        "approval_seconds": approval_seconds,
        "dry_run": dry_run,
        "expect_plan": expect_plan,
        "requested_by": me() if requested_by is None else requested_by,
        "window_wait_seconds": window_wait_seconds,
        "break_glass": break_glass,
    }

    def request() -> Checked:
        from prefect_rollout.plan import BatchRequest, load_plan

        return BatchRequest.of(plan=load_plan(plan), **asked)

    return _run("deploy_batch", request, as_json)


@app.command
def rollback(
    common: Common,
    *,
    to_template: Annotated[
        str | None,
        Parameter(help="Template to go back to; the last one released in each cluster if not given."),
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Put a deployment back to the last template that was released in each cluster before what is now."""
    return _run(
        "rollback",
        lambda: RollbackRequest.of(**common.values(), to_template=to_template),
        as_json,
    )


@app.command
def restart(common: Common, *, as_json: AsJson = False) -> int:
    """Have a deployment's pods replaced by new ones of the same template."""
    return _run("restart", lambda: Request.of(**common.values()), as_json)


@app.command
def scale(
    common: Common,
    *,
    replicas: Annotated[int, Parameter(help="Pods in each cluster, 1 to 32.")],
    as_json: AsJson = False,
) -> int:
    """Change how many pods a deployment has in each cluster, until its next release."""
    return _run("scale", lambda: ScaleRequest.of(**common.values(), replicas=replicas), as_json)


@app.command
def retry(
    run_id: Annotated[str, Parameter(help="Id of the flow run.")],
    /,
    *,
    as_json: AsJson = False,
) -> int:
    """Go on, in this process, with a run that failed, timed out, crashed or was cancelled."""
    prefect_api.prepare()
    with _stdout_for_json(as_json) as stdout:
        try:
            wanted = UUID(run_id)
        except ValueError:
            problem = f"run_id: {one_line(run_id, 80)!r} is not the id of a flow run, such as {UUID(int=0)}"
            return _end(None, InputError(problem, field="run_id"), stdout)
        return _conduct(lambda: _retry(wanted), stdout)


async def _retry(run_id: UUID) -> "ReleaseResult | BatchResult":
    from prefect_rollout.flows.again import find, go_on

    await _say_where((await find(run_id)).parameters)
    return await (await go_on(run_id)).aresult()


@app.command
def history(
    *,
    app_id: Annotated[
        str | None, Parameter(name=("--app", "--app-id"), help="Only releases of this app.")
    ] = None,
    deployment: Annotated[str | None, Parameter(help="Only of this deployment.")] = None,
    cluster: Annotated[str | None, Parameter(help="Only what concerned this cluster.")] = None,
    since: Annotated[
        str | None, Parameter(help="Only since then: 7d, 36h, 2026-11-01 (UTC), or 2026-11-01T08:00+08:00.")
    ] = None,
    limit: Annotated[int, Parameter(help="Rows at the most.", validator=Number(gte=1))] = 50,
    as_json: Annotated[
        bool, Parameter(name="--json", help="Print a JSON object a line on standard output.", negative="")
    ] = False,
) -> int:
    """Say what changed, who asked for it, when, why and through which entrance: the newest first."""
    prefect_api.prepare()
    with _stdout_for_json(as_json) as stdout:
        from prefect_rollout import ledger

        after = None if since is None else ledger.since_of(since, datetime.now(UTC))
        wanted = ledger.Wanted(app_id, deployment, cluster, after, limit)
        found = asyncio.run(_at_the_api(lambda: _history(wanted)))
        if stdout:
            stdout.writelines(json_line(change.model_dump(mode="json")) + "\n" for change in found)
        elif found:
            # What reads from a pipe has no width.
            out = QuietConsole(highlight=False, emoji=False, width=None if sys.stdout.isatty() else 250)
            out.print(_history_table(found))
    if not found:
        asked = {"app": app_id, "deployment": deployment, "cluster": cluster, "since": since}
        fits = ", ".join(f"{name} {one_line(value, 80)}" for name, value in asked.items() if value)
        say(f"No release{' of ' if fits else ''}{fits} is on record.")
    return 0


async def _history(wanted: "Wanted") -> "list[Change]":
    from prefect import get_client

    from prefect_rollout import ledger

    async with get_client() as client:
        return await ledger.read(client, wanted)


def _history_table(found: "list[Change]") -> Table:
    """The changes as a person reads them; texts of others are words in it, too."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("When (UTC)", no_wrap=True)
    for head in ("Deployment (app)", "What", "Cloud (block)", "Cluster", "Before → after"):
        table.add_column(head, overflow="fold")
    for head in ("Who (entrance)", "Why"):
        table.add_column(head, overflow="fold")
    table.add_column("Flow run", no_wrap=True)
    for change in found:
        who = f"{change.who} ({change.entrance})" if change.entrance else change.who
        if change.approved_by:
            who += f", approved by {change.approved_by}"
        why = f"{change.why} [break glass: {change.break_glass}]" if change.break_glass else change.why
        cells = (
            *(f"{change.when.astimezone(UTC):%Y-%m-%d %H:%M}", f"{change.deployment} ({change.app_id})"),
            *(f"{change.action}: {change.outcome}", cloud_words(change.cloud, change.target)),
            *(change.cluster, f"{change.before} → {change.after}"),
            *(who, why, change.run_id),
        )
        table.add_row(*(Text(one_line(cell, 1000)) for cell in cells))
    return table


@app.command
def notify(
    files: Annotated[list[Path], Parameter(help="Automations, as in docs/automations.")],
    /,
    *,
    block: Annotated[str, Parameter(help="Notification block: type-slug/name, such as slack-webhook/ops.")],
) -> int:
    """Create automations that notify, or renew those of the same names."""
    prefect_api.prepare()
    for name, created in asyncio.run(_at_the_api(lambda: _notify(files, block))):
        done = "Created" if created else "Renewed"
        say(f"{done} the automation {one_line(name, 120)!r}.")
    return 0


async def _notify(files: list[Path], block: str) -> list[tuple[str, bool]]:
    from prefect import get_client

    from prefect_rollout import automations

    async with get_client() as client:
        return await automations.apply(client, files, block)


def _images(given: list[str] | None) -> dict[str, str] | None:
    images = {}
    for pair in given or []:
        container, _, image = pair.partition("=")
        if not container or not image:
            raise InputError(f"image: {one_line(pair, 120)!r} is not container=image", field="image")
        if container in images:
            raise InputError(f"image: container {one_line(container, 80)!r} is given twice", field="image")
        images[container] = image
    return images or None


def _run(flow: str, request: Callable[[], Checked], as_json: bool) -> int:
    """Runs the flow of that name, once what it is asked has been checked."""
    prefect_api.prepare()
    with _stdout_for_json(as_json) as stdout:
        try:
            asked = request()
        except InputError as error:
            return _end(None, error, stdout)
        return _conduct(lambda: _run_flow(flow, asked), stdout)


_api_lines: ContextVar[Sequence[str]] = ContextVar("api_lines", default=())
"""Which Prefect API is used; a run says it after the cloud, which matters more."""


async def _at_the_api(work: Callable[[], Coroutine[Any, Any, T]], home: Path = local.HOME) -> T:
    """Run `work` with the Prefect API that is configured, or with the user's local server.

    Args:
        work: what to run.
        home: folder of the local service.
    """

    def starting() -> None:
        say("Starting the local Prefect server, which takes some seconds.")

    async with prefect_api.reached(home, starting=starting) as lease:
        lines = [f"Prefect API: {prefect_api.api_in_use()}"]
        _api_lines.set(lines)
        if lease is not None:
            lines.append(f"Its UI asks for the password in {home / local.PASSWORD}")
            if home == local.HOME:
                earlier.tell_once(say)
            await _offer_what_was_killed()
        return await work()


async def _offer_what_was_killed() -> None:
    from prefect import get_client

    from prefect_rollout import guard, reaper

    async with get_client() as client:
        # Whatever uses this server runs on this machine, so its processes can be asked for.
        await reaper.sweep(client, gone=guard.ended_here)
        for run in await reaper.to_offer(client):
            say(
                f"A release was killed while it ran: {one_line(run.name, 80)}. "
                f"Continue it: {_command('prefect-rollout')} retry {run.id}"
            )


def _conduct(
    work: "Callable[[], Coroutine[Any, Any, ReleaseResult | BatchResult]]",
    stdout: TextIO | None,
    home: Path = local.HOME,
) -> int:
    """Runs a flow in this process, shows its progress, says how it ended, returns the exit code."""
    from prefect.exceptions import Abort, TerminationSignal

    async def shown() -> "ReleaseResult | BatchResult":
        with LiveProgress(err).showing():
            return await _cancelled_by_ctrl_c(work())

    result: ReleaseResult | BatchResult | None = None
    error: RolloutError | None = None
    try:
        result = asyncio.run(_at_the_api(shown, home))
    except RolloutError as failure:
        result, error = failure.batch or failure.result, failure
    except (TerminationSignal, KeyboardInterrupt, asyncio.CancelledError) as signalled:  # the first: SIGTERM
        from prefect_rollout import guard

        if not guard.stopped:
            raise KeyboardInterrupt from signalled
        error = guard.stopped[-1]
        result = error.batch or error.result
    except Abort as aborted:  # another process goes on with the run
        error = LockLostError(str(aborted))
    return _end(result, error, stdout)


async def _cancelled_by_ctrl_c(
    work: "Coroutine[Any, Any, ReleaseResult | BatchResult]",
) -> "ReleaseResult | BatchResult":
    """`work`; the first Ctrl-C cancels the release in good order, a second one ends it at once."""
    from prefect_rollout import guard

    def cancel() -> None:
        loop.remove_signal_handler(signal.SIGINT)
        if guard.cancel_all("cancelled by Ctrl-C"):
            err.print("\nCancelling, and looking at what is live. Ctrl-C again ends it at once.")
        else:
            task.cancel()

    loop, task = asyncio.get_running_loop(), asyncio.ensure_future(work)
    with contextlib.suppress(NotImplementedError):  # Windows, where Ctrl-C ends it at once
        loop.add_signal_handler(signal.SIGINT, cancel)
    return await task


async def _run_flow(name: str, request: Checked) -> "ReleaseResult | BatchResult":
    from prefect import tags

    from prefect_rollout import flows
    from prefect_rollout.ledger import ENTRANCE

    # Not dumped: a plan keeps the lines of its file.
    parameters = {field: getattr(request, field) for field in type(request).model_fields}
    await _say_where(parameters)
    with tags(f"{ENTRANCE}cli"):
        state: State[ReleaseResult | BatchResult] = await getattr(flows, name)(
            **parameters, return_state=True
        )
    return await state.aresult()


async def _say_where(parameters: Mapping[str, Any]) -> None:
    """Say which clouds a run with these parameters is about, and then which Prefect API is used."""
    from prefect_rollout.blocks import choose_target
    from prefect_rollout.plan import Plan

    clouds = []
    with contextlib.suppress(ConfigurationError, InputError):  # the run itself says what is wrong
        targets = [str(parameters.get("target") or "")]
        if "plan" in parameters:
            targets = Plan.of_parameter(parameters["plan"]).targets
        for target in targets:
            clouds.append((await choose_target(target)).words)  # noqa: PERF401 - as many as can be found
    for cloud in dict.fromkeys(clouds):
        say(f"Cloud: {one_line(cloud)}")
    for line in _api_lines.get():
        say(line)


def _end(
    result: "ReleaseResult | BatchResult | None", error: RolloutError | None, stdout: TextIO | None
) -> int:
    """Says how a release ended, to a person and, where `stdout` is given, as JSON; the exit code."""
    outcome = result.outcome if result else Outcome.FAILED
    if result and outcome is not Outcome.PLANNED:
        for note in _notes(result):
            say(f"{one_line(note, 500)}.", style="yellow")
    if error:
        complain(error)
    elif result and result.outcome is Outcome.PLANNED:
        for line in _planned(result):
            say(line)
    elif result:
        done = _released(result) if isinstance(result, ReleaseResult) else f"Done: {result.counted}."
        say(done, style="green")
    if error and result and error.retry_helps:
        run_id = result.release_id if isinstance(result, ReleaseResult) else result.batch_id
        say(f"Continue it: {_command('prefect-rollout')} retry {run_id}")
    if stdout:
        document: dict[str, Any] = result.model_dump(mode="json") if result else {"outcome": outcome.value}
        if error:
            document["error"] = error.to_dict()
        stdout.write(json_line(document) + "\n")
    if isinstance(error, InputError | ConfigurationError):
        return WRONG_USE
    return EXIT_CODES[outcome]


def _notes(result: "ReleaseResult | BatchResult") -> list[str]:
    """The templates that were skipped, of a batch with the name of the release."""
    if isinstance(result, ReleaseResult):
        return result.notes
    return [f"{one_line(row.name, 120)}: {note}" for row in result.releases for note in row.notes]


_DONE = {
    Action.DEPLOY: "Released",
    Action.ROLLBACK: "Rolled back",
    Action.RESTART: "Restarted",
    Action.SCALE: "Scaled",
}


def _planned(result: "ReleaseResult | BatchResult") -> Iterator[str]:
    if isinstance(result, ReleaseResult):
        lines = plan_lines(result.plan) if result.plan else []
        plan_hash = result.plan.plan_hash if result.plan else ""
    else:
        from prefect_rollout.batch import plan_of_all

        lines, plan_hash = plan_of_all(result), result.plan_hash
    yield from lines
    yield (
        "Nothing was written. To do exactly this: the same command with "
        f"--expect-plan {plan_hash} in place of --dry-run."
    )


def _released(result: ReleaseResult) -> str:
    ready = ", ".join(f"{c.cluster} {c.ready}/{c.replicas}" for c in result.clusters)
    deployment = one_line(result.deployment)
    notes = "".join(f" {one_line(c.cluster, 80)}: {one_line(c.note)}." for c in result.clusters if c.note)
    return f"{_DONE[result.action]}: {deployment} runs {_template(result)} in {one_line(ready)}.{notes}"


def _template(result: ReleaseResult) -> str:
    ids = sorted({str(cluster.template) for cluster in result.clusters})
    images = f" ({one_line(', '.join(result.images.values()))})" if result.images else ""
    return f"template {one_line(', '.join(ids))}{images}"


def _ask(variable: str, question: str, default: str = "", *, secret: bool = False) -> str:
    """What the user answers; without a terminal to ask on, an error that names the variable."""
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


@contextmanager
def _stdout_for_json(wanted: bool) -> Iterator[TextIO | None]:
    """Standard output for the one JSON object alone: whatever else writes there goes to stderr."""
    if not wanted:
        yield None
        return
    sys.stdout.flush()
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as stdout:
        os.dup2(2, 1)
        try:
            yield stdout
        finally:
            sys.stdout.flush()
            os.dup2(stdout.fileno(), 1)
