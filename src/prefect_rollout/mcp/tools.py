"""The tools, the resource and the prompt that a client sees. What they do is in `releases`."""

import inspect
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from mcp.server import MCPServer
from mcp.server.elicitation import AcceptedElicitation, ElicitationResult
from mcp.server.mcpserver import Context, Elicit, Resolve
from mcp.server.mcpserver.exceptions import ResourceError, ToolError
from mcp_types import ToolAnnotations
from pydantic import BaseModel, Field

from prefect_rollout.console import me
from prefect_rollout.errors import ConfigurationError, InputError
from prefect_rollout.mcp import answers
from prefect_rollout.mcp.answers import (
    DeploymentStatus,
    Logs,
    Planned,
    Release,
    Releases,
    Submitted,
    Templates,
)
from prefect_rollout.mcp.quoting import unquoted
from prefect_rollout.mcp.work import Tooling, Work
from prefect_rollout.models import (
    ENVIRONMENT,
    Checked,
    ReleaseRequest,
    Request,
    RollbackRequest,
    ScaleRequest,
    same_id,
)
from prefect_rollout.plan import BatchRequest, Plan
from prefect_rollout.plan import Release as PlannedRelease
from prefect_rollout.settings import CloudEnvironment, cloud_environment
from prefect_rollout.text import one_line, when

READS = ToolAnnotations(read_only_hint=True, open_world_hint=True)
PLANS = ToolAnnotations(read_only_hint=True, idempotent_hint=True, open_world_hint=True)
WRITES = ToolAnnotations(
    read_only_hint=False, destructive_hint=True, idempotent_hint=True, open_world_hint=True
)
STOPS = ToolAnnotations(
    # It has nothing written to the cloud: it keeps a release from writing more.
    read_only_hint=False,
    destructive_hint=False,
    idempotent_hint=True,
    open_world_hint=True,
)

_PLAN_SECONDS = 45.0

UNVERIFIED = "(unverified)"
"""Suffix of the name of whoever asks over HTTP: clients choose their names."""

FlowRunId = Annotated[str, Field(description="Id of the release's flow run.")]
WaitSeconds = Annotated[
    float,
    Field(
        ge=0,
        le=50,
        description="Wait so long for the end; 0 answers at once. Many clients cut calls at 60 s.",
    ),
]
Confirm = Annotated[
    str,
    Field(description="The plan hash of plan_release, once the user has agreed to that plan."),
]
Limit = Annotated[int, Field(ge=1, le=50, description="At the most so many.")]
Cursor = Annotated[str, Field(description="next_cursor of the answer before; empty for the first page.")]


AppId = Annotated[int | str | None, Field(description="Id of the app; K8S_APP_ID by default.")]
DeploymentName = Annotated[
    str | None, Field(description="Exact name of the deployment; K8S_DEPLOY_NAME by default.")
]
Clusters = Annotated[
    list[str] | None, Field(description="Only these clusters; all of the deployment's by default.")
]
Target = Annotated[
    str | None,
    Field(
        description="Prefect block with the platform's credentials, as type-slug/name, or 'environment' for "
        "the K8S_ variables; rarely needed."
    ),
]


def _argument(kind: Any, default: Any, description: str) -> tuple[Any, Any]:
    return Annotated[kind, Field(description=description)], default


