"""What an operator starts."""

from prefect_rollout.flows.batch import deploy_batch
from prefect_rollout.flows.deploy import deploy_latest_image
from prefect_rollout.flows.restart import restart
from prefect_rollout.flows.rollback import rollback
from prefect_rollout.flows.scale import scale

__all__ = ["deploy_batch", "deploy_latest_image", "restart", "rollback", "scale"]
