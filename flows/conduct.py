"""What the flows here have in common: the guard, the order of the clusters, the watching, the ending."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar, cast
from uuid import UUID

import httpx
import prefect.runtime
from prefect import get_client, get_run_logger, task
from prefect.cache_policies import INPUTS, RUN_ID
from prefect.client.schemas.objects import State
from prefect.context import FlowRunContext, TagsContext
from prefect.exceptions import Abort, TerminationSignal
from prefect.settings import PREFECT_API_URL, PREFECT_UI_URL
from prefect.states import Cancelled, Completed
from prefect.utilities.urls import url_for
from pydantic import BaseModel

from prefect_rollout import events
from prefect_rollout.blocks import open_target
from prefect_rollout.difference import summary
from prefect_rollout.errors import (
    ClusterNotFoundError,
    ConfigurationError,
    NotApprovedError,
    PlatformError,
    ReleaseCancelledError,
    ReleaseError,
    ReleaseTimedOutError,
    RollbackFailedError,
    RolloutError,
    SkippedError,
    UnforeseenError,
)
from prefect_rollout.flows.admission import admit
from prefect_rollout.flows.punctual import skip_unless_due
from prefect_rollout.guard import ROLLED_BACK, Guard, Standing, lock_name, watching
from prefect_rollout.ledger import ENTRANCE, asker_of, entrance_of
from prefect_rollout.models import (
    Action,
    ClusterResult,
    Deployment,
    Id,
    Outcome,
    ReleasePlan,
    ReleaseResult,
    Request,
    Version,
    same_id,
)
from prefect_rollout.platforms.port import Platform
from prefect_rollout.progress import Progress, listening, tell
from prefect_rollout.tasks import (
    check_deployment,
    note_online,
    parse_metadata,
    publish_deployment,
    report_release,
    wait_for_pods,
)
from prefect_rollout.tasks.before import Before, online_everywhere, still_online
from prefect_rollout.tasks.step import may_have_run_before
from prefect_rollout.text import one_line
from prefect_rollout.turns import resting
from prefect_rollout.verdict import Expected, Verdict, running

RequestT = TypeVar("RequestT", bound=Request)

# A run that is cancelled has about as long to say what it leaves behind: whoever cancels it waits.
_LAST_LOOK_SECONDS = 6.0


class Move(BaseModel):
    """What one cluster shall become, and what it was."""

    cluster: str
    replicas: int
    template_id: Id
    before: Before
    changed: bool = True
    in_place: bool = False
    restarted: bool = False

    def expected(self, baseline: dict[str, str | None] | None) -> Expected:
        """What the cluster has to show, where `baseline` stood before."""
        return Expected(
            cluster=self.cluster,
            template_id=self.template_id,
            replicas=self.replicas,
            baseline=baseline,
            generation_before=self.before.generation,
            changed=self.changed,
            in_place=self.in_place,
            restarted=self.restarted,
        )


Write = Callable[[Move], Awaitable[dict[str, str | None] | None]]
"""Sends one move's write; `{pod: state}` as listed right before it, where that is known."""


