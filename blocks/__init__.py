"""Credentials and targets of releases, as Prefect blocks."""

from prefect_rollout.blocks.container_cloud import ContainerCloud
from prefect_rollout.blocks.target import TargetBlock, load_target, open_target

__all__ = ["ContainerCloud", "TargetBlock", "load_target", "open_target"]
