"""The simulated cloud on a real socket."""

import asyncio
import shlex
import socket
import sys
import threading
from collections.abc import Coroutine
from types import TracebackType
from typing import Any, Self

import uvicorn

from prefect_rollout.errors import ConfigurationError
from prefect_rollout.execution.sockets import listen
from prefect_rollout.simulator.api import create_app
from prefect_rollout.simulator.cloud import Cloud
from prefect_rollout.simulator.scenario import Scenario

MAX_SPEED = 1_000_000  # a year in half a minute; dates would run out of years soon after

_START_OR_STOP_SECONDS = 10.0  # far more than either takes: a stop waits for nobody


class SimulatorServer:
    """A simulated cloud that listens while the context lasts, in a daemon thread of this process.

    `cloud` may be asked from any thread, through its public methods.

    Args:
        scenario: what it holds; the article's cloud if left out.
        host: the address to listen on.
        port: the port; 0 takes a free one.
        speed: simulated seconds that pass in one second.

    Raises:
        ConfigurationError: on entering, if it cannot listen there.
    """

    def __init__(
        self,
        scenario: Scenario | None = None,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        speed: float = 1.0,
    ) -> None:
        if not 0 < speed <= MAX_SPEED:
            raise ConfigurationError(
                f"speed must be more than 0 and at most {MAX_SPEED}, not {speed}", advice="Try 1, or 10."
            )
        self.cloud = Cloud(scenario or Scenario(), speed=speed)
        self.host = host
        self.port = port
        # h11 and asyncio are always there; uvicorn's own choice would differ between machines.
        config = uvicorn.Config(
            create_app(self.cloud),
            http="h11",
            loop="asyncio",
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="critical",
            access_log=False,
            timeout_graceful_shutdown=1,
        )
        self._server = _Server(config)
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        """The base URL, without a path."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"

    def __enter__(self) -> Self:
        listener = listen(self.host, self.port)
        self.port = listener.getsockname()[1]
        self._thread = threading.Thread(
            target=self._server.run, args=([listener],), name="container-cloud-simulator", daemon=True
        )
        self._thread.start()
        if not self._server.listening.wait(_START_OR_STOP_SECONDS):
            self._server.should_exit = True
            raise ConfigurationError(
                f"the simulator did not start on {self.url}", advice="Look at the error printed before this."
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.should_exit = True
        self.wait(_START_OR_STOP_SECONDS)

    def refuse(self) -> None:
        """Has connections refused until `accept`, as while a cloud restarts; those that stand break."""
        self._have(self._server.refuse())

    def accept(self) -> None:
        """Listens again on the same port, if it was refusing."""
        if self._server.refusing:
            self._have(self._server.startup([listen(self.host, self.port)]))

    def _have(self, done: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(done, self._server.loop).result(_START_OR_STOP_SECONDS)

    def wait(self, seconds: float) -> bool:
        """Waits for the server's end; says whether it has ended."""
        if self._thread is not None:
            self._thread.join(seconds)
        return self._thread is None or not self._thread.is_alive()


class _Server(uvicorn.Server):
    """uvicorn, made to say when it listens, to refuse connections and to wait for no open one."""

    loop: asyncio.AbstractEventLoop

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = threading.Event()
        self.refusing = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.loop = asyncio.get_running_loop()
        self.refusing = False
        self.listening.set()

    async def refuse(self) -> None:
        for server in self.servers:
            server.close()
        self._break_connections()
        await asyncio.sleep(0)  # transports close their sockets in the loop's next round
        self.refusing = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # A client that holds its connection, or a request that is never answered, must not delay it.
        self._break_connections()
        await super().shutdown(sockets)

    def _break_connections(self) -> None:
        for connection in list(self.server_state.connections):
            if connection.transport is not None:
                connection.transport.abort()


def run(
    host: str = "127.0.0.1", port: int = 8360, scenario: Scenario | None = None, speed: float = 1.0
) -> None:
    """Serves a simulated cloud until Ctrl-C, and says on stderr how to reach it.

    Raises:
        ConfigurationError: it cannot listen there.
    """
    try:
        with SimulatorServer(scenario, host=host, port=port, speed=speed) as server:
            print(_greeting(server), file=sys.stderr, flush=True)  # noqa: T201 - the command's output
            # In steps: on Windows a wait without an end cannot be interrupted.
            while not server.wait(1):
                pass
    except KeyboardInterrupt:
        print("The simulated container cloud has ended.", file=sys.stderr)  # noqa: T201


def _greeting(server: SimulatorServer) -> str:
    scenario = server.cloud.scenario
    app = scenario.apps[0] if scenario.apps else None
    deployment = app.deployments[0] if app and app.deployments else None
    lines = [
        f"A simulated container cloud listens on {server.url} (Ctrl-C ends it).",
        "",
        f"export K8S_API_URL={server.url}",
        f"export K8S_KEY_ID={shlex.quote(scenario.key_id)}",
        f"export K8S_SECRET_KEY={shlex.quote(scenario.secret_key)}",
        "export PREFECT_ROLLOUT_CHECK_IMAGES=off",  # no registry has its images
        f"export K8S_APP_ID={app.id}" if app else "",
        f"export K8S_DEPLOY_NAME={shlex.quote(deployment.name)}" if deployment else "",
        "",
        f"What really happened: {server.url}/_control/truth",
    ]
    return "\n".join(lines)
