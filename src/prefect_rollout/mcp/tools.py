"""The tools, the resource and the prompt that a client sees. Importing this module imports no Prefect."""

import inspect
from collections.abc import Awaitable, Callable
from typing import Annotated, Any, Literal

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
from prefect_rollout.ids import same_id
from prefect_rollout.mcp import types
from prefect_rollout.mcp.actions import ACTIONS, ARGUMENTS, Action, argument, with_arguments
from prefect_rollout.mcp.consent import Consent, Prepared, asking, bound, can_ask, question, require
from prefect_rollout.mcp.session import Session, Tooling
from prefect_rollout.mcp.untrusted import unquoted
from prefect_rollout.release.request import ENVIRONMENT, Checked, Request
from prefect_rollout.settings import CloudEnvironment, cloud_environment
from prefect_rollout.text import one_line, when

READS = ToolAnnotations(read_only_hint=True, open_world_hint=True)
PLANS = ToolAnnotations(read_only_hint=True, idempotent_hint=True, open_world_hint=True)
WRITES = ToolAnnotations(
    read_only_hint=False, destructive_hint=True, idempotent_hint=True, open_world_hint=True
)
STOPS = ToolAnnotations(  # it writes nothing to the cloud, but stops the writes of a run
    read_only_hint=False, destructive_hint=False, idempotent_hint=True, open_world_hint=True
)

_PLAN_SECONDS = 45.0

UNVERIFIED = "(unverified)"
"""Suffix of a requester's name over HTTP, where a client can choose any name."""

FlowRunId = Annotated[str, Field(description="ID of the release's flow run.")]
WaitSeconds = Annotated[
    float,
    Field(
        ge=0,
        le=50,
        description="Seconds to wait for the end; 0 returns at once. Many clients cut calls at 60 s.",
    ),
]
Limit = Annotated[int, Field(ge=1, le=50, description="Maximum number of entries.")]
Cursor = Annotated[str, Field(description="next_cursor of the previous page; empty for the first page.")]
_READ = {name: argument(Request, name) for name in ("app_id", "deployment", "clusters", "target")}


