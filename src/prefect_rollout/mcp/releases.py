"""Releases as flow runs of a Prefect API: submitted, followed, listed, cancelled, retried."""

import asyncio
import hashlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple
from uuid import UUID

from prefect import Task
from prefect.client.schemas.filters import (
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterId,
    FlowRunFilterIdempotencyKey,
    FlowRunFilterTags,
    LogFilter,
    LogFilterFlowRunId,
    LogFilterLevel,
)
from prefect.client.schemas.objects import FlowRun, State, StateType, TaskRun
from prefect.client.schemas.responses import SetStateStatus
from prefect.client.schemas.sorting import FlowRunSort, LogSort
from prefect.exceptions import ObjectNotFound
from prefect.states import AwaitingRetry, Cancelling
from pydantic import ValidationError

from prefect_rollout import ledger, reaper, tasks
from prefect_rollout.blocks import open_target, opened_as
from prefect_rollout.errors import ConfigurationError, InputError, RolloutError, TemplateError
from prefect_rollout.flow_runs import PAGE
from prefect_rollout.flows.children import children_of, name_of
from prefect_rollout.guard import CLOUD, ROLLED_BACK, TARGET, answering
from prefect_rollout.mcp import answers
from prefect_rollout.mcp.answers import StepState
from prefect_rollout.mcp.connection import Api
from prefect_rollout.mcp.permits import Permits
from prefect_rollout.mcp.quoting import quoted, unlisted
from prefect_rollout.models import (
    Checked,
    Outcome,
    Template,
    cloud_words,
    maker_of,
    newest_first,
    same_id,
)
from prefect_rollout.platforms.port import Platform
from prefect_rollout.records import known_here
from prefect_rollout.replicas import now as replicas_now
from prefect_rollout.revisions import Revision, why_not
from prefect_rollout.tasks.parse_metadata import scope_of
from prefect_rollout.text import one_line
from prefect_rollout.verdict import running as running_pods

WINDOW = timedelta(minutes=10)
"""For how long the same request means the same release."""

_LOOK_SECONDS = 0.5
_LIVE_SECONDS = 10.0
_PAGES_AT_ONCE = 5  # that one list looks through

Noted = Callable[[answers.Release], Awaitable[None]]


class Submission(NamedTuple):
    """A flow run, and whether an earlier request had started it."""

    run: FlowRun
    repeated: bool


# ---- submitting ---------------------------------------------------------------------------------


async def submit(
    api: Api, flow: str, request: Checked, *, attempt: int, tags: Sequence[str] = ()
) -> Submission:
    """Has a flow run created, unless the same request has started one in the last ten minutes.

    Args:
        api: where.
        flow: the flow's name, and that of its deployment.
        request: what it is asked.
        attempt: another number makes another request of the same.
        tags: of the run, beside those of its entrance.

    Raises:
        ConfigurationError: the API has no such deployment, or did not answer.
    """
    if known := await submitted(api, flow, request, attempt=attempt):
        return Submission(known, repeated=True)
    with answering():
        try:
            deployment = await api.client.read_deployment_by_name(f"{flow}/{flow}")
        except ObjectNotFound:
            raise ConfigurationError(
                f"this Prefect API has no deployment {flow}/{flow}",
                advice="Apply prefect-rollout's prefect.yaml with `prefect --no-prompt deploy --all`.",
            ) from None
        run = await api.client.create_flow_run_from_deployment(
            deployment.id,
            parameters=request.model_dump(mode="json", exclude_unset=True),
            tags=[f"{ledger.ENTRANCE}mcp", *tags],
            idempotency_key=_keys(flow, request, attempt)[0],
        )
    api.poke()
    return Submission(run, repeated=False)


async def submitted(api: Api, flow: str, request: Checked, *, attempt: int) -> FlowRun | None:
    """The flow run that the same request started in the last ten minutes, if any."""
    keys = FlowRunFilterIdempotencyKey(any_=_keys(flow, request, attempt))
    with answering():
        found = await api.client.read_flow_runs(
            flow_run_filter=FlowRunFilter(idempotency_key=keys), sort=FlowRunSort.EXPECTED_START_TIME_DESC
        )
    since = datetime.now(UTC) - WINDOW
    return next((run for run in found if run.created is not None and run.created > since), None)


