"""Processes of Python scripts such as `prefect-rollout`, forked from one that has imported Prefect.

Each has a command line, environment, session, standard streams, signals and exit code of its own, and
imports `prefect_rollout`, as an executed process does. It takes a fraction of the CPU time.
"""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from operator import methodcaller
from pathlib import Path
from threading import Timer
from typing import Self

# What `prefect-rollout` imports sooner or later, except its own package, which reads the environment.
_MODULES = (
    *("anyio._backends._asyncio", "cronsim", "cyclopts.validators", "encodings.idna", "fastapi", "getpass"),
    *("prefect.artifacts", "prefect.concurrency.v1", "prefect.flow_engine", "prefect.main"),
    *("prefect.task_engine", "prefect.utilities.visualization", "prefect.workers.process", "prefect_redis"),
    *("pydantic.v1", "rich.live", "rich.prompt", "uvicorn"),
)


class Zygote:
    """Forks processes from one that has imported modules; its end does not end them."""

    def __init__(self, *modules: str) -> None:
        self.orders, its_end = socket.socketpair()
        with its_end:
            self._process = subprocess.Popen(
                [sys.executable, Path(__file__).with_name("zygote.py"), str(its_end.fileno()), *modules],
                # A home without the user's profiles, whose path Prefect takes from here for good.
                env={**os.environ, "HOME": os.environ["PREFECT_HOME"]},
                stdin=subprocess.DEVNULL,
                pass_fds=[its_end.fileno()],
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self.orders, self._process:
            self._process.kill()


@cache
def _commands() -> Zygote:
    """Return what forks commands; it ends with this process."""
    return Zygote(*_MODULES)


class Process:
    """A script that runs.

    Attributes:
        pid: its id, and that of its process group.
        stdout: its standard output, to be read.
        stderr: its standard error, to be read unless a descriptor takes it.
    """

    def __init__(
        self,
        command: Sequence[object],
        env: Mapping[str, str],
        *,
        stderr: int | None = None,
        zygote: Zygote | None = None,
    ) -> None:
        self._connection, its_end = socket.socketpair()
        out, its_out = os.pipe()
        err, its_err = os.pipe()
        its_in = os.open(os.devnull, os.O_RDONLY)
        streams = [its_in, its_out, its_err if stderr is None else stderr]
        socket.send_fds((zygote or _commands()).orders, [b"!"], [*streams, its_end.fileno()])
        its_end.close()
        for descriptor in (its_in, its_out, its_err):
            os.close(descriptor)
        self.stdout = os.fdopen(out, encoding="utf-8")
        self.stderr = os.fdopen(err, encoding="utf-8")
        order = {
            "command": [str(each) for each in command],
            "environment": dict(env),
            "folder": str(Path.cwd()),
        }
        self._connection.sendall(f"{json.dumps(order)}\n".encode())
        self._lines = self._connection.makefile()
        self.pid = int(self._lines.readline())

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code, or minus the number of the signal that ended it."""
        self._connection.settimeout(timeout)
        return int(self._lines.readline())


def run(
    command: Sequence[object], env: Mapping[str, str], timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    """Run a script to its end; after `timeout` seconds, kill it."""
    process = Process(command, env)
    killer = Timer(timeout, os.kill, [process.pid, signal.SIGKILL])
    killer.start()
    with process.stdout, process.stderr, ThreadPoolExecutor() as pool:
        stdout, stderr = pool.map(methodcaller("read"), [process.stdout, process.stderr])
    code = process.wait()
    killer.cancel()
    return subprocess.CompletedProcess([str(each) for each in command], code, stdout, stderr)
