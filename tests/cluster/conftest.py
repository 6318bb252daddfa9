"""The tests' Prefect API is a cluster here."""

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from prefect.settings import (
    PREFECT_API_URL,
    PREFECT_CLIENT_MAX_RETRIES,
    PREFECT_CLIENT_RETRY_EXTRA_CODES,
    temporary_settings,
)

from cluster.topology import DEPLOY, Topology
from support import BIN


@pytest.fixture(scope="session")
def topology() -> Iterator[Topology]:
    """The cluster, with the work pool and the deployments of prefect.yaml."""
    with tempfile.TemporaryDirectory(prefix="prefect-rollout-cluster-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        folder.chmod(0o755)  # PostgreSQL has a user of its own
        with Topology(folder) as cluster:
            cluster.run([BIN / "prefect-rollout", "init"])
            cluster.run([sys.executable, DEPLOY / "results.py", cluster.shared])
            yield cluster


@pytest.fixture
def prefect_api(topology: Topology) -> Iterator[str]:
    """Has this process speak to the cluster, as patiently as a worker does."""
    patience = {PREFECT_CLIENT_MAX_RETRIES: 10, PREFECT_CLIENT_RETRY_EXTRA_CODES: {500}}
    with temporary_settings({PREFECT_API_URL: topology.url, **patience}):
        yield topology.url
