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
    field_validator,
)
from pydantic_core import PydanticCustomError

from prefect_rollout.errors import InputError
from prefect_rollout.ids import Id, first_mistake, usable_cluster, usable_id
from prefect_rollout.release.images import usable_image

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
        description="Block with the platform's credentials, as type-slug/name, or environment for the K8S_ "
        f"variables; by default {DEFAULT_TARGET} if it is saved, else the variables.",
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

    replicas: Annotated[int, Field(strict=True, ge=1, le=32)] = Field(
        description="Number of pods in each cluster."
    )


class Action(StrEnum):
    """Kinds of change to a deployment."""

    DEPLOY = "deploy"
    ROLLBACK = "rollback"
    RESTART = "restart"
    SCALE = "scale"
