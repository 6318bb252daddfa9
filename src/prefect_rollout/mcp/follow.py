"""Follow a release: the steps, the verdict, the live state, and the next thing to do."""

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

from prefect import Task
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import FlowRun, StateType, TaskRun
from pydantic import ValidationError

from prefect_rollout import tasks
from prefect_rollout.errors import ConfigurationError, InputError, RolloutError
from prefect_rollout.mcp import deployments, types
from prefect_rollout.mcp.connection import Api
from prefect_rollout.mcp.flow_runs import Found, fields_of, find, refreshed
from prefect_rollout.mcp.policy import Policy
from prefect_rollout.mcp.types import Seen, StepState
from prefect_rollout.mcp.untrusted import quoted, unlisted
from prefect_rollout.release.result import Outcome
from prefect_rollout.runs import history
from prefect_rollout.runs.children import children_of, name_of
from prefect_rollout.runs.flow_runs import PAGE, ROLLED_BACK, TARGET, outcome_of
from prefect_rollout.runs.prefect_errors import translate_errors
from prefect_rollout.text import one_line

_POLL_SECONDS = 0.5
_LIVE_SECONDS = 5.0
_LEAST_SECONDS = 0.5
_ANSWER_SECONDS = 3.0
"""Part of the time of a call that is kept for its answer, which reads the live state."""
_LATE = timedelta(seconds=30)

Notify = Callable[[types.Release], Awaitable[None]]


async def wait(
    renewed: Callable[[], Awaitable[Api]], policy: Policy, flow_run_id: str, seconds: float, notify: Notify
) -> types.Release:
    """Return the release once it has ended or waits for a person, at the latest when the seconds have passed.

    `renewed` reconnects to a local server that was restarted; `notify` gets each change of the release.
    """
    until = time.monotonic() + seconds
    found: Found | None = None
    newest: types.Release | None = None
    while True:
        try:
            # The first look is always complete: there is nothing else to answer.
            async with asyncio.timeout(None if newest is None else until - time.monotonic()):
                api = await renewed()
                # Only the state changes; the flow and the policy are checked once.
                found = await (find(api, policy, flow_run_id) if found is None else refreshed(api, found))
                state = found.run.state
                left = until - time.monotonic()
                last = left <= min(_ANSWER_SECONDS, seconds / 3)
                last = last or state is None or state.is_final() or state.is_paused()
                live = (
                    max(_LEAST_SECONDS, min(_LIVE_SECONDS, left - _LEAST_SECONDS))
                    if seconds
                    else _LIVE_SECONDS
                )
                release = await look(api, found, live=live if last else 0)
        except TimeoutError:
            if newest is None:
                raise
            return newest
        except ConfigurationError:
            if not api.lost or time.monotonic() >= until:
                raise
            await asyncio.sleep(_POLL_SECONDS)
            continue
        shown = release.model_dump(exclude={"seconds"})
        if (newest or seconds) and (newest is None or shown != newest.model_dump(exclude={"seconds"})):
            await notify(release)
        newest = release
        if last:
            return release
        await asyncio.sleep(min(_POLL_SECONDS, max(0.0, until - time.monotonic())))


async def look(api: Api, found: Found, *, live: float = _LIVE_SECONDS) -> types.Release:
    """Return everything known about a flow run in its current state.

    If the run does not have the live state, the platform has `live` seconds to answer.
    """
    run, flow, restricted = found
    state, batch = run.state, flow == "deploy-batch"
    ended = state is not None and state.is_final()
    with translate_errors():
        task_runs = [] if batch else await _task_runs(api, run)
        record = await history.record_of(api.client, run) if ended else None
    fields, advice = fields_of(api, run, flow, reason=1000), ""
    if record is not None:
        try:
            fields |= types.result_fields(record, run.end_time)
        except ValidationError:  # a record of another version of this package
            record = None
    if record is not None:
        fields["verdict"], advice = types.verdict_of(record)
    elif batch:
        fields |= await _children(api, run, ended=ended)
    release = types.Release(**fields, next="")
    error = (record or {}).get("error") or {}
    if ended and _refusal(run) is None and error.get("retry_helps", True):
        release.confirm_retry = retry_token(run)
    if not batch:
        action = "deploy" if flow == "deploy-latest-image" else flow
        done = types.steps_done(record) if record else {}
        release.steps = types.steps_of(action, _steps_seen(task_runs, run) | done)
    if live and run.start_time and not (release.clusters or release.dry_run or batch):
        # The run has not ended, or ended without this: ask the platform.
        release = await _with_live(api, release, run, live)
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


async def _children(api: Api, run: FlowRun, *, ended: bool) -> dict[str, Any]:
    """Return the fields with the releases of a batch without a record that have started."""
    dry_run = bool(run.parameters.get("dry_run"))
    with translate_errors():
        runs = await children_of(api.client, run.id, "dry-run" if dry_run else "release")
    newest = {name_of(child): child for child in runs}
    if not newest and ended:  # its state has the reason
        return {}
    rows = types.rows_of(
        {"name": name, "stage": _stage(child), "flow_run_id": str(child.id)} for name, child in newest.items()
    )
    plan = run.parameters.get("plan")
    total = len(plan.get("releases") or []) if isinstance(plan, dict) else len(newest)
    done = sum(bool(child.state and child.state.is_final()) for child in newest.values())
    kind = "dry runs" if dry_run else "releases"
    return {**rows, "verdict": f"{len(newest)} of {total} {kind} have started, {done} have ended"}


def _stage(child: FlowRun) -> str:
    if child.state is None:
        return "unknown"
    outcome = outcome_of(child.state)
    return outcome.value if outcome else one_line(child.state.name, 40).lower()


async def _with_live(api: Api, release: types.Release, run: FlowRun, seconds: float) -> types.Release:
    parameters, block = run.parameters, str(run.labels.get(TARGET, ""))
    # The environment variables of this process may differ from those of the run.
    if "/" not in block:
        block = str(parameters.get("target") or "")
    try:
        async with asyncio.timeout(seconds):
            app_id, name = parameters["app_id"], str(parameters["deployment"])
            status = await deployments.live(api, block, app_id, name, parameters.get("clusters"))
    except (RolloutError, TimeoutError):
        return release  # the live state is unknown; the run itself reports the problem
    if release.cloud and status.cloud != release.cloud:
        return release
    now = datetime.now(UTC).replace(microsecond=0)
    update = {"clusters": status.clusters, "cloud": status.cloud, "live_at": now}
    return release.model_copy(update=update)


async def _task_runs(api: Api, run: FlowRun) -> list[TaskRun]:
    return await api.client.read_task_runs(
        flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[run.id])), limit=PAGE
    )


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


def _steps_seen(task_runs: list[TaskRun], run: FlowRun) -> dict[str, Seen]:
    """Return `{step: (state, seconds)}` of the newest attempt; task runs of the same step are combined."""
    newest = max((task.flow_run_run_count for task in task_runs), default=0)
    ended = run.state is not None and run.state.is_final()
    # Prefect records task runs asynchronously: the last states may not have arrived.
    at_end: StepState = "done" if run.state is not None and run.state.is_completed() else "stopped"
    seen: dict[str, Seen] = {}
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
    """Return if the run can be retried; raise `InputError` if it cannot."""
    if refusal := _refusal(run):
        raise refusal
