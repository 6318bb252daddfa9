"""The control plane of the tests itself."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import go_programs
import psutil
import pytest
from go_programs import NoGoError

import control_plane

STARTER = """
import sys
from pathlib import Path
from control_plane import control_plane
with control_plane(Path(sys.argv[1])):
    print("up", flush=True)
    sys.stdin.read()
"""


def left(folder: Path) -> list[psutil.Process]:
    """Return the processes that were started for a folder."""
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if any(str(folder) in each for each in process.info["cmdline"] or [])
    ]


def test_it_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    go_programs.control_plane()
    starter = subprocess.Popen(
        [sys.executable, "-c", STARTER, tmp_path / "plane"],
        cwd=Path(control_plane.__file__).parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert starter.stdout
    assert starter.stdout.readline() == b"up\n"
    # The program itself, with etcd and the nodes; and a process for each other component.
    assert len(left(tmp_path / "plane")) == 1 + 4
    os.kill(starter.pid, signal.SIGKILL)
    starter.wait(30)
    until = time.monotonic() + 60
    while left(tmp_path / "plane"):
        assert time.monotonic() < until, left(tmp_path / "plane")
        time.sleep(0.1)


def test_without_go_it_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = tmp_path / "go"
    old.write_text("#!/bin/sh\necho go version go1.19.8 linux/amd64\n")
    old.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(go_programs, "_CACHE", tmp_path / "cache")
    with pytest.raises(NoGoError, match=r"Go 1\.26 or newer.*go\.dev/dl"):
        go_programs.control_plane()
