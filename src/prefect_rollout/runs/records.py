"""Records of revisions that flow runs keep, read from Prefect. `release.revisions` judges them."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from uuid import UUID

from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId, FlowRunFilterTags, Operator
from prefect.client.schemas.objects import FlowRun

from prefect_rollout.ids import Id
from prefect_rollout.platforms.port import Platform
from prefect_rollout.release.revisions import Known, Past, Record, known_of
from prefect_rollout.release.workload import Revision, Workload
from prefect_rollout.runs import flow_runs, guard
from prefect_rollout.runs.prefect_errors import translate_errors
from prefect_rollout.text import one_line

RECORD = "rollout.revisions"
"""Label of a flow run that holds its `Record`."""


def revision_tag(revision: Id) -> str:
    """Return the tag of a run that recorded an event of a revision that it did not create."""
    return f"template:{one_line(revision, 80)}"


async def known_here(
    platform: Platform,
    workload: Workload,
    revisions: Sequence[Revision],
    online: Mapping[str, Id] | None = None,
    client: PrefectClient | None = None,
) -> dict[str, dict[str, Known]]:
    """Return what is known about each revision, as `{revision: {cluster: known}}`.

    Without `online`, the revision in each cluster, it is read from the platform if it matters. The client is
    the flow's own by default.

    Raises:
        ConfigurationError: the Prefect API did not answer (retryable).
    """
    if not revisions:
        return {}
    with translate_errors(retryable=True):
        async with nullcontext(client) if client else guard.prefect_client() as api:
            runs = await _runs(api, workload, revisions)
    pasts = [past for run in runs if (past := _past(run, platform, workload))]
    if online is None:
        online = {}
        wanted = {str(revision.id) for revision in revisions}
        if any(
            entry.event == "left"
            for past in pasts
            for revision in wanted & set(past.record.seen)
            for entry in past.record.seen[revision].values()
        ):
            online = await platform.online(workload)
    return {str(revision.id): known_of(revision, pasts, online) for revision in revisions}


async def _runs(client: PrefectClient, workload: Workload, revisions: Sequence[Revision]) -> list[FlowRun]:
    """Return the runs that created the revisions or recorded an event of them."""
    wanted = FlowRunFilter(
        operator=Operator.or_,  # type: ignore[call-arg] # a field of a mixin, which mypy's plugin overlooks
        id=FlowRunFilterId(any_=[made_by for each in revisions if (made_by := _uuid(each.made_by))]),
        tags=FlowRunFilterTags(
            all_=flow_runs.deployment_tags(workload.app_id, workload.name),
            any_=[revision_tag(each.id) for each in revisions],
        ),
    )
    return await flow_runs.all_runs(client, wanted)


def _uuid(text: str | None) -> UUID | None:
    try:
        return UUID(text or "")
    except ValueError:  # another tool's mark
        return None


def _past(run: FlowRun, platform: Platform, workload: Workload) -> Past | None:
    """Return a run's record, with the names of clusters here; `None` if it is not of this deployment."""
    record = Record.read(run.labels.get(RECORD))
    if record is None or run.state is None:
        return None
    if (record.platform, record.deployment) != (platform.realm, str(workload.id)):
        return None
    record.clusters = [platform.cluster_at(place) for place in record.clusters]
    record.seen = {
        revision: {platform.cluster_at(place): entry for place, entry in seen.items()}
        for revision, seen in record.seen.items()
    }
    state = run.state
    return Past(str(run.id), run.name, state.type.value, state.timestamp, record)
