"""The JSON of the container cloud (camelCase on the wire, snake_case here). Source: the Open API contract.

`metaData` and `template` arrive as JSON *strings*.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import AliasPath, BaseModel, Field, ValidationError
from pydantic_core import from_json

from prefect_rollout.errors import ClusterNotFoundError, UnreadableTemplateError, WorkloadError
from prefect_rollout.ids import CamelCase, Count, Id, Lenient, by_age, first_mistake, usable_cluster
from prefect_rollout.release.workload import ListedRevision, Placement, Revision, Strategy, Workload, digest
from prefect_rollout.text import one_line
from prefect_rollout.verdict.status import Event, Pod, Status


class App(CamelCase):
    """An app (article, step 1)."""

    id: Id
    name: str


class ClusterMeta(CamelCase):
    """One cluster of a deployment's metaData; `replica` is its number of replicas."""

    replica: Count | None = None


class MetaData(CamelCase):
    """A deployment's metaData (article, step 2)."""

    strategy: Strategy | None = None
    in_place: bool = False
    replicas: dict[str, Count | None] | None = None
    clusters: dict[str, ClusterMeta | None] | None = None

    def replicas_of(self, cluster: str) -> int | None:
        """Return `clusters[cluster].replica`, else Wayne's older `replicas[cluster]`, else `None`.

        If both exist and differ, the first one applies (contract, below the status object). `None` means
        unknown, never zero.
        """
        meta = (self.clusters or {}).get(cluster)
        if meta is not None and meta.replica is not None:
            return meta.replica
        return (self.replicas or {}).get(cluster)


class Deployment(CamelCase):
    """A deployment of an app; `meta_data` is a JSON string."""

    id: Id
    name: str
    meta_data: str | None = None
    app_id: Id | None = None


_COMPLETE = "Complete the deployment's clusters and replicas in the cloud's console; nothing was written."


def placement_of(workload: Workload, chosen: Sequence[str] | None) -> Placement:
    """Return the chosen clusters, or all, and their replicas, from the metaData of a deployment.

    Raises:
        ClusterNotFoundError: the metaData does not have a chosen cluster.
        WorkloadError: the metaData cannot be read, or it has no clusters, a cluster with an unusable name, or
            a cluster without replicas. Nothing has been written yet; the article detects missing replicas
            only in the middle of publishing.
    """
    meta = _meta_data(workload.handle)
    name = one_line(workload.name, 120)
    known = list(meta.clusters or meta.replicas or {})
    for cluster in chosen or []:
        if cluster not in known:
            raise ClusterNotFoundError.named(cluster, known, f"in the metaData of {name}")
    if not known:
        raise WorkloadError(f"the metaData of {name} names no clusters", advice=_COMPLETE)
    asked = {cluster: meta.replicas_of(cluster) for cluster in known if not chosen or cluster in chosen}
    for cluster in asked:
        try:
            usable_cluster(cluster)
        except ValueError as error:
            raise WorkloadError(
                f"the metaData names a cluster {one_line(cluster, 80)!r}, which is not usable: {error}",
                advice=_COMPLETE,
            ) from error
    if unclear := [one_line(cluster, 80) for cluster, count in asked.items() if count is None]:
        raise WorkloadError(
            f"the metaData of {name} has no replicas for {', '.join(unclear)}",
            advice=_COMPLETE,
            clusters=unclear,
        )
    replicas = {cluster: count for cluster, count in asked.items() if count is not None}
    return Placement(
        replicas=replicas, scalable=(1, 32), in_place=meta.in_place, strategy=meta.strategy
    )  # of the contract


def _meta_data(text: object) -> MetaData:
    if not isinstance(text, str) or not text.strip():
        raise WorkloadError("the deployment's metaData is empty", advice=_COMPLETE)
    try:
        return MetaData.model_validate(from_json(text))
    except ValidationError as error:
        # Not pydantic's own text, which would show values of the metaData in the log.
        raise WorkloadError(
            f"the deployment's metaData does not have the expected structure: {first_mistake(error)}",
            advice=_COMPLETE,
        ) from None
    except ValueError as error:
        raise WorkloadError(
            f"the deployment's metaData is not readable JSON: {one_line(error, 120)}",
            advice=_COMPLETE,
        ) from error


class Container(CamelCase):
    """A container of a pod template."""

    name: str | None = None
    image: str | None = None


class PodSpec(CamelCase):
    """The part of a pod template that names the containers."""

    containers: list[Container | None] = Field(default=[])


class Manifest(BaseModel):
    """An apps/v1 Deployment in a template (article, step 3)."""

    kind: str
    pods: PodSpec = Field(validation_alias=AliasPath("spec", "template", "spec"))


