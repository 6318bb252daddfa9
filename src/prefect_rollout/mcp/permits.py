"""What a client may ask for: read only or not, and which apps, deployments, clusters and targets. Pure."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from prefect_rollout.errors import InputError
from prefect_rollout.text import one_line


@dataclass(frozen=True)
class Permits:
    """What is allowed; an empty list allows all. Names may hold `*`.

    Attributes:
        read_only: nothing may be written.
        apps: ids of apps.
        deployments: names of deployments.
        clusters: names of clusters; a request then has to name its own.
        targets: blocks, as type-slug/name.
    """

    read_only: bool = False
    apps: Collection[str] = ()
    deployments: Collection[str] = ()
    clusters: Collection[str] = ()
    targets: Collection[str] = ()

    def check(self, parameters: Mapping[str, Any], *, target: str) -> None:
        """Returns where the parameters of a flow name nothing that is not allowed.

        Args:
            parameters: of a release, or with the `plan` of a batch.
            target: the target where they name none.

        Raises:
            InputError: they do; it names the field and what is allowed.
        """
        plan = parameters.get("plan")
        if plan is None:
            self._check_one(parameters, target, "")
            return
        if not isinstance(plan, Mapping):
            raise InputError("plan: should be an object with a list of releases", field="plan")
        defaults = plan.get("defaults") or {}
        for number, release in enumerate(plan.get("releases") or []):
            named = {**release, "target": release.get("target") or plan.get("target")}
            named["clusters"] = release.get("clusters") or defaults.get("clusters")
            self._check_one(named, target, f"plan.releases.{number}.")

    def allows(self, parameters: Mapping[str, Any], *, target: str) -> bool:
        """Whether `check` returns."""
        try:
            self.check(parameters, target=target)
        except (InputError, AttributeError):  # parameters that are none of ours
            return False
        return True

    def _check_one(self, named: Mapping[str, Any], target: str, where: str) -> None:
        _check(f"{where}app_id", [named.get("app_id")], self.apps)
        _check(f"{where}deployment", [named.get("deployment")], self.deployments)
        _check(f"{where}target", [named.get("target") or target], self.targets)
        # None named is all of the metaData's: whether those are allowed is not known here.
        _check(f"{where}clusters", named.get("clusters") or ["(all)"], self.clusters)


def _check(field: str, values: Iterable[Any], allowed: Collection[str]) -> None:
    for value in values:
        if allowed and not any(fnmatchcase(str(value), pattern) for pattern in allowed):
            listed = ", ".join(one_line(pattern, 120) for pattern in sorted(allowed))
            raise InputError(
                f"{field}: {one_line(value, 120)!r} is not allowed here",
                advice=f"Allowed: {listed}. Who runs this MCP server decides; nothing was submitted.",
                field=field,
            )
