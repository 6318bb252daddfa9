"""Limits of a client, and their options: read-only, apps, deployments, clusters, targets, images."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NoReturn

from cyclopts import Parameter

from prefect_rollout.errors import ConfigurationError, InputError
from prefect_rollout.release.images import (
    ALLOW,
    RAN_BEFORE,
    UNLISTED,
    allows,
    registry_patterns,
    usable_pattern,
)
from prefect_rollout.text import one_line

_ALLOW = "PREFECT_ROLLOUT_MCP_ALLOW_"


def _allow(option: str, description: str) -> Parameter:
    variable = f"{_ALLOW}{option.upper()}S"
    return Parameter(
        name=f"--allow-{option}", env_var=variable, negative="", show_default=False, help=description
    )


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Policy:
    """Limits of MCP clients. `*` matches any text; without a limit, everything except images is allowed."""

    read_only: Annotated[
        bool,
        Parameter(env_var="PREFECT_ROLLOUT_MCP_READ_ONLY", negative="", help="Provide only read-only tools."),
    ] = False
    apps: Annotated[Sequence[str], _allow("app", "Allow only this app ID; may be repeated.")] = ()
    deployments: Annotated[
        Sequence[str], _allow("deployment", "Allow only this deployment; may be repeated.")
    ] = ()
    clusters: Annotated[
        Sequence[str],
        _allow("cluster", "Allow only this cluster; may be repeated. Requests must then name clusters."),
    ] = ()
    targets: Annotated[
        Sequence[str], _allow("target", "Allow only this block, as type-slug/name; may be repeated.")
    ] = ()
    images: Annotated[
        Sequence[str],
        _allow(
            "image",
            "Allow only images of this registry or repository, such as harbor.example/team; may be repeated. "
            "Default: an image that a client names must come from a registry and namespace that the "
            "deployment has used before, or from K8S_REGISTRY_URL.",
        ),
    ] = ()

    def check_settings(self, environment: Mapping[str, str]) -> None:
        """Raise `ConfigurationError` if a variable is empty, or a pattern is invalid."""
        for name, value in environment.items():
            # A compose file can pass on a variable that is not set.
            if name.startswith(_ALLOW) and not value.strip():
                raise ConfigurationError(
                    f"{name} is set but empty",
                    advice="Set it to the allowed names, or unset it to allow all.",
                    field=name,
                )
        for pattern in self.images:
            try:
                usable_pattern(pattern)
            except ValueError as error:
                raise ConfigurationError(
                    f"allow_image: {error}",
                    advice="Correct --allow-image, or leave it out.",
                    field="allow_image",
                ) from None

    @property
    def restrict(self) -> bool:
        """True if anything but images is restricted."""
        return bool(self.apps or self.deployments or self.clusters or self.targets)

    def tags(self, registry_url: str | None) -> list[str]:
        """Return the tags of submitted runs, which limit the images to release and the names to show."""
        patterns = list(map(usable_pattern, self.images)) or [RAN_BEFORE, *registry_patterns(registry_url)]
        return [*(f"{ALLOW}{pattern}" for pattern in patterns), *([UNLISTED] if self.restrict else [])]

    def check(self, parameters: Mapping[str, Any], *, clusters: bool = True) -> None:
        """Return if the parameters of a release, or the `plan` of a batch, are allowed.

        Raises:
            InputError: a value is not allowed; it names the field and the allowed values.
            PlanError: the plan of a batch has mistakes.
        """
        limits = (self.apps, self.deployments, self.targets, self.images, self.clusters if clusters else ())
        if not any(limits):
            return
        if "plan" not in parameters:
            self._check_one(parameters, "", clusters=clusters)
            return
        from prefect_rollout.batch.plan import Plan

        plan = Plan.of_parameter(parameters["plan"])
        for number, release in enumerate(plan.releases):
            # With the plan's defaults applied.
            self._check_one(plan.request(release).model_dump(), f"plan.releases.{number}.", clusters=clusters)

    def allows(self, parameters: Mapping[str, Any]) -> bool:
        """Return True if `check` passes; a run of another client may have any parameters."""
        try:
            self.check(parameters)
        except InputError:
            return False
        return True

    def allows_cluster(self, name: str) -> bool:
        """Return True if the cluster is allowed."""
        return _allowed(name, self.clusters)

    def _check_one(self, named: Mapping[str, Any], where: str, *, clusters: bool) -> None:
        _check(f"{where}app_id", named.get("app_id"), self.apps)
        _check(f"{where}deployment", named.get("deployment"), self.deployments)
        _check(f"{where}target", named.get("target") or DEFAULT_TARGET, self.targets)
        given = named.get("clusters")
        # Without a list, the release covers all clusters of the deployment, which are not known here.
        for cluster in (given if isinstance(given, list) and given else [ALL]) if clusters else []:
            _check(f"{where}clusters", cluster, self.clusters)
        images = named.get("images")
        for container, image in images.items() if self.images and isinstance(images, dict) else ():
            if not allows(map(usable_pattern, self.images), str(image)):
                _refuse(f"{where}images.{one_line(container, 80)}", image, self.images)


ALL = "(all)"
DEFAULT_TARGET = "container-cloud/default"
"""The default of `Request.target`, without the import of all models."""


def _allowed(value: object, allowed: Collection[str]) -> bool:
    text = str(value)
    return not allowed or any(
        # Only `*` is special, and only a bare `*` allows all clusters.
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
        advice=f"Allowed: {listed}. The operator of this MCP server sets the limits; nothing was submitted.",
        field=field,
    )