class Run:
    """One run of a flow: what it was asked, how far it came, and what it writes through."""

    def __init__(self, request: Request, result: ReleaseResult, platform: Platform, guard: Guard) -> None:
        self.request = request
        self.result = result
        self.platform = platform
        self.in_place = False
        self.app_id: Id = request.app_id
        self._guard = guard
        self._deployment: Deployment | None = None

    @property
    def deployment(self) -> Deployment:
        """The deployment; `begin` finds it."""
        if self._deployment is None:
            raise RuntimeError("the run has not begun")
        return self._deployment

    async def begin(self) -> None:
        """Steps 1 and 2: the deployment, and where it goes with how many replicas; and whether it may now.

        Raises:
            WindowClosedError: a release window is closed for longer than the request waits.
        """
        await self._read()
        events.emit("started", self.result, self.platform.identity)
        waited = await self._admit(self.request.window_wait_seconds)
        if waited and not may_have_run_before():
            await self._read(anew=True)  # what was read hours ago may have changed

    async def _admit(self, wait_seconds: float) -> bool:
        return await admit(self.app_id, self.request, self.result, self._guard, wait_seconds=wait_seconds)

    async def _read(self, *, anew: bool = False) -> None:
        request, result = self.request, self.result
        check, parse = check_deployment, parse_metadata
        if anew:
            check, parse = check.with_options(refresh_cache=True), parse.with_options(refresh_cache=True)
        checked = await check(request.app_id, request.deployment, target=request.target)
        self._deployment, result.app = checked.deployment, checked.app.name
        self.app_id = checked.app.id
        scope = await parse(checked.deployment, request.clusters)
        self.in_place = scope.in_place
        # What an earlier try of the run wrote is not known yet.
        written = None if request.writes and may_have_run_before() else False
        result.clusters = [
            ClusterResult(cluster=name, replicas=count, published=written)
            for name, count in scope.replicas.items()
        ]
        if request.canary is not None and request.canary not in scope.replicas:
            raise ClusterNotFoundError.named(
                request.canary, list(scope.replicas), "among the clusters of this release"
            )

    async def lock(self) -> None:
        """Takes the locks of all clusters that the run is about.

        Raises:
            LockedError: another release held them all the while.
            WindowClosedError: a release window was closed meanwhile.
        """
        request = self.request
        names = [cluster.cluster for cluster in self.result.clusters]
        await self._guard.lock(
            [lock_name(self.platform.identity, self.app_id, request.deployment, name) for name in names],
            tags=[
                f"app:{one_line(self.app_id, 80)}",
                f"deployment:{one_line(request.deployment, 80)}",
                *(f"cluster:{one_line(name, 80)}" for name in names),
            ],
            wait_seconds=request.lock_wait_seconds,
        )
        await self._admit(0)  # the wait for the lock may have taken long

    def moves_to(self, versions: Mapping[str, Version], before: Mapping[str, Before]) -> list[Move]:
        """A move a cluster to its version, over what stands there; both are noted in the result."""
        moves = []
        for cluster in self.result.clusters:
            version, now = versions[cluster.cluster], before[cluster.cluster]
            cluster.template, cluster.template_before = version.id, now.template_id
            cluster.images_before = now.version.images if now.version else None
            moves.append(
                Move(
                    cluster=cluster.cluster,
                    replicas=cluster.replicas,
                    template_id=version.id,
                    before=now,
                    changed=now.differs_from(version),
                    in_place=self.in_place,
                )
            )
        return moves

    async def moves_in_place(self, *, restarted: bool = False) -> list[Move]:
        """A move a cluster that keeps the template that is online there.

        Raises:
            NoTemplateError: nothing is online in one of them.
        """
        names = [cluster.cluster for cluster in self.result.clusters]
        before = await note_online(self.deployment, names, target=self.request.target)
        online = online_everywhere(
            self.deployment, {name: found.template_id for name, found in before.items()}
        )
        moves = []
        for cluster in self.result.clusters:
            cluster.template = cluster.template_before = online[cluster.cluster]
            moves.append(
                Move(
                    cluster=cluster.cluster,
                    replicas=cluster.replicas,
                    template_id=online[cluster.cluster],
                    before=before[cluster.cluster],
                    changed=restarted,
                    in_place=self.in_place,
                    restarted=restarted,
                )
            )
        return moves

    async def roll(self, moves: Sequence[Move], write: Write) -> None:
        """Writes and watches, stage by stage: steps 6 and 7."""
        expected: list[Expected] = []
        stages = self._stages(moves)
        for number, stage in enumerate(stages):
            if number and self.request.pause_seconds:
                await pause(self.request.pause_seconds, after=stages[number - 1][-1].cluster)
            for move in stage:
                if may_have_run_before():
                    # What an earlier try of the run did may have been undone since.
                    await still_online(self.platform, self.deployment, expected)
                expected.append(await self._write(move, write))
            await self._watch(expected)

    def _stages(self, moves: Sequence[Move]) -> list[list[Move]]:
        """The moves that are written before the next look: all, or one by one, the canary first."""
        canary = [move for move in moves if move.cluster == self.request.canary]
        rest = [move for move in moves if move.cluster != self.request.canary]
        if self.request.order == "one-by-one":
            return [[move] for move in canary + rest]
        return [stage for stage in (canary, rest) if stage]

    async def _write(self, move: Move, write: Write) -> Expected:
        cluster = self._cluster(move.cluster)
        cluster.published = None  # not known until it returns; `look` finds out
        accepted = self._guard.accepted
        pods = await write(move)
        cluster.published = True
        self._tell_published(cluster, move.template_id, since=accepted)
        known = move.before.pods
        return move.expected(pods if known is None else known | (pods or {}))

    def _tell_published(
        self, cluster: ClusterResult, template: Id, *, since: int, rollback: bool = False
    ) -> None:
        # A retry passes by the writes of the tries before, which have told theirs.
        if self._guard.accepted > since or not may_have_run_before():
            events.published(self.result, self.platform.identity, cluster, template, rollback=rollback)

    async def _watch(self, expected: Sequence[Expected]) -> None:
        verdict = await wait_for_pods(
            self.deployment,
            expected,
            poll_seconds=self.request.poll_seconds,
            poll_attempts=self.request.poll_attempts,
            grace_seconds=self.request.grace_seconds,
            target=self.request.target,
        )
        self.result.evidence = verdict.evidence
        self._note(verdict)
        for each in expected:
            cluster = self._cluster(each.cluster)
            cluster.online, cluster.online_known = each.template_id, True

    def _cluster(self, name: str) -> ClusterResult:
        return next(cluster for cluster in self.result.clusters if cluster.cluster == name)

    def _note(self, verdict: Verdict) -> None:
        for judged in verdict.clusters:
            cluster = self._cluster(judged.cluster)
            cluster.ready, cluster.pods = judged.ready, judged.pods
            cluster.running = running(judged.pods)

    async def look(self) -> None:
        """What is live where, noted in the result as far as the platform answers in time."""
        for cluster in self.result.clusters:
            # Nothing older passes for what is live.
            cluster.online, cluster.online_known, cluster.running = None, False, None
        await asyncio.gather(_in_time(self._look_at_online()), _in_time(self._look_at_pods()))

    async def _look_at_online(self) -> None:
        online = {each.cluster: each.template_id for each in await self.platform.online(self.deployment)}
        for cluster in self.result.clusters:
            cluster.online, cluster.online_known = online.get(cluster.cluster), True
            if cluster.published is None and not same_id(cluster.template_before, cluster.template):
                arrived = same_id(cluster.online, cluster.template)
                # A write that was broken off on its way may yet take effect.
                cluster.published = arrived or (None if self._guard.unanswered else False)

    async def _look_at_pods(self) -> None:
        names = [cluster.cluster for cluster in self.result.clusters]
        status = await self.platform.status(self.deployment, names)
        for cluster in self.result.clusters:
            now = status.get(cluster.cluster)
            if now is not None and now.pods is not None:
                cluster.pods = now.pods
                cluster.running = running(now.pods)

    @property
    def wrote(self) -> bool:
        """Whether any cluster was written to, or may have been."""
        return any(cluster.published is not False for cluster in self.result.clusters)

    async def roll_back(self, moves: Sequence[Move], failure: RolloutError) -> None:
        """Puts every cluster that was touched back to what was online before, the last one first.

        Raises:
            RollbackFailedError: in at least one cluster that did not succeed; the others were tried.
        """
        tell(Progress("publish deployment", "running", "rolling back", aloud=True))
        try:
            await self._guard.label(ROLLED_BACK, "yes")
        except ConfigurationError as error:  # to go back matters more
            get_run_logger().warning("The run could not be marked as rolled back: %s", one_line(error))
        problems: list[str] = []
        expected: list[Expected] = []
        for move in reversed(moves):
            cluster = self._cluster(move.cluster)
            name, target = one_line(move.cluster, 60), move.before.template_id
            if cluster.published is False:
                continue
            ids = {str(move.template_id), str(target)}
            if cluster.online_known and str(cluster.online) not in ids:
                continue  # somebody else's release is online by now
            if target is None:
                cluster.rolled_back = False
                problems.append(f"{name}: what was online before is not known, or nothing was")
                continue
            accepted = self._guard.accepted
            try:
                pods = await publish_deployment(
                    self.deployment,
                    target,
                    move.cluster,
                    move.replicas,
                    over=move.template_id,
                    release_id=self.result.release_id,
                    key=self._rollback_key(),
                    target=self.request.target,
                )
            except RolloutError as error:
                cluster.rolled_back = False
                problems.append(f"{name}: {error.problem}")
                continue
            self._tell_published(cluster, target, since=accepted, rollback=True)
            if (
                pods is None
            ):  # an earlier try wrote; what was listed at the last look stood before it or after
                pods = {pod.name: pod.state for pod in cluster.pods}
            # Pods of before that still stand belong to what is gone back to.
            kept = move.before.pods or {}
            baseline = {pod: state for pod, state in pods.items() if pod not in kept}
            back = move.model_copy(update={"template_id": target, "before": Before()})
            expected.append(back.expected(baseline))
        if expected:
            problems += await self._watch_back(expected)
        if problems:
            raise RollbackFailedError(
                f"ROLLBACK FAILED: {'; '.join(problems)}; it was tried because {failure.problem}"
            ) from failure

    def _rollback_key(self) -> str:
        """What the publishes of a rollback are to the release; those of a retry are not the first one's."""
        tries: int = prefect.runtime.flow_run.run_count
        return "rollback" if tries < 2 else f"rollback-{tries}"

    async def _watch_back(self, expected: Sequence[Expected]) -> list[str]:
        try:
            await self._watch(expected)
        except RolloutError as error:
            verdict = error.verdict if isinstance(error, ReleaseError) else None
            if verdict:
                self._note(verdict)
            released = (
                {judged.cluster for judged in verdict.clusters if judged.released} if verdict else set()
            )
            for each in expected:
                self._cluster(each.cluster).rolled_back = each.cluster in released
            return [error.problem]
        for each in expected:
            self._cluster(each.cluster).rolled_back = True
        return []

    def failed(self, error: RolloutError) -> None:
        """Notes in the result how `error` ended the run, and in the error what is live where."""
        self.result.outcome = Outcome.FAILED
        if isinstance(error, ReleaseTimedOutError):
            self.result.outcome = Outcome.TIMED_OUT
        elif isinstance(error, NotApprovedError) and error.rejected:
            self.result.outcome = Outcome.CANCELLED
        if isinstance(error, ReleaseError) and error.verdict:
            self._note(error.verdict)


