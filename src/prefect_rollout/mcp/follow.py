"""Follow a release: the steps, the verdict, the live state, and the next thing to do."""

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from prefect import Task
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import FlowRun, State, StateType, TaskRun
from pydantic import ValidationError

from prefect_rollout import tasks
from prefect_rollout.errors import ConfigurationError, InputError, RolloutError
from prefect_rollout.mcp import deployments, types
from prefect_rollout.mcp.connection import Api
from prefect_rollout.mcp.flow_runs import Found, fields_of, find, refreshed
from prefect_rollout.mcp.policy import Policy
from prefect_rollout.mcp.types import StepState
from prefect_rollout.mcp.untrusted import quoted, unlisted
from prefect_rollout.release.result import Outcome
from prefect_rollout.runs import history
from prefect_rollout.runs.children import children_of, name_of
from prefect_rollout.runs.flow_runs import PAGE
from prefect_rollout.runs.labels import ROLLED_BACK, TARGET
from prefect_rollout.runs.prefect_errors import translate_errors
from prefect_rollout.text import one_line

_POLL_SECONDS = 0.5
_LIVE_SECONDS = 10.0
_LATE = timedelta(seconds=30)

Notify = Callable[[types.Release], Awaitable[None]]


async def wait(
    renewed: Callable[[], Awaitable[Api]], policy: Policy, flow_run_id: str, seconds: float, notify: Notify
) -> types.Release:
    """Return the release once it has ended, waits for a person, or the seconds have passed.

    Args:
        renewed: returns the API, reconnected if the local server was restarted.
        policy: limits of the client.
        flow_run_id: ID of the release.
        seconds: longest time to wait.
        notify: called whenever the release has changed.
    """
    until = time.monotonic() + seconds
    before = ""
    found: Found | None = None
    while True:
        api = await renewed()
        try:
            # Only the state changes; the flow and the policy are checked once.
            found = await (find(api, policy, flow_run_id) if found is None else refreshed(api, found))
            state = found.run.state
            last = state is None or state.is_final() or state.is_paused() or time.monotonic() >= until
            release = await look(api, found, live=last)
        except ConfigurationError:
            if not api.lost or time.monotonic() >= until:
                raise
            await asyncio.sleep(_POLL_SECONDS)
            continue
        now = release.model_dump_json(exclude={"seconds"})
        if now != before and (before or seconds):
            await notify(release)
        before = now
        if last:
            return release
        await asyncio.sleep(min(_POLL_SECONDS, max(0.0, until - time.monotonic())))


async def look(api: Api, found: Found, *, live: bool = True) -> types.Release:
    """Return everything known about a flow run.

    Args:
        api: the Prefect API.
        found: the run in its current state.
        live: ask the platform for the live state if the run does not have it.
    """
    run, flow, restricted = found
    state = run.state
    ended = state is not None and state.is_final()
    batch = flow == "deploy-batch"
    with translate_errors():
        steps = [] if batch else await _task_runs(api, run)
        record = await history.record_of(api.client, run) if ended else None
    release = types.Release(
        **fields_of(api, run, flow, reason=1000),
        next="",
        started=run.start_time,
        confirm_retry=retry_token(run) if ended and _refusal(run) is None else "",
    )
    if not batch:
        action = "deploy" if flow == "deploy-latest-image" else flow
        seen = _steps_seen(steps, run) | (types.steps_done(record) if record else {})
        release.steps = types.steps_of(action, seen)
    advice = ""
    if record is not None:
        try:
            release, advice = _with_record(release, record, run.end_time)
        except ValidationError:  # a record of another version of this package
            record = None
    if record is not None and not (record.get("error") or {}).get("retry_helps", True):
        release.confirm_retry = ""
    if record is None and ended and state is not None:
        release.outcome = _outcome_of(state)
    if batch and record is None:
        release = await _with_children(api, release, run)
    if live and not release.clusters and not release.dry_run and not batch and run.start_time:
        # The run has not ended, or ended without this: ask the platform.
        release = await _with_live(api, release, run)
    if record is None and state is not None and state.is_cancelled() and not release.verdict:
        release.verdict = await _cancelled_early(api, run)
    release.verdict = release.verdict or _verdict(release, run)
    if restricted:
        release.verdict, advice = unlisted(release.verdict), unlisted(advice)
        for row in release.releases:
            row.why = unlisted(row.why)
    release.next = _next(release, run, advice)
    if api.local and state is not None and state.is_paused():
        release.next += " The UI asks for a password; prefect-rollout's README says where to find it."
    return release


