"""Workloads of Kubernetes and their revisions, read from the JSON of the API server. Pure.

The id of a revision is a digest of its pod template, written in ten letters. Unlike the number that
`kubectl rollout history` shows, it does not change when an earlier revision becomes current again, and unlike
the pod-template-hash, it is known before the write: a server-side dry run returns the pod template as it will
be stored.
"""

import base64
import copy
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple
from urllib.parse import quote

from prefect_rollout.errors import InputError, WorkloadError
from prefect_rollout.ids import Id
from prefect_rollout.release.workload import ListedRevision, RollingUpdate, Strategy, digest
from prefect_rollout.text import one_line

Object = Mapping[str, Any]
"""An object as the API server writes it."""

HASH = "pod-template-hash"
CONTROLLER_HASH = "controller-revision-hash"
NUMBER = "deployment.kubernetes.io/revision"
CAUSE = "kubernetes.io/change-cause"
RELEASE = "prefect-rollout/release"
RELEASED = "prefect-rollout/revision"
REQUESTER = "prefect-rollout/requested-by"
RELEASES = "prefect-rollout/releases"
RESTART = "prefect-rollout/restart"
RESTARTED = "kubectl.kubernetes.io/restartedAt"


class Kind(NamedTuple):
    """A kind of workload: its name, the plural in paths, and the prefix in the name of a deployment."""

    name: str
    plural: str
    prefix: str

    @property
    def revisions(self) -> str:
        """The plural of the objects that hold its revisions."""
        return "replicasets" if self.name == "Deployment" else "controllerrevisions"

    @property
    def holder(self) -> str:
        """The kind of the same objects."""
        return "ReplicaSet" if self.name == "Deployment" else "ControllerRevision"

    @property
    def label(self) -> str:
        """The label of a pod that names its revision."""
        return HASH if self.name == "Deployment" else CONTROLLER_HASH


KINDS = {
    kind.prefix: kind
    for kind in (
        Kind("Deployment", "deployments", "deployment"),
        Kind("StatefulSet", "statefulsets", "statefulset"),
        Kind("DaemonSet", "daemonsets", "daemonset"),
    )
}


def apps_path(kind: Kind, namespace: str, plural: str | None = None) -> str:
    """Return the path of a namespace's workloads of a kind, or of other objects of the same API group."""
    return f"/apis/apps/v1/namespaces/{quote(namespace, safe='')}/{plural or kind.plural}"


_KEPT = 10  # releases; as many revisions as a controller keeps by default

_SHORT = {"deploy": "deployment", "sts": "statefulset", "ds": "daemonset"}


def parse_name(text: str) -> tuple[list[Kind], str]:
    """Return the kinds that a deployment's name may mean, and the name: `web`, `statefulset/web`, `sts/web`.

    Raises:
        InputError: the part before the slash names no kind.
    """
    prefix, slash, name = text.rpartition("/")
    if not slash:
        return list(KINDS.values()), name
    singular = prefix.lower().removesuffix(".apps")
    singular = _SHORT.get(singular, singular.removesuffix("s"))
    if singular not in KINDS or not name:
        raise InputError(
            f"deployment: {one_line(text, 120)!r} names no workload",
            advice=f"Give a name, or one of {', '.join(f'{each}/name' for each in KINDS)}.",
            field="deployment",
        )
    return [KINDS[singular]], name


# ---- revisions ----------------------------------------------------------------------------------


def template_of(found: Object) -> dict[str, Any]:
    """Return the pod template of a workload, a ReplicaSet or a ControllerRevision."""
    holder = found["data"] if found.get("kind") == "ControllerRevision" or "data" in found else found
    template: dict[str, Any] = copy.deepcopy(dict(holder["spec"]["template"]))
    template.pop("$patch", None)
    labels = (template.get("metadata") or {}).get("labels") or {}
    labels.pop(HASH, None)
    cleaned = _without_empty(template)
    return cleaned if isinstance(cleaned, dict) else {}


def _without_empty(value: Any) -> Any:
    """Return JSON without nulls; `metadata` also loses what is empty, which writers omit or keep."""
    if isinstance(value, Mapping):
        return {
            key: _without_empty(each)
            for key, each in value.items()
            if each is not None and not (key in {"metadata", "labels", "annotations"} and each == {})
        }
    return [_without_empty(each) for each in value] if isinstance(value, list) else value


def revision_id(template: Mapping[str, Any]) -> str:
    """Return the id of the revision with this pod template, such as `k3vq7a2mzt`."""
    first = hashlib.sha256(digest(template).encode()).digest()
    return base64.b32encode(first).decode().lower()[:10]