@task(
    name="pause",
    task_run_name="pause {seconds} s after {after}",
    persist_result=True,
    cache_policy=INPUTS + RUN_ID,
)
async def pause(seconds: float, *, after: str) -> str:
    """Lets a cluster serve for some seconds before the next one is written to; `after` names it."""
    async with resting():
        await asyncio.sleep(seconds)
    return after


async def conduct(
    action: Action, request: RequestT, work: Callable[[Run, RequestT], Awaitable[None]]
) -> ReleaseResult:
    """Runs `work` under the guard, and tells in every case how it ended.

    Raises:
        ReleaseCancelledError: it was cancelled in Prefect or by Ctrl-C; the run's state is Cancelled.
        SkippedError: it came too late, or a newer run takes its place; likewise, as Skipped.
        NotApprovedError: a person rejected it; likewise, as Rejected.
        RolloutError: what else ended it; `error.result` is the result so far.
    """
    run_id = UUID(str(prefect.runtime.flow_run.id))
    result = _begun(action, request, run_id)

    def note(progress: Progress) -> None:
        if progress.seconds:
            total = result.seconds.get(progress.step, 0) + progress.seconds
            result.seconds[progress.step] = round(total, 3)
        if guard is not None:
            guard.failing = progress.state == "failed"

    guard: Guard | None = None
    run: Run | None = None
    standing = Standing.OURS
    try:
        with listening(note), _tags_of_tasks():
            await skip_unless_due(request.late_minutes)
            async with watching(run_id) as guard, open_target(request.target) as platform:
                link = run_link(run_id)
                result.links = ({"Flow run": link} if link else {}) | platform.links()
                run = Run(request, result, platform, guard)
                try:
                    await _told(run, lambda: work(run, request))
                finally:
                    standing = await _standing(guard)
        if result.outcome is not Outcome.PLANNED:
            result.outcome = Outcome.RELEASED
    except SkippedError as error:
        return _skipped(error, result)
    except RolloutError as error:
        if standing is Standing.TAKEN_OVER:
            # Neither a state nor a report of this process may stand over its successor's.
            raise Abort(f"another process goes on with this run: {error}") from error
        error.result = result
        result.error = error.to_dict()
        await report(result, run)
        if standing is Standing.CANCELLING or result.outcome is Outcome.CANCELLED:
            return _cancelled(error, "Rejected" if result.outcome is Outcome.CANCELLED else "Cancelled")
        raise
    except (asyncio.CancelledError, TerminationSignal) as signalled:
        if standing is Standing.TAKEN_OVER:
            raise Abort("another process goes on with this run") from signalled
        result.outcome = Outcome.CANCELLED
        why = guard.cancelled if guard else None
        stopped = _stopped(result, why, wrote=run is not None and run.wrote)
        stopped.result, result.error = result, stopped.to_dict()
        await _leave_report(result, run)
        current = asyncio.current_task()
        if why is None or current is None:
            raise  # Prefect says how: Crashed, or Cancelled by the worker that ends the process
        current.uncancel()
        return _cancelled(stopped)
    if standing is Standing.TAKEN_OVER:
        raise Abort("another process goes on with this run")
    await report(result, run)
    if standing is Standing.CANCELLING:
        return _cancelled(_too_late(result, request))
    return _planned(result, result.plan) if result.outcome is Outcome.PLANNED and result.plan else result


