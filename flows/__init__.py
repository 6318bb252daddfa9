"""What an operator starts."""

from prefect_rollout.flows.deploy import deploy_latest_image

__all__ = ["deploy_latest_image"]
