"""Ends what a test run started, once the run itself has ended, however it ended.

`python guardian.py MARK`: waits for the end of standard input, then kills every process whose environment
has `ROLLOUT_TESTS=MARK`. Servers, workers and local services inherit the variable, detached ones too.
"""

import os
import sys
from contextlib import suppress

import psutil


def marked(mark: str) -> list[psutil.Process]:
    """Return the processes of the run, without this one; `info["cmdline"]` has their arguments."""
    return [
        process
        for process in psutil.process_iter(["cmdline", "environ"])
        if process.pid != os.getpid() and (process.info["environ"] or {}).get("ROLLOUT_TESTS") == mark
    ]


if __name__ == "__main__":
    sys.stdin.read()
    while left := marked(sys.argv[1]):
        for process in left:
            with suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(left, timeout=5)
