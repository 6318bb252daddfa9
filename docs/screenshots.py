"""Takes the pictures of the README: a release and a failed one in the Prefect UI.

    .venv/bin/python docs/screenshots.py

Starts a Prefect server and a simulated cloud of its own, releases two deployments, and photographs
their runs with headless Chromium, which has to be installed (`chromium` on the path).
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from prefect_rollout.simulator import Scenario, SimulatorServer

BIN = Path(sys.executable).parent
PICTURES = Path(__file__).parent / "pictures"


def main() -> None:
    """Everything, from the server's start to the pictures."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not chromium:
        sys.exit("chromium is not on the path: install it first")
    PICTURES.mkdir(exist_ok=True)
    with (
        tempfile.TemporaryDirectory() as home,
        prefect_server(Path(home)) as url,
        SimulatorServer(Scenario(), speed=2) as cloud,
    ):
        environment = {
            **{
                name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "K8S_"))
            },
            "PREFECT_HOME": home,
            "PREFECT_API_URL": f"{url}/api",
            "K8S_API_URL": cloud.url,
            "K8S_KEY_ID": "demo-key",
            "K8S_SECRET_KEY": "demo-secret",
            "K8S_REGISTRY_URL": "harbor.qihoo.net",
        }
        released = release(environment, "qapm-home", "weekly release")
        failed = release(
            environment, "bad-image", "hotfix", "--on-failure", "rollback", "--grace-seconds", "6"
        )
        prefect(environment, "work-pool", "create", "rollout", "--type", "process")
        prefect(environment, "--no-prompt", "deploy", "--all")
        api = httpx.Client(base_url=f"{url}/api", timeout=30)
        deployment = api.get("/deployments/name/deploy-latest-image/deploy-latest-image").json()["id"]
        pages = {
            "released": (f"/runs/flow-run/{released}", 1000),
            "failed": (f"/runs/flow-run/{failed}", 1000),
            "released-report": (f"/artifacts/artifact/{artifact(api, released)}", 1500),
            "failed-report": (f"/artifacts/artifact/{artifact(api, failed)}", 1300),
            "runs": ("/runs", 900),
            "run-form": (f"/deployments/deployment/{deployment}/run", 1900),
        }
        for name, (path, height) in pages.items():
            photograph(chromium, f"{url}{path}", PICTURES / f"{name}.png", height)
            print(PICTURES / f"{name}.png")


@contextmanager
def prefect_server(home: Path) -> Iterator[str]:
    """A Prefect server with its UI, as `prefect server start` runs it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    server = subprocess.Popen(
        [BIN / "prefect", "server", "start", "--port", str(port)],
        env={**os.environ, "PREFECT_HOME": str(home), "PREFECT_UI_API_URL": f"{url}/api"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        until = time.monotonic() + 180
        while time.monotonic() < until:
            try:
                httpx.get(f"{url}/api/health", timeout=5).raise_for_status()
            except httpx.HTTPError:
                time.sleep(0.3)
            else:
                break
        yield url
    finally:
        server.terminate()
        server.wait(30)


def prefect(environment: dict[str, str], *arguments: str) -> None:
    """One call of Prefect's command line, from the repository."""
    subprocess.run(
        [BIN / "prefect", *arguments],
        env=environment,
        cwd=Path(__file__).parent.parent,
        check=True,
        stdout=subprocess.DEVNULL,
    )


def release(environment: dict[str, str], deployment: str, reason: str, *options: str) -> str:
    """Releases a deployment from the command line; the flow run's id."""
    ended = subprocess.run(
        [
            *(BIN / "prefect-rollout", "deploy", "--app-id", "3290", "--deployment", deployment),
            *("--reason", reason, "--poll-seconds", "2", "--json", *options),
        ],
        env=environment,
        stdout=subprocess.PIPE,
        check=False,
    )
    return str(json.loads(ended.stdout)["release_id"])


def artifact(api: httpx.Client, flow_run_id: str) -> str:
    """The id of a flow run's report."""
    body = {"artifacts": {"flow_run_id": {"any_": [flow_run_id]}, "type": {"any_": ["markdown"]}}}
    return str(api.post("/artifacts/filter", json=body).json()[0]["id"])


def photograph(chromium: str, url: str, picture: Path, height: int) -> None:
    """A picture of a page, after it had time to draw itself."""
    with tempfile.TemporaryDirectory() as profile:
        subprocess.run(
            [
                *(chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic"),
                *("--no-first-run", "--disable-background-networking", "--disable-component-update"),
                *("--disable-sync", "--hide-scrollbars", "--force-prefers-reduced-motion"),
                f"--user-data-dir={profile}",
                *(f"--window-size=1400,{height}", "--virtual-time-budget=20000", "--timeout=30000"),
                *(f"--screenshot={picture}", url),
            ],
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=120,
        )


if __name__ == "__main__":
    main()
