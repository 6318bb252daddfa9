"""The plan of a release: its changes to each cluster. Pure."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Self

from pydantic import BaseModel, Field

from prefect_rollout.ids import Id, same_id
from prefect_rollout.release.image_facts import CheckedImage
from prefect_rollout.release.pod_diff import FieldChange
from prefect_rollout.release.replicas import Replicas
from prefect_rollout.release.request import Action, Approval, OnFailure, Order, Request
from prefect_rollout.release.workload import Baseline, Placement, Revision, Strategy, Workload, digest

SHOWN_CHANGES = 100
"""Maximum number of changes listed for a cluster; the others are only counted."""

UNSEEN = "its pods are not reported now: new and old pods cannot be told apart by their names"


class Procedure(BaseModel):
    """The order, canary, pause, failure policy and approval of a release, without its polling."""

    order: Order = "together"
    canary: str | None = None
    pause_seconds: float = 0
    unblock: bool = Field(
        default=False, description="True if it may delete pods that block their replacement."
    )
    on_failure: OnFailure | None = Field(
        default=None, description="Action after a failure; null for a run that never rolls back."
    )
    approval: Approval | None = Field(
        default=None, description="Whether a person has to approve; null for a run that asks nobody."
    )

    @classmethod
    def of(cls, request: "Request") -> Self:
        """Return the procedure that `request` asks for."""
        return cls.model_validate(request.model_dump(include=set(cls.model_fields)))


class ClusterPlan(BaseModel):
    """The part of a plan for one cluster."""

    cluster: str
    template_before: int | str | None = Field(
        default=None, description="The template that is online; null if none is."
    )
    template: int | str | None = Field(
        default=None, description="The template to publish; null if the release creates a new one."
    )
    base_template_id: int | str | None = Field(
        default=None, description="The template that its new one is created from, if not that of the plan."
    )
    images_before: dict[str, str] | None = Field(
        default=None, description="Images that are online; null if unknown."
    )
    images: dict[str, str] = Field(default={}, description="Images after the release.")
    pods: int | None = Field(default=None, description="Pods that are listed now; null if unknown.")
    replicas: int | None = Field(description="Desired replicas; null if they are not changed.")
    desired: int | None = Field(
        default=None,
        description="Replicas that the platform was asked for before; null if it does not report them.",
    )
    assumed: bool = Field(
        default=False, description="True if `replicas` replaces a number that the platform does not report."
    )
    notes: list[str] = Field(default=[], description="Notes for people.")
    changes: list[FieldChange] | None = Field(
        default=None,
        description="Other changes of the pod template; null if unknown.",
    )
    more: int = Field(default=0, description="Number of changes that are not listed.")

    @property
    def nothing(self) -> bool:
        """True if the pods stay as they are, as far as that is known."""
        same = self.changes == [] and self.images == self.images_before
        if self.replicas is None:
            return same
        return same and self.pods == self.replicas and self.desired in {None, self.replicas}


class ReleasePlan(BaseModel):
    """The plan of a release, and the hash of everything that decides what it writes."""

    action: Action
    plan_hash: str
    cloud: str = Field(default="", description="Address of the platform.")
    target: str = Field(default="", description="Block with the credentials of the platform.")
    app_id: int | str
    deployment: str
    base_template_id: int | str | None = Field(
        default=None, description="The template that a new one is created from; null in a rollback."
    )
    strategy: Strategy | None = None
    in_place: bool = Field(default=False, description="True if pods keep their names.")
    procedure: Procedure = Procedure()
    notes: list[str] = Field(
        default=[], description="Templates that were skipped, why, and how to release them anyway."
    )
    unknown: list[int | str] = Field(
        default=[], description="Chosen templates without a release on record; they count as released."
    )
    checked: list[CheckedImage] = Field(
        default=[], description="The images as their registries have them; empty if none was asked."
    )
    clusters: list[ClusterPlan]

    @property
    def nothing(self) -> bool:
        """True if the pods of all clusters stay as they are, as far as that is known."""
        return self.action is not Action.RESTART and all(cluster.nothing for cluster in self.clusters)


class Target(NamedTuple):
    """The state that a release gives one cluster.

    Attributes:
        cluster: the cluster.
        before: the state before the release.
        after: the revision to publish, or the base of a new one.
        images: images of the cluster after the release, `{container: image}`.
        replicas: replicas of the cluster after the release.
    """

    cluster: str
    before: Baseline
    after: Revision
    images: Mapping[str, str]
    replicas: Replicas


def release_plan(
    action: Action,
    targets: Sequence[Target],
    *,
    platform: str,
    cloud: str,
    target: str,
    workload: Workload,
    placement: Placement,
    creates: bool,
    procedure: Procedure,
    notes: Sequence[str] = (),
    unknown: Sequence[Id] = (),
    checked: Sequence[CheckedImage] = (),
) -> ReleasePlan:
    """Return the plan of a release, with its hash.

    The hash covers everything that decides what is written, and nothing that changes by itself, such as pods.

    `platform` is `Platform.identity`. `cloud`, its address, and `target`, the block with its credentials, are
    for people. With `creates`, the release creates a new revision from the one in `targets`. `notes` name the
    revisions that were skipped, and why; the chosen revisions in `unknown` have no release on record.
    `checked` has the images as their registries have them.
    """
    # By image: clusters may run different images in containers of one name.
    digests = {each.image: each.digest for each in checked if each.digest}
    facts = {
        "action": action.value,
        "platform": platform,
        "app": str(workload.app_id),
        "deployment": str(workload.id),
        "strategy": placement.strategy and placement.strategy.model_dump(mode="json"),
        "in_place": placement.in_place,
        "procedure": procedure.model_dump(mode="json", exclude=None if procedure.unblock else {"unblock"}),
        # If clusters are written to one by one, the order decides which ones precede a failure.
        "sequence": [each.cluster for each in targets] if procedure.order == "one-by-one" else None,
        "notes": list(notes),
        **({"digests": digests} if digests else {}),
        "clusters": sorted(
            (
                {
                    "cluster": each.cluster,
                    "online": None if each.before.online is None else str(each.before.online),
                    "before": each.before.revision and _content(each.before.revision),
                    "template": str(each.after.id),
                    "after": _content(each.after),
                    "images": dict(each.images),
                    # An assumed number depends on the listed pods, and is not written.
                    "replicas": None if each.replicas.assumed else each.replicas.number,
                }
                for each in targets
            ),
            key=lambda each: str(each["cluster"]),
        ),
    }
    return ReleasePlan(
        action=action,
        plan_hash=digest(facts)[:16],
        cloud=cloud,
        target=target,
        app_id=workload.app_id,
        deployment=workload.name,
        base_template_id=targets[0].after.id if creates else None,
        strategy=placement.strategy,
        in_place=placement.in_place,
        procedure=procedure,
        notes=list(notes),
        unknown=list(unknown),
        checked=list(checked),
        clusters=[
            _cluster_plan(each, action, placement, targets[0].after.id if creates else None)
            for each in targets
        ],
    )


def _content(revision: Revision) -> list[object]:
    return [revision.digest, revision.images]


def _cluster_plan(target: Target, action: Action, placement: Placement, base: Id | None) -> ClusterPlan:
    """Return the plan of a cluster; with `base`, that of the plan, a new revision is created."""
    before = target.before
    same = before.revision is not None and before.revision.digest == target.after.digest
    images_before = before.revision.images if before.revision else None
    stays = action is Action.SCALE or (same and images_before == dict(target.images))
    replaced = action is Action.RESTART or not stays
    unseen = before.pods is None and before.online is not None and replaced and not placement.in_place
    return ClusterPlan(
        cluster=target.cluster,
        template_before=before.online,
        template=target.after.id if base is None else None,
        base_template_id=None if base is None or same_id(base, target.after.id) else target.after.id,
        images_before=images_before,
        images=dict(target.images),
        pods=None if before.pods is None else len(before.pods),
        replicas=target.replicas.number,
        desired=before.desired,
        assumed=target.replicas.assumed,
        notes=[
            *placement.notes.get(target.cluster, ()),
            *(note for note in (target.replicas.note, UNSEEN if unseen else "") if note),
        ],
        changes=[] if same or before.online is None else None,
    )


def with_changes(plan: ReleasePlan, changes: Mapping[str, Sequence[FieldChange]]) -> ReleasePlan:
    """Return the plan with the changes of pod templates, `{cluster: changes}`."""
    clusters = [
        each.model_copy(
            update={
                "changes": list(changes[each.cluster][:SHOWN_CHANGES]),
                "more": max(0, len(changes[each.cluster]) - SHOWN_CHANGES),
            }
        )
        if each.cluster in changes
        else each
        for each in plan.clusters
    ]
    return plan.model_copy(update={"clusters": clusters})