def _keys(flow: str, request: Checked, attempt: int) -> list[str]:
    """The idempotency keys of a request that is made now, and of one that was made shortly before."""
    now = int(time.time() // WINDOW.total_seconds())
    return [f"mcp:{_digest(flow, request, attempt)}:{bucket}" for bucket in (now, now - 1)]


def _digest(flow: str, request: Checked, attempt: int) -> str:
    # How it is worded, and which plan it was held to, make no other request of it.
    same = request.model_dump(mode="json", exclude={"reason", "requested_by", "expect_plan"})
    canonical = json.dumps([flow, same, attempt], sort_keys=True)
    return hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).hexdigest()[:32]


async def plan(api: Api, flow: str, request: Checked, *, tags: Sequence[str] = ()) -> Submission:
    """A dry run of the request: one that is under way, or a new one.

    Args:
        api: where.
        flow: the flow's name.
        request: what it is asked.
        tags: of the run, beside those of its entrance.

    Raises:
        ConfigurationError: the API has no such deployment, or did not answer.
    """
    dry = request.model_copy(update={"dry_run": True, "expect_plan": ""})
    tag = f"plan:{_digest(flow, dry, 0)}"
    with answering():
        found = await api.client.read_flow_runs(
            flow_run_filter=FlowRunFilter(tags=FlowRunFilterTags(all_=[tag])),
            sort=FlowRunSort.EXPECTED_START_TIME_DESC,
            limit=1,
        )
    if found and not (found[0].state and found[0].state.is_final()):
        return Submission(found[0], repeated=True)
    return await submit(api, flow, dry, attempt=int(time.time() * 1000), tags=[tag, *tags])


# ---- finding ------------------------------------------------------------------------------------


class Found(NamedTuple):
    """A flow run of ours, the name of its flow, and whether the client may know other names than its own."""

    run: FlowRun
    flow: str
    restricted: bool = False


async def find(api: Api, permits: Permits, flow_run_id: str) -> Found:
    """The flow run of that id.

    Raises:
        InputError: it is no id, or there is no such run, or it is of another flow, or not allowed here.
        ConfigurationError: the API did not answer.
    """
    try:
        wanted = UUID(flow_run_id)
    except ValueError:
        raise InputError(
            f"flow_run_id: {one_line(flow_run_id, 80)!r} is not the id of a flow run, such as {UUID(int=0)}",
            advice="Take it from the answer that submitted the release, or from list_releases.",
            field="flow_run_id",
        ) from None
    with answering():
        try:
            run = await api.client.read_flow_run(wanted)
        except ObjectNotFound:
            raise InputError(
                f"flow_run_id: this Prefect API has no flow run {wanted}",
                advice="list_releases names those it has.",
                field="flow_run_id",
            ) from None
        flow = (await api.client.read_flow(run.flow_id)).name
    if flow not in reaper.FLOWS or not reaper.ours(run):
        raise InputError(
            f"flow_run_id: {wanted} is a run of the flow {one_line(flow, 80)!r}, and none of a release",
            advice="list_releases names the runs of releases.",
            field="flow_run_id",
        )
    if not permits.allows(run.parameters):
        # Without what it is of: the client gave an id, and may not know more.
        raise InputError(
            f"flow_run_id: {wanted} is a run of what is not allowed here",
            advice="list_releases names the runs that are. Who runs this MCP server decides.",
            field="flow_run_id",
        )
    return Found(run, flow, permits.restrict)


async def _anew(api: Api, found: Found) -> Found:
    with answering():
        return found._replace(run=await api.client.read_flow_run(found.run.id))


async def wait(
    renewed: Callable[[], Awaitable[Api]],
    permits: Permits,
    flow_run_id: str,
    seconds: float,
    noted: Noted,
) -> answers.Release:
    """The release, once it has ended, waits for a person, or the seconds have passed.

    Args:
        renewed: gives the API, another one where the local service ended and was started again.
        permits: what is allowed.
        flow_run_id: of the release.
        seconds: to wait at the most.
        noted: is called with each look at it that differs from the one before.
    """
    until = time.monotonic() + seconds
    before = ""
    found: Found | None = None
    while True:
        api = await renewed()
        try:
            # Only its state changes: what it is, and whether it may be looked at, was found out once.
            found = await (find(api, permits, flow_run_id) if found is None else _anew(api, found))
            state = found.run.state
            last = state is None or state.is_final() or state.is_paused() or time.monotonic() >= until
            release = await look(api, found, live=last)
        except ConfigurationError:
            if not api.lost or time.monotonic() >= until:
                raise
            await asyncio.sleep(_LOOK_SECONDS)
            continue
        now = release.model_dump_json(exclude={"seconds"})
        if now != before and (before or seconds):
            await noted(release)
        before = now
        if last:
            return release
        await asyncio.sleep(min(_LOOK_SECONDS, max(0.0, until - time.monotonic())))