# Errors show only these kinds of a template. Other text may contain secrets.
_OTHER_KINDS = {"CronJob", "DaemonSet", "Job", "List", "Pod", "ReplicaSet", "Service", "StatefulSet"}


class Template(CamelCase):
    """A stored version of a deployment; `template` is a JSON string of an apps/v1 Deployment."""

    id: Id
    template: str | None = Field(default=None, repr=False)  # its environment values may be secrets
    deployment_id: Id | None = None
    description: str | None = None
    create_time: str | None = None
    user: str | None = None

    def read(self) -> tuple[dict[str, str], dict[str, Any]]:
        """Return the images by container (article, step 4), and the rest of the pod template.

        Raises:
            UnreadableTemplateError: the template is empty, not JSON, or not a Deployment.
        """
        shown = f"template {one_line(self.id, 80)}"
        try:
            values = from_json(self.template or "")
            manifest = Manifest.model_validate(values)
        except ValidationError as error:
            problem = f"{shown} is not a Deployment: {first_mistake(error)}"
            # Not pydantic's own text, which would show values of the template in the log.
            raise UnreadableTemplateError(problem, template_id=self.id) from None
        except ValueError as error:
            problem = f"{shown} is not readable JSON: {one_line(error, 120)}"
            raise UnreadableTemplateError(problem, template_id=self.id) from error
        if manifest.kind != "Deployment":
            kind = f"a {manifest.kind!r}" if manifest.kind in _OTHER_KINDS else "of another kind"
            raise UnreadableTemplateError(f"{shown} is {kind}, not a Deployment", template_id=self.id)
        images = {
            container.name: container.image
            for container in manifest.pods.containers
            if container and container.name and container.image
        }
        pods: dict[str, Any] = values["spec"]["template"]
        for container in pods["spec"].get("containers") or []:
            if container and container.get("name") in images:
                container.pop("image", None)
        return images, pods

    @property
    def revision(self) -> Revision:
        """Return this template as a revision, without its text."""
        images: dict[str, str] = {}
        rest, problem = "", ""
        try:
            images, pods = self.read()
            rest = digest(pods)
        except UnreadableTemplateError as error:
            problem = error.problem
        # The id of the release that created the template ends its description.
        mark = re.search(rf"{re.escape(release_mark(''))}(\S+)\Z", self.description or "")
        made_by = mark[1] if mark else None
        return Revision(
            id=self.id,
            images=images,
            digest=rest,
            problem=problem,
            made_by=made_by,
            age=by_age(self.id),
        )

    @property
    def listed(self) -> ListedRevision:
        """Return the revision with its author and description."""
        return ListedRevision(
            **self.revision.model_dump(),
            created=self.create_time or "",
            author=self.user or "",
            note=self.description or "",
        )


def release_mark(release_id: str) -> str:
    """Return the end of the description of a template that a release creates (contract, Idempotency)."""
    return f"release={release_id}"


class OnlineTemplate(CamelCase):
    """The template that is online in a cluster (`/publishstatus`)."""

    template_id: Id
    cluster: str


class Publication(CamelCase):
    """One entry of the publish history. `status` 1 means only that the write was accepted."""

    template_id: Id
    cluster: str
    status: int | None = None


class PodCount(CamelCase):
    """The cloud's own count of a deployment's pods in a cluster; `warnings` are events, or anything."""

    desired: Lenient[Count] = None
    warnings: Lenient[list[Any]] = None


class DeploymentState(CamelCase):
    """The state of the deployment in a cluster."""

    pod_state: Lenient[PodCount] = None


class ClusterStatus(CamelCase):
    """A deployment's state in one cluster. Only `pods[].name` and `pods[].state` are certain."""

    cluster: str | None = None
    pods: list[Pod] | None = None
    deployment: Lenient[DeploymentState] = None
    template_id: Id | None = None
    generation: Count | None = None
    observed_generation: Count | None = None
    updated_replicas: Count | None = None

    @property
    def status(self) -> Status:
        """Return the status as input of the verdict."""
        count = self.deployment.pod_state if self.deployment else None
        return Status(
            pods=self.pods,
            desired=count.desired if count else None,
            events=[_event(item) for item in count.warnings or () if item] if count else None,
            revision=self.template_id,
            generation=self.generation,
            observed_generation=self.observed_generation,
            updated_replicas=self.updated_replicas,
        )


def _event(item: Any) -> Event:
    """Return one of the `warnings` as an event. If it is not an object, it becomes the message."""
    if not isinstance(item, Mapping):
        return Event(message=one_line(item))
    name, reason, message, count = (item.get(key) for key in ("name", "reason", "message", "count"))
    return Event(
        name=name if isinstance(name, str) else None,
        reason=one_line(reason, 80) if isinstance(reason, str) else "",
        message=one_line(message) if isinstance(message, str) else "",
        count=count if isinstance(count, int) else 1,
    )
