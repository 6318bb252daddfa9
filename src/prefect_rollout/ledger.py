"""What changed, who, when, why, through which entrance, before and after: from Prefect's own records.

Each try of a release leaves a table artifact with a row for each of its clusters (`changes`, `table`).
`read` joins them with the flow runs, so that a run that was killed and left none is not overlooked.
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
    ArtifactFilterKey,
    ArtifactFilterType,
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterEndTime,
    FlowRunFilterStartTime,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.sorting import ArtifactSort, FlowRunSort
from pydantic import AwareDatetime, BaseModel, ValidationError

from prefect_rollout import flow_runs
from prefect_rollout.errors import InputError
from prefect_rollout.guard import CLOUD, TARGET
from prefect_rollout.models import Action, ClusterResult, Outcome, ReleaseResult, same_id
from prefect_rollout.reaper import FLOWS
from prefect_rollout.text import cell, one_line, plain
from prefect_rollout.windows import iso_time

KEY = "changes"
"""How the keys of the table artifacts begin."""

ENTRANCE = "entrance:"
"""How the tag begins that says through which entrance a run was started."""

RECORD = "prefect-rollout-result"
"""The type of the artifact that holds a run's result for programs, as `--json` prints it."""

UNKNOWN = "?"
"""The cluster of a run that left no record of where it had come."""


class Change(BaseModel):
    """What one try of a release did to one cluster.

    Attributes:
        when: when the try ended; of one that left no record, when Prefect noted its state.
        outcome: a release's, with what became of its rollback; or the run's state, such as `crashed`.
        cloud: the platform's address.
        target: the block that it was reached through.
        cluster: its name; `none` where the release had not come so far; `?` where that is not known.
        before: the template that was online before.
        after: the template online at the last look; `as before` where nothing was written.
        ready: new pods that were ready, and pods wanted.
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
    entrance: str = ""
    approved_by: str = ""
    break_glass: str = ""
    tries: int = 1
    run_id: str


# ---- the record that a release leaves -----------------------------------------------------------


def entrance_of(run: FlowRun | None) -> str:
    """The way a flow run was started: batch, what its tag says, schedule, ui or api, or python."""
    if run is None:
        return ""
    if run.parent_task_run_id is not None:
        return "batch"
    tagged = sorted(tag.removeprefix(ENTRANCE) for tag in run.tags if tag.startswith(ENTRANCE))
    if tagged:
        return one_line(tagged[0], 40)
    if run.auto_scheduled:
        return "schedule"
    return "python" if run.deployment_id is None else "ui or api"


def asker_of(run: FlowRun | None) -> str:
    """What Prefect knows of who created a flow run, such as `schedule weekly`; often nothing."""
    by = run and run.created_by
    return one_line(f"{(by.type or '').lower()} {by.display_value or ''}", 200) if by else ""


def changes(result: ReleaseResult, when: datetime) -> list[Change]:
    """What the release did, a cluster at a time; nothing of a dry run or of one that skipped itself."""
    if result.dry_run or result.outcome in {Outcome.PLANNED, Outcome.SKIPPED}:
        return []
    # One that failed before it knew its clusters did nothing to any.
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
            entrance=result.entrance,
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
    """The images that changed, where what is online is what the release asked for."""
    if cluster.online is None or not same_id(cluster.online, cluster.template):
        return ""
    before = cluster.images_before or {}
    return ", ".join(
        one_line(f"{container}: {before.get(container, 'unknown')} → {image}", 1000)
        for container, image in sorted(result.images.items())
        if before.get(container) != image
    )


_COLUMNS = {
    "When": "when",
    "Action": "action",
    "Outcome": "outcome",
    "Cloud": "cloud",
    "Target": "target",
    "Cluster": "cluster",
    "Before": "before",
    "After": "after",
    "Ready": "ready",
    "Who": "who",
    "Why": "why",
    "Entrance": "entrance",
    "Approved by": "approved_by",
    "Break glass": "break_glass",
    "Try": "tries",
    "Flow run": "run_id",
    "Images": "images",
}
_SELDOM = {"Approved by", "Break glass"}


def table(rows: Sequence[Change]) -> list[dict[str, Any]]:
    """The rows of the table artifact: texts as markdown, which is how the Prefect UI reads them."""
    shown = {
        column: name
        for column, name in _COLUMNS.items()
        if column not in _SELDOM or any(getattr(row, name) for row in rows)
    }
    return [{column: _cell(getattr(row, name)) for column, name in shown.items()} for row in rows]


def _cell(value: str | int | datetime) -> str | int:
    if isinstance(value, datetime):
        return f"{value:%Y-%m-%d %H:%M:%SZ}"
    return cell(value, 5000) if isinstance(value, str) else value


# ---- results ------------------------------------------------------------------------------------


async def leave_record(result: BaseModel) -> None:
    """Leaves the result of the run that this is called in. It has no key: the UI lists it nowhere."""
    told = "The result, for programs"
    await Artifact(type=RECORD, description=told, data=result.model_dump(mode="json")).acreate()


async def record_of(client: PrefectClient, run: FlowRun) -> dict[str, Any] | None:
    """The result that the last try of a run left, as `--json` prints it; `None` where it left none."""
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
    # A retry that was cancelled before it ran was scheduled, and no more.
    begun = [state.timestamp for state in states if state.is_running() or state.is_scheduled()]
    left = found[0].created
    if begun and left and left < max(begun):  # by an earlier try
        return None
    try:
        record = json.loads(str(found[0].data))
    except ValueError:  # of somebody else's making
        return None
    return record if isinstance(record, dict) else None


# ---- the history --------------------------------------------------------------------------------


class Wanted(NamedTuple):
    """Which changes are asked for; `None` asks for all."""

    app_id: str | None = None
    deployment: str | None = None
    cluster: str | None = None
    since: datetime | None = None
    limit: int = 50


_UNITS = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


def since_of(text: str, now: datetime) -> datetime:
    """Return the moment that `text` names: a span before `now` such as 7d, or a date or time of day.

    Without an offset it is in UTC, whatever the machine's clock shows.

    Raises:
        InputError: it is neither.
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
    """The changes that are asked for, newest first, `wanted.limit` at the most."""
    kept = [
        change
        for change in found
        if (wanted.app_id is None or change.app_id == one_line(wanted.app_id))
        and (wanted.deployment is None or change.deployment == one_line(wanted.deployment))
        # What is not known may have concerned any cluster.
        and (wanted.cluster is None or change.cluster in {one_line(wanted.cluster), UNKNOWN})
        and (wanted.since is None or change.when >= wanted.since)
    ]
    return sorted(kept, key=lambda change: change.when, reverse=True)[: wanted.limit]


