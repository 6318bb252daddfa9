"""Step 2: parse the deployment's metadata."""

from collections.abc import Sequence

from prefect_rollout.blocks import open_target
from prefect_rollout.release.workload import Placement, Workload
from prefect_rollout.runs.step import say, step
from prefect_rollout.text import one_line


@step("parse metadata", "parse metadata of {workload.name}")
async def parse_metadata(
    workload: Workload, clusters: Sequence[str] | None = None, *, target: str
) -> Placement:
    """Read the clusters that the deployment runs in, and their replicas.

    With `clusters`, only these, in the deployment's order.

    Raises:
        ClusterNotFoundError: the deployment does not have one of `clusters`.
        WorkloadError: its configuration cannot be read, or lacks clusters or replicas.
    """
    async with open_target(target) as platform:
        placement = platform.placement(workload, clusters)
    listed = ", ".join(
        f"{one_line(cluster, 80)} {'not set here' if count is None else count}"
        for cluster, count in placement.replicas.items()
    )
    say("parse metadata", f"replicas: {listed}")
    return placement