def _too_late(result: ReleaseResult, request: Request) -> ReleaseCancelledError:
    error = ReleaseCancelledError(
        "it was cancelled too late, all was done",
        advice="Roll back if it shall not stay." if request.writes else "Nothing was written.",
    )
    error.live, error.result = result.live, result
    return error


def _begun(action: Action, request: Request, run_id: UUID) -> ReleaseResult:
    """The result of a run that has done nothing yet."""
    context = FlowRunContext.get()
    flow_run = context.flow_run if context else None
    return ReleaseResult(
        action=action,
        outcome=Outcome.FAILED,
        app_id=request.app_id,
        deployment=request.deployment,
        release_id=str(run_id),
        reason=request.reason,
        requested_by=one_line(request.requested_by, 200) or asker_of(flow_run),
        entrance=entrance_of(flow_run),
        dry_run=not request.writes,
        tries=flow_run.run_count if flow_run else 1,
    )


def _tags_of_tasks() -> TagsContext:
    """The run's tags for its tasks, less its entrance: for each tag of a task Prefect looks for a limit."""
    tags = TagsContext.get().current_tags
    return TagsContext(current_tags={tag for tag in tags if not tag.startswith(ENTRANCE)})


async def _standing(guard: Guard) -> Standing:
    """Whose the run is; where the Prefect API does not say so in time, it counts as ours."""
    try:
        async with asyncio.timeout(_LAST_LOOK_SECONDS):
            return await guard.standing()
    except TimeoutError:
        return Standing.OURS


