"""The suite itself: what an interrupted run leaves behind."""

import os
import re
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import psutil
import pytest

from guardian import marked

ROOT = Path(__file__).parent.parent


@pytest.mark.server
@pytest.mark.parametrize(
    "how", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.complete)], ids=str
)
def test_an_interrupted_run_leaves_no_process(how: signal.Signals) -> None:
    mark = str(uuid.uuid4())
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    run = psutil.Popen(
        [sys.executable, "-m", "pytest", "-q", "-n", "1", "tests/test_deploy.py"],
        env={**environment, "ROLLOUT_TESTS": mark},
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    until = time.monotonic() + 120
    while not any("server" in process.info["cmdline"] for process in marked(mark)):
        assert run.poll() is None
        assert time.monotonic() < until
        time.sleep(0.2)
    if how is signal.SIGINT:  # as a terminal sends it
        os.killpg(run.pid, how)
    else:
        run.send_signal(how)
    run.wait(180)
    until = time.monotonic() + 60
    while left := marked(mark):
        assert time.monotonic() < until, left
        time.sleep(0.2)


def test_every_promise_has_a_test_that_make_test_runs() -> None:
    rows = re.findall(r"^\| \*\*(.+?)\.?\*\*", (ROOT / "docs/promises.md").read_text("utf-8"), re.MULTILINE)
    named = {
        name.rstrip(".")
        for path in (ROOT / "tests").glob("test_*.py")
        for name in re.findall(r'mark\.promise\("(.+?)"\)', path.read_text("utf-8"))
    }
    assert named == set(rows)


def test_tests_of_a_file_stay_together(request: pytest.FixtureRequest) -> None:
    """Each worker would make the fixtures of a module else: pytest-xdist marks groups in the node ids."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        assert request.node.nodeid.endswith("@test_suite.py")
