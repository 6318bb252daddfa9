"""The history of releases, from Prefect's own records.

The page that each attempt of a release leaves includes its result (`with_record`). `read` joins the results
with the flow runs, so that it also lists runs that were killed before they left a page.
"""

import json
import re
from collections.abc import AsyncIterator, Collection, Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple
from uuid import UUID

from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    ArtifactFilterType,
    FlowRunFilter,
    FlowRunFilterEndTime,
    FlowRunFilterStartTime,
)
from prefect.client.schemas.objects import Artifact as PrefectArtifact
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.sorting import ArtifactSort, FlowRunSort
from pydantic import AwareDatetime, BaseModel, ValidationError

from prefect_rollout.errors import InputError
from prefect_rollout.ids import names_deployment, same_id
from prefect_rollout.release.image_facts import with_digests
from prefect_rollout.release.request import Action
from prefect_rollout.release.result import BACK, ClusterResult, Outcome, ReleaseResult
from prefect_rollout.release.revisions import Record
from prefect_rollout.release.windows import iso_time
from prefect_rollout.runs import flow_runs
from prefect_rollout.runs.flow_runs import CLOUD, TARGET, TRIGGER
from prefect_rollout.runs.records import RECORD
from prefect_rollout.text import number, one_line

# A definition of a link that nothing refers to: no renderer of markdown shows it.
_RECORD = re.compile(r"^\[prefect-rollout-result\]: <(.*)>$", re.MULTILINE)

UNKNOWN = "?"
"""The cluster of a run that left no record, and other unknown values."""


class Change(BaseModel):
    """The effect of one attempt of a release on one cluster.

    Attributes:
        when: end of the attempt; without a record, the time of the run's state.
        outcome: outcome of the release and of its rollback, or the run's state, such as `crashed`.
        cloud: the platform's address.
        target: the block with the platform's credentials.
        cluster: name of the cluster; `none` if the release had not read its clusters yet; `?` if unknown.
        before: the template that was online before.
        after: the template that was online at the last observation; `as before` if nothing was written.
        ready: new pods that were ready, of the desired pods.
        images: the images that changed, as `container: before → after`, with the digests that were read.
    """

    when: AwareDatetime
    app_id: str
    deployment: str
    action: str
    outcome: str
    cloud: str = UNKNOWN
    target: str = UNKNOWN
    cluster: str
    before: str = UNKNOWN
    after: str = UNKNOWN
    ready: str = ""
    images: str = ""
    who: str = UNKNOWN
    why: str = ""
    trigger: str = ""
    approved_by: str = ""
    break_glass: str = ""
    tries: int = 1
    run_id: str


# ---- the changes of one release -----------------------------------------------------------------


def trigger_of(run: FlowRun) -> str:
    """Return what started a flow run: batch, the value of its tag, schedule, ui or api, or python."""
    if run.parent_task_run_id is not None:
        return "batch"
    tagged = sorted(tag.removeprefix(TRIGGER) for tag in run.tags if tag.startswith(TRIGGER))
    if tagged:
        return one_line(tagged[0], 40)
    if run.auto_scheduled:
        return "schedule"
    return "python" if run.deployment_id is None else "ui or api"


def asker_of(run: FlowRun) -> str:
    """Return the creator of a flow run, such as `schedule weekly`; empty if Prefect does not know."""
    by = run.created_by
    return one_line(f"{(by.type or '').lower()} {by.display_value or ''}", 200) if by else ""


def changes(result: ReleaseResult, when: datetime) -> list[Change]:
    """Return a change for each cluster; none for a dry run or a run that skipped itself."""
    if result.dry_run or result.outcome in {Outcome.PLANNED, Outcome.SKIPPED}:
        return []
    # The release failed before it read its clusters, so it changed none.
    clusters = result.clusters or [ClusterResult(cluster="none", replicas=0)]
    return [
        Change(
            when=when,
            app_id=one_line(result.app_id),
            deployment=one_line(result.deployment),
            action=result.action.value,
            outcome=result.outcome.value + BACK[cluster.rolled_back],
            cloud=one_line(result.cloud) or UNKNOWN,
            target=one_line(result.target) or UNKNOWN,
            cluster=one_line(cluster.cluster),
            before=_id(cluster.template_before),
            after=_after(cluster),
            ready=f"{number(cluster.ready)} of {number(cluster.wanted)}" if result.clusters else "",
            images=_images(result, cluster),
            who=one_line(result.requested_by, 200) or "unknown",
            why=one_line(result.reason, 1000),
            trigger=result.trigger,
            approved_by=one_line(result.approved_by, 200),
            break_glass=one_line(result.break_glass, 1000),
            tries=result.tries,
            run_id=result.release_id,
        )
        for cluster in clusters
    ]


