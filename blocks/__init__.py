"""Prefect blocks: release targets with their credentials, and release windows."""

from prefect_rollout.blocks.container_cloud import ContainerCloud
from prefect_rollout.blocks.image_registry import ImageRegistry, Registries, open_registry
from prefect_rollout.blocks.kubernetes import Kubernetes
from prefect_rollout.blocks.load import forget_blocks, sharing_blocks
from prefect_rollout.blocks.target import (
    TargetBlock,
    choose_target,
    open_target,
    opened_as,
    refuse_two_clouds,
    target_of_environment,
)
from prefect_rollout.blocks.windows import ReleaseWindows, load_windows

__all__ = [
    "ContainerCloud",
    "ImageRegistry",
    "Kubernetes",
    "Registries",
    "ReleaseWindows",
    "TargetBlock",
    "choose_target",
    "forget_blocks",
    "load_windows",
    "open_registry",
    "open_target",
    "opened_as",
    "refuse_two_clouds",
    "sharing_blocks",
    "target_of_environment",
]