def containers(template: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the init containers and containers of a pod template."""
    spec = template.get("spec") or {}
    yield from spec.get("initContainers") or []
    yield from spec.get("containers") or []


def images_of(template: Mapping[str, Any]) -> dict[str, str]:
    """Return `{container: image}` of a pod template, init containers included."""
    return {each["name"]: each["image"] for each in containers(template) if each.get("image")}


def with_images(template: Mapping[str, Any], images: Mapping[str, str]) -> dict[str, Any]:
    """Return the pod template with other images."""
    changed = copy.deepcopy(dict(template))
    for container in containers(changed):
        if container["name"] in images:
            container["image"] = images[container["name"]]
    return changed


def without_images(template: Mapping[str, Any]) -> dict[str, Any]:
    """Return the pod template without its images."""
    rest = copy.deepcopy(dict(template))
    for container in containers(rest):
        container.pop("image", None)
    return rest


NEWEST = 1 << 62
"""Number of a revision before the controller has created an object for it."""


class Stored(NamedTuple):
    """A revision that a cluster keeps: the object that holds it, and its pod template."""

    id: str
    number: int
    created: str
    label: str  # of its pods
    template: dict[str, Any]
    annotations: Mapping[str, str]
    held_by: str = ""

    @property
    def listed(self) -> ListedRevision:
        """Return the revision for the port."""
        made_here = self.annotations.get(RELEASED) == self.id
        return ListedRevision(
            id=self.id,
            images=images_of(self.template),
            digest=digest(without_images(self.template)),
            made_by=self.annotations.get(RELEASE) if made_here else None,
            age=(self.number if self.number == NEWEST else _seconds(self.created), self.number, ""),
            created=self.created,
            author=self.annotations.get(REQUESTER, "") if made_here else "",
            note=self.annotations.get(CAUSE, ""),
        )


def stored_revisions(kind: Kind, workload: Object, holders: Sequence[Object]) -> list[Stored]:
    """Return the revisions of a workload, the current one first, then the newest.

    The current one is always there, even before the controller has created an object for it.

    Args:
        kind: the workload's kind.
        workload: the workload.
        holders: ReplicaSets, or ControllerRevisions, of its namespace.
    """
    uid = workload["metadata"]["uid"]
    owned = sorted((each for each in holders if owner_of(each) == uid), key=_age)
    live = template_of(workload)
    current = revision_id(live)
    seen: set[str] = set()
    found: list[Stored] = []
    for each in owned:
        template = template_of(each)
        name = revision_id(template)
        labels = each["metadata"].get("labels") or {}
        label = labels.get(kind.label) or each["metadata"]["name"]
        if kind.name == "StatefulSet":
            label = each["metadata"]["name"]
        if name in seen:
            name = label  # the controller uses the oldest ReplicaSet of those with the same pod template
        seen.add(name)
        annotations = each["metadata"].get("annotations") or {}
        created = each["metadata"].get("creationTimestamp") or ""
        held_by = f"{kind.holder} {each['metadata']['name']}"
        found.append(Stored(name, _number(each), created, label, template, annotations, held_by))
    if kind.name != "Deployment" and found and observed(workload):
        # The controller compares stored bytes, which a newer API server may write in another way.
        newest = max(found, key=lambda each: each.number)
        found = [each._replace(id=current, template=live) if each is newest else each for each in found]
    annotations = workload["metadata"].get("annotations") or {}
    if kind.name != "Deployment":  # its controller does not copy annotations to the revision
        made = releases_of(annotations)
        found = [
            each._replace(
                annotations=annotations
                if each.id == current
                else {RELEASED: each.id, RELEASE: made[each.id]}
                if each.id in made
                else {}
            )
            for each in found
        ]
    if all(each.id != current for each in found):
        created = workload["metadata"].get("creationTimestamp") or ""
        found.append(Stored(current, NEWEST, created, "", live, annotations))
    return sorted(found, key=lambda each: (each.id == current, each.number), reverse=True)


def releases_of(annotations: Mapping[str, str]) -> dict[str, str]:
    """Return `{revision: release}` of the last releases, of kinds whose revisions have no annotations."""
    pairs = (each.partition("=") for each in annotations.get(RELEASES, "").split())
    return {revision: release for revision, _, release in pairs if release}


def with_release(annotations: Mapping[str, str], revision: str, release: str) -> str:
    """Return the value of the annotation `RELEASES` after a release."""
    made = releases_of(annotations)
    made.pop(revision, None)
    made[revision] = release
    return " ".join(f"{each}={made[each]}" for each in list(made)[-_KEPT:])


def _seconds(time: str) -> int:
    """Return a time of the API server in seconds; 0 if there is none."""
    return int(datetime.fromisoformat(time).timestamp()) if time else 0


def owner_of(found: Object) -> str | None:
    """Return the uid of the controller that owns an object."""
    owners = found["metadata"].get("ownerReferences") or []
    return next((each["uid"] for each in owners if each.get("controller")), None)


def _age(found: Object) -> tuple[str, str]:
    return (found["metadata"].get("creationTimestamp") or "", found["metadata"]["name"])


def _number(found: Object) -> int:
    if "revision" in found:
        return int(found["revision"])
    text = (found["metadata"].get("annotations") or {}).get(NUMBER, "0")
    return int(text) if text.isdigit() else 0


def find_revision(stored: Sequence[Stored], wanted: Id) -> Stored | None:
    """Return a revision by its id, its number in `kubectl rollout history`, or the label of its pods."""
    text = str(wanted)
    for each in stored:
        if text in {each.id, each.label}:
            return each
    numbers = {each.number: each for each in stored}
    return numbers.get(int(text)) if text.isascii() and text.isdigit() and len(text) < 10 else None


# ---- workloads ----------------------------------------------------------------------------------


def observed(workload: Object) -> bool:
    """Return whether the controller has acted on the newest generation."""
    generation = workload["metadata"].get("generation")
    seen = (workload.get("status") or {}).get("observedGeneration")
    return generation is not None and seen is not None and int(seen) >= int(generation)


def desired_of(kind: Kind, workload: Object) -> int | None:
    """Return the desired pods of a workload; a DaemonSet has one for each node that it fits."""
    if kind.name == "DaemonSet":
        wanted = (workload.get("status") or {}).get("desiredNumberScheduled")
        return wanted if observed(workload) and isinstance(wanted, int) else None
    replicas = workload["spec"].get("replicas")
    return replicas if isinstance(replicas, int) else None


def strategy_of(workload: Object) -> Strategy | None:
    """Return the way in which new pods replace old ones."""
    spec = workload["spec"]
    found = spec.get("strategy") or spec.get("updateStrategy")
    if not found:
        return None
    rolling = found.get("rollingUpdate")
    return Strategy(type=found.get("type"), rolling_update=RollingUpdate(**rolling) if rolling else None)


def obstacle(kind: Kind, workload: Object, cluster: str) -> tuple[str, str] | None:
    """Return why the controller would not replace all pods after a change, and what to do about it."""
    metadata, spec = workload["metadata"], workload["spec"]
    shown = f"{kind.prefix}/{metadata['name']}"
    where = f"{shown} in {one_line(cluster, 60)}"
    command = f"kubectl -n {metadata['namespace']}"
    strategy = spec.get("updateStrategy") or {}
    partition = (strategy.get("rollingUpdate") or {}).get("partition") or 0
    if metadata.get("deletionTimestamp"):
        return f"{where} is being deleted", "Create it again first."
    if spec.get("paused"):
        return (
            f"{where} is paused: its controller replaces no pods",
            f"Resume it with `{command} rollout resume {shown}`.",
        )
    if strategy.get("type") == "OnDelete":
        return (
            f"{where} has the update strategy OnDelete: its controller replaces no pods",
            "Change its updateStrategy to RollingUpdate.",
        )
    if partition:
        return (
            f"{where} has the partition {partition}: pods below that number keep the old revision",
            "Set its updateStrategy.rollingUpdate.partition to 0.",
        )
    return None


def refuse(found: Sequence[str] | None, cluster: str) -> None:
    """Raise `WorkloadError` for an obstacle to a change, if there is one."""
    if found:
        problem, advice = found
        raise WorkloadError(problem, advice=f"{advice} Nothing was written.", cluster=cluster)


def blocking(kind: Kind, workload: Object, pods: Sequence[Object], label: str) -> list[Object]:
    """Return the pods of other revisions than that with the label that its controller waits for in vain.

    A StatefulSet replaces pods in order, each when the one before is ready, and so never replaces one that
    cannot become ready (kubernetes.io, StatefulSets, Forced rollback).
    """
    if kind.name != "StatefulSet" or workload["spec"].get("podManagementPolicy") == "Parallel":
        return []
    return [
        pod
        for pod in pods
        if owner_of(pod) == workload["metadata"]["uid"]
        and not pod["metadata"].get("deletionTimestamp")
        and (pod["metadata"].get("labels") or {}).get(kind.label) != label
        and not is_ready(pod)
    ]


def is_ready(pod: Object) -> bool:
    """Return whether a pod is ready."""
    conditions = (pod.get("status") or {}).get("conditions") or []
    return any(each["type"] == "Ready" and each["status"] == "True" for each in conditions)


def selector_of(workload: Object) -> str:
    """Return the workload's selector as the API server takes it in a query."""
    selector = workload["spec"].get("selector") or {}
    parts = [f"{key}={value}" for key, value in (selector.get("matchLabels") or {}).items()]
    for each in selector.get("matchExpressions") or []:
        values = ",".join(each.get("values") or [])
        match each["operator"]:
            case "In":
                parts.append(f"{each['key']} in ({values})")
            case "NotIn":
                parts.append(f"{each['key']} notin ({values})")
            case "Exists":
                parts.append(each["key"])
            case "DoesNotExist":
                parts.append(f"!{each['key']}")
    return ",".join(parts)
