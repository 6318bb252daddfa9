"""What the flows here have in common: the guard, the order of the clusters, the watching, the ending."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any, TypeVar, cast
from uuid import UUID

import httpx
import prefect.runtime
from prefect import get_client, get_run_logger, task
from prefect.cache_policies import INPUTS, RUN_ID
from prefect.client.schemas.objects import State
from prefect.context import FlowRunContext, TagsContext
from prefect.exceptions import Abort, TerminationSignal
from prefect.states import Cancelled, Completed, Crashed
from prefect.utilities.urls import url_for
from pydantic import BaseModel

from prefect_rollout import events
from prefect_rollout.aftermath import aftermath
from prefect_rollout.blocks import open_target, opened_as
from prefect_rollout.diagnosis import Diagnosis
from prefect_rollout.difference import UNSEEN, summary
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
from prefect_rollout.guard import (
    CLOUD,
    ENDS,
    INHERITED,
    ROLLED_BACK,
    TARGET,
    Guard,
    Standing,
    lock_name,
    watching,
)
from prefect_rollout.guard import stopped as stopped_here
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
    RollbackRequest,
    Version,
    same_id,
    same_or_none,
)
from prefect_rollout.platforms.port import Platform
from prefect_rollout.progress import ROLL_BACK, Progress, listening, tell
from prefect_rollout.records import RECORD, deployment_tags, revision_tag
from prefect_rollout.replicas import kept, released
from prefect_rollout.revisions import Event, Record
from prefect_rollout.tasks import (
    check_deployment,
    choose_rollback,
    find_where_live,
    note_online,
    parse_metadata,
    report_release,
    roll_back_deployment,
    wait_for_pods,
    wait_for_rollback,
)
from prefect_rollout.tasks.before import Before, online_everywhere, still_online
from prefect_rollout.tasks.step import may_have_run_before
from prefect_rollout.text import address, one_line
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
        self.in_last_stage = False
        self.app_id: Id = request.app_id
        self._guard = guard
        self._deployment: Deployment | None = None
        self._record: Record | None = None

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
        rollback = isinstance(self.request, RollbackRequest)
        return await admit(
            self.app_id,
            self.request,
            self.result,
            self._guard,
            wait_seconds=wait_seconds,
            way_back=self._way_back if rollback else None,
        )

    async def _way_back(self) -> list[str]:
        """The clusters in which what a rollback goes to was live before."""
        request, names = self.request, [cluster.cluster for cluster in self.result.clusters]
        if not isinstance(request, RollbackRequest) or request.to_template in {None, ""}:
            return names  # each goes to what was released there
        with listening(_unheard, alone=True):  # it comes before the steps that a rollback shows
            return await find_where_live(self.deployment, names, request.to_template, target=request.target)

    async def _read(self, *, anew: bool = False) -> None:
        request, result = self.request, self.result
        check, parse = check_deployment, parse_metadata
        if anew:
            check, parse = check.with_options(refresh_cache=True), parse.with_options(refresh_cache=True)
        checked = await check(request.app_id, request.deployment, target=request.target)
        if checked.platform != self.platform.identity:
            raise ConfigurationError(
                f"this run began on the cloud {one_line(checked.platform, 120)}, and its target is "
                f"{one_line(self.platform.identity, 120)} now",
                advice="Start a new release there, or put the target back and retry the run.",
                field="target",
            )
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
        # An earlier try of the run has recorded something, perhaps.
        record = Record.read(self._guard.labels.get(RECORD)) or Record(
            platform=self.platform.identity, deployment=str(self.deployment.id), clusters=[]
        )
        record.clusters = sorted({*record.clusters, *names})
        await self._guard.lock(
            [lock_name(self.platform.identity, self.app_id, request.deployment, name) for name in names],
            tags=[
                *deployment_tags(self.app_id, request.deployment),
                *(f"cluster:{one_line(name, 80)}" for name in names),
            ],
            labels={RECORD: record.model_dump_json()},
            wait_seconds=request.lock_wait_seconds,
        )
        self._record = record
        await self._admit(0)  # the wait for the lock may have taken long

    def moves_to(self, versions: Mapping[str, Version], before: Mapping[str, Before]) -> list[Move]:
        """A move a cluster to its version, over what stands there; both are noted in the result."""
        moves = []
        for cluster in self.result.clusters:
            version, now = versions[cluster.cluster], before[cluster.cluster]
            cluster.template, cluster.template_before = version.id, now.template_id
            cluster.images_before = now.version.images if now.version else None
            cluster.note = released(now.desired, now.pods, cluster.replicas).note
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
            if restarted:
                now = before[cluster.cluster]
                cluster.replicas, cluster.note, _ = kept(now.desired, now.pods, cluster.replicas)
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
            self.in_last_stage = stage is stages[-1]
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
        cluster.published = cluster.ready = None  # not known until it returns; `look` finds out
        accepted = self._guard.accepted
        pods = await write(move)
        cluster.published = True
        self._tell_published(cluster, move.template_id, since=accepted)
        known = move.before.pods
        expected = move.expected(pods if known is None else known | (pods or {}))
        if expected.baseline is None and not move.in_place and (move.changed or move.restarted):
            cluster.note = "; ".join(filter(None, (cluster.note, UNSEEN)))
            get_run_logger().warning("%s: %s", one_line(move.cluster, 80), UNSEEN)
        return expected

    def _tell_published(
        self, cluster: ClusterResult, template: Id, *, since: int, rollback: bool = False
    ) -> None:
        # A retry passes by the writes of the tries before, which have told theirs.
        if self._guard.accepted > since or not may_have_run_before():
            events.published(self.result, self.platform.identity, cluster, template, rollback=rollback)

    async def record(
        self, events: Iterable[tuple[Event, Id | None, str]], labels: Mapping[str, str] | None = None
    ) -> None:
        """Record `(event, template, cluster)` in a label of the run, for the releases that follow.

        Raises:
            ConfigurationError: the Prefect API did not answer.
        """
        if self._record is None:
            raise RuntimeError("only a run that holds its locks records anything")
        made = self.result.template_id if self.result.action is Action.DEPLOY else None
        now, tags = datetime.now(UTC), set()
        for event, template_id, cluster in events:
            if template_id is not None:
                self._record.note(event, template_id, cluster, now)
                # The description of a template names the run that made it; other runs are found by a tag.
                tags |= set() if same_or_none(template_id, made) else {revision_tag(template_id)}
        await self._guard.label({**(labels or {}), RECORD: self._record.model_dump_json()}, tags)

    async def _record_verdict(self, verdict: Verdict | None, expected: Sequence[Expected]) -> None:
        # A scaling keeps the pods that run, of whichever template.
        if verdict is None or self.result.action is Action.SCALE:
            return
        released = {judged.cluster for judged in verdict.clusters if judged.released}
        # A restart that fails says nothing against the template.
        both = self.result.action is not Action.RESTART
        events: list[tuple[Event, Id | None, str]] = [
            ("ready" if each.cluster in released else "failed", each.template_id, each.cluster)
            for each in expected
            if both or each.cluster in released
        ]
        if not events:
            return
        try:
            await self.record(events)
        except ConfigurationError as error:  # it changes nothing of what is live
            get_run_logger().warning("What the pods showed could not be recorded: %s", one_line(error))

    async def _watch(self, expected: Sequence[Expected], *, rollback: bool = False) -> None:
        watch = wait_for_rollback if rollback else wait_for_pods
        try:
            verdict = await watch(
                self.deployment,
                expected,
                poll_seconds=self.request.poll_seconds,
                poll_attempts=self.request.poll_attempts,
                grace_seconds=self.request.grace_seconds,
                target=self.request.target,
            )
        except ReleaseError as error:
            await self._record_verdict(error.verdict, expected)
            raise
        await self._record_verdict(verdict, expected)
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
            cluster.ready, cluster.pods = judged.ready, judged.pods or []
            cluster.running = None if judged.pods is None else running(judged.pods)

    async def look(self) -> None:
        """What is live where, noted in the result as far as the platform answers in time."""
        for cluster in self.result.clusters:
            # Nothing older passes for what is live.
            cluster.online, cluster.online_known, cluster.running = None, False, None
            cluster.desired = None
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
            cluster.desired = now.desired if now else None
            if now is not None and now.pods is not None:
                cluster.pods = now.pods
                cluster.running = running(now.pods)

    async def roll_back(self, moves: Sequence[Move], failure: RolloutError) -> None:
        """Puts every cluster that was touched back to what was released there before, the last one first.

        That is what was online before, or an earlier template if that one was not released either.

        Raises:
            RollbackFailedError: in at least one cluster that did not succeed; the others were tried.
        """
        tell(Progress(ROLL_BACK, "running", "to what was released before", aloud=True))
        touched = [move for move in reversed(moves) if self._touched(move)]
        try:
            await self.record(
                [("left", move.template_id, move.cluster) for move in touched], {ROLLED_BACK: "yes"}
            )
        except ConfigurationError as error:  # to go back matters more
            get_run_logger().warning("The run could not be marked as rolled back: %s", one_line(error))
        ways = await self._ways_back(touched)
        problems: list[str] = []
        found: list[Diagnosis] = []
        expected: list[Expected] = []
        for move in touched:
            cluster = self._cluster(move.cluster)
            name, target = one_line(move.cluster, 60), ways.get(move.cluster)
            if target is None:
                cluster.rolled_back = False
                nothing = "no template that was released there before is on record"
                if move.before.template_id is None:
                    nothing = "what was online before is not known, or nothing was"
                problems.append(f"{name}: {nothing}")
                continue
            accepted = self._guard.accepted
            if move.before.desired is not None:
                cluster.replicas = move.before.desired
            try:
                pods = await roll_back_deployment(
                    self.deployment,
                    target,
                    move.cluster,
                    cluster.replicas,
                    over=move.template_id,
                    key=f"{self.result.release_id}:{self._rollback_key()}:{move.cluster}",
                    target=self.request.target,
                )
            except RolloutError as error:
                cluster.rolled_back = False
                problems.append(f"{name}: {error.problem}")
                found.append(error.diagnosis)
                continue
            self._tell_published(cluster, target, since=accepted, rollback=True)
            if pods is None and cluster.running is not None:
                # An earlier try wrote; what was listed at the last look stood before it or after.
                pods = {pod.name: pod.state for pod in cluster.pods}
            # Old pods that still run belong to what is gone back to.
            old = move.before.pods
            baseline = pods and {pod: state for pod, state in pods.items() if pod not in (old or {})}
            changed = move.changed or not same_id(target, move.before.template_id)
            update = {
                "template_id": target,
                "replicas": cluster.replicas,
                "before": Before(),
                "changed": changed,
            }
            back = move.model_copy(update=update).expected(baseline)
            expected.append(back.model_copy(update={"mixed": old is None}))
        if problems:  # even if the last cluster went well
            tell(Progress(ROLL_BACK, "failed", "; ".join(problems)))
        if expected and (failed_watch := await self._watch_back(expected)):
            problems.append(failed_watch.problem)
            found.insert(0, failed_watch.diagnosis)
        if problems:
            failed = RollbackFailedError(
                f"ROLLBACK FAILED: {'; '.join(problems)}; it was tried because {failure.problem}"
            )
            failed.found, failed.cause = next(iter(found), None), failure.to_dict()
            raise failed from failure

    def _touched(self, move: Move) -> bool:
        """Return whether a rollback has to write to the cluster: not if another release is online now."""
        cluster = self._cluster(move.cluster)
        ours = {str(move.template_id), str(move.before.template_id)}
        others = cluster.online_known and str(cluster.online) not in ours
        return cluster.published is not False and not others

    async def _ways_back(self, moves: Sequence[Move]) -> dict[str, Id]:
        """Return the template that each cluster goes back to, without clusters that had nothing online."""
        back = [move for move in moves if move.before.template_id is not None]
        before = {move.cluster: move.before for move in back}
        if not back:
            return {}
        try:
            with listening(_unheard, alone=True):  # a deploy shows no such step
                chosen = await choose_rollback(
                    self.deployment,
                    before,
                    over={move.cluster: move.template_id for move in back},
                    target=self.request.target,
                )
        except RolloutError as error:
            get_run_logger().warning(
                "Going back to what was online before, released or not: %s", one_line(error)
            )
            return {name: each.template_id for name, each in before.items() if each.template_id is not None}
        self.result.notes += [note for each in chosen.values() for note in each.notes]
        return {name: version.id for name, version in chosen.items()}

    def _rollback_key(self) -> str:
        """What the publishes of a rollback are to the release; those of a retry are not the first one's."""
        tries: int = prefect.runtime.flow_run.run_count
        return "rollback" if tries < 2 else f"rollback-{tries}"

    async def _watch_back(self, expected: Sequence[Expected]) -> RolloutError | None:
        try:
            await self._watch(expected, rollback=True)
        except RolloutError as error:
            verdict = error.verdict if isinstance(error, ReleaseError) else None
            if verdict:
                self._note(verdict)
            released = (
                {judged.cluster for judged in verdict.clusters if judged.released} if verdict else set()
            )
            for each in expected:
                self._cluster(each.cluster).rolled_back = each.cluster in released
            return error
        for each in expected:
            self._cluster(each.cluster).rolled_back = True
        return None

    def failed(self, error: RolloutError) -> None:
        """Notes in the result how `error` ended the run, and in the error what is live where."""
        self.result.outcome = Outcome.FAILED
        if isinstance(error, ReleaseTimedOutError):
            self.result.outcome = Outcome.TIMED_OUT
        elif isinstance(error, NotApprovedError) and error.rejected:
            self.result.outcome = Outcome.CANCELLED
        # After a rollback, its pods are what counts.
        if isinstance(error, ReleaseError) and error.verdict and not self.result.rolled_back:
            self._note(error.verdict)


