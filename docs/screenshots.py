"""Take the pictures of the README and the docs: releases, a batch and an approval in the Prefect UI.

    uv run --group pictures docs/screenshots.py

Starts a Prefect server, a worker and a simulated cloud, creates a successful, a failed and a planned
release, a batch with a bad image and a release that waits for approval, and takes screenshots with headless
Chromium. Install it first (`chromium` on the path).
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
from playwright.sync_api import Page, sync_playwright

from prefect_rollout.simulator import Scenario, SimulatorServer

BIN = Path(sys.executable).parent
PICTURES = Path(__file__).parent / "pictures"
PLAN = {
    "defaults": {"poll_seconds": 1, "poll_attempts": 60, "grace_seconds": 5, "reason": "July release"},
    "failure_budget": "20%",
    "max_parallel": 4,
    "soak_seconds": 2,
    "releases": [
        {"app_id": 3290, "deployment": "qapm-home"},
        {"app_id": 3290, "deployment": "bad-image", "on_failure": "rollback"},
        {
            "app_id": 3290,
            "deployment": "qapm-api",
            "wave": 2,
            "clusters": ["pub-bjwdt"],
            "name": "qapm-api first",
        },
        {"app_id": 3290, "deployment": "slow-start", "wave": 2},
        {
            "app_id": 3290,
            "deployment": "qapm-api",
            "clusters": ["pub-bjyt"],
            "name": "qapm-api rest",
            "wave": 3,
            "after": ["qapm-api first"],
        },
    ],
}


def main() -> None:
    """Start the servers, create the releases and take the pictures."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not chromium:
        sys.exit("chromium is not on the path: install it first")
    PICTURES.mkdir(exist_ok=True)
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        url = stack.enter_context(prefect_server(home))
        cloud = stack.enter_context(SimulatorServer(Scenario(), speed=2))
        environment = {
            **{
                name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "K8S_"))
            },
            "PREFECT_HOME": str(home),
            "PREFECT_API_URL": f"{url}/api",
            "K8S_API_URL": cloud.url,
            "K8S_KEY_ID": "demo-key",
            "K8S_SECRET_KEY": "demo-secret",
            "K8S_REGISTRY_URL": "harbor.qihoo.net",
            "PREFECT_ROLLOUT_CHECK_IMAGES": "off",  # no registry has its images
        }
        api = stack.enter_context(httpx.Client(base_url=f"{url}/api", timeout=30))
        subprocess.run([BIN / "prefect-rollout", "init", "--type", "process"], env=environment, check=True)
        stack.enter_context(worker(environment, home))

        planned = release(environment, "qapm-home", "weekly release", "--dry-run")
        released = release(environment, "qapm-home", "weekly release")
        failed = release(
            environment, "bad-image", "hotfix", "--on-failure", "rollback", "--grace-seconds", "6"
        )
        batch = call(environment, "batch", str(written(home / "plan.json", PLAN)), "--json")["batch_id"]
        waiting = started(
            api,
            "deploy-latest-image",
            deployment="qapm-api",
            images={"qapm-api": "harbor.qihoo.net/qdgc-qapm/qapm-api:202408011000-4c5d6e7"},
            approval="before-release",
            requested_by="zhangsan",
        )
        eventually(lambda: state(api, waiting) == "PAUSED")

        form = deployment_id(api, "deploy-latest-image")
        batch_form = deployment_id(api, "deploy-batch")
        playwright = stack.enter_context(sync_playwright())
        browser = stack.enter_context(playwright.chromium.launch(executable_path=chromium))
        camera = Camera(browser.new_page(viewport={"width": 1400, "height": 1000}), url)
        camera.take("released", f"/runs/flow-run/{released}", top=True)
        camera.take("failed", f"/runs/flow-run/{failed}", top=True)
        camera.take("batch", f"/runs/flow-run/{batch}", top=True)
        camera.take("approval-run", f"/runs/flow-run/{waiting}", top=True)
        camera.take("released-report", artifact(api, released), whole=True)
        camera.take("failed-report", artifact(api, failed), whole=True)
        camera.take("plan-report", artifact(api, planned), whole=True)
        camera.take("batch-report", artifact(api, batch), whole=True)
        camera.take("artifacts", "/artifacts")
        camera.take("runs", "/runs")
        camera.take("deployments", "/deployments")
        camera.take("run-form", f"/deployments/deployment/{form}/run", whole=True)
        camera.take("batch-form", f"/deployments/deployment/{batch_form}/run", whole=True)
        camera.take("approval", f"/runs/flow-run/{waiting}", click="Resume")
        camera.take("windows-form", "/blocks/catalog/release-windows/create", whole=True)


