"""The vocabulary of a release: what the platforms answer, what a release asks for, how it ended.

Payload models mirror the container cloud's JSON (camelCase on the wire, snake_case here).
`metaData` and `template` arrive as JSON *strings*; `MetaData.parse` and `Template.workload` read them.
Sources: the article's steps 1 to 7, the Open API contract.
"""

import hashlib
import json
import re
from enum import StrEnum
from typing import Annotated, Any, Literal, Self, TypeVar

from annotated_types import Ge
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    Strict,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
)
from pydantic.alias_generators import to_camel
from pydantic_core import PydanticCustomError, from_json

from prefect_rollout.errors import InputError, MetaDataError, UnreadableTemplateError
from prefect_rollout.images import usable_image
from prefect_rollout.text import one_line


def _printable(value: int | str) -> int | str:
    if not str(value).isprintable():
        raise ValueError("an id is printable text")
    return value


Id = Annotated[Annotated[int, Strict()] | Annotated[str, Strict()], AfterValidator(_printable)]
"""An id as the platform writes it. Ids are compared as text: `same_id`. They stand in names of runs."""

Count = Annotated[int, Strict(), Ge(0)]
"""A number of pods. JSON `true` or `"1"` is not one."""


def _absent_if_wrong(value: Any, read: ValidatorFunctionWrapHandler) -> Any:
    try:
        return read(value)
    except ValidationError:
        return None


T = TypeVar("T")
Lenient = Annotated[T | None, WrapValidator(_absent_if_wrong)]
"""A field that a poll can do without: a value of the wrong type counts as absent."""


def same_id(one: object, other: object) -> bool:
    """Whether two ids are the same written as text (article, step 3: `String(tpl.id) === template_id`)."""
    return str(one) == str(other)


def same_or_none(one: Id | None, other: Id | None) -> bool:
    """Whether two ids are the same, or neither is there."""
    return one is other is None or (one is not None and other is not None and same_id(one, other))


def template_name(template_id: Id | None) -> str:
    """Such as `template 1343170`, or `nothing`; safe for a log."""
    return "nothing" if template_id is None else f"template {one_line(template_id, 40)}"


def newest_first(identifier: Id) -> tuple[int, int, str]:
    """A key that sorts ids, newest last: numbers by value, other text after them by its letters."""
    text = str(identifier)
    number = text.isascii() and text.isdigit() and len(text) < 100
    return (0, int(text), "") if number else (1, 0, text)


def first_mistake(error: ValidationError) -> str:
    """The first mistake of a pydantic error as `field: what is wrong`, without the value."""
    mistake = error.errors(include_url=False, include_input=False, include_context=False)[0]
    field = ".".join(str(part) for part in mistake["loc"])
    return one_line(f"{field}: {mistake['msg']}" if field else mistake["msg"])


class Payload(BaseModel):
    """A JSON object of the platform. Unknown keys are ignored, and so never kept with a result."""

    model_config = ConfigDict(extra="ignore", alias_generator=to_camel, populate_by_name=True)


class App(Payload):
    """An app (article, step 1)."""

    id: Id
    name: str
    namespace: str | None = None
    kube_namespace: str | None = None


class LogTopic(Payload):
    """Where a cluster's logs go."""

    name: str | None = None
    host: str | None = None


class ClusterMeta(Payload):
    """One cluster of a deployment's metaData; `replica` is its number of replicas."""

    name: str | None = None
    replica: Count | None = None
    log_topic: LogTopic | None = None
    host_group: str | None = None


class Idc(Payload):
    """A data centre area and the clusters in it."""

    area: str | None = None
    idc_names: list[str] | None = None
    clusters: list[str] | None = None
    vpc: dict[str, Any] | None = None


class RollingUpdate(Payload):
    """Bounds of a rolling update: pods, or a percentage as text such as `25%`."""

    max_unavailable: int | str | None = None
    max_surge: int | str | None = None


class Strategy(Payload):
    """How old pods give way to new ones."""

    type: str | None = None
    rolling_update: RollingUpdate | None = None