# What the tools that submit ask for, by the names of the flows' parameters.
ARGUMENTS: dict[str, tuple[Any, Any]] = {
    "app_id": (AppId, None),
    "deployment": (DeploymentName, None),
    "template_id": _argument(
        int | str | None,
        None,
        "Template to release from, even if its release failed; by default K8S_TEMPLATE_ID, else the newest "
        "released one.",
    ),
    "images": _argument(
        dict[str, str] | None,
        None,
        "Images in place of the template's, by container: {'web': 'registry/web:2'}.",
    ),
    "to_template": _argument(
        int | str | None, None, "Template to go back to; the last one released in each cluster by default."
    ),
    "replicas": _argument(Annotated[int, Field(ge=1, le=32)], ..., "Pods in each cluster."),
    "plan": _argument(
        dict[str, Any],
        ...,
        "The batch: {'releases': [{'app_id': 3290, 'deployment': 'qapm-home', 'template_id': …, "
        "'images': {…}, 'clusters': […], 'wave': 1, 'after': […]}, …], 'defaults': {…}, 'max_parallel': 10, "
        "'failure_budget': 0 or '5%', 'soak_seconds': 0, 'on_failure': …}. Waves run one after the other.",
    ),
    "clusters": (Clusters, None),
    "target": (Target, None),
    "reason": _argument(str, "", "Why, in the user's words; kept in the report and the history."),
    "on_failure": _argument(
        Literal["stop", "rollback"], "stop", "Leave a failed release as it is, or put back what it touched."
    ),
    "order": _argument(
        Literal["together", "one-by-one"],
        "together",
        "All clusters at once, or each when the one before is ready.",
    ),
    "canary": _argument(str | None, None, "Cluster that is released and watched before all others."),
    "approval": _argument(
        Literal["none", "before-release"],
        "none",
        "before-release: it waits until a person has approved it in the Prefect UI.",
    ),
    "poll_seconds": _argument(float, 5, "Seconds between looks at the pods."),
    "poll_attempts": _argument(int, 20, "Looks at the pods before it counts as timed out."),
    "only_failed": _argument(bool, False, "Leave out what earlier batches of the same plan have released."),
}
_WATCHING = ("poll_seconds", "poll_attempts")
_ONE = ("app_id", "deployment", "clusters", "target", "reason", "order", "canary", *_WATCHING)


@dataclass(frozen=True)
class Submitting:
    """A tool that starts a flow run.

    Attributes:
        tool: its name.
        flow: the flow's.
        request: what checks the arguments.
        arguments: names of `ARGUMENTS`.
        title: for a person.
        description: for a model.
    """

    tool: str
    flow: str
    request: type[Checked]
    arguments: tuple[str, ...]
    title: str
    description: str


_ANSWER = (
    "Answers with flow_run_id, state and ui_link; follow it with get_release. Asks the user to agree where "
    "the client can ask; else `confirm` is needed. The same request within ten minutes answers with the run "
    "it started then (`repeated`); attempt=2 makes another release of it on purpose."
)

SUBMITTING = {
    "deploy": Submitting(
        "deploy_latest_image",
        "deploy-latest-image",
        ReleaseRequest,
        (*_ONE[:2], "template_id", "images", *_ONE[2:], "on_failure", "approval"),
        "Release a deployment",
        "Releases a deployment: the images of a template, the newest by default, to its clusters, and "
        f"watches the pods. Use it when the user asks to deploy or release. {_ANSWER}",
    ),
    "batch": Submitting(
        "deploy_batch",
        "deploy-batch",
        BatchRequest,
        ("plan", "only_failed"),
        "Release many deployments",
        "Releases many deployments in waves, each as a flow run of its own; one that fails does not stop the "
        f"others until the failure budget is used up. {_ANSWER}",
    ),
    "rollback": Submitting(
        "rollback",
        "rollback",
        RollbackRequest,
        (*_ONE[:2], "to_template", *_ONE[2:]),
        "Roll a deployment back",
        "Puts a deployment back to the last template released before, and watches the pods. Use it when a "
        f"release was bad and the user wants the version of before. {_ANSWER}",
    ),
    "restart": Submitting(
        "restart",
        "restart",
        Request,
        _ONE,
        "Restart a deployment",
        f"Replaces a deployment's pods by new ones of the same template, and watches them. {_ANSWER}",
    ),
    "scale": Submitting(
        "scale",
        "scale",
        ScaleRequest,
        (*_ONE[:2], "replicas", *_ONE[2:]),
        "Scale a deployment",
        "Changes how many pods a deployment has in each cluster, until its next release, and watches them. "
        f"{_ANSWER}",
    ),
}


class Consent(BaseModel):
    """What the user is asked for."""

    proceed: bool = Field(title="Do it", description="Yes to have exactly this done; no to do nothing.")


@dataclass(frozen=True)
class Prepared:
    """A request that only waits for its user to agree.

    Attributes:
        request: what to submit, held to its plan.
        question: what the user is asked; empty where `confirm` has said it, or there is nothing to ask.
        known: id of the run that the same request has started already; of a retry, the end it goes on from.
    """

    request: Checked
    question: str = ""
    known: str = ""


