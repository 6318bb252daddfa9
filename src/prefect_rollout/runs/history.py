"""The history of releases, from Prefect's own records.

Each attempt of a release stores its result as an artifact for programs (`leave_record`), and a table for
people with a row for each cluster (`changes`, `table`). `read` joins the results with the flow runs, so that
it also lists runs that were killed before they stored a result.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple
from uuid import UUID

from prefect.artifacts import Artifact
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
from prefect_rollout.ids import same_id
from prefect_rollout.release.request import Action
from prefect_rollout.release.result import ClusterResult, Outcome, ReleaseResult
from prefect_rollout.release.windows import iso_time
from prefect_rollout.runs import flow_runs
from prefect_rollout.runs.labels import CLOUD, TARGET, TRIGGER
from prefect_rollout.text import cell, one_line

KEY = "changes"
"""Prefix of the keys of the table artifacts."""

RECORD = "prefect-rollout-result"
"""Type of the artifact with the result of one attempt of a run, as `--json` prints it."""

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
        images: the images that changed, as `container: before → after`.
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


def trigger_of(run: FlowRun | None) -> str:
    """Return what started a flow run: batch, the value of its tag, schedule, ui or api, or python."""
    if run is None:
        return ""
    if run.parent_task_run_id is not None:
        return "batch"
    tagged = sorted(tag.removeprefix(TRIGGER) for tag in run.tags if tag.startswith(TRIGGER))
    if tagged:
        return one_line(tagged[0], 40)
    if run.auto_scheduled:
        return "schedule"
    return "python" if run.deployment_id is None else "ui or api"


def asker_of(run: FlowRun | None) -> str:
    """Return the creator of a flow run, such as `schedule weekly`; empty if Prefect does not know."""
    by = run and run.created_by
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
            outcome=result.outcome.value + _BACK[cluster.rolled_back],
            cloud=one_line(result.cloud) or UNKNOWN,
            target=one_line(result.target) or UNKNOWN,
            cluster=one_line(cluster.cluster),
            before=_id(cluster.template_before),
            after=_after(cluster),
            ready=f"{_number(cluster.ready)} of {cluster.replicas}" if result.clusters else "",
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


_BACK = {True: ", rolled back", False: ", rollback failed", None: ""}


def _number(count: int | None) -> str:
    return UNKNOWN if count is None else str(count)


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
    return ", ".join(
        one_line(f"{container}: {before.get(container, 'unknown')} → {image}", 1000)
        for container, image in sorted(result.images.items())
        if before.get(container) != image
    )


def table(rows: Sequence[Change]) -> list[dict[str, Any]]:
    """Return the rows of the table artifact, without empty columns; the Prefect UI reads them as markdown."""
    dumped = [row.model_dump(exclude={"app_id", "deployment"}) for row in rows]
    shown = [name for name in Change.model_fields if any(row.get(name) for row in dumped)]
    return [{name.replace("_", " ").capitalize(): _cell(row[name]) for name in shown} for row in dumped]


def _cell(value: str | int | datetime) -> str | int:
    if isinstance(value, datetime):
        return f"{value:%Y-%m-%d %H:%M:%SZ}"
    return cell(value, 5000) if isinstance(value, str) else value


# ---- results ------------------------------------------------------------------------------------


async def leave_record(result: BaseModel) -> None:
    """Store the result of the current run as an artifact. It has no key, so the UI does not list it."""
    data = result.model_dump(mode="json")
    await Artifact(type=RECORD, description="The result, for programs", data=data).acreate()


async def record_of(client: PrefectClient, run: FlowRun) -> dict[str, Any] | None:
    """Return the stored result of a run's last attempt, as `--json` prints it; `None` if there is none."""
    found = await client.read_artifacts(
        artifact_filter=ArtifactFilter(
            flow_run_id=ArtifactFilterFlowRunId(any_=[run.id]),
            type=ArtifactFilterType(any_=[RECORD]),
        ),
        sort=ArtifactSort.CREATED_DESC,
        limit=1,
    )
    if not found:
        return None
    states = await client.read_flow_run_states(run.id)
    # A retry that was cancelled before it ran was only scheduled.
    begun = [state.timestamp for state in states if state.is_running() or state.is_scheduled()]
    left = found[0].created
    if begun and left and left < max(begun):  # from an earlier attempt
        return None
    try:
        record = json.loads(str(found[0].data))
    except ValueError:  # from another program
        return None
    return record if isinstance(record, dict) else None


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
        and (wanted.deployment is None or change.deployment == one_line(wanted.deployment))
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
    wanted = ArtifactFilter(
        flow_run_id=ArtifactFilterFlowRunId(any_=list(ours)), type=ArtifactFilterType(any_=[RECORD])
    )
    offset = 0
    while ours:
        artifacts = await client.read_artifacts(artifact_filter=wanted, limit=flow_runs.PAGE, offset=offset)
        for artifact in artifacts:
            if artifact.flow_run_id in ours:
                found[str(artifact.flow_run_id)] += _recorded(ours[artifact.flow_run_id], artifact)
        if len(artifacts) < flow_runs.PAGE:
            break
        offset += flow_runs.PAGE
    for run in ours.values():
        found[str(run.id)] += _unrecorded(run, flows.get(run.flow_id, ""), found[str(run.id)])
    return found


def _recorded(run: FlowRun, record: PrefectArtifact) -> list[Change]:
    """Return the changes in a stored result; none if another program stored it."""
    try:
        result = ReleaseResult.model_validate_json(str(record.data))
    except ValidationError:
        return []
    at = record.created or datetime.now(UTC)
    return [change.model_copy(update=_of_run(run)) for change in changes(result, at)]


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
    clusters = [tag.removeprefix("cluster:") for tag in run.tags if tag.startswith("cluster:")]
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
        for cluster in sorted(clusters) or [UNKNOWN]
    ]