class MetaData(Payload):
    """A deployment's metaData (article, step 2)."""

    strategy: Strategy | None = None
    in_place: bool = False
    replicas: dict[str, Count | None] | None = None
    log_topic: dict[str, LogTopic] | None = None
    new_meta: bool | None = None
    clusters: dict[str, ClusterMeta | None] | None = None
    idcs: list[Idc] | None = None
    network_type: str | None = None

    @classmethod
    def parse(cls, text: str | None) -> Self:
        """The metaData in `text`.

        Raises:
            MetaDataError: it is empty, not JSON, nested too deep, or of another shape.
        """
        if not (text or "").strip():
            raise MetaDataError("the deployment's metaData is empty")
        try:
            return cls.model_validate(from_json(text or ""))
        except ValidationError as error:
            # Without pydantic's own text, which would show in the log what stands there.
            raise MetaDataError(
                f"the deployment's metaData has another shape: {first_mistake(error)}"
            ) from None
        except ValueError as error:
            raise MetaDataError(
                f"the deployment's metaData is not readable JSON: {one_line(error, 120)}"
            ) from error

    def wanted_replicas(self, cluster: str) -> int | None:
        """Replicas for `cluster`: `clusters[c].replica`, else Wayne's older `replicas[c]`, else `None`.

        Where both stand and differ, the first is right (contract, below the status object). `None`
        means unknown and is never to be read as zero.
        """
        meta = (self.clusters or {}).get(cluster)
        if meta is not None and meta.replica is not None:
            return meta.replica
        return (self.replicas or {}).get(cluster)


class Deployment(Payload):
    """A deployment of an app; `meta_data` is a JSON string."""

    id: Id
    name: str
    meta_data: str | None = Field(default=None, repr=False)  # Prefect logs results at debug level
    app_id: Id | None = None


class Container(Payload):
    """A container of a pod template."""

    name: str | None = None
    image: str | None = None


class PodSpec(Payload):
    """The part of a pod template that names the containers."""

    containers: list[Container | None] = []


class PodTemplate(Payload):
    """What the pods of a template are made from."""

    spec: PodSpec


class WorkloadSpec(Payload):
    """The spec of a workload."""

    template: PodTemplate


# Named in errors. Any other kind is not: no text of a template is shown, as it may hold secrets.
_OTHER_KINDS = {"CronJob", "DaemonSet", "Job", "List", "Pod", "ReplicaSet", "Service", "StatefulSet"}


class Workload(Payload):
    """An apps/v1 Deployment as a template holds it (article, step 3)."""

    kind: str
    api_version: str | None = None
    spec: WorkloadSpec

    @property
    def images(self) -> dict[str, str]:
        """`{container: image}` of the containers that have both (article, step 4)."""
        return {
            container.name: container.image
            for container in self.spec.template.spec.containers
            if container and container.name and container.image
        }


class Template(Payload):
    """A stored version of a deployment; `template` is a JSON string of an apps/v1 Deployment."""

    id: Id
    name: str | None = None
    template: str | None = Field(default=None, repr=False)  # its environment values may be secrets
    deployment_id: Id | None = None
    description: str | None = None
    create_time: str | None = None
    user: str | None = None

    @property
    def workload(self) -> Workload:
        """The Deployment in `template`.

        Raises:
            UnreadableTemplateError: it is empty, not JSON, or not a Deployment.
        """
        try:
            workload = Workload.model_validate(from_json(self.template or ""))
        except ValidationError as error:
            raise UnreadableTemplateError(
                f"template {one_line(self.id, 80)} is not a Deployment: {first_mistake(error)}",
                template_id=self.id,
            ) from None  # pydantic's own text would show values of the template in the log
        except ValueError as error:
            raise UnreadableTemplateError(
                f"template {one_line(self.id, 80)} is not readable JSON: {one_line(error, 120)}",
                template_id=self.id,
            ) from error
        if workload.kind != "Deployment":
            kind = f"a {workload.kind!r}" if workload.kind in _OTHER_KINDS else "of another kind"
            raise UnreadableTemplateError(
                f"template {one_line(self.id, 80)} is {kind}, not a Deployment",
                template_id=self.id,
            )
        return workload

    @property
    def pods(self) -> dict[str, Any]:
        """The pod template, less the images in `workload.images`. It may hold secrets: keep it nowhere.

        Raises:
            UnreadableTemplateError: it is empty, not JSON, or not a Deployment.
        """
        images = self.workload.images
        pods: dict[str, Any] = from_json(self.template or "")["spec"]["template"]
        for container in pods["spec"].get("containers") or []:
            if container and container.get("name") in images:
                container.pop("image", None)
        return pods

    @property
    def version(self) -> "Version":
        """What a release keeps of the template.

        Raises:
            UnreadableTemplateError: it is empty, not JSON, or not a Deployment.
        """
        canonical = json.dumps(self.pods, sort_keys=True, ensure_ascii=False)
        digest = hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).hexdigest()
        return Version(id=self.id, images=self.workload.images, digest=digest)