async def _cancelled_early(api: Api, run: FlowRun) -> str:
    """Return the verdict on a run that Prefect cancelled itself, because no process executed it."""
    if run.run_count == 0:
        return "Cancelled before it started: nothing was written."
    with translate_errors():
        states = sorted(
            await api.client.read_flow_run_states(run.id), key=lambda state: state.timestamp, reverse=True
        )
    before = next((state for state in states if not state.is_cancelled()), None)
    if before is None or (run.state is not None and run.state.message):
        return ""
    if before.is_paused():
        return "Cancelled while it waited for approval: nothing was written since it asked."
    if before.is_scheduled() or before.is_pending():
        return "Cancelled before it continued: nothing more was written. Earlier writes remain."
    return ""


def _outcome_of(state: State[Any]) -> Outcome | None:
    """Return the outcome of a run without a record; None if a person set its state by hand."""
    if state.is_completed() and state.data is None:
        return None
    return _OUTCOMES.get(str(state.name))


def _with_record(
    release: types.Release, record: Mapping[str, Any], at: datetime | None
) -> tuple[types.Release, str]:
    verdict, advice = types.verdict_of(record)
    if release.flow != "deploy-batch":
        fields = types.result_fields(record, at)
        return release.model_copy(update={**fields, "verdict": verdict}), advice
    rows, more = types.rows_of(record.get("releases") or [])
    update: dict[str, Any] = {
        "outcome": types.outcome_of(record),
        "releases": rows,
        "more_releases": more,
        "verdict": verdict,
    }
    if release.dry_run and record.get("plan_hash"):
        update["plan"] = types.plan_of_batch(record)
    return release.model_copy(update=update), advice


async def _with_children(api: Api, release: types.Release, run: FlowRun) -> types.Release:
    """Add the releases of a batch without a record that have started."""
    with translate_errors():
        runs = await children_of(api.client, run.id, "dry-run" if release.dry_run else "release")
    newest = {name_of(child): child for child in runs}
    if not newest and release.ended:  # its state has the reason
        return release
    rows, more = types.rows_of(
        {"name": name, "stage": _stage(child), "flow_run_id": str(child.id)} for name, child in newest.items()
    )
    plan = run.parameters.get("plan")
    total = len(plan.get("releases") or []) if isinstance(plan, dict) else len(newest)
    done = sum(bool(child.state and child.state.is_final()) for child in newest.values())
    kind = "dry runs" if release.dry_run else "releases"
    verdict = f"{len(newest)} of {total} {kind} have started, {done} have ended"
    return release.model_copy(update={"releases": rows, "more_releases": more, "verdict": verdict})


def _stage(child: FlowRun) -> str:
    if child.state is None:
        return "unknown"
    outcome = _outcome_of(child.state) if child.state.is_final() else None
    return outcome.value if outcome else one_line(child.state.name, 40).lower()


async def _with_live(api: Api, release: types.Release, run: FlowRun) -> types.Release:
    parameters, block = run.parameters, str(run.labels.get(TARGET, ""))
    # The environment variables of this process may differ from those of the run.
    if "/" not in block:
        block = str(parameters.get("target") or "")
    try:
        async with asyncio.timeout(_LIVE_SECONDS):
            status = await deployments.live(
                api,
                block,
                parameters["app_id"],
                str(parameters["deployment"]),
                parameters.get("clusters"),
            )
    except (RolloutError, TimeoutError):
        return release  # the live state is unknown; the run itself reports the problem
    if release.cloud and status.cloud != release.cloud:
        return release
    update = {"clusters": status.clusters, "cloud": status.cloud, "live_at": datetime.now(UTC)}
    return release.model_copy(update=update)


async def _task_runs(api: Api, run: FlowRun) -> list[TaskRun]:
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
"""Outcomes by the name of the state. The outcome of a crashed run is unknown."""

_STATES: dict[StateType, StepState] = {
    StateType.COMPLETED: "done",
    StateType.RUNNING: "running",
    StateType.PENDING: "running",
    StateType.SCHEDULED: "retrying",
    StateType.FAILED: "failed",
}
# Keys: names of the task functions, with which Prefect's task keys begin.
_STEP_OF = {
    each.task_key.rpartition("-")[0]: each.name
    for each in vars(tasks).values()
    if isinstance(each, Task) and each.name in types.STEP_NAMES
}
_GRAVITY: tuple[StepState, ...] = ("done", "waiting", "stopped", "running", "retrying", "failed")


