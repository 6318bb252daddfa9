"""Data types of a release: workloads, their revisions, and changes to them."""

import hashlib
import json
from typing import Any

from pydantic import BaseModel, Field, JsonValue

from prefect_rollout.ids import CamelCase, Id


class RollingUpdate(CamelCase):
    """Bounds of a rolling update: pods, or a percentage as text such as `25%`."""

    max_unavailable: int | str | None = None
    max_surge: int | str | None = None


class Strategy(CamelCase):
    """The way in which new pods replace old ones."""

    type: str | None = None
    rolling_update: RollingUpdate | None = None


class Workload(BaseModel):
    """A deployment of an app on a platform.

    Attributes:
        app_id: the app's id.
        app: the app's name.
        id: the deployment's id.
        name: the deployment's name, unique in its app and the same however it was asked for. A platform
            with several kinds of them puts the kind in front, such as `statefulset/web`.
        handle: private data of the platform's client.
    """

    app_id: Id
    app: str
    id: Id
    name: str
    handle: JsonValue = Field(default=None, repr=False)  # Prefect logs results at debug level


class Placement(BaseModel):
    """The clusters of a workload, in the order of publishing.

    Attributes:
        replicas: configured replicas, `{cluster: replicas}`; `None` if something else sets them, such as an
            autoscaler or the nodes that a DaemonSet runs on.
        scaled_by: what sets the replicas, `{cluster: name}`, such as an autoscaler; a scale is refused there.
        scalable: fewest and most replicas that a scale may ask for.
        notes: what people should know before they change the workload, `{cluster: clauses}`, such as a tool
            that may revert the change.
        in_place: the platform updates pods in place, so that they keep their names.
        strategy: the way in which new pods replace old ones, if the platform says so.
    """

    replicas: dict[str, int | None]
    scalable: tuple[int, int] = (0, 10_000)
    notes: dict[str, list[str]] = {}
    scaled_by: dict[str, str] = {}
    in_place: bool = False
    strategy: Strategy | None = None


class Revision(BaseModel):
    """A revision of a workload, without its pod template, whose environment values may be secrets.

    Attributes:
        images: `{container: image}` of the containers that have both.
        digest: SHA-256 of the rest of the pod template: two revisions with the same digest and images run
            the same pods.
        problem: the reason why the revision cannot be read; empty if it can.
        made_by: id of the flow run that created it.
        age: sort key of its creation: that of a newer revision is greater; `None` if unknown.
    """

    id: Id
    images: dict[str, str] = {}
    digest: str = ""
    problem: str = ""
    made_by: str | None = None
    age: tuple[int, int, str] | None = None

    def runs_like(self, other: "Revision") -> bool:
        """Return whether both revisions run the same pods."""
        return (self.digest, self.images) == (other.digest, other.images)

    def is_older_than(self, other: "Revision | None") -> bool:
        """Return whether it was created before the other one; unknown counts as no."""
        return other is not None and self.age is not None and other.age is not None and self.age < other.age


class ListedRevision(Revision):
    """A revision with details for people. It is not persisted, because its author may be a key.

    Attributes:
        created: time of its creation, as the platform writes it.
        author: user who created it.
        note: its description.
    """

    created: str = ""
    author: str = ""
    note: str = ""


class Chosen(Revision):
    """The revision that a step chose, and notes on the choice.

    Attributes:
        notes: the revisions that were skipped, and why, as sentences without a period.
        unknown: no release of it is on record.
    """

    notes: list[str] = []
    unknown: bool = False


class Change(BaseModel):
    """A change of a workload that is ready to be applied to its clusters.

    Attributes:
        base: id of the revision that the change starts from.
        images: `{container: image}` after the change.
        revision: id of the revision that clusters run after the change, if it is known before the write.
        handle: private data of the platform's client.
    """

    base: Id
    images: dict[str, str]
    revision: Id | None = None
    handle: JsonValue = Field(default=None, repr=False)


class Applied(BaseModel):
    """The state that a cluster has to reach after a write.

    Attributes:
        revision: id of the revision that the cluster has to run.
        generation: generation of the workload after the write, if the platform reports it.
    """

    revision: Id
    generation: int | None = None


class Published(BaseModel):
    """A write that the platform accepted.

    Attributes:
        applied: the state that the cluster has to reach.
        pods: `{pod: state}` right before the write; `None` if unknown, or if an earlier attempt wrote.
    """

    applied: Applied
    pods: dict[str, str | None] | None = None


class Baseline(BaseModel):
    """The state of a cluster before a write, for the verdict and for a rollback.

    Attributes:
        online: the revision that the cluster was last asked for; `None` if there is none.
        revision: the same revision with its images; `None` if it can no longer be read.
        revision_object: the platform's own object that holds it, such as `ReplicaSet web-5d8f9c`.
        pods: `{pod: state}`; `None` if the platform does not list them.
        generation: generation of the workload, if the platform reports it.
        desired: replicas that the platform was last asked for, if it reports them.
    """

    online: Id | None = None
    revision: Revision | None = None
    revision_object: str = ""
    pods: dict[str, str | None] | None = None
    generation: int | None = None
    desired: int | None = None

    def changes_to(self, revision: Revision) -> bool:
        """Return whether the pods of `revision` differ from those online; unknown counts as yes."""
        return self.revision is None or not self.revision.runs_like(revision)


def digest(values: Any) -> str:
    """Return the SHA-256 of JSON values, such as a pod template; the order of keys does not matter."""
    canonical = json.dumps(values, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).hexdigest()