class Tools:
    """The tools of one server.

    Args:
        work: what they work with.
        environment: the article's variables, for defaults.
        stdio: whether the server's user is the user of this machine.
    """

    def __init__(self, work: Work, environment: CloudEnvironment, *, stdio: bool) -> None:
        self._work = work
        self._environment = environment
        self._stdio = stdio
        self._tags = work.permits.tags(environment.registry_url)

    def add_to(self, server: MCPServer[None], *, read_only: bool) -> None:
        """Adds all tools, or those that write nothing."""

        def add(tool: Callable[..., Any], title: str, annotations: ToolAnnotations) -> None:
            server.add_tool(tool, title=title, description=inspect.getdoc(tool), annotations=annotations)

        add(self._planning(), "Plan a release", PLANS)
        add(self.get_release, "Follow a release", READS)
        add(self.list_releases, "List releases", READS)
        add(self.get_release_logs, "Read a release's log", READS)
        add(self.list_templates, "List a deployment's templates", READS)
        add(self.get_deployment_status, "See what is live", READS)
        if read_only:
            return
        for action, submitting in SUBMITTING.items():
            tool = self._submitting(action, submitting)
            tool.__name__, tool.__doc__ = submitting.tool, submitting.description
            add(tool, submitting.title, WRITES)
        add(self.cancel_release, "Cancel a release", STOPS)
        add(self._retrying(), "Go on with a release", WRITES)

    # ---- reading ----

    async def get_release(
        self, ctx: Context, flow_run_id: FlowRunId, wait_seconds: WaitSeconds = 0
    ) -> Release:
        """Says how far a release is, or how it ended: steps, pods, verdict, diagnosis, what to do next.

        Use it after every tool that started one, with wait_seconds, until `ended` is true.
        """
        async with self._work.tooling() as tooling:
            return await self._wait(tooling, ctx, flow_run_id, wait_seconds)

    async def list_releases(
        self,
        app_id: Annotated[str, Field(description="Only of this app.")] = "",
        deployment: Annotated[str, Field(description="Only of this deployment.")] = "",
        running: Annotated[
            bool | None, Field(description="true: only those under way; false: only those that have ended.")
        ] = None,
        limit: Limit = 20,
        cursor: Cursor = "",
    ) -> Releases:
        """Lists releases, batches, rollbacks, restarts and scalings, however started; the newest first."""
        async with self._work.tooling() as tooling:
            found: Releases = await tooling.releases.listed(
                tooling.api,
                tooling.permits,
                app_id=app_id,
                deployment=deployment,
                running=running,
                limit=limit,
                cursor=cursor,
            )
            return found

    async def get_release_logs(
        self,
        flow_run_id: FlowRunId,
        limit: Annotated[int, Field(ge=1, le=200, description="Lines at the most.")] = 50,
        cursor: Cursor = "",
        warnings_only: Annotated[bool, Field(description="Leave out what only informs.")] = False,
    ) -> Logs:
        """Reads a page of a release's log, oldest line first. get_release tells in short what matters."""
        async with self._work.tooling() as tooling:
            found = await tooling.releases.find(tooling.api, tooling.permits, flow_run_id)
            logs: Logs = await tooling.releases.logs(
                tooling.api, found, limit=limit, cursor=cursor, warnings=warnings_only
            )
            return logs

    async def list_templates(
        self,
        app_id: AppId = None,
        deployment: DeploymentName = None,
        target: Target = None,
        limit: Limit = 20,
    ) -> Templates:
        """Lists the templates of a deployment, the newest first: their images, and where each is online."""
        async with self._work.tooling() as tooling:
            given = {"app_id": app_id, "deployment": deployment, "target": target}
            asked = await self._asked(tooling, given, clusters=False)
            found: Templates = await tooling.releases.templates(
                tooling.api, tooling.permits, asked.target, asked.app_id, asked.deployment, limit
            )
            return found

    async def get_deployment_status(
        self,
        app_id: AppId = None,
        deployment: DeploymentName = None,
        clusters: Clusters = None,
        target: Target = None,
    ) -> DeploymentStatus:
        """Asks the platform what is live of a deployment now: online template and pods of each cluster."""
        async with self._work.tooling() as tooling:
            given = {"app_id": app_id, "deployment": deployment, "clusters": clusters, "target": target}
            asked = await self._asked(tooling, given)
            found: DeploymentStatus = await tooling.releases.live(
                tooling.api, asked.target, asked.app_id, asked.deployment, asked.clusters
            )
            return found

    async def release_resource(self, flow_run_id: str) -> str:
        """A release as JSON."""
        try:
            async with self._work.tooling() as tooling:
                found = await tooling.releases.find(tooling.api, tooling.permits, flow_run_id)
                release: Release = await tooling.releases.look(tooling.api, found)
                return release.model_dump_json()
        except ToolError as error:
            raise ResourceError(str(error)) from error

    # ---- planning ----

    def _planning(self) -> Callable[..., Awaitable[Planned]]:
        async def plan_release(
            ctx: Context,
            action: Annotated[
                Literal["deploy", "batch", "rollback", "restart", "scale"],
                Field(description="What to plan; batch takes `plan`, the others app_id and deployment."),
            ] = "deploy",
            wait_seconds: Annotated[float, Field(ge=0, le=50, description="Wait so long for the plan.")] = 30,
            **given: Any,
        ) -> Planned:
            """Makes a dry run: what would change in each cluster, and the plan hash to confirm it with.

            Reads everything and writes nothing. Show the lines to the user before anything is released.
            """
            submitting = SUBMITTING[action]
            async with self._work.tooling() as tooling:
                foreign = [
                    name
                    for name, value in given.items()
                    if name not in submitting.arguments and value not in (ARGUMENTS[name][1], None)
                ]
                if foreign:
                    raise InputError(
                        f"{foreign[0]}: is no argument of the action {action}",
                        advice=f"Leave it out; {action} has: {', '.join(submitting.arguments)}.",
                        field=foreign[0],
                    )
                mine = {name: given[name] for name in submitting.arguments}
                request = await self._request(tooling, ctx, submitting, mine)
                return await self._plan(tooling, ctx, submitting.flow, request, wait_seconds)

        arguments = dict(ARGUMENTS)
        for name in ("replicas", "plan"):
            kind = arguments[name][0]
            arguments[name] = (Annotated[kind.__origin__ | None, *kind.__metadata__], None)
        return _with_arguments(plan_release, arguments)

    async def _plan(
        self, tooling: Tooling, ctx: Context, flow: str, request: Checked, wait_seconds: float
    ) -> Planned:
        submission = await tooling.releases.plan(tooling.api, flow, request, tags=self._tags)
        release = await self._wait(tooling, ctx, str(submission.run.id), wait_seconds)
        return Planned(
            flow_run_id=release.flow_run_id,
            state=release.state,
            plan=release.plan,
            cloud=release.cloud,
            releases=release.releases,
            verdict=release.verdict,
            next=release.next,
            ui_link=release.ui_link,
        )

    # ---- submitting ----

    def _submitting(self, action: str, submitting: Submitting) -> Callable[..., Awaitable[Submitted]]:
        async def prepare(ctx: Context, confirm: str, attempt: int, **given: Any) -> Prepared:
            async with self._work.tooling() as tooling:
                request = await self._request(tooling, ctx, submitting, given)
                known = await tooling.releases.submitted(
                    tooling.api, submitting.flow, request, attempt=attempt
                )
                if known is not None:
                    return Prepared(request, known=str(known.id))
                if not _can_ask(ctx):
                    if not confirm:
                        raise ToolError(
                            f"Nothing was submitted: the user has to agree first. Call plan_release with "
                            f"action={action!r} and the same arguments, show the user what it answers, and "
                            "call this again with confirm=<its plan_hash>."
                        )
                    return Prepared(_held(request, confirm))
                planned = await self._plan(tooling, ctx, submitting.flow, request, _PLAN_SECONDS)
                if planned.plan is None:
                    raise ToolError(_without_plan(planned))
                if confirm and confirm.strip().lower() != planned.plan.plan_hash:
                    raise ToolError(
                        f"Nothing was submitted: the plan is {planned.plan.plan_hash} now, and not "
                        f"{one_line(confirm, 40)!r}. Show the user what would change now: "
                        + " ".join(planned.plan.lines)
                    )
                return Prepared(_held(request, planned.plan.plan_hash), _question(submitting, planned.plan))

        arguments = {name: ARGUMENTS[name] for name in submitting.arguments}
        ask = _asking(_with_arguments(prepare, arguments))

        async def submit(
            ctx: Context,
            prepared: Annotated[Prepared, Resolve(ask.prepare)],
            consent: Annotated[ElicitationResult[Consent], Resolve(ask.consent)],
            confirm: Confirm = "",
            wait_seconds: WaitSeconds = 0,
            attempt: Annotated[
                int,
                Field(ge=1, le=1000, description="Another number makes another release of the same request."),
            ] = 1,
            **_: Any,
        ) -> Submitted:
            _agreed(consent)
            async with self._work.tooling() as tooling:
                flow_run_id, repeated = prepared.known, True
                if not prepared.known:
                    submission = await tooling.releases.submit(
                        tooling.api, submitting.flow, prepared.request, attempt=attempt, tags=self._tags
                    )
                    flow_run_id, repeated = str(submission.run.id), submission.repeated
                return await self._submitted(tooling, ctx, flow_run_id, wait_seconds, repeated=repeated)

        return _with_arguments(submit, arguments)

    async def _submitted(
        self, tooling: Tooling, ctx: Context, flow_run_id: str, wait_seconds: float, *, repeated: bool
    ) -> Submitted:
        try:
            release = await self._wait(tooling, ctx, flow_run_id, wait_seconds)
        except ConfigurationError:
            # It is submitted: whatever keeps it from being looked at, its id must not be lost.
            return Submitted(
                flow_run_id=flow_run_id,
                state="unknown",
                repeated=repeated,
                next=f"It is submitted, and the Prefect API does not answer now. Call get_release with "
                f"flow_run_id={flow_run_id} in some seconds.",
                ui_link=tooling.api.link(flow_run_id),
            )
        first = ""
        if repeated:
            at = f" at {when(release.started)}" if release.started else ""
            first = (
                f"Nothing was done: the same request started this run{at}; attempt=2 makes another release "
                "of it. "
            )
        return Submitted(
            flow_run_id=release.flow_run_id,
            state=release.state,
            repeated=repeated,
            outcome=release.outcome,
            verdict=release.verdict,
            live=release.live,
            live_at=release.live_at,
            cloud=release.cloud,
            next=first + release.next,
            ui_link=release.ui_link,
        )

    # ---- cancelling and retrying ----

    async def cancel_release(
        self, ctx: Context, flow_run_id: FlowRunId, wait_seconds: WaitSeconds = 15
    ) -> Release:
        """Stops a release: nothing more is written, and what is live where is reported. It undoes nothing.

        To undo what was published use rollback; to go on use retry_release.
        """
        async with self._work.tooling() as tooling:
            found = await tooling.releases.find(tooling.api, tooling.permits, flow_run_id)
            await tooling.releases.cancel(tooling.api, found)
            return await self._wait(tooling, ctx, flow_run_id, wait_seconds)

    def _retrying(self) -> Callable[..., Awaitable[Submitted]]:
        async def prepare(ctx: Context, flow_run_id: str, confirm: str) -> Prepared:
            async with self._work.tooling() as tooling:
                found = await tooling.releases.find(tooling.api, tooling.permits, flow_run_id)
                tooling.releases.check_retry(found)
                token = tooling.releases.retry_token(found.run)
                if confirm == token and not _can_ask(ctx):
                    return Prepared(Checked(), known=token)
                release: Release = await tooling.releases.look(tooling.api, found)
                if not _can_ask(ctx):
                    raise ToolError(
                        "Nothing was done: the user has to agree first. Show the user how the release ended "
                        f"({release.verdict}), and call this again with confirm={token}."
                    )
                question = (
                    f"Go on with {one_line(found.run.name, 120)} ({found.flow}) where it stopped?\n"
                    f"It ended as {release.state}: {unquoted(release.verdict)}"
                )
                return Prepared(Checked(), question, token)

        ask = _asking(prepare)

        async def retry_release(
            ctx: Context,
            prepared: Annotated[Prepared, Resolve(ask.prepare)],
            consent: Annotated[ElicitationResult[Consent], Resolve(ask.consent)],
            flow_run_id: FlowRunId,
            confirm: Annotated[str, Field(description="confirm_retry of get_release.")] = "",
            wait_seconds: WaitSeconds = 0,
        ) -> Submitted:
            """Goes on with a release that failed, timed out, crashed or was cancelled, where it stopped.

            No write that was done is repeated, and of a batch only what was not released is. Answers like the
            tool that started it.
            """
            _agreed(consent)
            async with self._work.tooling() as tooling:
                found = await tooling.releases.find(tooling.api, tooling.permits, flow_run_id)
                await tooling.releases.retry(tooling.api, found, prepared.known)
                return await self._submitted(tooling, ctx, flow_run_id, wait_seconds, repeated=False)

        return retry_release

    # ---- what they have in common ----

    async def _wait(self, tooling: Tooling, ctx: Context, flow_run_id: str, seconds: float) -> Release:
        async def noted(release: Release) -> None:
            done = sum(step.state == "done" for step in release.steps)
            await ctx.report_progress(done, len(release.steps) or None, release.verdict or release.state)

        release: Release = await tooling.releases.wait(
            tooling.renewed, tooling.permits, flow_run_id, seconds, noted
        )
        return release

    async def _asked(self, tooling: Tooling, given: dict[str, Any], *, clusters: bool = True) -> Request:
        """What a tool that only reads was asked."""
        request = Request.of(**await self._given(tooling, given))
        tooling.permits.check(request.model_dump(), clusters=clusters)
        return request

    async def _request(
        self, tooling: Tooling, ctx: Context, submitting: Submitting, given: dict[str, Any]
    ) -> Checked:
        """The checked request of a tool that submits; `InputError` names what is wrong with it."""
        values = await self._given(tooling, given, template="template_id" in submitting.arguments)
        values["requested_by"] = self._requested_by(ctx)
        if "plan" in values:
            plan = Plan.of_parameter(values["plan"])
            needed = {"", ENVIRONMENT}.intersection(plan.targets)
            parts: list[Plan | PlannedRelease] = [plan, *plan.releases]
            for part in parts:
                if part.target is not None and part.target in needed:
                    part.target = await tooling.api.target_of(part.target)
            values["plan"] = plan
        request = submitting.request.of(**values)
        tooling.permits.check({name: getattr(request, name) for name in request.model_fields_set})
        return request

    async def _given(
        self, tooling: Tooling, given: dict[str, Any], *, template: bool = False
    ) -> dict[str, Any]:
        """What was given, with defaults from the environment; what was not stays with the flow's defaults."""
        values = {
            name: value
            for name, value in given.items()
            if value is not None and value != "" and value != ARGUMENTS[name][1]
        }
        if "plan" in given:
            return values
        environment = self._environment
        if target := await tooling.api.target_of(values.get("target", "")):
            values["target"] = target
        for name, default in (("app_id", environment.app_id), ("deployment", environment.deploy_name)):
            if default:
                values.setdefault(name, default)
        # It is a template of that deployment, and of no other.
        own = same_id(values.get("app_id", ""), environment.app_id or "") and (
            values.get("deployment") == environment.deploy_name
        )
        if template and own and environment.template_id and not values.get("images"):
            values.setdefault("template_id", environment.template_id)
        return values

    def _requested_by(self, ctx: Context) -> str:
        info = ctx.session.client_params.client_info if ctx.session.client_params else None
        client = one_line(info.name, 80) if info else "an MCP client"
        if not self._stdio:
            return f"{client} {UNVERIFIED}"
        user = me()
        return one_line(f"{user} by {client}" if user else client, 200)


