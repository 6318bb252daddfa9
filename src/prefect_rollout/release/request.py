"""Requests to change a deployment, and the checks of their fields."""

import re
from enum import StrEnum
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_core import PydanticCustomError

from prefect_rollout.errors import InputError
from prefect_rollout.ids import Id, first_mistake, usable_cluster, usable_id
from prefect_rollout.release.images import CheckImages, usable_image
from prefect_rollout.text import one_line

DAY = 86_400  # seconds

Cluster = Annotated[str, Field(min_length=1, max_length=253)]
Name = Annotated[str, Field(min_length=1, max_length=253)]


def _image(value: str) -> str:
    try:
        return usable_image(value)
    except ValueError as error:
        raise PydanticCustomError("image", "{problem}", {"problem": str(error)}) from None


# The schema keeps a pattern for forms; the error names the likely cause.
Image = Annotated[
    str,
    Field(max_length=2000, json_schema_extra={"pattern": r"^\S+$", "minLength": 1}),
    AfterValidator(_image),
]
Reason = Annotated[str, Field(max_length=1000)]
Order = Literal["together", "one-by-one"]
OnFailure = Literal["stop", "rollback"]
Seconds = Annotated[float, Field(ge=0, le=DAY, allow_inf_nan=False)]
PollSeconds = Annotated[float, Field(ge=0.01, le=3600, allow_inf_nan=False)]
PollAttempts = Annotated[int, Field(ge=1, le=100_000)]
WindowWait = Annotated[float, Field(ge=0, le=14 * DAY, allow_inf_nan=False)]
LateMinutes = Annotated[float, Field(ge=0, le=14 * 1440, allow_inf_nan=False)]
ApprovalSeconds = Annotated[
    float,
    Field(
        ge=1,
        le=30 * DAY,
        allow_inf_nan=False,
        description="Seconds to wait for an approval before the run fails.",
    ),
]
Approval = Literal["none", "before-release"]
Person = Annotated[str, Field(max_length=200)]


DEFAULT_TARGET = "container-cloud/default"
"""Block of a request that names no target."""

ENVIRONMENT = "environment"
"""Target that selects the environment variables, even if blocks are saved."""

PLATFORMS = ("container-cloud", "kubernetes")
"""Types of blocks that name their default block as a target."""

_BLOCK = r"[a-z0-9-]{1,200}/[a-z0-9-]{1,200}"


def _plan_hash(value: str) -> str:
    value = value.strip().lower()
    if not re.fullmatch(_PLAN_HASH, value):
        raise ValueError("the hash of a plan has 16 digits, 0-9 and a-f, as a dry run prints it")
    return value


_PLAN_HASH = r"^([0-9a-f]{16})?$"
# The schema keeps the pattern for forms; the error is a sentence.
PlanHash = Annotated[str, AfterValidator(_plan_hash), Field(json_schema_extra={"pattern": _PLAN_HASH})]
"""Empty, or the 16 hexadecimal digits that a dry run prints."""