class Version(BaseModel):
    """What a release keeps of a template: never its text, whose environment values may be secrets.

    Attributes:
        images: `{container: image}` of the containers that have both.
        digest: SHA-256 of the rest of the pod template, so that two versions can be compared.
    """

    id: Id
    images: dict[str, str]
    digest: str


class Chosen(Version):
    """The version that a step chose, and what there is to say about the choice.

    Attributes:
        notes: the templates that were skipped, and why, as sentences without a period.
        unknown: whether no release of it is on record.
    """

    notes: list[str] = []
    unknown: bool = False


def release_mark(release_id: str) -> str:
    """What ends the description of a template that a release created (contract, Idempotency)."""
    return f"release={release_id}"


def marked(template: Template, release_id: str) -> bool:
    """Whether that release created the template."""
    return (template.description or "").endswith(release_mark(release_id))


RUNNING = "Running"
"""The one state that means ready (contract: phase Running and Ready)."""

FINISHED = frozenset({"Succeeded", "Failed"})
"""States of pods that run no more. Kubernetes may list such pods long after they were replaced."""


def maker_of(template: Template) -> str | None:
    """Return the id of the flow run that the template's description names as its maker."""
    found = re.search(rf"{release_mark(_UUID)}\Z", template.description or "")
    return found[1] if found else None


_UUID = r"([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})"


class ContainerStatus(Payload):
    """How often a container was restarted, and why it waits or ended, in Kubernetes' words."""

    name: Lenient[str] = None
    restart_count: Lenient[Count] = None
    reason: Lenient[str] = None
    message: Lenient[str] = None


class Pod(Payload):
    """A pod. `state` is `Running` only when it is also ready; a word that nobody knows is not ready.

    `reason` and `message` say why it is as it is, in Kubernetes' words; the container cloud fills them
    not, other platforms do.
    """

    name: str
    state: str | None = None
    reason: Lenient[str] = None
    message: Lenient[str] = None
    namespace: Lenient[str] = None
    pod_ip: Lenient[str] = None
    node_name: Lenient[str] = None
    start_time: Lenient[str] = None
    container_status: Lenient[list[Lenient[ContainerStatus]]] = None
    template_id: Id | None = None


class PodCount(Payload):
    """The platform's own count of a deployment's pods in a cluster; `warnings` are events, or anything."""

    current: Lenient[Count] = None
    desired: Lenient[Count] = None
    warnings: Lenient[list[Any]] = None


class DeploymentState(Payload):
    """The deployment as a cluster sees it."""

    name: Lenient[str] = None
    namespace: Lenient[str] = None
    pod_state: Lenient[PodCount] = None


class ClusterStatus(Payload):
    """A deployment's state in one cluster. Only `pods[].name` and `pods[].state` are certain."""

    cluster: str | None = None
    pods: list[Pod] | None = None
    deployment: Lenient[DeploymentState] = None
    healthz: Any = None
    template_id: Id | None = None
    generation: Count | None = None
    observed_generation: Count | None = None
    updated_replicas: Count | None = None

    @property
    def desired(self) -> int | None:
        """Return how many pods the platform was last asked for; `None` where it does not report that."""
        count = self.deployment.pod_state if self.deployment else None
        return count.desired if count else None


class OnlineTemplate(Payload):
    """Which template is online in a cluster (`/publishstatus`)."""

    template_id: Id
    cluster: str
    id: Id | None = None
    resource_id: Id | None = None


class Publication(Payload):
    """One entry of the publish history. `status` 1 means that the write was accepted, no more."""

    template_id: Id
    cluster: str
    id: Id | None = None
    resource_id: Id | None = None
    status: int | None = None
    message: str | None = None
    user: str | None = None
    create_time: str | None = None


# ---- what a release asks for, and how it ended ------------------------------------------------


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
Seconds = Annotated[float, Field(ge=0, le=86_400, allow_inf_nan=False)]
PollSeconds = Annotated[float, Field(ge=0.01, le=3600, allow_inf_nan=False)]
PollAttempts = Annotated[int, Field(ge=1, le=100_000)]
WindowWait = Annotated[float, Field(ge=0, le=14 * 86_400, allow_inf_nan=False)]
LateMinutes = Annotated[float, Field(ge=0, le=14 * 1440, allow_inf_nan=False)]
ApprovalSeconds = Annotated[float, Field(ge=1, le=30 * 86_400, allow_inf_nan=False)]
Approval = Literal["none", "before-release"]
Person = Annotated[str, Field(max_length=200)]


