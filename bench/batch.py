"""Many releases at once in one process, each of whose pods take 20 s; and against a process for each."""

import math
import statistics
from typing import Any

from rig import TWENTY_SECONDS, Row, child, clean_environment, served_prefect, shop, simulated, workplace

SIZES = (1, 10, 100, 500, 1000)
ALONE = 10
GOALS = {"wall": 3, "memory": 3}  # × the wall time of one, and MB a release, both with 500


def measure(sizes: tuple[int, ...] = SIZES) -> list[Row]:
    """Wall time, memory, requests and processor time, by the number of apps."""
    found = {size: _batch(size) for size in sizes}
    one = found[sizes[0]]["wall"]
    rows = [row for size in sizes for row in _of(size, found[size], one)]
    cost = [(math.log(n), math.log(each["cpu"] + each["server_cpu"])) for n, each in found.items() if n > 1]
    if len(cost) > 1:
        slope, last = (
            statistics.linear_regression(*zip(*few, strict=True)).slope for few in (cost, cost[-2:])
        )
        note = f"between the two largest: {last:.2f}"
        rows.append(Row("batch: processor time grows by apps to the power of", slope, "", 1.1, note))
    return rows + _alone(found.get(ALONE) or _batch(ALONE))


def _batch(size: int) -> dict[str, Any]:
    with workplace() as folder, simulated(folder, shop(size, TWENTY_SECONDS)) as cloud:
        variables = {**clean_environment(folder), **cloud.variables}
        figures: dict[str, Any] = child("batch_child.py", [size, folder / "batch"], variables)
        writes = cloud.control("GET", "record")
        if not figures["state"].startswith("Completed") or len(writes) != 2 * size:
            raise RuntimeError(f"a batch of {size} wrote {len(writes)} times and ended: {figures}")
        return figures


def _of(size: int, figures: dict[str, Any], wall_of_one: float) -> list[Row]:
    goal = GOALS if size == 500 else {}
    return [
        Row(f"batch of {size}: wall", figures["wall"], "s"),
        Row(f"batch of {size}: wall by that of one", figures["wall"] / wall_of_one, "×", goal.get("wall")),
        Row(f"batch of {size}: memory a release", figures["memory"] / size / 2**20, "MB", goal.get("memory")),
        Row(f"batch of {size}: requests to the cloud a release", figures["to_cloud"] / size, ""),
        Row(
            f"batch of {size}: requests to Prefect a release",
            figures["to_prefect"] / size,
            "",
            None,
            "over HTTP; events go through a web socket",
        ),
        Row(f"batch of {size}: most requests to the cloud in a second", figures["peak"], ""),
        Row(f"batch of {size}: processor time a release, ours", figures["cpu"] / size, "s"),
        Row(f"batch of {size}: processor time a release, Prefect's", figures["server_cpu"] / size, "s"),
    ]


def _alone(together: dict[str, Any]) -> list[Row]:
    with (
        workplace() as folder,
        simulated(folder, shop(ALONE, TWENTY_SECONDS)) as cloud,
        served_prefect(folder) as variables,
    ):
        alone = child("alone_child.py", [ALONE, folder], {**variables, **cloud.variables})
    memory, wall = alone["memory"] / together["memory"], alone["wall"] / together["wall"]
    return [
        Row(
            f"{ALONE} releases, a process each: wall",
            alone["wall"],
            "s",
            None,
            f"×{wall:.1f} of the batch's; Prefect's process worker",
        ),
        Row(
            f"{ALONE} releases, a process each: memory a release",
            alone["memory"] / ALONE / 2**20,
            "MB",
            None,
            f"×{memory:.0f} of the batch's; all that ends with the process, and what the batch's adds to one",
        ),
    ]
