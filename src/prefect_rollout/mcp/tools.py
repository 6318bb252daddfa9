"""The tools, the resource and the prompt that a client sees. Importing this module imports no Prefect."""

import inspect
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from mcp.server import MCPServer
from mcp.server.elicitation import ElicitationResult
from mcp.server.mcpserver import Context, Resolve
from mcp.server.mcpserver.exceptions import ResourceError, ToolError
from mcp_types import ToolAnnotations
from pydantic import Field

from prefect_rollout.batch.plan import Plan
from prefect_rollout.batch.plan import Release as PlannedRelease
from prefect_rollout.cli.output import me
from prefect_rollout.errors import ConfigurationError, InputError
from prefect_rollout.ids import Id, same_id
from prefect_rollout.mcp import types
from prefect_rollout.mcp.actions import (
    ACTIONS,
    DEFAULTS,
    Action,
    AppId,
    Cursor,
    Deployment,
    FlowRunId,
    Limit,
    Target,
    WaitSeconds,
    all_arguments,
    with_arguments,
)
from prefect_rollout.mcp.consent import Consent, Prepared, asking, bound, can_ask, question, require
from prefect_rollout.mcp.server import release_and_watch
from prefect_rollout.mcp.session import Session, Tooling
from prefect_rollout.mcp.untrusted import unquoted
from prefect_rollout.release.request import ENVIRONMENT, Checked, Request
from prefect_rollout.release.result import Outcome
from prefect_rollout.settings import VARIABLES, CloudEnvironment, cloud_environment
from prefect_rollout.text import one_line, when

if TYPE_CHECKING:
    from prefect_rollout.mcp.flow_runs import Found

READS = ToolAnnotations(read_only_hint=True)
WRITES = ToolAnnotations(destructive_hint=True, idempotent_hint=True)
# It writes nothing to the cloud, but stops the writes of a run.
STOPS = ToolAnnotations(destructive_hint=False, idempotent_hint=True)

_PLAN_SECONDS = 45.0

UNVERIFIED = "(unverified)"
"""Suffix of a requester's name over HTTP, where a client can choose any name."""

R = TypeVar("R", bound=Checked)