# ---- looking at one -----------------------------------------------------------------------------


async def look(api: Api, found: Found, *, live: bool = True) -> answers.Release:
    """All that is known of a flow run.

    Args:
        api: where.
        found: the run, as it is now.
        live: whether the platform is asked what is live, where the run has not ended.
    """
    run, flow, restricted = found
    state = run.state
    ended = state is not None and state.is_final()
    with answering():
        steps = [] if flow == "deploy-batch" else await _tasks(api, run)
        record = await ledger.record_of(api.client, run) if ended else None
    release = answers.Release(
        **_of_run(api, run, flow, reason=1000),
        next="",
        started=run.start_time,
        confirm_retry=retry_token(run) if ended and _refusal(run) is None else "",
    )
    if flow != "deploy-batch":
        action = "deploy" if flow == "deploy-latest-image" else flow
        seen = _seen(steps, run) | (answers.steps_done(record) if record else {})
        release.steps = answers.steps_of(action, seen)
    advice = ""
    if record is not None:
        try:
            release, advice = _with_record(release, record, run.end_time)
        except ValidationError:  # of another version of this package
            record = None
    if record is not None and not (record.get("error") or {}).get("retry_helps", True):
        release.confirm_retry = ""
    if record is None and ended and state is not None:
        release.outcome = _outcome_of(state)
    if flow == "deploy-batch" and record is None:
        release = await _with_children(api, release, run)
    if live and not release.clusters and not release.dry_run and flow != "deploy-batch" and run.start_time:
        # It runs, or ended before it knew: the platform says what is live.
        release = await _with_live(api, release, run)
    if record is None and state is not None and state.is_cancelled() and not release.verdict:
        release.verdict = await _unbegun(api, run)
    release.verdict = release.verdict or _verdict(release, run)
    if restricted:
        release.verdict, advice = unlisted(release.verdict), unlisted(advice)
        for row in release.releases:
            row.why = unlisted(row.why)
    release.next = _next(release, run, advice)
    if api.local and state is not None and state.is_paused():
        release.next += " The UI asks the user for a password; prefect-rollout's README says where it is."
    return release


async def _unbegun(api: Api, run: FlowRun) -> str:
    """The verdict on a run that Prefect cancelled by itself, because no process ran it."""
    if run.run_count == 0:
        return "Cancelled before it began: nothing was written."
    with answering():
        states = sorted(
            await api.client.read_flow_run_states(run.id), key=lambda state: state.timestamp, reverse=True
        )
    before = next((state for state in states if not state.is_cancelled()), None)
    if before is None or (run.state is not None and run.state.message):
        return ""
    if before.is_paused():
        return "Cancelled while it waited for a person's approval: nothing was written since it asked."
    if before.is_scheduled() or before.is_pending():
        return "Cancelled before it continued: nothing more was written. What an earlier try wrote stays."
    return ""


def _outcome_of(state: State[Any]) -> Outcome | None:
    """How a run ended that left no record; where somebody set its state by hand, nobody knows."""
    if state.is_completed() and state.data is None:
        return None
    return _OUTCOMES.get(str(state.name))


def _with_record(
    release: answers.Release, record: Mapping[str, Any], at: datetime | None
) -> tuple[answers.Release, str]:
    verdict, advice = answers.verdict_of(record)
    if release.flow != "deploy-batch":
        more = answers.result_fields(record, at)
        return release.model_copy(update={**more, "verdict": verdict}), advice
    rows, others = answers.rows_of(record.get("releases") or [])
    update: dict[str, Any] = {
        "outcome": answers.outcome_of(record),
        "releases": rows,
        "more_releases": others,
        "verdict": verdict,
    }
    if release.dry_run and record.get("plan_hash"):
        update["plan"] = answers.plan_of_batch(record)
    return release.model_copy(update=update), advice


