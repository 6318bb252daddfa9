"""Find, list and log the flow runs of releases."""

from datetime import UTC, datetime
from typing import Any, NamedTuple
from uuid import UUID

from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterExpectedStartTime,
    LogFilter,
    LogFilterFlowRunId,
    LogFilterLevel,
)
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.sorting import FlowRunSort, LogSort
from prefect.exceptions import ObjectNotFound

from prefect_rollout.errors import InputError
from prefect_rollout.mcp import types
from prefect_rollout.mcp.connection import Api
from prefect_rollout.mcp.policy import Policy
from prefect_rollout.mcp.untrusted import quoted, quoted_all, unlisted
from prefect_rollout.release.result import cloud_words
from prefect_rollout.runs import flow_runs, history
from prefect_rollout.runs.flow_runs import CLOUD, PAGE, TARGET, Wanted, outcome_of
from prefect_rollout.runs.prefect_errors import translate_errors
from prefect_rollout.text import id_in, one_line

_PAGES_AT_ONCE = 5


class Found(NamedTuple):
    """A flow run of a release; if `restricted`, the client may not learn names outside its limits."""

    run: FlowRun
    flow: str
    restricted: bool = False


async def find(api: Api, policy: Policy, flow_run_id: str) -> Found:
    """Return the flow run with that ID, which may be the address of its page.

    Raises:
        InputError: the ID is malformed or unknown, or its run belongs to another flow or is not allowed.
        ConfigurationError: the API did not answer.
    """
    try:
        wanted = UUID(id_in(flow_run_id))
    except ValueError:
        raise _refused(
            f"{one_line(flow_run_id, 80)!r} is not the ID of a flow run, such as {UUID(int=0)}",
            "Use the ID that the start of the release returned, or list_releases.",
        ) from None
    with translate_errors():
        try:
            run = await api.client.read_flow_run(wanted)
        except ObjectNotFound:
            raise _refused(
                f"this Prefect API has no flow run {wanted}", "list_releases shows the runs that exist."
            ) from None
        flow = (await api.client.read_flow(run.flow_id)).name
    if flow not in flow_runs.FLOW_NAMES or not flow_runs.is_release(run):
        raise _refused(
            f"{wanted} is a run of the flow {one_line(flow, 80)!r}, not of a release",
            "list_releases shows the runs of releases.",
        )
    if not policy.allows(run.parameters):
        # The error names no app or deployment: the client knows only the ID.
        raise _refused(
            f"{wanted} is a run of a deployment that is not allowed here",
            "list_releases shows the runs that are allowed. The operator of this MCP server sets the limits.",
        )
    return Found(run, flow, policy.restrict)


def _refused(problem: str, advice: str) -> InputError:
    return InputError(f"flow_run_id: {problem}", advice=advice, field="flow_run_id")


async def refreshed(api: Api, found: Found) -> Found:
    """Return the same run in its current state."""
    with translate_errors():
        return found._replace(run=await api.client.read_flow_run(found.run.id))


def fields_of(api: Api, run: FlowRun, flow: str, *, reason: int) -> dict[str, Any]:
    """Return the fields of `types.Row` for a flow run; its reason is cut to `reason` characters."""
    parameters, state, seconds, images = run.parameters, run.state, None, run.parameters.get("images")
    cloud, target = str(run.labels.get(CLOUD, "")), str(run.labels.get(TARGET, ""))
    if run.start_time is not None:
        seconds = round(((run.end_time or datetime.now(UTC)) - run.start_time).total_seconds(), 1)
    return {
        "flow_run_id": str(run.id),
        "flow": flow,
        "cloud": quoted(cloud_words(cloud, target)) if cloud else "",
        "app_id": quoted(parameters.get("app_id", ""), 253),
        "deployment": quoted(parameters.get("deployment", ""), 253),
        "dry_run": bool(parameters.get("dry_run")),
        "state": one_line(state.name if state else "unknown", 40),
        "ended": state is not None and state.is_final(),
        "outcome": outcome_of(state),
        "images": quoted_all(images) if isinstance(images, dict) else {},
        "reason": quoted(parameters.get("reason") or "", reason),
        "requested_by": quoted(parameters.get("requested_by") or "", 200),
        "started": run.start_time and run.start_time.replace(microsecond=0),
        "seconds": seconds,
        "ui_link": api.link(run.id),
    }


async def listed(api: Api, policy: Policy, wanted: Wanted, *, limit: int, cursor: str) -> types.Releases:
    """Return a page of the allowed flow runs of releases, newest first."""
    offset = _offset(cursor)
    since = FlowRunFilter(expected_start_time=FlowRunFilterExpectedStartTime(after_=wanted.since))
    rows: list[types.Row] = []
    # Without a filter, most of the newest runs are wanted.
    filtered = policy.restrict or wanted._replace(dry_runs=False) != Wanted()
    size = PAGE if filtered else min(PAGE, 3 * limit)
    with translate_errors():
        flows = {
            flow.id: flow.name for flow in await api.client.read_flows(flow_filter=flow_runs.OF_RELEASES)
        }
        for _ in range(_PAGES_AT_ONCE):
            page = await api.client.read_flow_runs(
                flow_filter=flow_runs.OF_RELEASES,
                flow_run_filter=since if wanted.since else None,
                sort=FlowRunSort.EXPECTED_START_TIME_DESC,
                limit=size,
                offset=offset,
            )
            chosen = [run for run in page if wanted.match(run) and policy.allows(run.parameters)]
            some = chosen if wanted.image else chosen[: limit - len(rows)]
            results = await history.results_of(api.client, [run.id for run in some])
            for run in chosen:
                fields = fields_of(api, run, flows.get(run.flow_id, ""), reason=300)
                images = results[run.id].images if run.id in results else {}
                row = types.Row(**fields | ({"images": quoted_all(images)} if images else {}))
                if wanted.image in " ".join(row.images.values()):
                    rows.append(row)
                if len(rows) == limit:
                    return types.Releases(releases=rows, next_cursor=str(offset + page.index(run) + 1))
            if len(page) < size:
                return types.Releases(releases=rows)
            offset, size = offset + size, PAGE
    return types.Releases(releases=rows, next_cursor=str(offset))


def _offset(cursor: str) -> int:
    if cursor and not (cursor.isascii() and cursor.isdigit() and len(cursor) < 10):
        raise InputError(
            f"cursor: {one_line(cursor, 40)!r} is not a cursor",
            advice="Leave it out for the first page, or pass next_cursor of the previous page.",
            field="cursor",
        )
    return int(cursor or 0)


async def logs(api: Api, found: Found, *, limit: int, cursor: str, warnings: bool) -> types.Logs:
    """Return a page of the run's log, oldest line first."""
    offset = _offset(cursor)
    with translate_errors():
        read = await api.client.read_logs(
            LogFilter(
                flow_run_id=LogFilterFlowRunId(any_=[found.run.id]),
                level=LogFilterLevel(ge_=30 if warnings else 20),
            ),
            limit=limit,
            offset=offset,
            sort=LogSort.TIMESTAMP_ASC,
        )
    lines = [
        types.Line(
            at=log.timestamp,
            level="error" if log.level >= 40 else "warning" if log.level >= 30 else "info",
            message=quoted(unlisted(log.message) if found.restricted else log.message, 1000),
        )
        for log in read
    ]
    return types.Logs(lines=lines, next_cursor=str(offset + len(read)) if len(read) == limit else "")
