"""One release of pods that are ready at once: against its bare HTTP calls, and the article's script."""

import statistics
import subprocess
import sys
import time
from typing import Any

from rig import AT_ONCE, ROLLOUT, Row, child, clean_environment, shop, simulated, spread, workplace

TIMES = 10
POLL_SECONDS = 5
READY_AFTER = (5.5, 7, 8.5, 9.9)  # seconds until the pods of the apps 2, 3, … are ready


def measure() -> list[Row]:
    """The release turn by turn with the others; where its time goes; how soon it sees ready pods."""
    apps = shop(1, AT_ONCE)["apps"]
    for number, seconds in enumerate(READY_AFTER, 2):
        (app,) = shop(1, {**AT_ONCE, "start": seconds})["apps"]
        deployment = app["deployments"][0]
        deployment |= {"id": number, "timings": {**AT_ONCE, "start": seconds}, "online": {"c1": number}}
        deployment["templates"][0]["id"] = number
        apps.append({**app, "id": number, "name": f"app-{number}"})
    with workplace() as folder, simulated(folder, {"timings": AT_ONCE, "apps": apps}) as cloud:
        variables = {**clean_environment(folder), **cloud.variables}
        apps_ready = [str(number) for number in range(2, 2 + len(READY_AFTER))]
        found: dict[str, Any] = child("one_child.py", [folder / "one", TIMES, *apps_ready], variables)
        began = time.monotonic()
        command = [ROLLOUT, "deploy", "--app-id", "1", "--deployment", "web"]
        subprocess.run(command, env=variables, check=True, capture_output=True)
        whole = time.monotonic() - began
    ours, bare, article = found["ours"], found["bare"], found["article"]
    middle, base = statistics.median(ours), statistics.median(bare)
    return [
        Row(
            "one release",
            middle,
            "s",
            1.15 * base + POLL_SECONDS,
            f"{spread(ours)}; goal: 1.15 × bare + a poll",
        ),
        Row("one release: its HTTP calls alone", base, "s", None, spread(bare)),
        Row(
            "one release: as the article does it",
            statistics.median(article),
            "s",
            None,
            "first look after 5 s",
        ),
        Row(
            "one release by its HTTP calls alone",
            middle / base,
            "×",
            None,
            "what Prefect costs; there is no poll",
        ),
        Row(
            "one release by that of the article",
            middle / statistics.median(article),
            "×",
            1,
            "all of it is the article's first wait",
        ),
        *(
            Row(f"one release, of it: {name}", seconds, "s", None, note)
            for name, seconds, note in found["parts"]
        ),
        Row(
            "pods ready to released",
            max(found["seen"]),
            "s",
            POLL_SECONDS,
            f"a poll every 5 s; {spread(found['seen'])}",
        ),
        Row(
            "the command from its start to its end",
            whole,
            "s",
            None,
            "a local server and its first database",
        ),
        Row("the command: start of the interpreter alone", _interpreter(), "s"),
    ]


def _interpreter() -> float:
    took = []
    for _ in range(5):
        began = time.monotonic()
        subprocess.run([sys.executable, "-c", "pass"], check=True)
        took.append(time.monotonic() - began)
    return statistics.median(took)
