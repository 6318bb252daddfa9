"""The clusters that the tests of this folder release to."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import go_programs
import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

import control_plane
from control_plane import ControlPlane, Namespace
from prefect_rollout.blocks import Kubernetes

Spaces = Callable[..., Namespace]


@pytest.fixture(scope="session")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """Yield a control plane that the tests share; each has namespaces of its own."""
    try:
        go_programs.control_plane()
    except go_programs.NoGoError as error:
        pytest.exit(str(error), returncode=1)
    with control_plane.control_plane(tmp_path_factory.mktemp("control-plane")) as made:
        yield made


@pytest.fixture(scope="session")
def second_plane(plane: ControlPlane, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """Yield another control plane, for releases to two clusters."""
    with control_plane.control_plane(tmp_path_factory.mktemp("second-control-plane")) as made:
        yield made


@pytest.fixture(scope="session")
def save_target(prefect_server: str) -> Callable[..., str]:
    """Save a block with clusters by the paths of their kubeconfigs; return the target that names it."""

    def save(name: str, /, **kubeconfigs: Path) -> str:
        clusters = [{"name": cluster, "kubeconfig": path} for cluster, path in kubeconfigs.items()]
        block = Kubernetes.model_validate({"clusters": clusters, "settle_seconds": 3})
        with temporary_settings({PREFECT_API_URL: prefect_server}):
            block.save(name, overwrite=True, _sync=True)
        return f"kubernetes/{name}"

    return save


@pytest.fixture(scope="session")
def target(plane: ControlPlane, save_target: Callable[..., str]) -> str:
    """Return a target whose cluster `here` is the control plane."""
    return save_target("here", here=plane.kubeconfig("releaser"))


@pytest.fixture(scope="session")
def new_space(plane: ControlPlane) -> Spaces:
    """Create a namespace of its own for a test."""
    numbers = itertools.count(1)

    def create(**rights: Any) -> Namespace:
        return Namespace(plane, f"space-{next(numbers)}", **rights)

    return create


@pytest.fixture
def space(new_space: Spaces, prefect_api: str) -> Namespace:
    """Return a namespace of the test's own."""
    return new_space()