@dataclass(frozen=True)
class _Asking:
    prepare: Callable[..., Awaitable[Prepared]]
    consent: Callable[..., Awaitable[Elicit[Consent] | Consent]]


def _asking(prepare: Callable[..., Awaitable[Prepared]]) -> _Asking:
    """What has a tool's user asked, in the way that every protocol version knows."""

    async def consent(prepared: Annotated[Prepared, Resolve(prepare)]) -> Elicit[Consent] | Consent:
        return Elicit(prepared.question, Consent) if prepared.question else Consent(proceed=True)

    return _Asking(prepare, consent)


def _agreed(consent: ElicitationResult[Consent]) -> None:
    if not (isinstance(consent, AcceptedElicitation) and consent.data.proceed):
        raise ToolError("The user did not agree; nothing was submitted. Ask the user what to do instead.")


def _can_ask(ctx: Context) -> bool:
    capabilities = ctx.client_capabilities
    elicitation = capabilities.elicitation if capabilities else None
    # Only url: such a client shows no form. Neither: it is of a time when there were only forms.
    return elicitation is not None and (elicitation.form is not None or elicitation.url is None)


def _held(request: Checked, plan_hash: str) -> Checked:
    return type(request).of(
        **{name: getattr(request, name) for name in request.model_fields_set} | {"expect_plan": plan_hash}
    )


