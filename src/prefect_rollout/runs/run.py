"""One run of a flow: its request, its progress, and the result that it fills."""

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import ParamSpec, TypeVar

from prefect import Task, get_run_logger
from prefect.cache_policies import CachePolicy

from prefect_rollout.blocks import forget_blocks
from prefect_rollout.blocks.target import Chosen as ChosenTarget
from prefect_rollout.errors import (
    ClusterNotFoundError,
    ConfigurationError,
    ConflictError,
    InputError,
    NotApprovedError,
    PlanChangedError,
    ReleaseError,
    ReleaseTimedOutError,
    RolloutError,
    WorkloadError,
)
from prefect_rollout.ids import Id, same_or_none
from prefect_rollout.platforms.port import Platform
from prefect_rollout.release.image_facts import CheckedImage
from prefect_rollout.release.plan import UNSEEN, Procedure, ReleasePlan, Target, release_plan
from prefect_rollout.release.plan_words import summary
from prefect_rollout.release.replicas import Replicas, kept, released
from prefect_rollout.release.request import Action, Request, ScaleRequest
from prefect_rollout.release.result import ClusterResult, Outcome, ReleaseResult
from prefect_rollout.release.revisions import Event, Record
from prefect_rollout.release.workload import Baseline, Chosen, Placement, Published, Revision, Workload
from prefect_rollout.runs import events
from prefect_rollout.runs.admission import WayBack, admit
from prefect_rollout.runs.flow_runs import deployment_tags
from prefect_rollout.runs.guard import Guard
from prefect_rollout.runs.last_look import last_look
from prefect_rollout.runs.lock import lock_name
from prefect_rollout.runs.moves import Move, nothing_between, stages_of, still_online
from prefect_rollout.runs.records import RECORD, revision_tag
from prefect_rollout.runs.step import may_have_run_before
from prefect_rollout.text import one_line
from prefect_rollout.verdict.expected import Expected
from prefect_rollout.verdict.status import running
from prefect_rollout.verdict.verdict import Verdict

P = ParamSpec("P")
R = TypeVar("R")

Watch = Callable[..., Awaitable[Verdict]]