class Camera:
    """Takes screenshots of pages of the Prefect UI."""

    def __init__(self, page: Page, url: str) -> None:
        self._page = page
        self._url = url

    def take(self, name: str, path: str, *, whole: bool = False, top: bool = False, click: str = "") -> None:
        """Save a screenshot of a page, or of its `top`, after it is drawn and the text `click` is clicked."""
        self._page.set_viewport_size({"width": 1400, "height": 1000})
        self._page.goto(f"{self._url}{path}")
        self._settle()
        if click:
            self._page.get_by_text(click).first.click()
            self._settle()
        if whole:
            # The UI scrolls inside the window: make the window as high as its content.
            height = self._page.evaluate(
                "Math.max(...[...document.querySelectorAll('*')].map(each => each.scrollHeight))"
            )
            self._page.set_viewport_size({"width": 1400, "height": min(4000, max(700, int(height) + 40))})
            self._settle()
        clip: Any = {"x": 0, "y": 0, "width": 1400, "height": 500} if top else None
        self._page.screenshot(path=PICTURES / f"{name}.png", clip=clip)
        print(PICTURES / f"{name}.png")

    def _settle(self) -> None:
        self._page.wait_for_timeout(4000)


@contextmanager
def prefect_server(home: Path) -> Iterator[str]:
    """Run `prefect server start` and yield its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    environment = {**os.environ, "PREFECT_HOME": str(home), "PREFECT_UI_API_URL": f"{url}/api"}
    with running([BIN / "prefect", "server", "start", "--port", str(port)], environment):
        until = time.monotonic() + 180
        while time.monotonic() < until:
            try:
                httpx.get(f"{url}/api/health", timeout=5).raise_for_status()
            except httpx.HTTPError:
                time.sleep(0.3)
            else:
                break
        yield url


@contextmanager
def worker(environment: dict[str, str], home: Path) -> Iterator[None]:
    """Run a worker of the pool."""
    command = [BIN / "prefect", "worker", "start", "--pool", "rollout"]
    with running(command, {**environment, "PREFECT_WORKER_QUERY_SECONDS": "1"}, home):
        yield


@contextmanager
def running(command: list[Any], environment: dict[str, str], folder: Path | None = None) -> Iterator[None]:
    """Run a process within the context."""
    process = subprocess.Popen(
        command, env=environment, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        yield
    finally:
        process.terminate()
        process.wait(60)


def call(environment: dict[str, str], *arguments: str) -> dict[str, Any]:
    """Run a prefect-rollout command with `--json` and return its output."""
    ended = subprocess.run(
        [BIN / "prefect-rollout", *arguments], env=environment, stdout=subprocess.PIPE, check=False
    )
    result: dict[str, Any] = json.loads(ended.stdout)
    return result


def release(environment: dict[str, str], deployment: str, reason: str, *options: str) -> str:
    """Release a deployment from the command line and return the id of the flow run."""
    what = ("deploy", "--app-id", "3290", "--deployment", deployment, "--requested-by", "zhangsan")
    return str(call(environment, *what, "--reason", reason, "--json", *options)["release_id"])


def written(path: Path, content: Any) -> Path:
    """Write `content` as JSON and return the path."""
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def deployment_id(api: httpx.Client, name: str) -> str:
    """Return the id of a Prefect deployment that is named like its flow."""
    return str(api.get(f"/deployments/name/{name}/{name}").json()["id"])


def started(api: httpx.Client, name: str, **parameters: Any) -> str:
    """Start a run of a Prefect deployment and return its id."""
    body = {"parameters": {"app_id": 3290, **parameters}}
    path = f"/deployments/{deployment_id(api, name)}/create_flow_run"
    while (answer := api.post(path, json=body)).status_code == 503:  # SQLite is busy
        time.sleep(1)
    return str(answer.raise_for_status().json()["id"])


def state(api: httpx.Client, flow_run_id: str) -> str:
    """Return the type of a flow run's state."""
    return str(api.get(f"/flow_runs/{flow_run_id}").json()["state_type"])


def eventually(holds: Callable[[], bool], seconds: float = 120) -> None:
    """Wait until a condition holds."""
    until = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > until:
            sys.exit("timed out")
        time.sleep(0.5)


def artifact(api: httpx.Client, flow_run_id: str) -> str:
    """Return the path of a flow run's report."""
    body = {"artifacts": {"flow_run_id": {"any_": [flow_run_id]}, "type": {"any_": ["markdown"]}}}
    return f"/artifacts/artifact/{api.post('/artifacts/filter', json=body).json()[0]['id']}"


if __name__ == "__main__":
    main()