def _question(submitting: Submitting, plan: answers.Plan) -> str:
    # The hash stands for what a long plan does not show, and has the user asked anew where that changes.
    return f"{submitting.title}?\n" + unquoted("\n".join(plan.lines)) + f"\nHeld to plan {plan.plan_hash}."


def _without_plan(planned: Planned) -> str:
    """What to say where a dry run has not ended, or not ended well."""
    if planned.state == "Failed":
        return f"Nothing was submitted, since it cannot be done: {planned.verdict} {planned.next}"
    return (
        f"Nothing was submitted: its dry run, flow run {planned.flow_run_id}, is {planned.state} and has no "
        "plan yet. Make the same call again in some seconds."
    )


def _with_arguments(fn: Callable[..., Any], arguments: dict[str, tuple[Any, Any]]) -> Callable[..., Any]:
    """`fn`, whose `**` stands for these arguments: the SDK reads a tool's schema from its signature."""
    named = inspect.signature(fn).parameters.values()
    own = [each for each in named if each.kind is not inspect.Parameter.VAR_KEYWORD]
    kind = inspect.Parameter.KEYWORD_ONLY
    parameters = [each.replace(kind=kind) for each in own[:1]]
    parameters += [
        inspect.Parameter(
            name, kind, annotation=annotation, default=inspect.Parameter.empty if default is ... else default
        )
        for name, (annotation, default) in arguments.items()
    ]
    parameters += [each.replace(kind=kind) for each in own[1:]]
    returned = inspect.signature(fn).return_annotation
    changed: Any = fn
    changed.__signature__ = inspect.Signature(parameters, return_annotation=returned)
    changed.__annotations__ = {each.name: each.annotation for each in parameters} | {"return": returned}
    return fn


