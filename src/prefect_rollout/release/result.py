"""The result of a release, which a flow returns and `--json` prints."""

from enum import StrEnum
from typing import Any

from pydantic import (
    BaseModel,
    Field,
)

from prefect_rollout.release.image_facts import CheckedImage
from prefect_rollout.release.plan import ReleasePlan
from prefect_rollout.release.request import Action
from prefect_rollout.text import number, one_line
from prefect_rollout.verdict.status import Pod


class Outcome(StrEnum):
    """Outcomes of a release."""

    RELEASED = "released"
    FAILED = "failed"
    TIMED_OUT = "timed-out"
    CANCELLED = "cancelled"
    PLANNED = "planned"
    """A dry run: everything was read, nothing was written."""
    SKIPPED = "skipped"
    """The run was late, or a newer run superseded it: no request was sent to the platform."""


class ClusterResult(BaseModel):
    """Outcome of a release in one cluster."""

    cluster: str
    replicas: int | None = Field(description="Desired replicas; null if the release does not change them.")
    ready: int | None = Field(
        default=0, description="New pods that were ready at the last look; null if unknown."
    )
    desired: int | None = Field(
        default=None,
        description="Replicas that the platform was asked for, at the last look; null if unknown.",
    )
    note: str = Field(default="", description="A note for people; empty if nothing is special.")
    template: int | str | None = Field(
        default=None, description="The template that the release publishes; null until it is chosen."
    )
    published: bool | None = Field(
        default=False, description="True if the write was accepted; null if its answer was lost."
    )
    rolled_back: bool | None = Field(
        default=None, description="True if it was rolled back; null if no rollback was tried."
    )
    template_before: int | str | None = Field(
        default=None,
        description="The template online before; null if there was none or it is unknown.",
    )
    images_before: dict[str, str] | None = Field(
        default=None, description="That template's images; null if unknown."
    )
    object: str = Field(
        default="",
        description="The platform's object that holds the template, such as ReplicaSet web-5d8f.",
    )
    object_before: str = Field(default="", description="The same for the template online before.")
    commands: list[str] = Field(default=[], description="Commands to see more of it, for a person to copy.")
    online: int | str | None = Field(
        default=None,
        description="The template online at the last look; null if none or unknown.",
    )
    online_known: bool = Field(default=False, description="True if the last look knows what is online.")
    running: int | None = Field(
        default=None, description="Pods of any template that were Running at the last look; null if unknown."
    )
    pods: list[Pod] = Field(default_factory=list, description="The pods at the last look.")

    @property
    def wanted(self) -> int | None:
        """Replicas that the cluster has to reach; the platform's number if the release sets none."""
        return self.desired if self.replicas is None else self.replicas

    @property
    def live(self) -> str:
        """State of the cluster at the last look, such as `pub-bjwdt has template 5 online (…)`."""
        name = one_line(self.cluster, 60)
        if self.online is None:
            return f"{name}: {'nothing is online' if self.online_known else 'what is online is not known'}"
        pods = "pods not known"
        if self.running is not None:
            wanted = self.replicas if self.desired is None else self.desired
            pods = f"{self.running} pods of any template Running, {number(wanted)} wanted"
        return f"{name} has template {one_line(self.online, 40)} online ({pods})"


BACK = {True: ", rolled back", False: ", rollback failed", None: ""}
"""`rolled_back` in words, after an outcome."""


def cloud_words(cloud: str, target: str) -> str:
    """Return text such as `https://k8s.qihoo.net (container-cloud/default)`; empty if neither is known."""
    return f"{cloud or 'unknown'} ({target})" if target else cloud


class ReleaseResult(BaseModel):
    """Outcome of a release."""

    action: Action = Action.DEPLOY
    outcome: Outcome
    cloud: str = Field(default="", description="Address of the platform; empty until its block is loaded.")
    target: str = Field(
        default="", description="Block that the platform was reached through, or `environment variables`."
    )
    app_id: int | str
    app: str | None = None
    deployment: str
    release_id: str
    template_id: int | str | None = Field(
        default=None,
        description="The template that was created, or that a rollback returned to; null if none.",
    )
    base_template_id: int | str | None = Field(
        default=None, description="The template that was chosen as its base."
    )
    notes: list[str] = Field(
        default=[],
        description="Templates that were skipped, why, and how to release them anyway; images with problems.",
    )
    images: dict[str, str] = {}
    checked: list[CheckedImage] = Field(
        default=[], description="The images as their registries had them; empty if none was asked."
    )
    clusters: list[ClusterResult] = []
    evidence: str | None = Field(
        default=None,
        description="strong: the platform reported revisions and they agree. weak: names and states only.",
    )
    reason: str = ""
    requested_by: str = Field(default="", description="Person who requested it, if known.")
    trigger: str = Field(
        default="", description="What started it: cli, schedule, batch, mcp, ui or api, python."
    )
    dry_run: bool = Field(default=False, description="True for a dry run, which writes nothing.")
    tries: int = Field(default=1, description="Attempt number, starting at 1.")
    approved_by: str = Field(default="", description="Person who approved it.")
    approval_comment: str = Field(default="", description="Comment of the approver.")
    break_glass: str = Field(default="", description="Reason for passing a closed release window.")
    plan: ReleasePlan | None = Field(
        default=None, description="The plan, for dry runs and for runs with expect_plan."
    )
    seconds: dict[str, float] = Field(default={}, description="Seconds that each step took.")
    failed_steps: list[str] = Field(default=[], description="Names of the steps that failed.")
    error: dict[str, Any] | None = Field(default=None, description="The error, if it failed.")
    links: dict[str, str] = Field(default={}, description="Further pages, label to address.")

    @property
    def wrote(self) -> bool:
        """True if any cluster was written to, or may have been."""
        return any(cluster.published is not False for cluster in self.clusters)

    @property
    def rolled_back(self) -> bool:
        """True if a rollback was tried, even if it failed. Such a run does not continue."""
        return any(cluster.rolled_back is not None for cluster in self.clusters)

    @property
    def over(self) -> bool:
        """True if a retry of the run has nothing left to do."""
        return self.dry_run or self.rolled_back or self.outcome is Outcome.RELEASED

    @property
    def live(self) -> str:
        """State of each cluster at the last look."""
        return "; ".join(cluster.live for cluster in self.clusters)
