"""The flows: one release, a batch of releases, a rollback, a restart, a scaling."""

from typing import Any

from prefect import Flow

from prefect_rollout.flows.batch import deploy_batch
from prefect_rollout.flows.deploy import deploy_latest_image
from prefect_rollout.flows.restart import restart
from prefect_rollout.flows.rollback import rollback
from prefect_rollout.flows.scale import scale

__all__ = ["FLOWS", "deploy_batch", "deploy_latest_image", "restart", "rollback", "scale"]

FLOWS: dict[str, Flow[Any, Any]] = {
    flow.name: flow for flow in (deploy_latest_image, deploy_batch, rollback, restart, scale)
}
"""The flows by name. Modules below use `prefect_rollout.runs.flow_runs.FLOW_NAMES`."""
