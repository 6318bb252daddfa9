"""Limits of a client: writes or not, and which apps, deployments, clusters and images. Pure."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from prefect_rollout.errors import UNLISTED, InputError
from prefect_rollout.images import ALLOW, RAN_BEFORE, allows, registry_patterns, usable_pattern
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
        images: registries and repositories; empty for those that a deployment's images came from before.
    """

    read_only: bool = False
    apps: Collection[str] = ()
    deployments: Collection[str] = ()
    clusters: Collection[str] = ()
    targets: Collection[str] = ()
    images: Collection[str] = ()

    @property
    def restrict(self) -> bool:
        """True if anything but images is restricted."""
        return bool(self.apps or self.deployments or self.clusters or self.targets)

    def tags(self, registry_url: str | None) -> list[str]:
        """Return the tags of the runs that are submitted: by them, a run knows what it may release and tell.

        Args:
            registry_url: `K8S_REGISTRY_URL`, which is allowed by default.
        """
        patterns = list(map(usable_pattern, self.images)) or [RAN_BEFORE, *registry_patterns(registry_url)]
        return [*(f"{ALLOW}{pattern}" for pattern in patterns), *([UNLISTED] if self.restrict else [])]

    def check(self, parameters: Mapping[str, Any], *, clusters: bool = True) -> None:
        """Returns where the parameters of a flow name nothing that is not allowed.

        Args:
            parameters: of a release, or with the `plan` of a batch.
            clusters: whether it matters which clusters they name.

        Raises:
            InputError: they do; it names the field and what is allowed.
            PlanError: the plan has mistakes, and not all that it may name is allowed.
        """
        limits = (self.apps, self.deployments, self.targets, self.images, self.clusters if clusters else ())
        if not any(limits):
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
        images = named.get("images")
        for container, image in images.items() if self.images and isinstance(images, dict) else ():
            if not allows(map(usable_pattern, self.images), str(image)):
                _refuse(f"{where}images.{one_line(container, 80)}", image, self.images)


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
        _refuse(field, value, allowed)


def _refuse(field: str, value: object, allowed: Collection[str]) -> NoReturn:
    listed = ", ".join(one_line(pattern, 120) for pattern in sorted(allowed))
    raise InputError(
        f"{field}: {one_line(value, 120)!r} is not allowed here",
        advice=f"Allowed: {listed}. Who runs this MCP server decides; nothing was submitted.",
        field=field,
    )
