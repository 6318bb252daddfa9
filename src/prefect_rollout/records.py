"""Reads from Prefect what our flow runs recorded of a deployment's revisions. `revisions` judges it."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from uuid import UUID

from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId, FlowRunFilterTags, Operator
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.sorting import FlowRunSort

from prefect_rollout import flow_runs, guard
from prefect_rollout.models import Deployment, Id
from prefect_rollout.platforms.port import Platform
from prefect_rollout.revisions import Known, Past, Record, Revision, known_of
from prefect_rollout.text import one_line

RECORD = "rollout.revisions"
"""Label of a flow run: its `Record`."""


def deployment_tags(app_id: object, deployment: str) -> list[str]:
    """Return the tags that find the runs of a deployment; names may be cut, so the record decides."""
    return [f"app:{one_line(app_id, 80)}", f"deployment:{one_line(deployment, 80)}"]


def revision_tag(revision: Id) -> str:
    """Return the tag of a run that recorded anything of a revision that it did not make."""
    return f"template:{one_line(revision, 80)}"


async def known_here(
    platform: Platform,
    deployment: Deployment,
    revisions: Sequence[Revision],
    online: Mapping[str, Id | None] | None = None,
    client: PrefectClient | None = None,
) -> dict[str, dict[str, Known]]:
    """Return what is known of each revision, by cluster: `{revision: {cluster: known}}`.

    Args:
        platform: where the deployment is.
        deployment: as step 1 found it.
        revisions: which.
        online: what is online in each cluster; if `None`, the platform is asked where it matters.
        client: of the Prefect API; the flow's own if `None`.

    Raises:
        ConfigurationError: the Prefect API did not answer (retryable).
    """
    if not revisions:
        return {}
    with guard.answering(retryable=True):
        async with nullcontext(client) if client else guard.api() as api:
            runs = await _runs(api, deployment, revisions)
    pasts = [past for run in runs if (past := _past(run, platform, deployment))]
    if online is None:
        online = {}
        wanted = {str(revision.id) for revision in revisions}
        if any(
            entry.event == "left"
            for past in pasts
            for revision in wanted & set(past.record.seen)
            for entry in past.record.seen[revision].values()
        ):
            online = {each.cluster: each.template_id for each in await platform.online(deployment)}
    return {str(revision.id): known_of(revision, pasts, online) for revision in revisions}


async def _runs(
    client: PrefectClient, deployment: Deployment, revisions: Sequence[Revision]
) -> list[FlowRun]:
    """Return the runs that made the revisions or recorded anything of them: one request, if few enough."""
    wanted = FlowRunFilter(
        operator=Operator.or_,  # type: ignore[call-arg] # a field of a mixin, which mypy's plugin overlooks
        id=FlowRunFilterId(any_=[UUID(each.made_by) for each in revisions if each.made_by]),
        tags=FlowRunFilterTags(
            all_=deployment_tags(deployment.app_id, deployment.name),
            any_=[revision_tag(each.id) for each in revisions],
        ),
    )
    return [run async for page in flow_runs.pages(client, wanted, FlowRunSort.ID_DESC) for run in page]


def _past(run: FlowRun, platform: Platform, deployment: Deployment) -> Past | None:
    """Return a run's record; `None` for one of another deployment or platform, and of one without any."""
    record = Record.read(run.labels.get(RECORD))
    if record is None or run.state is None:
        return None
    if (record.platform, record.deployment) != (platform.identity, str(deployment.id)):
        return None
    state = run.state
    return Past(str(run.id), run.name, state.type.value, state.timestamp, record)
