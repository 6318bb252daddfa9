"""Step 2: parse the deployment's metaData."""

from collections.abc import Sequence

from pydantic import BaseModel

from prefect_rollout.errors import ClusterNotFoundError, MetaDataError
from prefect_rollout.models import Deployment, MetaData, Strategy, usable_cluster
from prefect_rollout.tasks.step import say, step
from prefect_rollout.text import one_line


class Scope(BaseModel):
    """Where a release goes: `{cluster: replicas}` in the order of publishing.

    `in_place` says whether pods are updated in place, keeping their names; `strategy` how others give
    way.
    """

    replicas: dict[str, int]
    in_place: bool = False
    strategy: Strategy | None = None


@step("parse metadata", "parse metadata of {deployment.name}")
async def parse_metadata(deployment: Deployment, clusters: Sequence[str] | None = None) -> Scope:
    """Reads which clusters the deployment runs in, with how many replicas.

    Args:
        deployment: as step 1 found it.
        clusters: release only these, in metaData's order; all of them if none are named.

    Raises:
        ClusterNotFoundError: metaData does not have a cluster that was asked for.
        MetaDataError: metaData cannot be read, has no clusters, or lacks a cluster's replicas. The
            article finds that out halfway through publishing; here nothing is written yet.
    """
    scope = scope_of(deployment, clusters)
    listed = ", ".join(f"{one_line(cluster, 80)} {count}" for cluster, count in scope.replicas.items())
    say("parse metadata", f"replicas: {listed}")
    return scope


def scope_of(deployment: Deployment, clusters: Sequence[str] | None = None) -> Scope:
    """What `parse_metadata` returns, and the same errors."""
    meta = MetaData.parse(deployment.meta_data)
    known = list(meta.clusters or meta.replicas or {})
    for cluster in clusters or []:
        if cluster not in known:
            raise ClusterNotFoundError.named(
                cluster, known, f"in the metaData of {one_line(deployment.name, 120)}"
            )
    chosen = [cluster for cluster in known if not clusters or cluster in clusters]
    if not chosen:
        raise MetaDataError(f"the metaData of {one_line(deployment.name, 120)} names no clusters")
    for cluster in chosen:
        try:
            usable_cluster(cluster)
        except ValueError as error:
            raise MetaDataError(
                f"the metaData names a cluster {one_line(cluster, 80)!r} that cannot be asked for: {error}"
            ) from error
    replicas = {cluster: meta.wanted_replicas(cluster) for cluster in chosen}
    unclear = [one_line(cluster, 80) for cluster, count in replicas.items() if count is None]
    if unclear:
        raise MetaDataError(
            f"the metaData of {one_line(deployment.name, 120)} has no replicas for {', '.join(unclear)}",
            clusters=unclear,
        )
    wanted = {cluster: count for cluster, count in replicas.items() if count is not None}
    return Scope(replicas=wanted, in_place=meta.in_place, strategy=meta.strategy)