class Steps:
    """Progress of a run's steps; the result keeps their seconds and which of them failed."""

    def __init__(self, result: ReleaseResult) -> None:
        self._result = result
        self._last: dict[str, Progress] = {}  # the one that moved last at the end

    def note(self, progress: Progress) -> None:
        """Take in what a step tells."""
        self._last.pop(progress.step, None)
        self._last[progress.step] = progress
        result = self._result
        result.failed_steps = [step for step, last in self._last.items() if last.state == "failed"]
        if progress.seconds:
            total = result.seconds.get(progress.step, 0) + progress.seconds
            result.seconds[progress.step] = round(total, 3)

    def fail(self, problem: str) -> None:
        """Tell in which step a run failed, where the step itself did not: not all raise in their tasks."""
        latest = next(reversed(self._last.values()), None)
        if latest and (latest.state == "running" or not self._result.failed_steps):
            tell(Progress(latest.step, "failed", problem))

    def stop(self) -> None:
        """Tell in which step a run was stopped."""
        latest = next(reversed(self._last.values()), None)
        if latest and latest.state in {"running", "retrying"}:
            tell(Progress(latest.step, "stopped"))


def _unheard(_: Progress) -> None:
    """Hears what a step says, and passes nothing on."""


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

    steps = Steps(result)

    def note(progress: Progress) -> None:
        steps.note(progress)
        if guard is not None and progress.step != "report release":
            watched = progress.step == "wait for pods" and progress.state == "done"
            released = watched and run is not None and run.in_last_stage
            guard.decided = released or progress.state == "failed"

    guard: Guard | None = None
    run: Run | None = None
    standing = Standing.OURS
    try:
        with listening(note), _tags_of_tasks():
            await skip_unless_due(request.late_minutes)
            async with _opened(request, result) as (platform, guard):
                run = Run(request, result, platform, guard)
                try:
                    await _told(run, lambda: work(run, request), steps)
                finally:
                    standing = await _standing(guard)
        if result.outcome is not Outcome.PLANNED:
            result.outcome = Outcome.RELEASED
    except SkippedError as error:
        return _skipped(error, result)
    except RolloutError as error:
        return await _failed(error, result, run, standing)
    except (asyncio.CancelledError, TerminationSignal) as signalled:
        return await _interrupted(signalled, result, run, guard, standing)
    if standing is Standing.TAKEN_OVER:
        raise Abort("another process goes on with this run")
    late = _too_late(result) if standing is Standing.CANCELLING else None
    result.error = late.to_dict() if late else None
    await report(result, run)
    if late:
        return _cancelled(late)
    return _planned(result, result.plan) if result.outcome is Outcome.PLANNED and result.plan else result