class Checked(BaseModel):
    """Field checks that requests and plans share. An unknown field is an error."""

    model_config = ConfigDict(extra="forbid")

    @classmethod
    def of(cls, /, **values: Any) -> Self:
        """Return the object made of `values`.

        Raises:
            InputError: a value is invalid; the message names its field and what the field allows.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise InputError(first_mistake(error), field=str(error.errors()[0]["loc"][0])) from None

    @field_validator("app_id", "deployment", "template_id", "to_template", check_fields=False)
    @classmethod
    def _usable_id(cls, value: int | str | None) -> int | str | None:
        if value is None or value == "":
            return value
        return usable_id(value)

    @field_validator("app_id", check_fields=False)
    @classmethod
    def _app_given(cls, value: int | str) -> int | str:
        if value == "":
            raise ValueError("an app id is required, such as 3290")
        return value

    @field_validator("target", check_fields=False)
    @classmethod
    def _slug_and_name(cls, value: str | None) -> str | None:
        """Return a target as type-slug/name; the type of a platform alone means its default block."""
        if value in PLATFORMS:
            return f"{value}/default"
        if value not in {None, "", ENVIRONMENT} and not re.fullmatch(_BLOCK, value or ""):
            raise ValueError(
                f"a target is a block as type-slug/name, such as {DEFAULT_TARGET}, or {ENVIRONMENT} for the "
                "environment variables"
            )
        return value

    @field_validator("clusters", check_fields=False)
    @classmethod
    def _clusters_once(cls, value: list[str] | None) -> list[str] | None:
        for cluster in value or []:
            usable_cluster(cluster)
        if value is not None and len(set(value)) != len(value):
            raise ValueError("a cluster is listed twice")
        return value

    @field_validator("canary", check_fields=False)
    @classmethod
    def _canary_usable(cls, value: str | None) -> str | None:
        return value and usable_cluster(value)


By = Literal["semver", "numerical", "alphabetical"]
GROUP_REFERENCE = re.compile(r"\$(?:\{(\w+)\}|(\w+)|(\$))")  # as in Go's regexp.Expand, which Flux uses


class NewestPolicy(Checked):
    """A rule that chooses the newest tag of a repository."""

    by: By = Field(
        default="semver",
        description="Order of the tags; the last wins.",
    )
    range: str = Field(
        default="*",
        max_length=200,
        description="Versions of semver, such as ^1.2 or >=1.2 <2.",
    )
    pattern: str = Field(
        default="",
        max_length=500,
        description="Regular expression of tags, such as ^main-([0-9]+)$.",
    )
    extract: str = Field(
        default="",
        max_length=200,
        description="Part to compare, such as $1 of the pattern.",
    )
    prereleases: bool = Field(default=False, description="Include pre-releases of semver.")

    @field_validator("range")
    @classmethod
    def _readable(cls, value: str) -> str:
        import nodesemver  # noqa: PLC0415 - commands without a policy start sooner

        # Flux also separates the parts of a range by commas.
        plain = value.replace(",", " ")
        if not plain.strip() or nodesemver.valid_range(plain, False) is None:
            raise ValueError("it is no range of versions, such as ^1.2, 1.x or >=1.2 <2")
        return value

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, value: str) -> str:
        import regex  # noqa: PLC0415

        try:
            regex.compile(value)
        except regex.error as error:
            raise ValueError(f"it is no regular expression: {one_line(error, 120)}") from None
        return value

    @field_validator("range", "prereleases")
    @classmethod
    def _of_versions(cls, value: str | bool, info: ValidationInfo) -> str | bool:
        if value not in {"*", False} and info.data.get("by", "semver") != "semver":
            raise ValueError("it needs by: semver")
        return value

    @field_validator("extract")
    @classmethod
    def _of_the_pattern(cls, value: str, info: ValidationInfo) -> str:
        import regex  # noqa: PLC0415

        known = regex.compile(info.data.get("pattern", ""))
        for braced, bare, _ in GROUP_REFERENCE.findall(value):
            name = braced or bare
            if name and name not in known.groupindex and not (name.isdigit() and int(name) <= known.groups):
                raise ValueError(f"the pattern has no group {name}; write ${{name}} before a letter")
        return value

    def __str__(self) -> str:
        """Return such as `the highest version in ^1.2`."""
        order = {
            "semver": f"the highest version in {self.range}{' with pre-releases' * self.prereleases}",
            "numerical": "the highest number",
            "alphabetical": "the last in alphabetical order",
        }[self.by]
        of = f" of tags that match {self.pattern}" if self.pattern else ""
        return one_line(order + of, 800)


class FlowRequest(Checked):
    """Options of every flow."""

    dry_run: bool = Field(
        default=False, description="Write nothing; show what would change, and the hash of the plan."
    )
    expect_plan: PlanHash = Field(
        default="", description="Plan hash of a dry run; fail if anything has changed since."
    )
    requested_by: Person = Field(
        default="", description="Person who requests the change; kept in the report and the history."
    )
    window_wait_seconds: WindowWait = Field(
        default=0, description="Seconds to wait until a closed release window opens; 0 fails at once."
    )
    break_glass: Reason = Field(
        default="", description="Reason to override a closed release window; kept in the history."
    )
    late_minutes: LateMinutes = Field(
        default=60, description="Minutes after its scheduled time at which a run skips itself; 0 for never."
    )

    @property
    def writes(self) -> bool:
        """True if the run may write."""
        return not self.dry_run


class Request(FlowRequest):
    """A request to change a deployment."""

    app_id: Id = Field(description="ID of the app, such as 3290.")
    deployment: Name = Field(description="Exact name of the deployment, such as qapm-home.")
    target: str = Field(
        default="",
        description="Block with the platform's credentials, as type-slug/name or type-slug for its default "
        "block, such as kubernetes, or environment for the K8S_ variables; by default "
        f"{DEFAULT_TARGET} if it is saved, else the variables.",
    )
    clusters: list[Cluster] | None = Field(
        default=None, description="Clusters to change; by default all clusters of the deployment."
    )
    reason: Reason = Field(
        default="", description="Reason for the change; kept in the report, the history and any new template."
    )
    order: Order = Field(
        default="together",
        description="together changes all clusters, then watches them; one-by-one waits until a cluster is "
        "ready before it changes the next.",
    )
    canary: Cluster | None = Field(default=None, description="Cluster to change and watch before all others.")
    pause_seconds: Seconds = Field(
        default=0, description="Seconds to pause after a cluster is ready, before the next one is changed."
    )
    poll_seconds: PollSeconds = Field(default=5, description="Seconds between polls of the pods.")
    poll_attempts: PollAttempts = Field(default=20, description="Polls of the pods before the run times out.")
    grace_seconds: Seconds = Field(
        default=30, description="Seconds that a new pod may have problems before the run fails."
    )
    unblock: bool = Field(
        default=False,
        description="Delete pods of an earlier revision that are not ready and block their replacement, as "
        "in a StatefulSet whose last release failed.",
    )
    lock_wait_seconds: Seconds = Field(
        default=600,
        description="Seconds to wait while another run changes the same deployment; 0 fails at once.",
    )

    @field_validator("clusters")
    @classmethod
    def _none_named_is_all(cls, value: list[str] | None) -> list[str] | None:
        return value or None


class ReleaseRequest(Request):
    """A request to release a template."""

    template_id: Id | None = Field(
        default=None,
        description="Template to release, even if it failed before; by default the newest released one.",
    )
    images: dict[str, Image] | None = Field(
        default=None,
        description='Images that replace the template\'s, by container, such as {"web": "registry/web:2"}.',
    )
    newest: NewestPolicy | None = Field(
        default=None,
        description="Rule for the newest tag of `images` without a tag, by default of the only container; "
        "tags that failed are left out.",
    )
    pin_digest: bool = Field(
        default=False,
        description="Release images by digest, as name:tag@sha256:….",
    )
    check_images: CheckImages | None = Field(
        default=None,
        description="auto refuses images that their registry does not have, and warns if it does not answer; "
        "require refuses then, too; warn only warns. By default PREFECT_ROLLOUT_CHECK_IMAGES, or auto.",
    )
    on_failure: OnFailure = Field(
        default="stop",
        description="stop leaves a failed release as it is; rollback restores every cluster it changed.",
    )
    approval: Approval = Field(
        default="none",
        description="before-release suspends the run until a person approves its plan in the Prefect UI.",
    )
    approval_seconds: ApprovalSeconds = DAY


class RollbackRequest(Request):
    """A request to roll a deployment back."""

    to_template: Id | None = Field(
        default=None,
        description="Template to roll all clusters back to; by default the last one released in each.",
    )


class ScaleRequest(Request):
    """A request to change the number of pods."""

    replicas: Annotated[int, Field(strict=True, ge=0, le=10_000)] = Field(
        description="Number of pods in each cluster."
    )
    force: bool = Field(
        default=False, description="Scale even if something else, such as an autoscaler, sets the replicas."
    )


class Action(StrEnum):
    """Kinds of change to a deployment."""

    DEPLOY = "deploy"
    ROLLBACK = "rollback"
    RESTART = "restart"
    SCALE = "scale"
