"""What the package adds to Prefect alone: packages, megabytes, and the start of a command."""

import json
import statistics
import subprocess
import sys
import time
from importlib.metadata import requires, version
from pathlib import Path

from rig import BIN, PREFECT, ROLLOUT, Row, clean_environment, spread, workplace

ROOT = Path(__file__).parent.parent
UV = str(BIN / "uv")
TIMES = 7


def measure() -> list[Row]:
    """Two new environments, and the time of `--help`."""
    # Without the bounds that go with it here, Prefect does not start.
    bounds = [
        each for each in requires("prefect-rollout") or [] if each.startswith(("fastapi", "sqlalchemy"))
    ]
    with workplace() as folder:
        alone = _installed(folder / "alone", [f"prefect=={version('prefect')}", *bounds])
        ours = _installed(folder / "ours", [str(ROOT)])
        took: dict[str, list[float]] = {name: [] for name in (ROLLOUT, PREFECT)}
        for turn in range(TIMES + 1):
            for command, seconds in took.items():
                seconds.append(_help(command, folder))
                if not turn:  # the first one reads from the disk
                    seconds.clear()
    return [
        Row("installed packages", ours[0], "", None, f"Prefect alone: {alone[0]}"),
        Row("installed megabytes", ours[1], "MB", None, f"Prefect alone: {alone[1]:.0f} MB"),
        Row("prefect-rollout --help", statistics.median(took[ROLLOUT]), "s", None, spread(took[ROLLOUT])),
        Row("prefect --help", statistics.median(took[PREFECT]), "s", None, spread(took[PREFECT])),
    ]


def _installed(folder: Path, wanted: list[str]) -> tuple[int, float]:
    """How many packages, and megabytes, an environment with these has."""
    environment = clean_environment(folder.parent)
    for command in (
        [UV, "venv", "--quiet", "--python", sys.executable, str(folder)],
        [UV, "pip", "install", "--quiet", "--python", str(folder), *wanted],
    ):
        subprocess.run(command, env=environment, check=True)
    listed = [UV, "pip", "list", "--quiet", "--format", "json", "--python", str(folder)]
    count = len(json.loads(subprocess.check_output(listed, env=environment)))
    return count, sum(each.stat().st_size for each in (folder / "lib").rglob("*") if each.is_file()) / 2**20


def _help(command: str, home: Path) -> float:
    began = time.monotonic()
    subprocess.run([command, "--help"], env=clean_environment(home), check=True, capture_output=True)
    return time.monotonic() - began