def release_and_watch(app_id: str = "", deployment: str = "") -> str:
    """Has an assistant release a deployment and follow it."""
    what = f"the deployment {deployment}" if deployment else "the deployment of the environment's defaults"
    of_app = f" of app {app_id}" if app_id else ""
    return (
        f"Release {what}{of_app}.\n"
        "1. Call plan_release and show me what would change.\n"
        "2. Once I agree, call deploy_latest_image with confirm=<plan_hash>, and tell me the link.\n"
        "3. Call get_release with wait_seconds=30 until it has ended, and tell me each step that is done.\n"
        "4. Tell me the outcome, what is live in each cluster, and, unless it is released, the diagnosis "
        "and what to do next. Do not retry or roll back without my word."
    )


def declare(server: MCPServer[None], work: Work, *, stdio: bool) -> None:
    """Adds the tools, the resource and the prompt to a server.

    Args:
        server: has none yet.
        work: what the tools work with.
        stdio: whether the server speaks to one client of this machine's user.

    Raises:
        ConfigurationError: a variable of the article's cannot be used.
    """
    tools = Tools(work, cloud_environment(), stdio=stdio)
    tools.add_to(server, read_only=work.permits.read_only)
    server.resource(
        "release://{flow_run_id}",
        title="A release",
        description="How far a release is, how it ended and what is live, as get_release answers it.",
        mime_type="application/json",
    )(tools.release_resource)
    server.prompt(title="Release and watch", description="Release a deployment and follow it to its end.")(
        release_and_watch
    )