async def _with_children(api: Api, release: answers.Release, run: FlowRun) -> answers.Release:
    """The releases of a batch that has left no record yet, as far as they have begun."""
    with answering():
        runs = await children_of(api.client, run.id, "dry-run" if release.dry_run else "release")
    newest = {name_of(child): child for child in runs}
    if not newest and release.ended:  # its state says why
        return release
    rows, others = answers.rows_of(
        {"name": name, "stage": _stage(child), "flow_run_id": str(child.id)} for name, child in newest.items()
    )
    plan = run.parameters.get("plan")
    total = len(plan.get("releases") or []) if isinstance(plan, dict) else len(newest)
    done = sum(bool(child.state and child.state.is_final()) for child in newest.values())
    what = "dry runs" if release.dry_run else "releases"
    verdict = f"{len(newest)} of {total} {what} have begun, {done} have ended"
    return release.model_copy(update={"releases": rows, "more_releases": others, "verdict": verdict})


def _stage(child: FlowRun) -> str:
    if child.state is None:
        return "unknown"
    outcome = _outcome_of(child.state) if child.state.is_final() else None
    return outcome.value if outcome else one_line(child.state.name, 40).lower()


async def _with_live(api: Api, release: answers.Release, run: FlowRun) -> answers.Release:
    parameters, block = run.parameters, str(run.labels.get(TARGET, ""))
    # The variables of the environment may be others here than where the run is.
    if "/" not in block:
        block = str(parameters.get("target") or "")
    try:
        async with asyncio.timeout(_LIVE_SECONDS):
            status = await live(
                api,
                block,
                parameters["app_id"],
                str(parameters["deployment"]),
                parameters.get("clusters"),
            )
    except (RolloutError, TimeoutError):
        return release  # what is live is not known; the run itself tells what is wrong
    if release.cloud and status.cloud != release.cloud:
        return release
    update = {"clusters": status.clusters, "cloud": status.cloud, "live_at": datetime.now(UTC)}
    return release.model_copy(update=update)


async def _tasks(api: Api, run: FlowRun) -> list[TaskRun]:
    return await api.client.read_task_runs(
        flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[run.id])), limit=PAGE
    )


_OUTCOMES = {
    "Completed": Outcome.RELEASED,
    "Planned": Outcome.PLANNED,
    "Cancelled": Outcome.CANCELLED,
    "Failed": Outcome.FAILED,
    "TimedOut": Outcome.FAILED,
    "Skipped": Outcome.SKIPPED,
    "Rejected": Outcome.CANCELLED,
}
"""By the state's name; of one that crashed, nobody knows."""

_STATES: dict[StateType, StepState] = {
    StateType.COMPLETED: "done",
    StateType.RUNNING: "running",
    StateType.PENDING: "running",
    StateType.SCHEDULED: "retrying",
    StateType.FAILED: "failed",
}
# By the name of its function, which begins Prefect's key of a task.
_STEP_OF = {
    each.task_key.rpartition("-")[0]: each.name for each in vars(tasks).values() if isinstance(each, Task)
}
_GRAVITY: tuple[StepState, ...] = ("done", "waiting", "stopped", "running", "retrying", "failed")


def _seen(steps: list[TaskRun], run: FlowRun) -> dict[str, tuple[StepState, float | None]]:
    """`{step: (state, seconds)}` of the newest try that has any; several of a step are one."""
    newest = max((task.flow_run_run_count for task in steps), default=0)
    over = run.state is not None and run.state.is_final()
    # Prefect records task runs behind the flow's back: their last states may not have arrived.
    at_end: StepState = "done" if run.state is not None and run.state.is_completed() else "stopped"
    seen: dict[str, tuple[StepState, float | None]] = {}
    for task in sorted(steps, key=lambda task: (task.start_time is None, str(task.start_time))):
        name = _STEP_OF.get(task.task_key.rpartition("-")[0])
        if task.flow_run_run_count != newest or name is None:
            continue
        state: StepState = _STATES.get(task.state_type or StateType.PENDING, "stopped")
        if over and state in {"running", "retrying"}:
            state = at_end
        seconds = task.total_run_time.total_seconds() if task.total_run_time else None
        if name in seen:
            before, took = seen[name]
            state = max(before, state, key=_GRAVITY.index)
            seconds = (took or 0) + (seconds or 0)
        seen[name] = state, None if seconds is None else round(seconds, 1)
    return seen