class Tools:
    """The tools of one server.

    Args:
        session: Prefect and its API.
        environment: the `K8S_` variables, for defaults.
        stdio: the server serves one client of this machine's user.
    """

    def __init__(self, session: Session, environment: CloudEnvironment, *, stdio: bool) -> None:
        self._session = session
        self._environment = environment
        self._stdio = stdio
        self._tags = session.policy.tags(environment.registry_url)

    def add_to(self, server: MCPServer[None], *, read_only: bool) -> None:
        """Add all tools, or only those that write nothing."""

        def add(tool: Callable[..., Any], title: str, annotations: ToolAnnotations) -> None:
            server.add_tool(tool, title=title, description=inspect.getdoc(tool), annotations=annotations)

        add(self._planning(), "Plan a release", PLANS)
        add(self.get_release, "Follow a release", READS)
        add(self.list_releases, "List releases", READS)
        add(self.get_release_logs, "Read the log of a release", READS)
        add(self._listing_templates(), "List the templates of a deployment", READS)
        add(self._getting_status(), "Get the live state of a deployment", READS)
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
        async with self._session.tooling() as tooling:
            return await self._wait(tooling, ctx, flow_run_id, wait_seconds)

    async def list_releases(
        self,
        app_id: Annotated[str, Field(description="Only runs of this app.")] = "",
        deployment: Annotated[str, Field(description="Only runs of this deployment.")] = "",
        running: Annotated[
            bool | None, Field(description="true: only runs in progress; false: only runs that have ended.")
        ] = None,
        limit: Limit = 20,
        cursor: Cursor = "",
    ) -> types.Releases:
        """List releases, batches, rollbacks, restarts and scalings of all clients, newest first."""
        async with self._session.tooling() as tooling:
            from prefect_rollout.mcp import flow_runs

            return await flow_runs.listed(
                tooling.api,
                tooling.policy,
                app_id=app_id,
                deployment=deployment,
                running=running,
                limit=limit,
                cursor=cursor,
            )

    async def get_release_logs(
        self,
        flow_run_id: FlowRunId,
        limit: Annotated[int, Field(ge=1, le=200, description="Maximum number of lines.")] = 50,
        cursor: Cursor = "",
        warnings_only: Annotated[bool, Field(description="Leave out lines of level info.")] = False,
    ) -> types.Logs:
        """Read a page of a release's log, oldest line first. get_release returns a summary."""
        async with self._session.tooling() as tooling:
            from prefect_rollout.mcp import flow_runs

            found = await flow_runs.find(tooling.api, tooling.policy, flow_run_id)
            return await flow_runs.logs(
                tooling.api, found, limit=limit, cursor=cursor, warnings=warnings_only
            )

    def _listing_templates(self) -> Callable[..., Awaitable[types.Templates]]:
        async def list_templates(limit: Limit = 20, **given: Any) -> types.Templates:
            """List the templates of a deployment, newest first: images, and the clusters that run them."""
            async with self._session.tooling() as tooling:
                from prefect_rollout.mcp import deployments

                asked = await self._asked(tooling, given, clusters=False)
                return await deployments.templates(
                    tooling.api, tooling.policy, asked.target, asked.app_id, asked.deployment, limit
                )

        return with_arguments(list_templates, [_READ[name] for name in _READ if name != "clusters"])

    def _getting_status(self) -> Callable[..., Awaitable[types.DeploymentStatus]]:
        async def get_deployment_status(**given: Any) -> types.DeploymentStatus:
            """Get the live state of a deployment: the online template and the pods of each cluster."""
            async with self._session.tooling() as tooling:
                from prefect_rollout.mcp import deployments

                asked = await self._asked(tooling, given)
                return await deployments.live(
                    tooling.api, asked.target, asked.app_id, asked.deployment, asked.clusters
                )

        return with_arguments(get_deployment_status, _READ.values())

    async def release_resource(self, flow_run_id: str) -> str:
        """Return a release as JSON."""
        try:
            async with self._session.tooling() as tooling:
                from prefect_rollout.mcp import flow_runs, follow

                found = await flow_runs.find(tooling.api, tooling.policy, flow_run_id)
                return (await follow.look(tooling.api, found)).model_dump_json()
        except ToolError as error:
            raise ResourceError(str(error)) from error

    # ---- planning ----

    def _planning(self) -> Callable[..., Awaitable[types.Planned]]:
        async def plan_release(
            action: Annotated[
                Literal["deploy", "batch", "rollback", "restart", "scale"],
                Field(description="Action to plan; batch takes `plan`, the others app_id and deployment."),
            ] = "deploy",
            *,
            ctx: Context,
            wait_seconds: Annotated[float, Field(ge=0, le=50, description="Seconds to wait.")] = 30,
            **given: Any,
        ) -> types.Planned:
            """Make a dry run: what would change in each cluster, and the plan hash that confirms it.

            It writes nothing. Show the lines to the user before you release anything.
            """
            planned = ACTIONS[action]
            foreign = [
                name
                for name, value in given.items()
                if name not in planned.arguments and value not in (ARGUMENTS[name].default, None)
            ]
            async with self._session.tooling() as tooling:
                if foreign:
                    raise InputError(
                        f"{foreign[0]}: the action {action} has no such argument",
                        advice=f"Leave it out. Arguments of {action}: {', '.join(planned.arguments)}.",
                        field=foreign[0],
                    )
                mine = {name: given[name] for name in planned.arguments}
                request = await self._request(tooling, ctx, planned, mine)
                return await self._plan(tooling, ctx, planned, request, wait_seconds)

        return with_arguments(plan_release, ARGUMENTS.values())

    async def _plan(
        self,
        tooling: Tooling,
        ctx: Context,
        action: Action,
        request: Checked,
        seconds: float,
        *,
        reuse: bool = False,
    ) -> types.Planned:
        from prefect_rollout.mcp import submit

        run = await submit.plan(tooling.api, action.flow, request, tags=self._tags, reuse=reuse)
        release = await self._wait(tooling, ctx, str(run.id), seconds)
        return types.Planned.model_validate(release, from_attributes=True)

    # ---- submitting ----

    def _submitting(self, name: str, action: Action) -> Callable[..., Awaitable[types.Submitted]]:
        async def prepare(ctx: Context, confirm: str, attempt: int, **given: Any) -> Prepared:
            async with self._session.tooling() as tooling:
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
                str, Field(description="plan_hash of plan_release, once the user has agreed to that plan.")
            ] = "",
            wait_seconds: WaitSeconds = 0,
            attempt: Annotated[
                int,
                Field(ge=1, le=1000, description="Another number starts another run of the same request."),
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
        if plan is None and planned.state == "Failed":
            raise ToolError(
                f"Nothing was submitted, because the plan failed: {planned.verdict} {planned.next}"
            )
        if plan is None:
            raise ToolError(
                f"Nothing was submitted: its dry run, flow run {planned.flow_run_id}, is {planned.state} and "
                "has no plan yet. Repeat the same call in a few seconds."
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
        return types.Submitted(
            repeated=repeated, **release.model_dump(include=set(types.Submitted.model_fields))
        )

    # ---- cancelling and retrying ----

    async def cancel_release(
        self, ctx: Context, flow_run_id: FlowRunId, wait_seconds: WaitSeconds = 15
    ) -> types.Release:
        """Cancel a release: it writes nothing more and reports what each cluster runs. It undoes nothing.

        Use rollback to undo what was published, and retry_release to continue.
        """
        async with self._session.tooling() as tooling:
            from prefect_rollout.mcp import flow_runs, submit

            await submit.cancel(tooling.api, await flow_runs.find(tooling.api, tooling.policy, flow_run_id))
            return await self._wait(tooling, ctx, flow_run_id, wait_seconds)

    def _retrying(self) -> Callable[..., Awaitable[types.Submitted]]:
        async def prepare(ctx: Context, flow_run_id: str, confirm: str) -> Prepared:
            async with self._session.tooling() as tooling:
                from prefect_rollout.mcp import flow_runs, follow

                found = await flow_runs.find(tooling.api, tooling.policy, flow_run_id)
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
            """Continue a release that failed, timed out, crashed or was cancelled where it stopped.

            It repeats no write that succeeded, and continues a batch with the releases that did not succeed.
            The answer is that of the tool that started the run.
            """
            require(consent)
            async with self._session.tooling() as tooling:
                from prefect_rollout.mcp import flow_runs, submit

                found = await flow_runs.find(tooling.api, tooling.policy, flow_run_id)
                await submit.retry(tooling.api, found, prepared.known)
                return await self._submitted(tooling, ctx, flow_run_id, wait_seconds, repeated=False)

        return retry_release

    # ---- shared ----

    async def _wait(self, tooling: Tooling, ctx: Context, flow_run_id: str, seconds: float) -> types.Release:
        from prefect_rollout.mcp import follow

        async def notify(release: types.Release) -> None:
            done = sum(step.state == "done" for step in release.steps)
            await ctx.report_progress(done, len(release.steps) or None, release.verdict or release.state)

        return await follow.wait(tooling.renewed, tooling.policy, flow_run_id, seconds, notify)

    async def _asked(self, tooling: Tooling, given: dict[str, Any], *, clusters: bool = True) -> Request:
        """Return the checked request of a tool that only reads."""
        request = Request.of(**await self._given(tooling, given))
        tooling.policy.check(request.model_dump(), clusters=clusters)
        return request

    async def _request(
        self, tooling: Tooling, ctx: Context, action: Action, given: dict[str, Any]
    ) -> Checked:
        """Return the checked request of an action; its `InputError` names the mistake."""
        values = await self._given(tooling, given)
        values["requested_by"] = self._requested_by(ctx)
        if "plan" in values:
            plan = Plan.of_parameter(values["plan"])
            needed = {"", ENVIRONMENT}.intersection(plan.targets)
            parts: list[Plan | PlannedRelease] = [plan, *plan.releases]
            for part in parts:
                if part.target is not None and part.target in needed:
                    part.target = await tooling.api.target_of(part.target)
            values["plan"] = plan
        request = action.request.of(**values)
        tooling.policy.check({name: getattr(request, name) for name in request.model_fields_set})
        return request

    async def _given(self, tooling: Tooling, given: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments that differ from the flow's defaults, with defaults from the environment."""
        values = {
            name: value for name, value in given.items() if value not in (None, ARGUMENTS[name].default)
        }
        if "plan" in given:
            return values
        environment = self._environment
        if target := await tooling.api.target_of(values.get("target", "")):
            values["target"] = target
        for name, default in (("app_id", environment.app_id), ("deployment", environment.deploy_name)):
            if default:
                values.setdefault(name, default)
        # K8S_TEMPLATE_ID is a template of the deployment K8S_DEPLOY_NAME only.
        own = same_id(values.get("app_id", ""), environment.app_id or "") and (
            values.get("deployment") == environment.deploy_name
        )
        if own and "template_id" in given and environment.template_id and not values.get("images"):
            values.setdefault("template_id", environment.template_id)
        return values

    def _requested_by(self, ctx: Context) -> str:
        info = ctx.session.client_params.client_info if ctx.session.client_params else None
        client = one_line(info.name, 80) if info else "an MCP client"
        if not self._stdio:
            return f"{client} {UNVERIFIED}"
        user = me()
        return one_line(f"{user} by {client}" if user else client, 200)


def release_and_watch(app_id: str = "", deployment: str = "") -> str:
    """Release a deployment and follow it."""
    name = f"the deployment {deployment}" if deployment else "the deployment K8S_DEPLOY_NAME"
    of_app = f" of app {app_id}" if app_id else ""
    return (
        f"Release {name}{of_app}.\n"
        "1. Call plan_release and show me what would change.\n"
        "2. Once I agree, call deploy_latest_image with confirm=<plan_hash> and give me the link.\n"
        "3. Call get_release with wait_seconds=30 until it has ended, and report each completed step.\n"
        "4. Report the outcome and what each cluster runs. Unless it is released, add the diagnosis and what "
        "to do next. Do not retry or roll back unless I ask for it."
    )


def declare(server: MCPServer[None], session: Session, *, stdio: bool) -> None:
    """Add the tools, the resource and the prompt to a server.

    Args:
        server: server without tools.
        session: Prefect and its API.
        stdio: the server serves one client of this machine's user.

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