def _steps_seen(task_runs: list[TaskRun], run: FlowRun) -> dict[str, tuple[StepState, float | None]]:
    """Return `{step: (state, seconds)}` of the newest attempt; task runs of the same step are combined."""
    newest = max((task.flow_run_run_count for task in task_runs), default=0)
    ended = run.state is not None and run.state.is_final()
    # Prefect records task runs asynchronously: the last states may not have arrived.
    at_end: StepState = "done" if run.state is not None and run.state.is_completed() else "stopped"
    seen: dict[str, tuple[StepState, float | None]] = {}
    for task in sorted(task_runs, key=lambda task: (task.start_time is None, str(task.start_time))):
        name = _STEP_OF.get(task.task_key.rpartition("-")[0])
        if task.flow_run_run_count != newest or name is None:
            continue
        state: StepState = _STATES.get(task.state_type or StateType.PENDING, "stopped")
        if ended and state in {"running", "retrying"}:
            state = at_end
        seconds = task.total_run_time.total_seconds() if task.total_run_time else None
        if name in seen:
            before, took = seen[name]
            state = max(before, state, key=_GRAVITY.index)
            seconds = (took or 0) + (seconds or 0)
        seen[name] = state, None if seconds is None else round(seconds, 1)
    return seen


# ---- words --------------------------------------------------------------------------------------

_DONE = {
    "deploy-latest-image": "Released: the clusters run only the new template, with the desired replicas.",
    "deploy-batch": "All releases of the plan are released.",
    "rollback": "Rolled back: the clusters run the previous template with the desired replicas.",
    "restart": "Restarted: the clusters run only new pods of the same template.",
    "scale": "Scaled: the clusters run the desired number of pods.",
}


def _verdict(release: types.Release, run: FlowRun) -> str:
    """Return the verdict on a run without a record, from its state."""
    state = run.state
    if state is None:
        return ""
    if release.outcome is Outcome.RELEASED:
        return _DONE[release.flow]
    message = one_line(state.message or "", 2000)
    if state.is_final() and message:
        return quoted(message)
    running = [step.step for step in release.steps if step.state in {"running", "retrying"}]
    return f"Running: {running[-1]}." if running else ""


def _next(release: types.Release, run: FlowRun, advice: str) -> str:
    state = run.state
    if state is None or not release.ended:
        return _next_while_running(run)
    if release.outcome is Outcome.PLANNED or (release.dry_run and state.is_completed()):
        tool = release.flow.replace("-", "_")
        return (
            f"Show the plan to the user. To do exactly this, call {tool} with the same arguments and "
            "confirm=<plan_hash>."
        )
    if state.is_completed():
        by_hand = "A person set the state to Completed by hand: check the cloud with get_deployment_status."
        return "Nothing: it is done." if release.outcome is Outcome.RELEASED else by_hand
    if release.dry_run:
        return f"{advice} Then plan again.".lstrip()
    if state.name == "Skipped":
        return "It wrote nothing. Start a new release if it is still needed."
    if release.outcome is Outcome.RELEASED:
        more = "The release finished before the cancellation arrived."
    elif release.confirm_retry:
        more = (
            f"Once that is fixed, call retry_release with confirm={release.confirm_retry} to continue where "
            "it stopped."
        )
    else:
        more = "A retry does not help: start a new release once that is fixed."
    return f"{advice} {more}".lstrip()


def _next_while_running(run: FlowRun) -> str:
    state = run.state
    again = f"Call get_release with flow_run_id={run.id} and wait_seconds=30 until `ended` is true."
    if state is None:
        return again
    if state.is_paused():
        return (
            "It waits for a person's approval in the Prefect UI: give the user the link. No tool can approve."
        )
    late = datetime.now(UTC) - (run.expected_start_time or datetime.now(UTC)) > _LATE
    if state.is_scheduled() and late:
        return f"Nothing has started it for 30 s: does a worker or runner serve its deployment? {again}"
    return again


# ---- retries ------------------------------------------------------------------------------------


def _refusal(run: FlowRun) -> InputError | None:
    """Return the error that says why the run cannot be retried, if it cannot."""
    state = run.state
    problem, advice = "", "Nothing was written. Start a new release if there is something to release."
    if state is None or not state.is_final():
        problem = f"it has not ended: it is {one_line(state and state.name, 40)}"
        advice = "Wait until it ends with get_release, or stop it with cancel_release."
    elif state.is_completed():
        problem = "it has succeeded"
    elif run.labels.get(ROLLED_BACK):
        problem = "it was rolled back, which ends it"
    elif run.parent_task_run_id is not None:
        problem = "it is a release of a batch"
        advice = "Retry the batch: it continues with the releases that did not succeed."
    elif run.deployment_id is None:
        problem = "it was started in a process of its own, not as a run of a Prefect deployment"
        advice = f"Retry it where it ran: `prefect-rollout retry {run.id}`."
    if not problem:
        return None
    return InputError(
        f"flow_run_id: {run.id} cannot be retried: {problem}", advice=advice, field="flow_run_id"
    )


def retry_token(run: FlowRun) -> str:
    """Return the token that proves that the caller has seen how the run ended."""
    state = run.state
    canonical = f"{run.id} {state and state.id} {run.run_count}"
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def check_retry(run: FlowRun) -> None:
    """Return if the run can be retried.

    Raises:
        InputError: it cannot.
    """
    if refusal := _refusal(run):
        raise refusal