_DONE = {
    "deploy-latest-image": "Released: its clusters run the new template and no other, as many as wanted.",
    "deploy-batch": "Every release of the plan is released.",
    "rollback": "Rolled back: its clusters run the template of before, with the replicas wanted.",
    "restart": "Restarted: the clusters run new pods of the same template, and no old ones.",
    "scale": "Scaled: the clusters run as many pods as asked for.",
}


def _verdict(release: answers.Release, run: FlowRun) -> str:
    """What is known of a run without a record, by its state."""
    state = run.state
    if state is None:
        return ""
    if release.outcome is Outcome.RELEASED:
        return _DONE[release.flow]
    message = one_line(state.message or "", 2000)
    if state.is_final() and message:
        return quoted(message)
    running = [step.step for step in release.steps if step.state in {"running", "retrying"}]
    return f"Under way: {running[-1]}." if running else ""


def _next(release: answers.Release, run: FlowRun, advice: str) -> str:
    state = run.state
    if state is None or not release.ended:
        return _next_of_unended(release, run)
    if release.outcome is Outcome.PLANNED or (release.dry_run and state.is_completed()):
        tool = release.flow.replace("-", "_")
        return (
            f"Show the plan to the user; to do exactly this, call {tool} with the same arguments and "
            "confirm=<plan_hash>."
        )
    if state.is_completed():
        by_hand = "Somebody set it to Completed by hand: ask get_deployment_status what is live."
        return "Nothing: it is done." if release.outcome is Outcome.RELEASED else by_hand
    if release.dry_run:
        return f"{advice} Then plan again.".lstrip()
    if state.name == "Skipped":
        return "It did nothing. Start a new release if one is still wanted."
    if release.outcome is Outcome.RELEASED:
        go_on = "It was done before the cancel arrived."
    elif release.confirm_retry:
        token = release.confirm_retry
        go_on = f"Once that is fixed, retry_release with confirm={token} continues where it stopped."
    else:
        go_on = "A retry does not help: start a new release once that is fixed."
    return " ".join(part for part in (advice, go_on) if part)


def _next_of_unended(release: answers.Release, run: FlowRun) -> str:
    state = run.state
    again = f"Call get_release with flow_run_id={run.id} and wait_seconds=30 until it has ended."
    if state is None:
        return again
    if state.is_paused():
        return (
            "It waits for a person's approval in the Prefect UI: give the user the link. No tool can approve."
        )
    late = datetime.now(UTC) - (run.expected_start_time or datetime.now(UTC)) > timedelta(seconds=30)
    if state.is_scheduled() and late:
        return f"Nothing has taken it up for 30 s: does a worker or runner serve its deployment? {again}"
    return again


def _of_run(api: Api, run: FlowRun, flow: str, *, reason: int) -> dict[str, Any]:
    """What every answer tells of a run; of its reason so many characters."""
    parameters, state = run.parameters, run.state
    return {
        "flow_run_id": str(run.id),
        "name": quoted(run.name, 300),
        "flow": flow,
        "cloud": _cloud(run),
        "app_id": quoted(parameters.get("app_id", ""), 253),
        "deployment": quoted(parameters.get("deployment", ""), 253),
        "dry_run": bool(parameters.get("dry_run")),
        "state": one_line(state.name if state else "unknown", 40),
        "ended": state is not None and state.is_final(),
        "reason": quoted(parameters.get("reason") or "", reason),
        "requested_by": quoted(parameters.get("requested_by") or "", 200),
        "seconds": _seconds(run),
        "ui_link": api.link(run.id),
    }


def _cloud(run: FlowRun) -> str:
    cloud, target = str(run.labels.get(CLOUD, "")), str(run.labels.get(TARGET, ""))
    return quoted(cloud_words(cloud, target)) if cloud else ""


def _seconds(run: FlowRun) -> float | None:
    if run.start_time is None:
        return None
    end = run.end_time or datetime.now(UTC)
    return round((end - run.start_time).total_seconds(), 1)


# ---- lists and logs -----------------------------------------------------------------------------