class Tools:
    """The tools of one server; with `stdio`, it serves one client of this machine's user."""

    def __init__(self, session: Session, environment: CloudEnvironment, *, stdio: bool) -> None:
        self._session = session
        self._environment = environment
        self._stdio = stdio
        self._tags = session.policy.tags(environment.registry_url)

    def add_to(self, server: MCPServer[None], *, read_only: bool) -> None:
        """Add all tools, or only those that write nothing."""

        def add(tool: Callable[..., Any], title: str, annotations: ToolAnnotations) -> None:
            server.add_tool(tool, title=title, description=inspect.getdoc(tool), annotations=annotations)

        add(self._planning(read_only=read_only), "Plan a release", READS)
        add(self.get_release, "Follow a release", READS)
        add(self.list_releases, "List releases", READS)
        add(self.get_release_logs, "Read the log of a release", READS)
        add(self.list_templates, "List the templates of a deployment", READS)
        add(self.get_deployment_status, "Get the live state of a deployment", READS)
        if read_only:
            return
        for name, action in ACTIONS.items():
            tool = self._submitting(name, action)
            tool.__name__, tool.__doc__ = action.tool, action.description
            add(tool, action.title, WRITES)
        add(self.cancel_release, "Cancel a release", STOPS)
        add(self._retrying(), "Retry a release", WRITES)

    # ---- reading ----

    async def get_release(
        self, ctx: Context, flow_run_id: FlowRunId, wait_seconds: WaitSeconds = 0
    ) -> types.Release:
        """Get the progress or the result of a release: steps, pods, verdict, diagnosis and what to do next.

        Call it with wait_seconds after every tool that starts a run, until `ended` is true.
        """
        async with self._session.tooling(ctx) as tooling:
            return await self._wait(tooling, ctx, flow_run_id, wait_seconds)

    async def list_releases(
        self,
        ctx: Context,
        app_id: Annotated[Id | None, Field(description="ID of an app.")] = None,
        deployment: Annotated[str, Field(description="Name of a deployment.")] = "",
        running: Annotated[bool | None, Field(description="true: in progress; false: ended.")] = None,
        outcome: Annotated[Outcome | None, Field(description="An outcome.")] = None,
        image: Annotated[str, Field(description="Part of an image.")] = "",
        requested_by: Annotated[str, Field(description="Part of the requester's name.")] = "",
        since: Annotated[str, Field(description="Time of the oldest run: 36h, 7d or an ISO time.")] = "",
        dry_runs: Annotated[bool, Field(description="Include dry runs.")] = False,
        limit: Limit = 20,
        cursor: Cursor = "",
    ) -> types.Releases:
        """List the releases, batches, rollbacks, restarts and scalings of all clients, newest first."""
        async with self._session.tooling(ctx) as tooling:
            from prefect_rollout.mcp import flow_runs
            from prefect_rollout.runs.flow_runs import Wanted
            from prefect_rollout.runs.history import since_of

            after = since_of(since, datetime.now(UTC)) if since else None
            wanted = Wanted(
                app_id or "", deployment, running, outcome or "", image, requested_by, after, dry_runs
            )
            return await flow_runs.listed(tooling.api, tooling.policy, wanted, limit=limit, cursor=cursor)

    async def get_release_logs(
        self,
        ctx: Context,
        flow_run_id: FlowRunId,
        limit: Annotated[int, Field(ge=1, le=200, description="Maximum number of lines.")] = 50,
        cursor: Cursor = "",
        warnings_only: Annotated[bool, Field(description="Leave out lines of level info.")] = False,
    ) -> types.Logs:
        """Read a page of a release's log, oldest line first. get_release returns a summary."""
        async with self._session.tooling(ctx) as tooling:
            from prefect_rollout.mcp import flow_runs

            found = await self._found(tooling, flow_run_id)
            return await flow_runs.logs(
                tooling.api, found, limit=limit, cursor=cursor, warnings=warnings_only
            )

    async def list_templates(
        self,
        ctx: Context,
        app_id: AppId = None,
        deployment: Deployment = None,
        target: Target = "",
        limit: Limit = 20,
    ) -> types.Templates:
        """List the templates of a deployment, newest first: images, and the clusters that run them."""
        async with self._session.tooling(ctx) as tooling:
            from prefect_rollout.mcp import deployments

            asked = await self._asked(
                tooling, limit_clusters=False, app_id=app_id, deployment=deployment, target=target
            )
            return await deployments.templates(
                tooling.api, tooling.policy, asked.target, asked.app_id, asked.deployment, limit
            )

    async def get_deployment_status(
        self,
        ctx: Context,
        app_id: AppId = None,
        deployment: Deployment = None,
        clusters: Annotated[list[str] | None, Field(description="Clusters; by default all.")] = None,
        target: Target = "",
    ) -> types.DeploymentStatus:
        """Get the live state of a deployment: the online template and the pods of each cluster."""
        async with self._session.tooling(ctx) as tooling:
            from prefect_rollout.mcp import deployments

            asked = await self._asked(
                tooling, app_id=app_id, deployment=deployment, clusters=clusters, target=target
            )
            return await deployments.live(
                tooling.api, asked.target, asked.app_id, asked.deployment, asked.clusters
            )

    async def release_resource(self, flow_run_id: str) -> str:
        """Return a release as JSON."""
        try:
            async with self._session.tooling() as tooling:
                from prefect_rollout.mcp import follow

                found = await self._found(tooling, flow_run_id)
                return (await follow.look(tooling.api, found)).model_dump_json()
        except ToolError as error:
            raise ResourceError(str(error)) from error

    # ---- planning ----

    def _planning(self, *, read_only: bool) -> Callable[..., Awaitable[types.Planned]]:
        async def plan_release(
            action: Annotated[
                Literal["deploy", "batch", "rollback", "restart", "scale"],
                Field(description="Action to plan; batch takes `plan`, the others app_id and deployment."),
            ] = "deploy",
            *,
            ctx: Context,
            wait_seconds: WaitSeconds = 30,
            **given: Any,
        ) -> types.Planned:
            """Make a dry run: what would change in each cluster, and the plan hash that confirms it.

            It writes nothing. Show the lines to the user before you release anything.
            """
            planned = ACTIONS[action]
            foreign = [
                name
                for name, value in given.items()
                if name not in planned.arguments and value not in (DEFAULTS[name], None)
            ]
            if foreign:
                raise ToolError(
                    f"{foreign[0]}: the action {action} has no such argument. Leave it out. Arguments of "
                    f"{action}: {', '.join(planned.arguments)}."
                )
            async with self._session.tooling(ctx) as tooling:
                mine = {name: given[name] for name in planned.arguments}
                request = await self._request(tooling, ctx, planned, mine)
                return await self._plan(tooling, ctx, planned, request, wait_seconds)

        return with_arguments(plan_release, all_arguments(alone=read_only))

    async def _plan(
        self, tooling: Tooling, ctx: Context, action: Action, request: Checked, seconds: float, **how: bool
    ) -> types.Planned:
        from prefect_rollout.mcp import submit

        run = await submit.plan(tooling.api, action.flow, request, tags=self._tags, **how)
        release = await self._wait(tooling, ctx, str(run.id), seconds)
        template = getattr(request, "template_id", None)
        if template and str(template) == self._environment.template_id and release.outcome is Outcome.FAILED:
            release.next += f" Template {one_line(template, 40)} is the one in {VARIABLES['template_id']}."
        return types.brief(types.Planned, release)

    # ---- submitting ----

    def _submitting(self, name: str, action: Action) -> Callable[..., Awaitable[types.Submitted]]:
        async def prepare(ctx: Context, confirm: str, attempt: int, **given: Any) -> Prepared:
            async with self._session.tooling(ctx) as tooling:
                from prefect_rollout.mcp import submit

                request = await self._request(tooling, ctx, action, given)
                known = await submit.submitted(tooling.api, action.flow, request, attempt=attempt)
                if known is not None:
                    return Prepared(known=str(known.id))
                if can_ask(ctx):
                    return await self._question(tooling, ctx, action, request, confirm)
                if confirm:
                    return Prepared(bound(request, confirm))
                raise ToolError(
                    f"Nothing was submitted: the user has to agree first. Call plan_release with "
                    f"action={name!r} and the same arguments, show its answer to the user, and repeat this "
                    "call with confirm=<plan_hash>."
                )

        ask = asking(with_arguments(prepare, action.arguments.values()))

        async def submit_run(
            ctx: Context,
            prepared: Annotated[Prepared, Resolve(prepare)],
            consent: Annotated[ElicitationResult[Consent], Resolve(ask)],
            confirm: Annotated[
                str,
                Field(description="plan_hash that the user agreed to; needed if the client cannot ask."),
            ] = "",
            wait_seconds: WaitSeconds = 0,
            attempt: Annotated[
                int,
                Field(ge=1, le=1000, description="Another number repeats a request of the last ten minutes."),
            ] = 1,
            **_: Any,
        ) -> types.Submitted:
            require(consent)
            async with self._session.tooling() as tooling:
                from prefect_rollout.mcp import submit

                flow_run_id, repeated = prepared.known, True
                if prepared.request is not None:
                    run, repeated = await submit.submit(
                        tooling.api, action.flow, prepared.request, attempt=attempt, tags=self._tags
                    )
                    flow_run_id = str(run.id)
                return await self._submitted(tooling, ctx, flow_run_id, wait_seconds, repeated=repeated)

        return with_arguments(submit_run, action.arguments.values())

    async def _question(
        self, tooling: Tooling, ctx: Context, action: Action, request: Checked, confirm: str
    ) -> Prepared:
        """Return the question about the plan of a request.

        The plan is made once: by plan_release, whose hash is `confirm`, or here, before the client asks. In
        the newest protocol, the client repeats the call with the answer of its user.
        """
        reuse = bool(confirm) or ctx.input_responses is not None
        planned = await self._plan(tooling, ctx, action, request, _PLAN_SECONDS, reuse=reuse)
        plan = planned.plan
        if plan is None:
            raise ToolError(
                f"Nothing was submitted, because the plan failed: {planned.verdict} {planned.next}"
                if planned.state == "Failed"
                else f"Nothing was submitted: the dry run {planned.flow_run_id} is {planned.state} and has "
                "no plan yet. Repeat the same call in a few seconds."
            )
        if confirm and confirm.strip().lower() != plan.plan_hash:
            raise ToolError(
                f"Nothing was submitted: the newest plan of this request is {plan.plan_hash}, not "
                f"{one_line(confirm, 40)!r}. Show it to the user: {' '.join(plan.lines)}"
            )
        return Prepared(bound(request, plan.plan_hash), question=question(action.title, plan))

    async def _submitted(
        self, tooling: Tooling, ctx: Context, flow_run_id: str, wait_seconds: float, *, repeated: bool
    ) -> types.Submitted:
        try:
            release = await self._wait(tooling, ctx, flow_run_id, wait_seconds)
        except ConfigurationError:
            # The run exists: the answer must contain its ID even if the API does not answer now.
            return types.Submitted(
                flow_run_id=flow_run_id,
                state="unknown",
                repeated=repeated,
                next=f"The run was submitted, but the Prefect API does not answer now. Call get_release with "
                f"flow_run_id={flow_run_id} in a few seconds.",
                ui_link=tooling.api.link(flow_run_id),
            )
        if repeated:
            at = f" at {when(release.started)}" if release.started else ""
            release.next = (
                f"Nothing new was started: the same request started this run{at}; attempt=2 starts another "
                f"one. {release.next}"
            )
        return types.brief(types.Submitted, release, repeated=repeated)

    # ---- cancelling and retrying ----

    async def cancel_release(
        self, ctx: Context, flow_run_id: FlowRunId, wait_seconds: WaitSeconds = 15
    ) -> types.Brief:
        """Cancel a release: it writes nothing more and reports what each cluster runs. It undoes nothing.

        Use rollback to undo what was published, and retry_release to continue.
        """
        async with self._session.tooling(ctx) as tooling:
            from prefect_rollout.mcp import submit

            await submit.cancel(tooling.api, await self._found(tooling, flow_run_id))
            return types.brief(types.Brief, await self._wait(tooling, ctx, flow_run_id, wait_seconds))

    def _retrying(self) -> Callable[..., Awaitable[types.Submitted]]:
        async def prepare(ctx: Context, flow_run_id: str, confirm: str) -> Prepared:
            async with self._session.tooling(ctx) as tooling:
                from prefect_rollout.mcp import follow

                found = await self._found(tooling, flow_run_id)
                follow.check_retry(found.run)
                token = follow.retry_token(found.run)
                if confirm == token and not can_ask(ctx):
                    return Prepared(known=token)
                release = await follow.look(tooling.api, found)
                if not can_ask(ctx):
                    raise ToolError(
                        "Nothing was done: the user has to agree first. Show the user how the release ended "
                        f"({release.verdict}), and repeat this call with confirm={token}."
                    )
                return Prepared(
                    known=token,
                    question=f"Continue {one_line(found.run.name, 120)} ({found.flow}) where it stopped?\n"
                    f"It ended as {release.state}: {unquoted(release.verdict)}",
                )

        ask = asking(prepare)

        async def retry_release(
            ctx: Context,
            prepared: Annotated[Prepared, Resolve(prepare)],
            consent: Annotated[ElicitationResult[Consent], Resolve(ask)],
            flow_run_id: FlowRunId,
            confirm: Annotated[str, Field(description="confirm_retry of get_release.")] = "",
            wait_seconds: WaitSeconds = 0,
        ) -> types.Submitted:
            """Continue a release or batch that failed, crashed or was cancelled where it stopped.

            It repeats no write that succeeded.
            """
            require(consent)
            async with self._session.tooling(ctx) as tooling:
                from prefect_rollout.mcp import submit

                found = await self._found(tooling, flow_run_id)
                await submit.retry(tooling.api, found, prepared.known)
                return await self._submitted(tooling, ctx, flow_run_id, wait_seconds, repeated=False)

        return retry_release

    # ---- shared ----

    async def _found(self, tooling: Tooling, flow_run_id: str) -> "Found":
        from prefect_rollout.mcp import flow_runs

        return await flow_runs.find(tooling.api, tooling.policy, flow_run_id)

    async def _wait(self, tooling: Tooling, ctx: Context, flow_run_id: str, seconds: float) -> types.Release:
        from prefect_rollout.mcp import follow

        async def notify(release: types.Release) -> None:
            # The wait for the server has reported up to 1.
            done = 1 + sum(step.state == "done" for step in release.steps)
            total = len(release.steps) + 1 if release.steps else None
            await ctx.report_progress(done, total, release.verdict or release.state)

        return await follow.wait(tooling.renewed, tooling.policy, flow_run_id, tooling.left(seconds), notify)

    async def _asked(self, tooling: Tooling, *, limit_clusters: bool = True, **given: Any) -> Request:
        """Return the checked request of a tool that only reads."""
        request = await self._checked(tooling, Request, given)
        tooling.policy.check(request.model_dump(), clusters=limit_clusters)
        return request

    async def _request(
        self, tooling: Tooling, ctx: Context, action: Action, given: dict[str, Any]
    ) -> Checked:
        """Return the checked request of an action; its `InputError` names the mistake."""
        if "plan" in given:
            plan = Plan.of_parameter(self._with_app_id(given["plan"]))
            parts: list[Plan | PlannedRelease] = [plan, *plan.releases]
            for part in parts:
                if part.target in {"", ENVIRONMENT}.intersection(plan.targets):
                    part.target = await tooling.api.target_of(part.target or "")
            given = given | {"plan": plan}
        request = await self._checked(tooling, action.request, given, requested_by=self._requested_by(ctx))
        tooling.policy.check({name: getattr(request, name) for name in request.model_fields_set})
        return request

    async def _checked(self, tooling: Tooling, model: type[R], given: dict[str, Any], **more: Any) -> R:
        """Return a request of the arguments that are not defaults, completed from the environment."""
        values = {name: each for name, each in given.items() if each not in (None, DEFAULTS[name])} | more
        found: dict[str, Any] = {}
        if "plan" not in given:
            if target := await tooling.api.target_of(values.get("target", "")):
                values["target"] = target
            environment = self._environment
            found = {"app_id": environment.app_id, "deployment": environment.deploy_name}
            asked = found | values
            # K8S_TEMPLATE_ID is a template of the deployment K8S_DEPLOY_NAME only.
            own = all(same_id(asked[name], found[name]) for name in found)
            if own and "template_id" in given and not values.get("images"):
                found["template_id"] = environment.template_id
        found = {name: each for name, each in found.items() if each and name not in values}
        try:
            return model.of(**found | values)
        except InputError as error:
            if error.data.get("field") in found:
                raise ConfigurationError(
                    f"{VARIABLES[error.data['field']]}: {error.problem}",
                    advice="Correct or unset the variable, or pass the argument.",
                    field=error.data["field"],
                ) from error
            raise

    def _with_app_id(self, plan: dict[str, Any]) -> dict[str, Any]:
        """Return a plan whose releases without an app have that of the environment."""
        releases, default = plan.get("releases"), self._environment.app_id
        if not default or not isinstance(releases, list):
            return plan
        filled = [{"app_id": default} | each if isinstance(each, dict) else each for each in releases]
        return plan | {"releases": filled}

    def _requested_by(self, ctx: Context) -> str:
        info = ctx.session.client_params.client_info if ctx.session.client_params else None
        client = one_line(info.name, 80) if info else "an MCP client"
        if not self._stdio:
            return f"{client} {UNVERIFIED}"
        user = me()
        return one_line(f"{user} by {client}" if user else client, 200)


def declare(server: MCPServer[None], session: Session, *, stdio: bool) -> None:
    """Add the tools, the resource and the prompt to a server.

    Raises:
        ConfigurationError: a `K8S_` variable is invalid.
    """
    tools = Tools(session, cloud_environment(), stdio=stdio)
    tools.add_to(server, read_only=session.policy.read_only)
    server.resource(
        "release://{flow_run_id}",
        title="A release",
        description="Progress or result of a release, as get_release returns it.",
        mime_type="application/json",
    )(tools.release_resource)
    server.prompt(title="Release and watch", description="Release a deployment and follow it to its end.")(
        release_and_watch
    )