@asynccontextmanager
async def _opened(request: Request, result: ReleaseResult) -> AsyncIterator[tuple[Platform, Guard]]:
    """The platform of the run's target, and the run's guard; result and labels name the platform."""
    run_id = UUID(result.release_id)
    async with open_target(request.target) as platform:
        chosen = await opened_as(request.target)
        result.cloud, result.target = chosen.block.address, chosen.name
        link = run_link(run_id)
        result.links = ({"Flow run": link} if link else {}) | platform.links()
        async with watching(run_id, {CLOUD: result.cloud, TARGET: result.target}) as guard:
            yield platform, guard


async def _failed(
    error: RolloutError, result: ReleaseResult, run: Run | None, standing: Standing
) -> ReleaseResult:
    """End a run with `error`: raise it, or return what has the run end as Cancelled or Rejected."""
    if standing is Standing.TAKEN_OVER:
        # Neither a state nor a report of this process may replace its successor's.
        raise Abort(f"another process goes on with this run: {error}") from error
    error.result = result
    if standing is Standing.CANCELLING:
        left = aftermath(result)
        error.problem += f"; it was cancelled too: {left.left}"
        error.advice = f"{error.advice} {left.undo}"
    result.error = error.to_dict()
    await report(result, run)
    if result.outcome is Outcome.CANCELLED:
        return _cancelled(error, "Rejected")
    if standing is Standing.CANCELLING:
        return _cancelled(error)
    raise error