def _id(template_id: int | str | None) -> str:
    return "none or unknown" if template_id is None else one_line(template_id, 80)


def _after(cluster: ClusterResult) -> str:
    if cluster.online_known:
        return "nothing" if cluster.online is None else one_line(cluster.online, 80)
    return "as before" if cluster.published is False else "unknown"


def _images(result: ReleaseResult, cluster: ClusterResult) -> str:
    """Return the images that changed, if the requested template is online."""
    if cluster.online is None or not same_id(cluster.online, cluster.template):
        return ""
    before = cluster.images_before or {}
    after = with_digests(result.images, result.checked)
    return ", ".join(
        one_line(f"{container}: {before.get(container, 'unknown')} → {after[container]}", 1000)
        for container, image in sorted(result.images.items())
        if before.get(container) != image
    )


# ---- results ------------------------------------------------------------------------------------


def with_record(page: str, result: BaseModel) -> str:
    """Return the page of a run with its result, as `--json` prints it. Viewers of the page do not see it."""
    record = re.sub(r"[\s<>]", lambda found: f"\\u{ord(found[0]):04x}", result.model_dump_json())
    return f"{page}\n[prefect-rollout-result]: <{record}>\n"


def _records(*run_ids: UUID) -> ArtifactFilter:
    """Return a filter of the pages of runs."""
    return ArtifactFilter(
        flow_run_id=ArtifactFilterFlowRunId(any_=list(run_ids)), type=ArtifactFilterType(any_=["markdown"])
    )


def _record(page: PrefectArtifact) -> str:
    """Return the result in a page; empty if it has none."""
    return next(reversed(_RECORD.findall(str(page.data))), "")


async def record_of(client: PrefectClient, run: FlowRun) -> dict[str, Any] | None:
    """Return the stored result of a run's last attempt, as `--json` prints it; `None` if there is none."""
    found = await client.read_artifacts(
        artifact_filter=_records(run.id), sort=ArtifactSort.CREATED_DESC, limit=1
    )
    if not found:
        return None
    states = await client.read_flow_run_states(run.id)
    # A retry that was cancelled before it ran was only scheduled.
    begun = [state.timestamp for state in states if state.is_running() or state.is_scheduled()]
    left = found[0].updated
    if begun and left and left < max(begun):  # from an earlier attempt
        return None
    try:
        record = json.loads(_record(found[0]))
    except ValueError:  # the page of a running batch, or of another program
        return None
    return record if isinstance(record, dict) else None


async def _results(
    client: PrefectClient, run_ids: Collection[UUID]
) -> AsyncIterator[tuple[UUID, datetime, ReleaseResult]]:
    """Yield the result of each attempt of releases that left one, with its run and the time."""
    offset = 0
    while run_ids:
        pages = await client.read_artifacts(
            artifact_filter=_records(*run_ids), limit=flow_runs.PAGE, offset=offset
        )
        for page in pages:
            try:
                result = ReleaseResult.model_validate_json(_record(page))
            except ValidationError:  # of a batch, or of another program
                continue
            if page.flow_run_id and page.flow_run_id in run_ids:
                yield page.flow_run_id, page.created or datetime.now(UTC), result
        if len(pages) < flow_runs.PAGE:
            return
        offset += flow_runs.PAGE


async def results_of(client: PrefectClient, run_ids: Collection[UUID]) -> dict[UUID, ReleaseResult]:
    """Return the last result of each release that left one."""
    found = [each async for each in _results(client, run_ids)]
    return {run_id: result for run_id, _, result in sorted(found, key=lambda each: each[1])}


# ---- the history --------------------------------------------------------------------------------


class Wanted(NamedTuple):
    """Filters of changes; `None` matches all."""

    app_id: str | None = None
    deployment: str | None = None
    cluster: str | None = None
    since: datetime | None = None
    limit: int = 50


_UNITS = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


def since_of(text: str, now: datetime) -> datetime:
    """Return the time that `text` names: a duration before `now`, such as 7d, or a date or time.

    A time without an offset is in UTC, not in the machine's time zone.

    Raises:
        InputError: `text` has none of these forms.
    """
    span = re.fullmatch(r"([0-9]{1,6})([mhdw])", text.strip())
    moment = None if span else iso_time(text.strip())
    try:
        if span:
            moment = now - timedelta(**{_UNITS[span[2]]: int(span[1])})
        elif moment is not None:
            moment = moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)
    except OverflowError:
        moment = None
    if moment is None:
        raise InputError(
            f"since: {one_line(text, 80)!r} is no time",
            advice="Give a span such as 90m, 36h, 7d or 2w, a date such as 2026-11-01 (in UTC), or a time "
            "such as 2026-11-01T08:00+08:00.",
            field="since",
        )
    return moment