class Run:
    """One run of a flow.

    Attributes:
        request: the request.
        result: the result so far; it is correct wherever the run ends.
        platform: the platform of its target.
        guard: the guard of the flow run.
        workload: the workload, from step 1.
        placement: the placement of the workload, from step 2.
        phase: name of a repeated reading in the same run; empty for the first one.
        in_last_stage: the last clusters are being watched.
        expected: the state to reach, for each cluster that was written to.
    """

    workload: Workload
    placement: Placement

    def __init__(
        self, request: Request, result: ReleaseResult, platform: Platform, target: ChosenTarget, guard: Guard
    ) -> None:
        self.request = request
        self.result = result
        self.platform = platform
        self.in_last_stage = False
        self.expected: list[Expected] = []
        self.phase = ""
        self._reread = False
        self._target = target
        self.guard = guard
        self._record: Record | None = None

    @property
    def clusters(self) -> list[str]:
        """The clusters of the run, in order."""
        return [cluster.cluster for cluster in self.result.clusters]

    def reading(self, step: Task[P, R]) -> Task[P, R]:
        """Return a step that does not reuse results in a dry run, after a long wait, and in another phase.

        Each phase has its own results, which persist for retries of the run.
        """
        if self.phase:
            salt = CachePolicy.from_cache_key_fn(lambda _context, _parameters: self.phase)
            step = step.with_options(cache_policy=step.cache_policy + salt)
        fresh = self._reread or not self.request.writes
        return step.with_options(refresh_cache=True) if fresh else step

    # ---- before the first write -------------------------------------------------------------

    def found(self, workload: Workload, identity: str) -> None:
        """Record the result of step 1.

        Raises:
            ConfigurationError: the target of the run is another platform than in an earlier attempt.
        """
        if identity != self.platform.identity:
            raise ConfigurationError(
                f"this run began on the cloud {one_line(identity, 120)}, and its target is "
                f"{one_line(self.platform.identity, 120)} now",
                advice="Start a new release there, or restore the target and retry the run.",
                field="target",
            )
        self.workload = workload
        self.result.app, self.result.deployment = workload.app, workload.name

    async def begin(self, placement: Placement, way_back: WayBack | None = None, *, lock: bool) -> bool:
        """Record the result of step 2, and wait for the release windows and, with `lock`, for the locks.

        Args:
            placement: from step 2.
            way_back: for a rollback, finds the clusters that return to an earlier live revision.
            lock: lock all clusters of the run, unless it holds their locks.

        Returns:
            True if the run has waited, so that steps 1 and 2 have to be read again.

        Raises:
            ClusterNotFoundError: the canary is not one of the clusters.
            WindowClosedError: a release window is closed for longer than the request waits.
            LockedError: another release held a lock for longer than the request waits.
            ConflictError: the clusters of the deployment have changed meanwhile.
            InputError: the platform does not allow so many or so few replicas.
            WorkloadError: the run sets replicas that something else sets.
        """
        request, result = self.request, self.result
        self.placement = placement
        # The writes of an earlier attempt are not known yet.
        written = None if request.writes and may_have_run_before() else False
        replicas = placement.replicas
        if isinstance(request, ScaleRequest):
            _check_scale(request, self.workload.name, placement)
            replicas = dict.fromkeys(replicas, request.replicas)
        result.clusters = [
            ClusterResult(
                cluster=name,
                replicas=count,
                published=written,
                commands=self.platform.commands(self.workload, name),
            )
            for name, count in replicas.items()
        ]
        if request.canary is not None and request.canary not in placement.replicas:
            raise ClusterNotFoundError.named(
                request.canary, list(placement.replicas), "among the clusters of this release"
            )
        if not (self._reread or self.phase):
            events.emit("started", result, self.platform.identity)
            waited = await self._admit(way_back, wait_seconds=request.window_wait_seconds)
            self._reread = waited and not may_have_run_before()
            if self._reread:
                return True
        return lock and await self._lock(way_back)

    async def _admit(self, way_back: WayBack | None, *, wait_seconds: float) -> bool:
        of_run = (self.workload.app_id, self.request, self.result, self.guard)
        return await admit(*of_run, wait_seconds=wait_seconds, way_back=way_back)

    async def _lock(self, way_back: WayBack | None) -> bool:
        """Lock all clusters of the run, unless it holds their locks; see `begin`."""
        request, workload = self.request, self.workload
        if self._record is not None:
            if not {self.platform.place(name) for name in self.clusters} <= set(self._record.clusters):
                raise ConflictError(
                    "the clusters of the deployment changed while this run waited for its lock",
                    advice="Start a new release; nothing was written.",
                )
            return False
        # An earlier attempt may have recorded something.
        record = Record.read(self.guard.run.labels.get(RECORD)) or Record(
            platform=self.platform.realm, deployment=str(workload.id), clusters=[]
        )
        places = [self.platform.place(name) for name in self.clusters]
        record.clusters = sorted({*record.clusters, *places})
        deployment = (self.platform.realm, workload.app_id, workload.name)
        waited = await self.guard.lock(
            [lock_name(*deployment, place) for place in places],
            tags=deployment_tags(workload.app_id, workload.name),
            labels={RECORD: record.model_dump_json()},
            wait_seconds=request.lock_wait_seconds,
        )
        self._record = record
        if waited:
            forget_blocks()
        await self._admit(way_back, wait_seconds=0)  # the wait for the lock may have taken long
        self._reread = self._reread or (waited and not may_have_run_before())
        return self._reread and waited

    def plan(
        self,
        baseline: Mapping[str, Baseline],
        after: Mapping[str, Revision],
        images: Mapping[str, Mapping[str, str]] | None = None,
        *,
        creates: bool = False,
        checked: Sequence[CheckedImage] = (),
    ) -> ReleasePlan:
        """Return the plan to publish `after` to each cluster or, with `creates`, a new revision based on it.

        The new revision of each cluster has its `images`; without them, those of `after`. `checked` has them
        as their registries do.
        """
        chosen = {str(each.id): each for each in after.values() if isinstance(each, Chosen)}.values()
        return release_plan(
            self.result.action,
            [
                Target(
                    cluster=name,
                    before=baseline[name],
                    after=after[name],
                    images=after[name].images if images is None else images[name],
                    replicas=self._replicas(name, baseline[name]),
                )
                for name in self.clusters
            ],
            platform=self.platform.identity,
            cloud=self._target.block.address,
            target=self._target.name,
            workload=self.workload,
            placement=self.placement,
            creates=creates,
            procedure=Procedure.of(self.request),
            notes=[note for each in chosen for note in each.notes],
            unknown=[each.id for each in chosen if each.unknown],
            checked=checked,
        )

    def _replicas(self, cluster: str, before: Baseline) -> Replicas:
        configured, by = self.placement.replicas[cluster], self.placement.scaled_by.get(cluster)
        if self.result.action is Action.SCALE:
            note = f"{by} may change them again" if by else ""
            return Replicas(self.cluster(cluster).replicas, note)
        if by:
            return Replicas(None, f"replicas are set by {by}")
        if self.result.action is Action.RESTART:
            return kept(before.desired, before.pods, configured)
        return released(before.desired, before.pods, configured)

    def planned(self, plan: ReleasePlan) -> None:
        """End a dry run with its plan.

        Raises:
            PlanChangedError: another plan was expected.
        """
        result = self.result
        result.plan, result.base_template_id = plan, plan.base_template_id
        result.clusters = [
            ClusterResult(
                cluster=each.cluster,
                replicas=each.replicas,
                template=each.template,
                template_before=each.template_before,
                images_before=each.images_before,
            )
            for each in plan.clusters
        ]
        self.hold_to(plan)
        result.outcome = Outcome.PLANNED

    def hold_to(self, plan: ReleasePlan, expected: str = "") -> None:
        """Check that the plan has the hash `expected`, or that of the request. Call it under the lock.

        Raises:
            PlanChangedError: the plan has another hash.
        """
        expected = expected or self.request.expect_plan
        if not expected:
            return
        self.result.plan = plan
        if plan.plan_hash != expected:
            raise PlanChangedError(
                f"the plan is {plan.plan_hash} now, and {expected} was expected: {summary(plan)}",
                plan_hash=plan.plan_hash,
                expect_plan=expected,
            )

    # ---- writes -----------------------------------------------------------------------------

    def moves(
        self, plan: ReleasePlan, baseline: Mapping[str, Baseline], after: Mapping[str, Revision]
    ) -> list[Move]:
        """Return the move of each cluster, and record its target in the result."""
        restarted = self.result.action is Action.RESTART
        moves = []
        for cluster, planned in zip(self.result.clusters, plan.clusters, strict=True):
            before, revision = baseline[cluster.cluster], after[cluster.cluster]
            cluster.template, cluster.template_before = revision.id, before.online
            cluster.images_before = before.revision.images if before.revision else None
            cluster.object_before = before.revision_object
            cluster.replicas = planned.replicas
            online = self.result.action is Action.DEPLOY and same_or_none(before.online, revision.id)
            notes = (
                ["nothing to release: this template is online", *planned.notes] if online else planned.notes
            )
            cluster.note = "; ".join(note for note in notes if note != UNSEEN)
            stays = self.result.action is Action.SCALE
            moves.append(
                Move(
                    cluster=cluster.cluster,
                    replicas=planned.replicas,
                    revision=revision.id,
                    before=before,
                    changed=restarted or (not stays and before.changes_to(revision)),
                    in_place=self.placement.in_place,
                    restarted=restarted,
                )
            )
        return moves

    async def write(self, move: Move, writing: Awaitable[Published]) -> None:
        """Send the write of a move, and record in the result that it was accepted."""
        cluster = self.cluster(move.cluster)
        cluster.published = cluster.ready = None  # unknown until the write returns; `look` reads it
        accepted = self.guard.accepted
        done = await writing
        cluster.published, cluster.template = True, done.applied.revision
        self.tell_published(cluster, done.applied.revision, since=accepted)
        known = move.before.pods
        expected = move.expected(done.applied, done.pods if known is None else known | (done.pods or {}))
        if expected.baseline is None and not move.in_place and (move.changed or move.restarted):
            cluster.note = "; ".join(filter(None, (cluster.note, UNSEEN)))
            get_run_logger().warning("%s: %s", one_line(move.cluster, 80), UNSEEN)
        self.expected.append(expected)

    async def roll_out(
        self,
        moves: Sequence[Move],
        write: Callable[[Move], Awaitable[Published]],
        watch: Watch,
        pause: Callable[..., Awaitable[str]],
    ) -> None:
        """Write to the clusters of each stage, then watch the pods of all clusters so far.

        Raises:
            ReleaseError: the rollout did not succeed.
        """
        if may_have_run_before():
            # Others may have published since the baseline was read.
            await nothing_between(self.platform, self.workload, moves, self.result.release_id)
        stages = stages_of(moves, self.request)
        for stage in stages:
            if stage.after and self.request.pause_seconds:
                await pause(self.request.pause_seconds, after=stage.after)
            for move in stage.moves:
                if self.expected and may_have_run_before():
                    # What an earlier attempt published may have been undone since.
                    await still_online(self.platform, self.workload, self.expected)
                await self.write(move, write(move))
            self.in_last_stage = stage is stages[-1]
            await self.watch(watch, self.expected)

    def tell_published(
        self, cluster: ClusterResult, revision: Id, *, since: int, rollback: bool = False
    ) -> None:
        """Emit the event of an accepted write, unless an earlier attempt has sent it."""
        if self.guard.accepted > since or not may_have_run_before():
            events.published(self.result, self.platform.identity, cluster, revision, rollback=rollback)

    async def record(
        self, entries: Iterable[tuple[Event, Id | None, str]], labels: Mapping[str, str] | None = None
    ) -> None:
        """Record `(event, revision, cluster)` in a label of the run, for later releases.

        Raises:
            ConfigurationError: the Prefect API did not answer.
        """
        if self._record is None:
            raise RuntimeError("only a run that holds its locks records anything")
        made = self.result.template_id if self.result.action is Action.DEPLOY else None
        now, tags = datetime.now(UTC), set()
        for event, revision, cluster in entries:
            if revision is not None:
                self._record.note(event, revision, self.platform.place(cluster), now)
                # A revision names the run that created it; other runs are found by a tag.
                tags |= set() if same_or_none(revision, made) else {revision_tag(revision)}
        await self.guard.label({**(labels or {}), RECORD: self._record.model_dump_json()}, tags)

    async def watch(self, watch: Watch, expected: Sequence[Expected]) -> None:
        """Wait for the verdict on `expected`, and add it to the result and to the record.

        Raises:
            ReleaseError: the rollout did not succeed.
        """
        request = self.request
        try:
            verdict = await watch(
                self.workload,
                expected,
                poll_seconds=request.poll_seconds,
                poll_attempts=request.poll_attempts,
                grace_seconds=request.grace_seconds,
                target=request.target,
            )
        except ReleaseError as error:
            await self._record_verdict(error.verdict, expected)
            raise
        await self._record_verdict(verdict, expected)
        self.result.evidence = verdict.evidence
        self.note(verdict)
        for each in expected:
            cluster = self.cluster(each.cluster)
            cluster.online, cluster.online_known = each.revision, True

    async def _record_verdict(self, verdict: Verdict | None, expected: Sequence[Expected]) -> None:
        # Scaling keeps the pods that run, of any revision.
        if verdict is None or self.result.action is Action.SCALE:
            return
        ready = {judged.cluster for judged in verdict.clusters if judged.released}
        # A restart that fails says nothing about the revision.
        both = self.result.action is not Action.RESTART
        entries: list[tuple[Event, Id | None, str]] = [
            ("ready" if each.cluster in ready else "failed", each.revision, each.cluster)
            for each in expected
            if both or each.cluster in ready
        ]
        if not entries:
            return
        try:
            await self.record(entries)
        except ConfigurationError as error:  # it does not change what is live
            get_run_logger().warning("The verdict could not be recorded: %s", one_line(error))

    # ---- the result -------------------------------------------------------------------------

    def cluster(self, name: str) -> ClusterResult:
        """Return the result of a cluster."""
        return next(cluster for cluster in self.result.clusters if cluster.cluster == name)

    def note(self, verdict: Verdict) -> None:
        """Copy the pods of a verdict to the result."""
        for judged in verdict.clusters:
            cluster = self.cluster(judged.cluster)
            cluster.ready, cluster.pods = judged.ready, judged.pods or []
            cluster.object = judged.revision_object
            cluster.running = None if judged.pods is None else running(judged.pods)

    async def look(self) -> None:
        """Record the live state in the result, as far as the platform answers in time."""
        await last_look(self.result, self.platform, self.workload, unanswered=self.guard.unanswered)

    def failed(self, error: RolloutError) -> None:
        """Record in the result how `error` ended the run."""
        self.result.outcome = Outcome.FAILED
        if isinstance(error, ReleaseTimedOutError):
            self.result.outcome = Outcome.TIMED_OUT
        elif isinstance(error, NotApprovedError) and error.rejected:
            self.result.outcome = Outcome.CANCELLED
        # After a rollback, the pods of the rollback count.
        if isinstance(error, ReleaseError) and error.verdict and not self.result.rolled_back:
            self.note(error.verdict)


def _check_scale(request: ScaleRequest, deployment: str, placement: Placement) -> None:
    fewest, most = placement.scalable
    if not fewest <= request.replicas <= most:
        raise InputError(
            f"replicas: {request.replicas} is not between {fewest} and {most}, which the platform allows",
            field="replicas",
        )
    for cluster, by in placement.scaled_by.items() if not request.force else ():
        raise WorkloadError(
            f"the replicas of {one_line(deployment, 120)} in {one_line(cluster, 80)} are set by "
            f"{one_line(by, 120)}",
            advice="Change its bounds there, or scale with force until it scales again; nothing was written.",
            cluster=cluster,
        )
