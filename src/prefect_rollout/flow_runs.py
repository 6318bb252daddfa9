"""Reading flow runs of which there may be more than Prefect's API gives at once."""

from collections.abc import AsyncIterator, Sequence
from uuid import UUID

from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.filters import FlowFilter, FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.sorting import FlowRunSort

PAGE = 200
"""No list of Prefect's API is longer."""


async def pages(
    client: PrefectClient, runs: FlowRunFilter, sort: FlowRunSort, flows: FlowFilter | None = None
) -> AsyncIterator[list[FlowRun]]:
    """The runs, page after page as they are asked for; no page is empty."""
    offset = 0
    while page := await client.read_flow_runs(
        flow_filter=flows, flow_run_filter=runs, sort=sort, limit=PAGE, offset=offset
    ):
        yield page
        if len(page) < PAGE:
            return
        offset += PAGE


async def by_id(client: PrefectClient, ids: Sequence[UUID]) -> dict[UUID, FlowRun]:
    """The runs of these ids, as far as there are any."""
    found: dict[UUID, FlowRun] = {}
    for start in range(0, len(ids), PAGE):
        few = FlowRunFilter(id=FlowRunFilterId(any_=list(ids[start : start + PAGE])))
        found |= {run.id: run for run in await client.read_flow_runs(flow_run_filter=few)}
    return found
