"""Approval of a run by a person in the Prefect UI, before anything is written.

The approver is the name in the form, because an open-source Prefect server has no users. Only Prefect's own
Resume answers the question.
"""

import math
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Annotated, Any, Literal

from prefect import get_client, get_run_logger
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import FlowRun
from prefect.exceptions import FlowPauseTimeout
from prefect.flow_runs import apause_flow_run, asuspend_flow_run
from prefect.input import RunInput
from prefect.input.run_input import keyset_from_base_key
from pydantic import AfterValidator, Field, ValidationError

from prefect_rollout.blocks import forget_blocks
from prefect_rollout.errors import InputError, NotApprovedError
from prefect_rollout.release.plan import ReleasePlan
from prefect_rollout.release.progress import Progress, tell
from prefect_rollout.release.report import app_words, render_plan
from prefect_rollout.release.request import ReleaseRequest
from prefect_rollout.release.result import ReleaseResult
from prefect_rollout.runs.flow_runs import this_run
from prefect_rollout.runs.guard import pausing
from prefect_rollout.runs.lifecycle import run_link
from prefect_rollout.runs.prefect_errors import translate_errors
from prefect_rollout.text import markdown, one_line

STEP = "approval"

# Attempts of a requester to approve their own request.
_TRIES = 5
_LOOK_SECONDS = 2
# Prefixes of the keys under which Prefect keeps a form and its answer.
_STATES = ("suspended", "paused")

_stays: ContextVar[bool] = ContextVar("stays", default=False)


class Decision(RunInput):
    """The approval form and its answer."""

    decision: Literal["approve", "reject"] = Field(description="Approve or reject.")
    name: Annotated[
        str,
        Field(description="Who decides: your name.", min_length=1, max_length=200, pattern=r"\S"),
        AfterValidator(one_line),
    ]
    comment: Annotated[str, Field(description="Reason, shown in the report.", max_length=1000)] = ""


def refuse_where_nobody_answers() -> None:
    """Check that a person can be asked. Call it before anything else.

    Raises:
        InputError: another flow run started this one, which therefore cannot wait for a person.
    """
    if this_run().parent_task_run_id is not None:
        raise InputError(
            "approval: a run that another flow run started cannot ask a person; allowed is none",
            advice="Ask in the run that starts it; nothing was written.",
            field="approval",
        )


async def approve(question: str, *, key: str, seconds: float, requested_by: str) -> Decision:
    """Wait until a person approves, and return the approval.

    The run of a Prefect deployment is suspended: its process ends, and the run starts again on Resume. Any
    other run is paused, and its process waits. An answered question is not asked again, even in a retry; a
    question that was resumed past its form is.

    Args:
        question: effect of the run, as markdown above the form.
        key: name of the question within the run: lower-case letters, digits and dashes.
        seconds: seconds that each question waits for its answer.
        requested_by: person who requested the run and so cannot approve it; empty if unknown.

    Raises:
        NotApprovedError: it was rejected, or not approved in time. If the run is suspended, Prefect itself
            fails it after that time.
        LockLostError: another process continues the run, or somebody ended it during the wait.
        ConfigurationError: the Prefect API did not answer.
    """
    with translate_errors():
        async with get_client() as client:
            run = await client.read_flow_run(this_run().id)
            decision = await _decision(client, run, question, key, seconds, requested_by)
            await client.update_flow_run_labels(run.id, {"rollout.approved-by": decision.name})
    forget_blocks()
    tell(Progress(STEP, "done", f"approved by {decision.name}"))
    return decision


