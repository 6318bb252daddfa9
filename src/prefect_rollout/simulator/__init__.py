"""A simulated container cloud: the contract's Open API over HTTP, with failures on demand.

It tells the truth about itself: `SimulatorServer.cloud` in this process, `/_control` over HTTP.
"""

from prefect_rollout.simulator.api import create_app
from prefect_rollout.simulator.scenario import Scenario, load_scenario
from prefect_rollout.simulator.server import SimulatorServer, run

__all__ = ["Scenario", "SimulatorServer", "create_app", "load_scenario", "run"]
