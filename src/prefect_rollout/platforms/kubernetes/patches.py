"""Conditional patches of a workload, its annotations and its history. Pure."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from prefect_rollout.errors import ConflictError, UpgradeError
from prefect_rollout.ids import Id, same_id, template_name
from prefect_rollout.platforms.kubernetes.objects import (
    CAUSE,
    RELEASE,
    RELEASED,
    RELEASES,
    REQUESTER,
    RESTART,
    Kind,
    Object,
    Stored,
    find_revision,
    revision_id,
    template_of,
    with_images,
    with_release,
)
from prefect_rollout.release.workload import Applied, Workload
from prefect_rollout.text import one_line

MANAGER = "prefect-rollout"
"""The field manager of all writes."""

JSON_PATCH = "application/json-patch+json"
MERGE_PATCH = "application/merge-patch+json"


class History(NamedTuple):
    """A workload and its revisions, the current one first."""

    kind: Kind
    workload: Object
    stored: list[Stored]


def release_patch(history: History, plan: Mapping[str, Any], revision: str | None) -> list[dict[str, Any]]:
    """Return the JSON patch of a change; the API server refuses it if the workload has changed since.

    Args:
        history: the workload as it was just read.
        plan: from `prepare` or `revert`: the revision to start from, images, release, cause and requester.
        revision: the revision that the change makes, for its mark; `None` for the dry run that computes it.

    Raises:
        UpgradeError: the cluster does not keep the revision to start from.
    """
    base = find_revision(history.stored, plan["base"])
    metadata = history.workload["metadata"]
    if base is None:
        raise UpgradeError(
            f"{template_name(plan['base'])} is no longer kept for {metadata['name']}",
            advice="Nothing was written. Choose one of `kubectl rollout history`, or raise its "
            "revisionHistoryLimit.",
        )
    if plan["release"]:
        marks = {
            RELEASE: plan["release"],
            RELEASED: revision or "",
            CAUSE: plan["cause"],
            REQUESTER: plan["requester"],
        }
        if history.kind.name != "Deployment" and revision:
            before = metadata.get("annotations") or {}
            marks[RELEASES] = with_release(before, revision, plan["release"])
    else:
        marks = {name: base.annotations.get(name, "") for name in (RELEASE, RELEASED, CAUSE, REQUESTER)}
    template = with_images(base.template, plan["images"])
    return [*conditional(history.workload, template), *annotate(history.workload, marks)]


def conditional(workload: Object, template: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the operations that set the pod template if the workload has not changed since it was read."""
    version = workload["metadata"]["resourceVersion"]
    return [
        {"op": "replace", "path": "/metadata/resourceVersion", "value": version},
        {"op": "replace", "path": "/spec/template", "value": template},
    ]


def annotate(workload: Object, marks: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return the operations that set annotations of a workload, and remove those that are empty."""
    before = workload["metadata"].get("annotations")
    operations: list[dict[str, Any]] = []
    if before is None:
        operations.append({"op": "add", "path": "/metadata/annotations", "value": {}})
    for name, value in marks.items():
        path = f"/metadata/annotations/{name.replace('~', '~0').replace('/', '~1')}"
        if value:
            operations.append({"op": "add", "path": path, "value": value})
        elif name in (before or {}):
            operations.append({"op": "remove", "path": path})
    return operations


def check_unchanged(workload: Workload, cluster: str, now: str, over: Id | None) -> None:
    """Check that nobody has changed the pod template since the release was planned.

    Raises:
        ConflictError: somebody has.
    """
    if over is not None and not same_id(now, over):
        raise ConflictError(
            f"{workload.id} in {one_line(cluster, 60)} was changed after this run was planned: "
            f"{template_name(now)} is online there, and {template_name(over)} was",
            advice="Look at what is online there, and start a new release if it should change.",
            cluster=cluster,
        )


def restarted_by(key: str, workload: Object) -> Applied | None:
    """Return what the restart with that key asked for, by its mark on the workload; `None` without it."""
    mark = (workload["metadata"].get("annotations") or {}).get(RESTART, "")
    marked, _, revision = mark.rpartition(" ")
    if marked != key:
        return None
    return Applied(revision=revision, generation=workload["metadata"].get("generation"))


def applied(workload: Object) -> Applied:
    """Return what a cluster has to reach after a write that returned `workload`."""
    return Applied(
        revision=revision_id(template_of(workload)), generation=workload["metadata"].get("generation")
    )
