"""A running simulator whose time only moves when a test says so."""

from collections.abc import Iterator

import httpx
import pytest

from prefect_rollout.simulator import Scenario, SimulatorServer
from simulator.caller import Caller, Calling, Signer


@pytest.fixture(scope="session")
def server() -> Iterator[SimulatorServer]:
    # So slow that simulated time stands still: tests move it with `cloud.advance`.
    with SimulatorServer(speed=1e-9) as running:
        yield running


@pytest.fixture
def calling(server: SimulatorServer) -> Iterator[Calling]:
    with httpx.Client(base_url=f"{server.url}/openapi/v1", auth=Signer(), timeout=10) as http:

        def call(**scenario: object) -> Caller:
            server.cloud.load(Scenario.model_validate(scenario))
            return Caller(http, server.cloud)

        yield call


@pytest.fixture
def caller(calling: Calling) -> Caller:
    return calling()