async def _decision(
    client: PrefectClient, run: FlowRun, question: str, key: str, seconds: float, requested_by: str
) -> Decision:
    """Return the approval; read the earlier answers first, then ask."""
    kept = await _kept(client, run, key)
    creator = run.created_by.display_value if run.created_by else None
    asking = {_same(requested_by), _same(creator)} - {""}
    number, refused, refusal = 0, 0, ""
    while refused < _TRIES:
        number += 1
        keysets = [keyset_from_base_key(f"{state}-{key}-{number}") for state in _STATES]
        if answers := [kept[keyset["response"]] for keyset in keysets if keyset["response"] in kept]:
            answer = _read(answers[0])
        elif any(keyset["schema"] in kept for keyset in keysets):
            continue  # not answered in time, or resumed past the form
        else:
            head = ""
            if refusal:
                get_run_logger().warning("Approval %d of %d is refused: %s", refused, _TRIES, refusal)
                head = f"**Refused: {markdown(refusal)}.**\n\n"
            answer = await _ask(run, head + question, f"{key}-{number}", seconds)
        if answer is None:
            continue
        if answer.decision == "reject":
            comment = f": {one_line(answer.comment)}" if answer.comment.strip() else ""
            raise _not_approved(f"{answer.name} rejected it{comment}", rejected_by=answer.name)
        if _same(answer.name) not in asking:
            return answer
        refused += 1
        refusal = f"{one_line(answer.name, 80)} has asked for it and cannot approve it, somebody else has to"
    raise _not_approved(f"{refusal}; it was refused {refused} times", refused=refused)


async def _kept(client: PrefectClient, run: FlowRun, key: str) -> dict[str, Any]:
    """Return the forms and answers of the question that Prefect keeps, by key.

    Prefect's own record of pauses is not enough: a retry of the run clears it.
    """
    kept = {}
    for state in _STATES:
        inputs = await client.filter_flow_run_input(
            run.id, key_prefix=f"{state}-{key}-", limit=1000, exclude_keys=set()
        )
        kept.update({found.key: found.decoded_value for found in inputs})
    return kept


async def _ask(run: FlowRun, question: str, key: str, seconds: float) -> Decision | None:
    """Ask the question and return its answer; `None` if the run was resumed past the form."""
    leaves = run.deployment_id is not None and not _stays.get()
    form = Decision.with_initial_data(description=question)
    where = run_link(run.id) or f"flow run {run.id}"
    tell(
        Progress(STEP, "running", f"waiting for a person to resume it in the Prefect UI: {where}", aloud=True)
    )
    async with pausing(leaves=leaves):
        try:
            if leaves:
                return await asuspend_flow_run(wait_for_input=form, timeout=math.ceil(seconds), key=key)
            return await apause_flow_run(
                wait_for_input=form, timeout=math.ceil(seconds), poll_interval=_LOOK_SECONDS, key=key
            )
        except ValidationError:
            return None
        except FlowPauseTimeout as error:
            raise _not_approved(f"nobody approved it within {seconds:g} s") from error


def _read(answer: Any) -> Decision | None:
    try:
        return Decision.model_validate(answer)
    except ValidationError:
        return None


def _not_approved(problem: str, **data: Any) -> NotApprovedError:
    error = NotApprovedError(problem, **data)
    error.step = STEP
    return error


def _same(name: str | None) -> str:
    """Return a name for comparison: case, width and extra blanks make no difference."""
    return " ".join(unicodedata.normalize("NFKC", name or "").casefold().split())


def question(request: ReleaseRequest, result: ReleaseResult, plan: ReleasePlan) -> str:
    """Return the effect of a release as markdown; `result` has the app. Pure."""
    lines = [
        f"**Release {markdown(result.deployment)}** of app {app_words(result)}\n",
        f"- **Requested by:** {markdown(request.requested_by)}" if request.requested_by else "",
        f"- **Reason:** {markdown(request.reason, 1000)}" if request.reason else "",
    ]
    return "\n".join(line for line in lines if line) + f"\n\n{render_plan(plan)}\n"


@contextmanager
def staying() -> Iterator[None]:
    """Keep a run that this process continues here while it waits, even if a worker could continue it."""
    token = _stays.set(True)
    try:
        yield
    finally:
        _stays.reset(token)