def _stopped(result: ReleaseResult, why: str | None, *, wrote: bool) -> ReleaseCancelledError:
    """The error of a run that was stopped, with what it leaves behind."""
    stopped = ReleaseCancelledError(why or "its process was told to end")
    if wrote:
        stopped.live = result.live
        return stopped
    made = result.template_id if result.action is Action.DEPLOY else None
    created = "" if made is None else f"; template {one_line(made, 40)} was created"
    stopped.advice = "Retry the run to go on where it stopped."
    stopped.live = f"as before, no cluster was written to{created}"
    return stopped


def _planned(result: ReleaseResult, plan: ReleasePlan) -> ReleaseResult:
    """What a dry run returns to end as Planned. Its caller gets `result`."""
    state: State[ReleaseResult] = Completed(
        data=result, name="Planned", message=f"Nothing was written. Plan {plan.plan_hash}: {summary(plan)}."
    )
    return cast(ReleaseResult, state)


def _skipped(error: SkippedError, result: ReleaseResult) -> ReleaseResult:
    """What a flow returns whose run skips itself. There is nothing to report."""
    result.outcome = Outcome.SKIPPED
    error.result, result.error = result, error.to_dict()
    events.ended(result, None)
    return _cancelled(error, "Skipped")


def _cancelled(error: RolloutError, name: str = "Cancelled") -> ReleaseResult:
    """What a flow returns to end as Cancelled. Its caller never sees it: Prefect raises `error` there."""
    state: State[ReleaseResult] = Cancelled(data=error, message=str(error), name=name)
    return cast(ReleaseResult, state)


