"""What a client may ask for: read only or not, and which apps, deployments, clusters and targets. Pure."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
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

    @property
    def restrict(self) -> bool:
        """Whether anything is not allowed to be named."""
        return bool(self.apps or self.deployments or self.clusters or self.targets)

    def check(self, parameters: Mapping[str, Any], *, clusters: bool = True) -> None:
        """Returns where the parameters of a flow name nothing that is not allowed.

        Args:
            parameters: of a release, or with the `plan` of a batch.
            clusters: whether it matters which clusters they name.

        Raises:
            InputError: they do; it names the field and what is allowed.
            PlanError: the plan has mistakes, and not all that it may name is allowed.
        """
        if not (self.restrict if clusters else (self.apps or self.deployments or self.targets)):
            return
        if "plan" not in parameters:
            self._check_one(parameters, "", clusters=clusters)
            return
        from prefect_rollout.plan import Plan

        plan = Plan.of_parameter(parameters["plan"])
        for number, release in enumerate(plan.releases):
            # As it would be carried out, whatever the plan's defaults are.
            self._check_one(plan.request(release).model_dump(), f"plan.releases.{number}.", clusters=clusters)

    def allows(self, parameters: Mapping[str, Any]) -> bool:
        """Whether `check` returns; anybody may have started a run, with parameters of any kind."""
        try:
            self.check(parameters)
        except InputError:
            return False
        return True

    def allows_cluster(self, name: str) -> bool:
        """Whether the cluster may be named."""
        return _allowed(name, self.clusters)

    def _check_one(self, named: Mapping[str, Any], where: str, *, clusters: bool) -> None:
        _check(f"{where}app_id", named.get("app_id"), self.apps)
        _check(f"{where}deployment", named.get("deployment"), self.deployments)
        _check(f"{where}target", named.get("target") or DEFAULT_TARGET, self.targets)
        given = named.get("clusters")
        # None named is all of the metaData's: whether those are allowed is not known here.
        for cluster in (given if isinstance(given, list) and given else [ALL]) if clusters else []:
            _check(f"{where}clusters", cluster, self.clusters)


ALL = "(all)"
DEFAULT_TARGET = "container-cloud/default"
"""The target of a flow that names none: `Request.target`, without the import of all models."""


def _allowed(value: object, allowed: Collection[str]) -> bool:
    text = str(value)
    return not allowed or any(
        # Only `*` means more than itself, and what is not named is not any name.
        pattern == "*" or (text != ALL and re.fullmatch(re.escape(pattern).replace(r"\*", ".*"), text))
        for pattern in allowed
    )


def _check(field: str, value: object, allowed: Collection[str]) -> None:
    if not _allowed(value, allowed):
        listed = ", ".join(one_line(pattern, 120) for pattern in sorted(allowed))
        raise InputError(
            f"{field}: {one_line(value, 120)!r} is not allowed here",
            advice=f"Allowed: {listed}. Who runs this MCP server decides; nothing was submitted.",
            field=field,
        )