async def _interrupted(
    signalled: BaseException,
    result: ReleaseResult,
    run: Run | None,
    guard: Guard | None,
    standing: Standing,
) -> ReleaseResult:
    """End a run that was stopped: raise `signalled`, or return what has it end as Cancelled or Crashed."""
    if standing is Standing.TAKEN_OVER:
        raise Abort("another process goes on with this run") from signalled
    result.outcome = Outcome.CANCELLED
    why = guard.cancelled if guard else None
    left = aftermath(result)
    stopped = ReleaseCancelledError(f"{why or ENDS}: {left.left}", advice=left.undo)
    stopped.live = result.live if result.wrote else "as before, no cluster was written to"
    stopped.result = result
    result.error = stopped.to_dict()
    stopped_here.append(stopped)
    await _leave_report(result, run)
    current = asyncio.current_task()
    if guard is None or why is None or current is None:
        # Prefect says how: Crashed, or Cancelled by the worker that ends the process.
        get_run_logger().warning("%s", stopped)
        raise signalled
    current.uncancel()
    if guard.ends and standing is not Standing.CANCELLING:
        return cast(ReleaseResult, Crashed(data=stopped, message=str(stopped)))
    return _cancelled(stopped)


def _too_late(result: ReleaseResult) -> ReleaseCancelledError:
    left = aftermath(result, done=True)
    error = ReleaseCancelledError(f"it was cancelled too late, all was done: {left.left}", advice=left.undo)
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
    """The run's tags for its tasks, less those of its entrance: Prefect looks for a limit for each tag."""
    tags = TagsContext.get().current_tags
    return TagsContext(current_tags={tag for tag in tags if not tag.startswith((ENTRANCE, *INHERITED))})


async def _standing(guard: Guard) -> Standing:
    """Whose the run is; where the Prefect API does not say so in time, it counts as ours."""
    try:
        async with asyncio.timeout(_LAST_LOOK_SECONDS):
            return await guard.standing()
    except TimeoutError:
        return Standing.OURS


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


async def _told(run: Run, work: Callable[[], Awaitable[None]], steps: Steps) -> None:
    """`work`, with a last look at what is live where it does not end well after a write."""
    try:
        await foreseen(work())
    except RolloutError as error:
        steps.fail(error.problem)
        run.failed(error)
        if run.result.wrote:
            await run.look()
            error.live = run.result.live
        raise
    except (asyncio.CancelledError, TerminationSignal):
        steps.stop()
        if run.result.wrote:
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
    """Return the address of a flow run in the Prefect UI; empty if there is none."""
    return address(url_for("flow-run", obj_id=run_id) or "")