def select(found: Iterable[Change], wanted: Wanted) -> list[Change]:
    """Return the changes that match, newest first, at most `wanted.limit`."""
    kept = [
        change
        for change in found
        if (wanted.app_id is None or change.app_id == one_line(wanted.app_id))
        and (wanted.deployment is None or names_deployment(one_line(wanted.deployment), change.deployment))
        # An unknown cluster may be any.
        and (wanted.cluster is None or change.cluster in {one_line(wanted.cluster), UNKNOWN})
        and (wanted.since is None or change.when >= wanted.since)
    ]
    return sorted(kept, key=lambda change: change.when, reverse=True)[: wanted.limit]


async def read(client: PrefectClient, wanted: Wanted) -> list[Change]:
    """Return the changes that match, newest first. Reads only as many pages as the limit needs."""
    found: dict[str, list[Change]] = {}
    flows = {flow.id: flow.name for flow in await client.read_flows(flow_filter=flow_runs.OF_RELEASES)}
    running = FlowRunFilter(
        start_time=FlowRunFilterStartTime(is_null_=False), end_time=FlowRunFilterEndTime(is_null_=True)
    )
    ended = FlowRunFilter(end_time=FlowRunFilterEndTime(after_=wanted.since, is_null_=False))
    for runs in (running, ended):
        async for page in flow_runs.pages(client, runs, FlowRunSort.END_TIME_DESC, flow_runs.OF_RELEASES):
            found |= await _changes_of(client, page, flows)
            chosen = select((change for each in found.values() for change in each), wanted)
            last = page[-1].end_time
            # The runs of the following pages ended earlier, and changed nothing after their end.
            if last is not None and len(chosen) == wanted.limit and last < chosen[-1].when:
                break
    return select((change for each in found.values() for change in each), wanted)


async def _changes_of(
    client: PrefectClient, page: Sequence[FlowRun], flows: Mapping[UUID, str]
) -> dict[str, list[Change]]:
    """Return the changes of each run, by its id."""
    # A flow of another program may have the same name.
    ours = {run.id: run for run in page if {"app_id", "deployment"} <= set(run.parameters)}
    found: dict[str, list[Change]] = {str(run_id): [] for run_id in ours}
    async for run_id, at, result in _results(client, ours):
        of_run = _of_run(ours[run_id])
        found[str(run_id)] += [change.model_copy(update=of_run) for change in changes(result, at)]
    for run in ours.values():
        found[str(run.id)] += _unrecorded(run, flows.get(run.flow_id, ""), found[str(run.id)])
    return found


def _of_run(run: FlowRun) -> dict[str, str]:
    return {
        "app_id": one_line(run.parameters["app_id"]),
        "deployment": one_line(run.parameters["deployment"]),
        "run_id": str(run.id),
    }


_OVER = {StateType.COMPLETED, StateType.FAILED, StateType.CANCELLED}


def _unrecorded(run: FlowRun, flow: str, recorded: Sequence[Change]) -> list[Change]:
    """Return the changes of an attempt without a record: killed, running, or unable to write one."""
    state = run.state
    # A run that continued in another process without ending leaves one record for several attempts.
    recorded_all = any(change.tries >= run.run_count for change in recorded) or (
        recorded and state is not None and state.type in _OVER
    )
    nothing = run.parameters.get("dry_run") or (state and state.name in {"Skipped", "Planned"})
    if state is None or run.run_count == 0 or recorded_all or nothing:
        return []
    record = Record.read(run.labels.get(RECORD))
    return [
        Change(
            **_of_run(run),
            when=state.timestamp,
            action=flow if flow in list(Action) else Action.DEPLOY.value,
            outcome=one_line(state.name, 40).lower(),
            cloud=one_line(run.labels.get(CLOUD)) if CLOUD in run.labels else UNKNOWN,
            target=one_line(run.labels.get(TARGET)) if TARGET in run.labels else UNKNOWN,
            cluster=cluster,
            who=one_line(run.parameters.get("requested_by") or "", 200) or asker_of(run) or "unknown",
            why=one_line(run.parameters.get("reason") or "", 1000),
            trigger=trigger_of(run),
            tries=run.run_count,
        )
        for cluster in (record and record.clusters) or [UNKNOWN]
    ]
