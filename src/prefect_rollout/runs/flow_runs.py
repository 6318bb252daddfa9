"""The flow runs of releases: the labels and tags that this package adds to them, and how to read them."""

from collections.abc import AsyncIterator, Sequence
from datetime import datetime
from typing import Any, NamedTuple
from uuid import UUID

from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.filters import (
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterId,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.context import FlowRunContext
from prefect.states import Cancelling

from prefect_rollout.ids import names_deployment, same_id
from prefect_rollout.release.images import ALLOW, UNLISTED
from prefect_rollout.release.request import Action, Checked, Request
from prefect_rollout.release.result import Outcome
from prefect_rollout.text import one_line

CLOUD, TARGET = "rollout.cloud", "rollout.target"
"""Labels: address of the run's cloud, and the block with its credentials."""

LEASE, LOCKS, LOCKED_AT = "rollout.lease", "rollout.locks", "rollout.locked-at"
"""Labels: the run's lease, the names of its locks, and when it acquired them."""

HOST, PROCESS = "rollout.host", "rollout.process"
"""Labels: machine with the results of the run's steps, and process that executes or last executed it."""

ROLLED_BACK = "rollout.rolled-back"
"""Label of a run that began to roll back: it cannot be continued."""

TRIGGER = "trigger:"
"""Prefix of the tag that says how a run was started."""

BATCH_TAG = "batch:"
"""Prefix of the tag of a batch's releases; the id of the batch's run follows."""

INHERITED = (ALLOW, UNLISTED)
"""Prefixes of the tags that a batch's run passes on to its releases."""

PAGE = 200
"""Longest list that Prefect's API returns."""

FLOW_NAMES = (
    "deploy-batch",
    "deploy-latest-image",
    *(action.value for action in Action if action is not Action.DEPLOY),
)
"""Names of the flows in `prefect_rollout.flows`, which nothing below it can import."""

OF_RELEASES = FlowFilter(name=FlowFilterName(any_=list(FLOW_NAMES)))
"""Filter of the flows of that name."""


def deployment_tags(app_id: object, deployment: str) -> list[str]:
    """Return the tags that find the runs of a deployment. Names may be cut: check the record as well."""
    return [f"app:{one_line(app_id, 80)}", f"deployment:{one_line(deployment, 80)}"]


def first_tags(trigger: str, request: Checked) -> list[str]:
    """Return the tags of a new run: its trigger and, unless it is a batch, its app and deployment."""
    tags = [f"{TRIGGER}{trigger}"]
    if isinstance(request, Request):
        tags += deployment_tags(request.app_id, request.deployment)
    return tags


def this_run() -> FlowRun:
    """Return the current flow run, as Prefect read it when it began."""
    context = FlowRunContext.get()
    if context is None or context.flow_run is None:
        raise RuntimeError("this is called outside of a flow run")
    return context.flow_run


def is_release(run: FlowRun) -> bool:
    """Return whether the parameters are those of one of the flows: another program's may have its name."""
    return "plan" in run.parameters or {"app_id", "deployment"} <= set(run.parameters)


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


def outcome_of(state: State[Any] | None) -> Outcome | None:
    """Return the outcome of a run that ended in this state; None if a person set the state by hand."""
    by_hand = state is not None and state.is_completed() and state.data is None
    return _OUTCOMES.get(str(state.name)) if state is not None and not by_hand else None


class Wanted(NamedTuple):
    """Filters of flow runs; an empty one matches all."""

    app_id: int | str = ""
    deployment: str = ""
    running: bool | None = None
    outcome: str = ""
    image: str = ""
    requested_by: str = ""
    since: datetime | None = None
    dry_runs: bool = False

    def match(self, run: FlowRun) -> bool:
        """Return True if the run matches everything but the image and the time."""
        asked, state = run.parameters, run.state
        return (
            is_release(run)
            and (self.dry_runs or not asked.get("dry_run"))
            and (not self.app_id or same_id(asked.get("app_id", ""), self.app_id))
            and (not self.deployment or self._names(run))
            and self.running in {None, state is not None and not state.is_final()}
            and (not self.outcome or self.outcome == outcome_of(state))
            and self.requested_by.lower() in str(asked.get("requested_by") or "").lower()
        )

    def _names(self, run: FlowRun) -> bool:
        """Return whether the run is of the deployment, whose own name is in the tags of its lock."""
        asked = str(run.parameters.get("deployment", ""))
        own = deployment_tags("", self.deployment)[1] in run.tags
        return own or names_deployment(self.deployment, asked) or names_deployment(asked, self.deployment)


async def pages(
    client: PrefectClient, runs: FlowRunFilter, sort: FlowRunSort, flows: FlowFilter | None = None
) -> AsyncIterator[list[FlowRun]]:
    """Yield the runs, page by page as they are requested; no page is empty."""
    offset = 0
    while page := await client.read_flow_runs(
        flow_filter=flows, flow_run_filter=runs, sort=sort, limit=PAGE, offset=offset
    ):
        yield page
        if len(page) < PAGE:
            return
        offset += PAGE


async def all_runs(
    client: PrefectClient,
    runs: FlowRunFilter,
    sort: FlowRunSort = FlowRunSort.ID_DESC,
    flows: FlowFilter | None = None,
) -> list[FlowRun]:
    """Return the runs of all pages."""
    return [run async for page in pages(client, runs, sort, flows) for run in page]


def in_states(*types: StateType) -> FlowRunFilterState:
    """Return a filter of the runs in a state of one of these types."""
    return FlowRunFilterState(type=FlowRunFilterStateType(any_=list(types)))


async def by_id(client: PrefectClient, ids: Sequence[UUID]) -> dict[UUID, FlowRun]:
    """Return the runs with these ids that exist, by id."""
    found: dict[UUID, FlowRun] = {}
    for start in range(0, len(ids), PAGE):
        few = FlowRunFilter(id=FlowRunFilterId(any_=list(ids[start : start + PAGE])))
        found |= {run.id: run for run in await client.read_flow_runs(flow_run_filter=few)}
    return found


async def cancel(client: PrefectClient, run: FlowRun) -> bool:
    """Ask a run to stop; return False if it has ended or was asked already."""
    state = run.state
    if state is not None and (state.is_final() or state.is_cancelling()):
        return False
    await client.set_flow_run_state(run.id, Cancelling())
    return True