DEFAULT_TARGET = "container-cloud/default"
"""The block that is meant where a request names no target."""

ENVIRONMENT = "environment"
"""The target that the environment variables describe, whatever blocks are saved."""

_BLOCK = r"[a-z0-9-]{1,200}/[a-z0-9-]{1,200}"


def _plan_hash(value: str) -> str:
    value = value.strip().lower()
    if not re.fullmatch(_PLAN_HASH, value):
        raise ValueError("a plan's hash has 16 digits, 0-9 and a-f, as a dry run prints it")
    return value


_PLAN_HASH = r"^([0-9a-f]{16})?$"
# The schema keeps the pattern for forms; a person is told in words.
PlanHash = Annotated[str, AfterValidator(_plan_hash), Field(json_schema_extra={"pattern": _PLAN_HASH})]
"""Empty, or what a dry run prints: 16 hexadecimal digits."""


class Checked(BaseModel):
    """The checks of the fields that requests and plans share. A misspelt key is a mistake."""

    model_config = ConfigDict(extra="forbid")

    @classmethod
    def of(cls, /, **values: Any) -> Self:
        """The object made of `values`.

        Raises:
            InputError: naming the field and what it allows.
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
            raise ValueError("an app id is needed, such as 3290")
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
            raise ValueError("a cluster is named twice")
        return value

    @field_validator("canary", check_fields=False)
    @classmethod
    def _canary_usable(cls, value: str | None) -> str | None:
        return value and usable_cluster(value)


class Request(Checked):
    """What every flow is asked for. `Request.of` checks it before anything is asked or written.

    Attributes:
        target: a block as type-slug/name, `environment`, or empty for the default block or the environment.
        dry_run: everything is read and nothing written.
        expect_plan: hash of a plan that has to hold still; empty for none.
    """

    app_id: Id
    deployment: Name
    target: str = ""
    clusters: list[Cluster] | None = None
    reason: Reason = ""
    order: Order = "together"
    canary: Cluster | None = None
    pause_seconds: Seconds = 0
    poll_seconds: PollSeconds = 5
    poll_attempts: PollAttempts = 20
    grace_seconds: Seconds = 30
    lock_wait_seconds: Seconds = 600
    requested_by: Person = ""
    window_wait_seconds: WindowWait = 0
    break_glass: Reason = ""
    late_minutes: LateMinutes = 60
    dry_run: bool = False
    expect_plan: PlanHash = ""

    @property
    def writes(self) -> bool:
        """Whether the run may write anything."""
        return not self.dry_run

    @field_validator("clusters")
    @classmethod
    def _none_named_is_all(cls, value: list[str] | None) -> list[str] | None:
        return value or None


class ReleaseRequest(Request):
    """What one release asks for."""

    template_id: Id | None = None
    images: dict[str, Image] | None = None
    on_failure: OnFailure = "stop"
    approval: Approval = "none"
    approval_seconds: ApprovalSeconds = 86_400


class RollbackRequest(Request):
    """What a rollback asks for."""

    to_template: Id | None = None


class ScaleRequest(Request):
    """What a scaling asks for."""

    replicas: Annotated[int, Field(strict=True, ge=1, le=32)]


def usable_id(value: int | str) -> int | str:
    """`value`, if it can stand in a path of the platform's API once percent-encoded.

    Raises:
        ValueError: it is negative, longer than 253 characters, has control characters, or is `.` or
            `..`, which proxies take for a step in the path even when they are encoded.
    """
    text = str(value)
    if isinstance(value, int) and value < 0:
        raise ValueError("an id is a whole number from 0 up, or text")
    if not text or len(text) > 253:
        raise ValueError("an id has 1 to 253 characters")
    if text in {".", ".."} or not text.isprintable() or text != text.strip():
        raise ValueError("an id is printable text without outer blanks, and neither '.' nor '..'")
    return value


def usable_cluster(name: str) -> str:
    """`name`, if the platform's API can be asked about a cluster of that name.

    Raises:
        ValueError: it is not a usable id, or holds a comma, which joins names in a query.
    """
    if "," in name:
        raise ValueError("a cluster's name holds no comma; several clusters are given as a list")
    return str(usable_id(name))


class Outcome(StrEnum):
    """The three endings of a release, its end by a person, and what ends before it has begun."""

    RELEASED = "released"
    FAILED = "failed"
    TIMED_OUT = "timed-out"
    CANCELLED = "cancelled"
    PLANNED = "planned"
    """A dry run: everything was read and nothing written."""
    SKIPPED = "skipped"
    """It came too late, or a newer one takes its place: nothing was asked of the platform."""


class Action(StrEnum):
    """What a flow does to a deployment."""

    DEPLOY = "deploy"
    ROLLBACK = "rollback"
    RESTART = "restart"
    SCALE = "scale"


class ClusterResult(BaseModel):
    """How a release ended in one cluster."""

    cluster: str
    replicas: int = Field(description="Replicas wanted.")
    ready: int | None = Field(
        default=0, description="New pods that were ready at the last look; null if unknown."
    )
    desired: int | None = Field(
        default=None,
        description="Pods that the platform was asked for, at the last look; null where it is not reported.",
    )
    note: str = Field(default="", description="What had to be assumed or is special there, in words.")
    template: int | str | None = Field(
        default=None, description="The template that the cluster shall run; null while it is not chosen."
    )
    published: bool | None = Field(
        default=False, description="Whether the write was accepted; null when its answer was lost."
    )
    rolled_back: bool | None = Field(
        default=None, description="Whether it was rolled back; null where no rollback was tried."
    )
    template_before: int | str | None = Field(
        default=None, description="The template that was online before; null when none was or it is unknown."
    )
    images_before: dict[str, str] | None = Field(
        default=None, description="That template's images; null when unknown."
    )
    online: int | str | None = Field(
        default=None, description="The template online at the last look; null when none is or it is unknown."
    )
    online_known: bool = Field(default=False, description="Whether the last look found out what is online.")
    running: int | None = Field(
        default=None, description="Pods of any template that were Running at the last look; null if unknown."
    )
    pods: list[Pod] = Field(default_factory=list, description="The pods at the last look.")

    @property
    def live(self) -> str:
        """What the cluster runs by the last look, such as `pub-bjwdt has template 5 online (…)`."""
        name = one_line(self.cluster, 60)
        if self.online is None:
            return f"{name}: {'nothing is online' if self.online_known else 'what is online is not known'}"
        pods = "pods not known"
        if self.running is not None:
            wanted = self.replicas if self.desired is None else self.desired
            pods = f"{self.running} pods of any template Running, {wanted} wanted"
        return f"{name} has template {one_line(self.online, 40)} online ({pods})"


def cloud_words(cloud: str, target: str) -> str:
    """Return such as `https://k8s.qihoo.net (container-cloud/default)`; empty if neither is known."""
    return f"{cloud or 'unknown'} ({target})" if target else cloud


class Change(BaseModel):
    """One difference between two pod templates. A value that might be a secret is never kept.

    Attributes:
        path: where in the pod template, such as `spec.containers[web].resources.limits.cpu`.
        what: what has happened there; `reordered` is of a list whose entries have names.
        before: the value as text; `None` where there was none or it is not shown.
        after: the same of the value to come.
    """

    path: str
    what: Literal["added", "removed", "changed", "reordered"]
    before: str | None = None
    after: str | None = None


class Procedure(BaseModel):
    """The order, canary, pause, failure policy and approval of a release. Polling is not part of it."""

    order: Order = "together"
    canary: str | None = None
    pause_seconds: float = 0
    on_failure: OnFailure | None = Field(
        default=None, description="What follows a failure; null where nothing is ever rolled back."
    )
    approval: Approval | None = Field(
        default=None, description="Whether a person has to approve; null where nobody can be asked."
    )

    @classmethod
    def of(cls, request: "Request") -> Self:
        """Return the procedure that `request` asks for."""
        return cls.model_validate(request.model_dump(include=set(cls.model_fields)))


class Difference(BaseModel):
    """What a release would change in one cluster."""

    cluster: str
    template_before: int | str | None = Field(
        default=None, description="The template that is online; null when none is."
    )
    template: int | str | None = Field(
        default=None, description="The template to go back to; null where a new one would be made."
    )
    images_before: dict[str, str] | None = Field(
        default=None, description="Images of what is online; null when it cannot be read."
    )
    images: dict[str, str] = Field(default={}, description="Images to come.")
    pods: int | None = Field(default=None, description="Pods that are listed now; null when unknown.")
    replicas: int = Field(description="Replicas wanted.")
    desired: int | None = Field(
        default=None,
        description="Pods that the platform was asked for before; null where it is not reported.",
    )
    assumed: bool = Field(
        default=False, description="Whether `replicas` stands in for a number that is not reported."
    )
    notes: list[str] = Field(default=[], description="What else a person has to know of it, in words.")
    changes: list[Change] | None = Field(
        default=None,
        description="What else changes in the pod template; null when what is online cannot be read.",
    )
    more: int = Field(default=0, description="Changes beyond those listed.")

    @property
    def nothing(self) -> bool:
        """Whether the pods would stay as they are, as far as that is known."""
        same = self.changes == [] and self.images == self.images_before
        return same and self.pods == self.replicas and self.desired in {None, self.replicas}


class ReleasePlan(BaseModel):
    """What a release would do, and the hash of all that this depends on."""

    action: Action
    plan_hash: str
    cloud: str = Field(default="", description="Address of the platform.")
    target: str = Field(default="", description="Block that the platform was reached through.")
    app_id: int | str
    deployment: str
    base_template_id: int | str | None = Field(
        default=None, description="The template that a new one would be made from; null in a rollback."
    )
    strategy: Strategy | None = None
    in_place: bool = Field(default=False, description="Whether pods keep their names.")
    procedure: Procedure = Procedure()
    notes: list[str] = Field(
        default=[], description="Templates that were skipped: why, and how to take them anyway."
    )
    unknown: list[int | str] = Field(
        default=[], description="Chosen templates of which no release is on record; they count as released."
    )
    clusters: list[Difference]

    @property
    def nothing(self) -> bool:
        """Whether the pods of all clusters would stay as they are, as far as that is known."""
        return self.action is not Action.RESTART and all(cluster.nothing for cluster in self.clusters)


class ReleaseResult(BaseModel):
    """How a release ended: what the flow returns and `--json` prints."""

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
        default=None, description="The template that was created, or gone back to; null where there is none."
    )
    base_template_id: int | str | None = Field(
        default=None, description="The template that was chosen as its base."
    )
    notes: list[str] = Field(
        default=[], description="Templates that were skipped: why, and how to take them anyway."
    )
    images: dict[str, str] = {}
    clusters: list[ClusterResult] = []
    evidence: str | None = Field(
        default=None,
        description="strong: the platform reported revisions and they agree. weak: names and states only.",
    )
    reason: str = ""
    requested_by: str = Field(default="", description="Who asked for it, as far as that is known.")
    entrance: str = Field(
        default="",
        description="The way it was started: cli, schedule, batch, mcp, ui or api, python.",
    )
    dry_run: bool = Field(default=False, description="Whether it was only to be planned, and write nothing.")
    tries: int = Field(default=1, description="The how-manieth try of the flow run this was, from 1.")
    approved_by: str = Field(default="", description="Who approved it, where somebody was asked.")
    approval_comment: str = Field(default="", description="What the approver wrote.")
    break_glass: str = Field(default="", description="Why it passed a closed release window, if it did.")
    plan: ReleasePlan | None = Field(
        default=None, description="What would change, or was expected to: of dry runs and of expect_plan."
    )
    seconds: dict[str, float] = Field(default={}, description="Seconds that each step took.")
    failed_steps: list[str] = Field(default=[], description="Names of the steps that failed.")
    error: dict[str, Any] | None = Field(default=None, description="Why it did not end well.")
    links: dict[str, str] = Field(default={}, description="Where to look further: label and address.")

    @property
    def wrote(self) -> bool:
        """True if any cluster was written to, or may have been."""
        return any(cluster.published is not False for cluster in self.clusters)

    @property
    def rolled_back(self) -> bool:
        """True if a rollback was tried, even if it failed: such a run is not continued."""
        return any(cluster.rolled_back is not None for cluster in self.clusters)

    @property
    def over(self) -> bool:
        """True if nothing is left that a retry of the run could do."""
        return self.dry_run or self.rolled_back or self.outcome is Outcome.RELEASED

    @property
    def live(self) -> str:
        """What each cluster runs by the last look."""
        return "; ".join(cluster.live for cluster in self.clusters)
