"""Read the flow runs of releases, of which there may be more than Prefect's API returns at once."""

from collections.abc import AsyncIterator, Sequence
from uuid import UUID

from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.filters import FlowFilter, FlowFilterName, FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.sorting import FlowRunSort

from prefect_rollout.release.request import Action

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


def is_release(run: FlowRun) -> bool:
    """Return whether the parameters are those of one of the flows: another program's may have its name."""
    return "plan" in run.parameters or {"app_id", "deployment"} <= set(run.parameters)


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


async def by_id(client: PrefectClient, ids: Sequence[UUID]) -> dict[UUID, FlowRun]:
    """Return the runs with these ids that exist, by id."""
    found: dict[UUID, FlowRun] = {}
    for start in range(0, len(ids), PAGE):
        few = FlowRunFilter(id=FlowRunFilterId(any_=list(ids[start : start + PAGE])))
        found |= {run.id: run for run in await client.read_flow_runs(flow_run_filter=few)}
    return found
