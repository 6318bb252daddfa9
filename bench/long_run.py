"""An hour of releases, ten times as fast, where one exchange with the cloud in twenty goes wrong."""

from collections import Counter

from rig import TWENTY_SECONDS, Row, child, served_prefect, shop, simulated, workplace

APPS, SPEED, HOUR = 40, 10, 3600
EVERY_SECONDS = 30  # a release, by the cloud's clock
FAULTS = [
    {"kind": "status", "status": 500, "probability": 0.01, "seed": 1},
    {"kind": "status", "status": 503, "probability": 0.01, "seed": 2},
    {"kind": "reset_before", "probability": 0.01, "seed": 3},
    {"kind": "reset_after", "probability": 0.01, "seed": 4},
    {"kind": "cut", "probability": 0.005, "seed": 5},
    {"kind": "malformed", "probability": 0.005, "seed": 6},
]
GOAL_MEGABYTES = 10.0


def measure(seconds: float = HOUR) -> list[Row]:
    """What is lost, what is done twice, and what grows."""
    scenario = shop(APPS, TWENTY_SECONDS, faults=FAULTS)
    with (
        workplace() as folder,
        simulated(folder, scenario, SPEED) as cloud,
        served_prefect(folder) as variables,
    ):
        arguments = [folder / "prefect" / "prefect.db", APPS, seconds / SPEED, EVERY_SECONDS / SPEED]
        found = child("long_child.py", arguments, {**variables, **cloud.variables})
        writes = Counter((each["app"], each["kind"]) for each in cloud.control("GET", "record"))
    begun = Counter({(app, kind): n for app, n in found["begun"] for kind in ("template", "publish")})
    count, first, last = len(found["outcomes"]), found["samples"][0], found["samples"][-1]
    lost = sum(outcome != "released" for outcome in found["outcomes"])
    return [
        Row(
            "an hour: releases that were not released",
            lost,
            "",
            0,
            f"of {count}, in {seconds / SPEED / 60:.0f} minutes; 5 % of exchanges spoilt",
        ),
        Row("an hour: writes that took effect twice", (writes - begun).total(), "", 0),
        Row(
            "an hour: memory that grew after the first quarter",
            (last["memory"] - first["memory"]) / 2**20,
            "MB",
            GOAL_MEGABYTES,
            f"of {last['memory'] / 2**20:.0f} MB",
        ),
        Row(
            "an hour: database a release",
            (last["database"] - first["database"]) / 1024 / max(1, last["releases"] - first["releases"]),
            "KB",
        ),
    ]