async def read(client: PrefectClient, wanted: Wanted) -> list[Change]:
    """The changes that are asked for, newest first, from as many records as that takes."""
    found: dict[str, list[Change]] = {}
    named = FlowFilter(name=FlowFilterName(any_=list(FLOWS)))
    flows = {flow.id: flow.name for flow in await client.read_flows(flow_filter=named)}
    running = FlowRunFilter(
        start_time=FlowRunFilterStartTime(is_null_=False), end_time=FlowRunFilterEndTime(is_null_=True)
    )
    ended = FlowRunFilter(end_time=FlowRunFilterEndTime(after_=wanted.since, is_null_=False))
    for runs in (running, ended):
        async for page in flow_runs.pages(client, runs, FlowRunSort.END_TIME_DESC, named):
            found |= await _changes_of(client, page, flows)
            chosen = select((change for each in found.values() for change in each), wanted)
            last = page[-1].end_time
            # No run of the pages that follow has changed anything after its end.
            if last is not None and len(chosen) == wanted.limit and last < chosen[-1].when:
                break
    return select((change for each in found.values() for change in each), wanted)


async def _changes_of(
    client: PrefectClient, page: Sequence[FlowRun], flows: Mapping[UUID, str]
) -> dict[str, list[Change]]:
    """The changes of each run, by its id."""
    # Another program's flow may have one of the names too.
    ours = {run.id: run for run in page if {"app_id", "deployment"} <= set(run.parameters)}
    found: dict[str, list[Change]] = {str(run_id): [] for run_id in ours}
    offset = 0
    while ours:
        artifacts = await client.read_artifacts(
            artifact_filter=ArtifactFilter(
                flow_run_id=ArtifactFilterFlowRunId(any_=list(ours)),
                key=ArtifactFilterKey(like_=f"{KEY}-%"),
                type=ArtifactFilterType(any_=["table"]),
            ),
            limit=flow_runs.PAGE,
            offset=offset,
        )
        for artifact in artifacts:
            if artifact.flow_run_id in ours:
                found[str(artifact.flow_run_id)] += _recorded(ours[artifact.flow_run_id], artifact.data)
        if len(artifacts) < flow_runs.PAGE:
            break
        offset += flow_runs.PAGE
    for run in ours.values():
        found[str(run.id)] += _unrecorded(run, flows.get(run.flow_id, ""), found[str(run.id)])
    return found


def _recorded(run: FlowRun, data: Any) -> list[Change]:
    """The rows of a table artifact; none of one that is not ours."""
    try:
        rows = json.loads(data)
        return [
            Change.model_validate(
                {_COLUMNS[column]: _value(shown) for column, shown in row.items() if column in _COLUMNS}
                | _of_run(run)
            )
            for row in rows
        ]
    except (ValidationError, ValueError, TypeError, AttributeError):
        return []


def _value(shown: Any) -> Any:
    return plain(shown) if isinstance(shown, str) else shown


def _of_run(run: FlowRun) -> dict[str, str]:
    return {
        "app_id": one_line(run.parameters["app_id"]),
        "deployment": one_line(run.parameters["deployment"]),
        "run_id": str(run.id),
    }


_OVER = {StateType.COMPLETED, StateType.FAILED, StateType.CANCELLED}


def _unrecorded(run: FlowRun, flow: str, recorded: Sequence[Change]) -> list[Change]:
    """What is known of a try that left no record: it was killed, still runs, or could not write it."""
    state = run.state
    # A run that was taken up again without ending leaves one record for several tries.
    told = any(change.tries >= run.run_count for change in recorded) or (
        recorded and state is not None and state.type in _OVER
    )
    nothing = run.parameters.get("dry_run") or (state and state.name in {"Skipped", "Planned"})
    if state is None or run.run_count == 0 or told or nothing:
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
            entrance=entrance_of(run),
            tries=run.run_count,
        )
        for cluster in sorted(clusters) or [UNKNOWN]
    ]