async def _in_time(look: Awaitable[None]) -> None:
    """A part of the last look, unless the platform does not answer it in time."""
    try:
        async with asyncio.timeout(_LAST_LOOK_SECONDS):
            await look
    except (PlatformError, TimeoutError) as error:
        get_run_logger().warning("The last look at what is live failed: %s", one_line(error))


async def foreseen(work: Awaitable[None]) -> None:
    """`work`; whatever goes wrong in it that nobody foresaw is an error of ours."""
    try:
        await work
    except RolloutError:
        raise
    except Exception as error:
        raise UnforeseenError(f"{type(error).__name__}, which nobody foresaw") from error


async def _told(run: Run, work: Callable[[], Awaitable[None]]) -> None:
    """`work`, with a last look at what is live where it does not end well after a write."""
    try:
        await foreseen(work())
    except RolloutError as error:
        run.failed(error)
        if run.wrote:
            await run.look()
            error.live = run.result.live
        raise
    except (asyncio.CancelledError, TerminationSignal):
        if run.wrote:
            await run.look()
        raise


async def rename(name: str) -> None:
    """Names the flow run after what it releases, so that a list of runs can be read."""
    try:
        async with get_client() as client:
            await client.update_flow_run(flow_run_id=prefect.runtime.flow_run.id, name=name)
    except httpx.HTTPError as error:
        get_run_logger().warning("The run keeps its first name: %s", one_line(error))


def first_name(what: str) -> Callable[[], str]:
    """The name of a run of `what` before it is known more precisely."""

    def name() -> str:
        parameters: dict[str, Any] = prefect.runtime.flow_run.parameters
        plan = "plan to " if parameters.get("dry_run") else ""
        return f"{plan}{what} {one_line(parameters.get('deployment'), 80)}".strip()

    return name


async def report(result: ReleaseResult, run: Run | None) -> None:
    """The last event, and step 8. What cannot be told changes nothing of how the release ended."""
    events.ended(result, run.platform.identity if run else None)
    try:
        with _tags_of_tasks():
            await report_release(result)
    except Exception as error:  # noqa: BLE001 - whatever keeps it from being left
        get_run_logger().warning("The report could not be left: %s", one_line(error))


async def _leave_report(result: ReleaseResult, run: Run | None) -> None:
    """The same of a run that is being stopped: no task of its own, and no long wait."""
    events.ended(result, run.platform.identity if run else None)
    try:
        async with asyncio.timeout(_LAST_LOOK_SECONDS):
            await report_release.fn(result)
    except (httpx.HTTPError, TimeoutError) as error:
        get_run_logger().warning("The report could not be left: %s", one_line(error) or "time ran out")


def run_link(run_id: UUID) -> str:
    """The address of a flow run in the Prefect UI; empty where the embedded API serves none."""
    if not (PREFECT_UI_URL.value() or PREFECT_API_URL.value()):
        return ""
    return url_for("flow-run", obj_id=run_id) or ""
