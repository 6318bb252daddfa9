import signal
import socket
import subprocess
import sys
import threading

import httpx
import pytest

from prefect_rollout.errors import ConfigurationError
from prefect_rollout.simulator import SimulatorServer, create_app, run
from simulator.caller import Signer


def test_a_port_in_use_is_named_with_what_to_do() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ConfigurationError, match=f"port {port}.*--port"):
            run("127.0.0.1", port)


@pytest.mark.parametrize("speed", [0, -1, 1e7, float("inf"), float("nan")])
def test_time_must_move_forward(speed: float) -> None:
    with pytest.raises(ConfigurationError, match="speed"):
        SimulatorServer(speed=speed)


def test_speed_multiplies_simulated_time() -> None:
    server = SimulatorServer(speed=1e6)
    before = server.cloud.now()
    while server.cloud.now() - before < 1000:
        pass


def test_it_stops_while_connections_are_open_and_a_request_hangs() -> None:
    failures: list[BaseException] = []

    def wait_for_ever(url: str) -> None:
        try:
            httpx.get(f"{url}/openapi/v1/apps/3290", auth=Signer(), timeout=60)
        except httpx.TransportError as error:
            failures.append(error)

    with SimulatorServer() as server, httpx.Client() as idle:
        idle.get(server.url)
        httpx.put(f"{server.url}/_control/faults", json=[{"kind": "never"}])
        hanging = threading.Thread(target=wait_for_ever, args=(server.url,))
        hanging.start()
        while not server.cloud.requests():
            pass
    assert server.wait(0)
    hanging.join(10)
    assert len(failures) == 1


def test_two_run_side_by_side() -> None:
    with SimulatorServer() as one, SimulatorServer() as other:
        assert one.port != other.port
        assert httpx.get(one.url).status_code == httpx.get(other.url).status_code == 200


async def test_the_application_answers_without_a_server() -> None:
    transport = httpx.ASGITransport(create_app())
    async with httpx.AsyncClient(transport=transport, base_url="http://cloud", auth=Signer()) as http:
        assert (await http.get("/openapi/v1/apps/3290")).json()["data"]["name"] == "qapm"


@pytest.mark.skipif(sys.platform == "win32", reason="Ctrl-C cannot be sent to one process there")
def test_ctrl_c_ends_it_quietly_and_the_exports_work() -> None:
    code = "from prefect_rollout.simulator import run; run(port=0)"
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    lines: list[str] = []
    while not lines or "_control" not in lines[-1]:
        lines.append(process.stderr.readline())
        assert lines[-1] or process.poll() is None, lines
    exports = dict(
        line.removeprefix("export ").strip().split("=", 1) for line in lines if line.startswith("export ")
    )
    assert set(exports) == {
        "K8S_API_URL", "K8S_KEY_ID", "K8S_SECRET_KEY", "K8S_APP_ID", "K8S_DEPLOY_NAME",
        "PREFECT_ROLLOUT_CHECK_IMAGES",
    }  # fmt: skip
    signer = Signer(exports["K8S_KEY_ID"], exports["K8S_SECRET_KEY"])
    answer = httpx.get(f"{exports['K8S_API_URL']}/openapi/v1/apps/{exports['K8S_APP_ID']}", auth=signer)
    assert answer.status_code == 200
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=180)
    assert process.returncode == 0
    assert "Traceback" not in rest
