"""Forks processes that run a Python script each, without the CPU seconds that the import of Prefect takes.

`zygote.py SOCKET MODULE...`, which `forked.Zygote` starts, imports the modules and ends when the other end
of the socket is closed. Each byte on the socket orders a process; with it come the process's standard input,
output and error, and a connection. A line of JSON on the connection holds the command line, the
environment and the working directory. The answer is the process's id and, when it has ended, its exit code,
each on a line.
"""

import builtins
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import prefect.context
from prefect.logging.configuration import setup_logging

_import = builtins.__import__
_running: dict[int, socket.socket] = {}


def main() -> None:
    """Import the modules and fork a process for each order."""
    orders = socket.socket(fileno=int(sys.argv[1]))
    for module in sys.argv[2:]:
        importlib.import_module(module)
    gc.freeze()  # no process has to search, and thereby copy, the imported modules
    gc.set_threshold(100_000, 50, 100)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, _report)
    while (received := socket.recv_fds(orders, 1, 4))[0]:
        *streams, descriptor = received[1]
        connection = socket.socket(fileno=descriptor)
        with connection.makefile() as lines:
            order = json.loads(lines.readline())
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
        pid = os.fork()
        if pid == 0:
            for each in (orders, connection, *_running.values()):
                each.close()
            run(streams, **order)
            return
        _running[pid] = connection
        _tell(connection, pid)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
        for stream in streams:
            os.close(stream)


def run(streams: list[int], command: list[str], environment: dict[str, str], folder: str) -> None:
    """Run the script in this process as if it had just been executed."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
    os.setsid()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    time.tzset()
    sys.argv[:] = command
    sys.path[0] = str(Path(command[0]).parent)
    builtins.__import__ = _import_prefect
    runpy.run_path(command[0], run_name="__main__")


def _import_prefect(name: str, *arguments: Any, **named: Any) -> Any:
    """Import a module; at the first of Prefect's, do what Prefect does with the environment when imported."""
    if name.partition(".")[0] == "prefect":
        builtins.__import__ = _import
        prefect.context.refresh_global_settings_context()
        setup_logging(incremental=False)
    return _import(name, *arguments, **named)


def _report(*_: object) -> None:
    """Tell the exit codes of the processes that have ended."""
    with suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            with _running.pop(ended[0]) as connection:
                _tell(connection, os.waitstatus_to_exitcode(ended[1]))


def _tell(connection: socket.socket, number: int) -> None:
    with suppress(BrokenPipeError):  # nobody has to wait for a process
        connection.sendall(f"{number}\n".encode())


main()