async def listed(
    api: Api,
    permits: Permits,
    *,
    app_id: str,
    deployment: str,
    running: bool | None,
    limit: int,
    cursor: str,
) -> answers.Releases:
    """Flow runs of releases, the newest first, as far as they are allowed here.

    Raises:
        InputError: the cursor is none.
        ConfigurationError: the API did not answer.
    """
    offset = _offset(cursor)
    named = FlowFilter(name=FlowFilterName(any_=list(reaper.FLOWS)))
    rows: list[answers.Row] = []
    # Where nothing is left out, nearly all of the newest are wanted.
    size = PAGE if app_id or deployment or running is not None or permits.restrict else limit
    with answering():
        flows = {flow.id: flow.name for flow in await api.client.read_flows(flow_filter=named)}
        for _ in range(_PAGES_AT_ONCE):
            page = await api.client.read_flow_runs(
                flow_filter=named, sort=FlowRunSort.EXPECTED_START_TIME_DESC, limit=size, offset=offset
            )
            for run in page:
                offset += 1
                if (
                    reaper.ours(run)
                    and permits.allows(run.parameters)
                    and (not app_id or same_id(run.parameters.get("app_id", ""), app_id))
                    and (not deployment or run.parameters.get("deployment") == deployment)
                    and (running is None or running is not (run.state is None or run.state.is_final()))
                ):
                    more = _of_run(api, run, flows.get(run.flow_id, ""), reason=300)
                    rows.append(answers.Row(**more, created=run.created))
                if len(rows) == limit:
                    return answers.Releases(releases=rows, next_cursor=str(offset))
            if len(page) < size:
                return answers.Releases(releases=rows)
            size = PAGE
    return answers.Releases(releases=rows, next_cursor=str(offset))


def _offset(cursor: str) -> int:
    if cursor and not (cursor.isascii() and cursor.isdigit() and len(cursor) < 10):
        raise InputError(
            f"cursor: {one_line(cursor, 40)!r} is none",
            advice="Leave it out for the first page, or pass next_cursor of the answer before.",
            field="cursor",
        )
    return int(cursor or 0)


async def logs(api: Api, found: Found, *, limit: int, cursor: str, warnings: bool) -> answers.Logs:
    """A page of the run's log, oldest first.

    Raises:
        InputError: the cursor is none.
        ConfigurationError: the API did not answer.
    """
    offset = _offset(cursor)
    with answering():
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
        answers.Line(
            at=log.timestamp,
            level=_level(log.level),
            message=quoted(unlisted(log.message) if found.restricted else log.message, 1000),
        )
        for log in read
    ]
    return answers.Logs(lines=lines, next_cursor=str(offset + len(read)) if len(read) == limit else "")


def _level(level: int) -> str:
    return "error" if level >= 40 else "warning" if level >= 30 else "info"


# ---- cancelling and retrying --------------------------------------------------------------------


async def cancel(api: Api, found: Found) -> None:
    """Asks a run to stop; one that has ended is left as it is.

    Raises:
        ConfigurationError: the API did not answer.
    """
    state = found.run.state
    if state is not None and (state.is_final() or state.type is StateType.CANCELLING):
        return
    with answering():
        await api.client.set_flow_run_state(found.run.id, Cancelling())


def _refusal(run: FlowRun) -> InputError | None:
    """Why the run cannot be gone on with, if it cannot."""
    state = run.state
    problem, advice = "", "Start a new release if there is something to release; nothing was written."
    if state is None or not state.is_final():
        problem = f"it has not ended: it is {one_line(state and state.name, 40)}"
        advice = "Wait for its end with get_release, or end it with cancel_release."
    elif state.is_completed():
        problem = "it ended well already"
    elif run.labels.get(ROLLED_BACK):
        problem = "it was rolled back, and is over"
    elif run.parent_task_run_id is not None:
        problem = "it is a release of a batch"
        advice = "Retry the batch: it goes on with what was not released."
    elif run.deployment_id is None:
        problem = "it was started by a process of its own, not as a run of a Prefect deployment"
        advice = f"Go on with it where it ran: `prefect-rollout retry {run.id}`."
    if not problem:
        return None
    return InputError(
        f"flow_run_id: {run.id} cannot be retried: {problem}", advice=advice, field="flow_run_id"
    )


def retry_token(run: FlowRun) -> str:
    """What shows that the caller has seen how the run ended."""
    state = run.state
    canonical = f"{run.id} {state and state.id} {run.run_count}"
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def check_retry(found: Found) -> None:
    """Returns where the run can be gone on with.

    Raises:
        InputError: it cannot.
    """
    if refusal := _refusal(found.run):
        raise refusal


