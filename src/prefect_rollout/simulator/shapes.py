"""The JSON of the contract's answers and bodies. The published OpenAPI document is made from these.

A field with a default may be left out: the contract marks it optional, and a scenario with
`optional_fields: false` leaves it out. What is not set is not sent.
"""

from typing import Annotated, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, Strict
from pydantic.alias_generators import to_camel

T = TypeVar("T")

MAX_REPLICAS = 2**31 - 1  # int32, as in Kubernetes; what a quota allows is another matter
Number = Annotated[int, Strict()]
Text = Annotated[str, Field(max_length=4096)]


class Shape(BaseModel):
    """A JSON object with camelCase names."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True)


# ---- bodies ---------------------------------------------------------------------------------


class UpgradeBody(Shape):
    """What an upgrade is made of."""

    template_id: Number = Field(ge=1, description="The template to start from.")
    clusters: list[Text] = Field(min_length=1, max_length=100)
    images: dict[str, Annotated[str, Field(min_length=1, max_length=2000)]] = Field(
        description="`{container: image}`; containers that are not named keep their image."
    )
    description: Text = ""


class PublishBody(Shape):
    """How many pods a publish asks for."""

    replicas: Number = Field(ge=0, le=MAX_REPLICAS)


class ScaleBody(Shape):
    """How many pods a deployment shall have from now on."""

    replicas: Number = Field(ge=1, le=32)


# ---- answers --------------------------------------------------------------------------------


class Envelope(Shape, Generic[T]):
    """Every answer that is not an error."""

    data: T


class Page(Shape, Generic[T]):
    """One page of a list; `list` is null when there is nothing on it, as with Wayne."""

    page_no: int
    page_size: int
    total_page: int
    total_count: int
    list: list[T] | None


class ErrorBody(Shape):
    """Every error; `code` equals the HTTP status."""

    code: int
    sub_code: int
    msg: str
    request_id: str | None = None


class AppShape(Shape):
    """An app."""

    id: int
    name: str
    namespace: str
    kube_namespace: str


class DeploymentShape(Shape):
    """A deployment; `metaData` is a JSON text."""

    id: int
    name: str
    meta_data: str
    app_id: int


class TemplateShape(Shape):
    """A stored version; `template` is the JSON text of an apps/v1 Deployment."""

    id: int
    name: str
    template: str
    deployment_id: int
    description: str
    create_time: str
    user: str


class TemplateIds(Shape):
    """What an upgrade created."""

    template_ids: list[int]


class ContainerShape(Shape):
    """A container of a pod."""

    name: str
    restart_count: int


class PodShape(Shape):
    """A pod."""

    name: str
    state: str
    namespace: str | None = None
    pod_ip: str | None = None
    node_name: str | None = None
    start_time: str | None = None
    container_status: list[ContainerShape] | None = None
    template_id: int | None = None


class EventShape(Shape):
    """A warning of the cluster about a pod, as Wayne tells it."""

    message: str
    source_component: str
    name: str
    object: str
    count: int
    first_seen: str
    last_seen: str
    reason: str
    type: str


class PodCountShape(Shape):
    """The cluster's own count: available pods and wanted ones, and why some are not available."""

    current: int
    desired: int
    warnings: list[EventShape]


class DeploymentStateShape(Shape):
    """The deployment as the cluster sees it."""

    name: str
    namespace: str
    pod_state: PodCountShape


class StatusShape(Shape):
    """A deployment in one cluster. `healthz` is Wayne's: true before a rollout has even begun."""

    pods: list[PodShape] | None
    cluster: str | None = None
    deployment: DeploymentStateShape | None = None
    healthz: bool | None = None
    template_id: int | None = None
    generation: int | None = None
    observed_generation: int | None = None
    updated_replicas: int | None = None


class OnlineShape(Shape):
    """Which template is online in a cluster."""

    id: int
    resource_id: int
    template_id: int
    cluster: str


class HistoryShape(Shape):
    """A publish that was accepted (status 1) or refused (0)."""

    id: int
    resource_id: int
    template_id: int
    cluster: str
    status: Literal[0, 1]
    message: str
    user: str
    create_time: str


# ---- the control API, in the simulator's own words ------------------------------------------


class Written(BaseModel):
    """A write that really took effect. `at` is in simulated seconds since the start or last reset."""

    kind: Literal["template", "publish", "restart", "scale"]
    app: int
    deployment: str
    template: int | None = None
    cluster: str | None = None
    replicas: int | None = None
    at: float
    idempotency_key: str | None = None
    description: str | None = None


class Truth(BaseModel):
    """What a rollout has really come to.

    `template` and `wanted` are what the last write asked for, `at` is the simulated second at which
    it was rolled out; null while it is not.
    """

    app: int
    deployment: str
    cluster: str
    template: int | None
    wanted: int | None
    pods: list[PodShape]
    rolled_out: bool
    at: float | None


class RequestSeen(BaseModel):
    """A request as it arrived and how it was answered.

    `status` is null where no answer began (a reset, or never). `headers` lacks Authorization. `body`
    has at most 16384 characters.
    """

    number: int
    at: float
    method: str
    path: str
    call: str | None
    status: int | None
    fault: str | None
    headers: dict[str, str]
    body: str


class Now(BaseModel):
    """The simulated time, in seconds since the start or last reset."""

    now: float