async def retry(api: Api, found: Found, token: str) -> None:
    """Has the run taken up again where it stopped; `token` is of the end that its user was shown.

    Raises:
        InputError: it cannot be, or somebody was quicker.
        ConfigurationError: the API did not answer.
    """
    check_retry(found)
    run = found.run
    if retry_token(run) != token:
        raise InputError(
            f"flow_run_id: {run.id} has run again since",
            advice="Look at it with get_release.",
            field="flow_run_id",
        )
    # Only Cancelled needs force; without it, Prefect admits one of two that retry at once.
    force = run.state is not None and run.state.type is StateType.CANCELLED
    with answering():
        state: State[Any] = AwaitingRetry()
        answer = await api.client.set_flow_run_state(run.id, state, force=force)
    if answer.status is not SetStateStatus.ACCEPT:
        raise InputError(
            f"flow_run_id: Prefect did not let {run.id} be retried: somebody else did, or its state changed",
            advice="Look at it with get_release.",
            field="flow_run_id",
        )
    api.poke()


# ---- what is live -------------------------------------------------------------------------------


@asynccontextmanager
async def _platform(api: Api, target: str) -> AsyncIterator[tuple[Platform, str]]:
    """The platform of a target, and what it is called."""
    with api.in_force():
        async with open_target(target) as platform:
            yield platform, quoted((await opened_as(target)).words)


async def live(
    api: Api, target: str, app_id: int | str, name: str, clusters: list[str] | None
) -> answers.DeploymentStatus:
    """What is live of a deployment, asked of the platform now.

    Raises:
        RolloutError: the platform, or its block, cannot be asked.
    """
    async with _platform(api, target) as (platform, cloud):
        app, deployment = await asyncio.gather(platform.app(app_id), platform.deployment(app_id, name))
        replicas = scope_of(deployment, clusters).replicas
        names = list(replicas)
        online, status = await asyncio.gather(platform.online(deployment), platform.status(deployment, names))
    templates = {each.cluster: each.template_id for each in online}
    found = []
    for cluster in names:
        now = status.get(cluster)
        pods, more = answers.pods_of((now and now.pods) or [])
        unseen = "its pods are not reported now" if now is None or now.pods is None else ""
        wanted = replicas_now(now.desired if now else None, replicas[cluster])
        found.append(
            answers.Cluster(
                cluster=quoted(cluster),
                online_template=answers.id_of(templates.get(cluster)),
                online_known=True,
                replicas=wanted.number,
                note="; ".join(filter(None, (wanted.note, unseen))),
                running=None if now is None or now.pods is None else running_pods(now.pods),
                pods=pods,
                more_pods=more,
            )
        )
    return answers.DeploymentStatus(
        cloud=cloud,
        app_id=quoted(app.id),
        app=quoted(app.name),
        deployment=quoted(deployment.name),
        clusters=found,
    )


def _images(template: Template) -> dict[str, str]:
    try:
        images = template.version.images
    except TemplateError:  # it is listed all the same
        return {}
    return {quoted(name, 253): quoted(image) for name, image in images.items()}


async def templates(
    api: Api, permits: Permits, target: str, app_id: int | str, name: str, limit: int
) -> answers.Templates:
    """The newest templates of a deployment.

    Raises:
        RolloutError: the platform, or its block, cannot be asked.
    """
    async with _platform(api, target) as (platform, cloud):
        deployment = await platform.deployment(app_id, name)
        online = await platform.online(deployment)
        found = [each async for each in platform.templates(deployment)]
        found.sort(key=lambda each: newest_first(each.id), reverse=True)
        known = await known_here(
            platform,
            deployment,
            [Revision(each.id, maker_of(each)) for each in found[:limit]],
            {each.cluster: each.template_id for each in online},
            client=api.client,
        )
    return answers.Templates(
        cloud=cloud,
        deployment=quoted(deployment.name),
        templates=[
            answers.TemplateView(
                template_id=answers.id_of(each.id) or "",
                images=_images(each),
                description=quoted(each.description or "", 500),
                created=quoted(each.create_time or "", 60),
                by=quoted(each.user or "", 120),
                not_released=quoted(why_not(known[str(each.id)], None), 300),
                online_in=[
                    quoted(now.cluster)
                    for now in online
                    if same_id(now.template_id, each.id) and permits.allows_cluster(now.cluster)
                ],
            )
            for each in found[:limit]
        ],
        more=max(0, len(found) - limit),
    )
