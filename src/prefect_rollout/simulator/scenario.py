"""What the simulated cloud holds and how it misbehaves: the scenario, read from YAML or JSON.

Every field has a default: an empty file is the article's cloud. Durations are in simulated seconds
unless a field says otherwise.
"""

import json
from collections.abc import Iterable
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from prefect_rollout.errors import ConfigurationError
from prefect_rollout.ids import first_mistake
from prefect_rollout.simulator import article
from prefect_rollout.simulator.fault import Fault
from prefect_rollout.text import one_line

Name = Annotated[str, Field(min_length=1, max_length=253)]
Id = Annotated[int, Field(gt=0, le=2**53)]
Seconds = Annotated[float, Field(ge=0, le=1e7, allow_inf_nan=False)]


def _listed(value: Any) -> Any:
    """One mapping stands for a list of one, so that the common case needs no dash."""
    return [value] if isinstance(value, dict | Behaviour) else value


class ScenarioModel(BaseModel):
    """The base of the scenario's parts: a misspelt key is a mistake, never ignored."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)


class Credential(ScenarioModel):
    """A key that may sign requests."""

    key_id: Name
    secret_key: Name
    expired: bool = Field(default=False, description="Requests are answered 401, subCode 401002.")
    read_only: bool = Field(default=False, description="Writes are answered 403.")


class Timings(ScenarioModel):
    """How long each step of a pod takes. The article's release lasts 9 seconds with the defaults."""

    observe: Seconds = Field(default=1, description="From a write until the cluster acts on it.")
    pull: Seconds = Field(default=2, description="To pull an image; the pod is Pending.")
    start: Seconds = Field(default=3, description="From then until ready; the pod is ContainersNotReady.")
    terminate: Seconds = Field(default=3, description="For an old pod to vanish; it is Terminating.")


BehaviourKind = Literal[
    "normal",
    "image_cannot_be_pulled",
    "invalid_image",
    "slow_pull",
    "unschedulable",
    "config_error",
    "crash_loop",
    "never_ready",
    "slow_start",
    "no_pods",
    "quota_refused",
    "cluster_down",
]


class Behaviour(ScenarioModel):
    """How a deployment's releases turn out.

    With the optional fields, `podState.warnings` tells why, as events.

    - `image_cannot_be_pulled`, `invalid_image`, `unschedulable`, `config_error`: new pods stay Pending.
    - `slow_pull`: the image cannot be pulled for `seconds`, and then it can.
    - `crash_loop`: they stay ContainersNotReady, restart, and look Running for a moment each time.
    - `never_ready`: they stay ContainersNotReady.
    - `slow_start`: they need `seconds` to start.
    - `no_pods`: the cluster makes and lists no pods for `seconds` after a publish, or for ever.
    - `quota_refused`: a publish is answered 403, subCode 403001.
    - `cluster_down`: a publish is answered 500 and the status has no pods.
    """

    kind: BehaviourKind = "normal"
    seconds: Seconds | None = Field(
        default=None, description="For slow_start and slow_pull (needed), and no_pods."
    )
    clusters: list[Name] | None = Field(default=None, description="Only there; everywhere when unset.")
    images: str | None = Field(default=None, description="Only for images that contain this text.")

    @model_validator(mode="after")
    def _seconds_fit(self) -> Self:
        if self.kind in {"slow_start", "slow_pull"} and self.seconds is None:
            raise ValueError(f"{self.kind} needs seconds")
        if self.seconds is not None and self.kind not in {"slow_start", "slow_pull", "no_pods"}:
            raise ValueError(f"{self.kind} has no seconds")
        if self.images is not None and self.kind == "cluster_down":
            raise ValueError("a cluster is down for every image: cluster_down has no images")
        return self

    def concerns(self, cluster: str, images: Iterable[str]) -> bool:
        """Whether it applies to pods with `images` in `cluster`."""
        if self.clusters is not None and cluster not in self.clusters:
            return False
        return self.images is None or any(self.images in image for image in images)


Behaviours = Annotated[list[Behaviour], BeforeValidator(_listed)]
"""One behaviour or several; the first that concerns a pod counts."""


class ClusterSpec(ScenarioModel):
    """A cluster of a deployment, where the scenario writes no metaData of its own."""

    replica: int = Field(default=1, ge=0, le=1000)
    host_group: str = Field(default="default", alias="hostGroup")


def _as_spec(value: Any) -> Any:
    return {"replica": value} if isinstance(value, int) else value


class TemplateSpec(ScenarioModel):
    """A stored version: an image, several images by container, or the template itself."""

    id: Id
    image: str | None = Field(default=None, description="For one container named like the deployment.")
    images: dict[str, str] | None = None
    template: dict[str, Any] | str | None = Field(
        default=None, description="An apps/v1 Deployment; as text it is served as it is, readable or not."
    )
    description: str = ""
    user: str = "zhangsan"
    create_time: str = "2024-07-29T18:35:00+08:00"

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if sum(source is not None for source in (self.image, self.images, self.template)) != 1:
            raise ValueError("a template needs exactly one of image, images and template")
        datetime.fromisoformat(self.create_time)
        return self

    def text(self, deployment: str, app: str, namespace: str) -> str:
        """The template as the JSON text that the cloud serves."""
        if isinstance(self.template, str):
            return self.template
        images = self.images or {deployment: self.image or ""}
        return json.dumps(
            self.template or article.template(deployment, app, namespace, images), ensure_ascii=False
        )


class DeploymentSpec(ScenarioModel):
    """A deployment: its metaData or clusters, its templates, and what is online where."""

    id: Id
    name: Name
    meta_data: dict[str, Any] | str | None = Field(
        default=None,
        alias="metaData",
        description="As text it is served as it is, readable or not; left out, it is made from `clusters`.",
    )
    clusters: dict[Name, Annotated[ClusterSpec, BeforeValidator(_as_spec)]] | None = Field(
        default=None, description="Clusters that it may go to; a number stands for its replicas."
    )
    templates: list[TemplateSpec] = []
    online: dict[Name, Id] = Field(default={}, description="The template online, by cluster.")
    behaviour: Behaviours = []
    timings: Timings | None = None

    @model_validator(mode="after")
    def _online_exists(self) -> Self:
        templates = {template.id for template in self.templates}
        for cluster, template in self.online.items():
            if template not in templates:
                raise ValueError(f"online.{cluster}: the deployment has no template {template}")
            if cluster not in self.allowed_clusters():
                raise ValueError(f"online.{cluster}: the deployment has no such cluster")
        return self

    def allowed_clusters(self) -> list[str]:
        """The clusters that it may be published to."""
        if self.clusters is not None:
            return list(self.clusters)
        clusters = self.parsed_meta_data.get("clusters")
        return list(clusters) if isinstance(clusters, dict) else []

    def meta_text(self) -> str:
        """The metaData as the JSON text that the cloud serves."""
        if isinstance(self.meta_data, str):
            return self.meta_data
        return json.dumps(self.parsed_meta_data, ensure_ascii=False)

    def replicas(self, cluster: str) -> int:
        """How many pods run in `cluster` at the start; 1 where nothing says."""
        newer, older = self.parsed_meta_data.get("clusters"), self.parsed_meta_data.get("replicas")
        entry = newer.get(cluster) if isinstance(newer, dict) else None
        spec = (self.clusters or {}).get(cluster)
        for found in (
            entry.get("replica") if isinstance(entry, dict) else None,
            older.get(cluster) if isinstance(older, dict) else None,
            spec and spec.replica,
        ):
            if isinstance(found, int) and 0 <= found <= 1000:
                return found
        return 1

    def rolling(self) -> tuple[object, object, bool]:
        """`(maxSurge, maxUnavailable, inPlace)` of the metaData, as they stand there."""
        meta = self.parsed_meta_data
        strategy = meta.get("strategy")
        bounds = strategy.get("rollingUpdate") if isinstance(strategy, dict) else None
        if not isinstance(bounds, dict):
            bounds = {}
        return bounds.get("maxSurge"), bounds.get("maxUnavailable"), meta.get("inPlace") is True

    @cached_property
    def parsed_meta_data(self) -> dict[str, Any]:
        """The metaData as an object; empty where it is unreadable."""
        if self.meta_data is None:
            return article.meta_data(
                self.name,
                {name: (spec.replica, spec.host_group) for name, spec in (self.clusters or {}).items()},
            )
        if isinstance(self.meta_data, dict):
            return self.meta_data
        try:
            parsed = json.loads(self.meta_data)
        except (ValueError, RecursionError):
            return {}  # served unreadable on purpose; the cluster itself then goes by the defaults
        return parsed if isinstance(parsed, dict) else {}


class AppSpec(ScenarioModel):
    """An app. With `copies` it stands for many alike.

    Copy number i (from 1) has the app's id plus i-1 and, from 2 on, `-i` after the app's name. Its
    deployments keep their names; their ids and their templates' ids count up too.
    """

    id: Id
    name: Name
    namespace: Name = "qdgc"
    copies: int = Field(default=1, ge=1, le=10_000)
    deployments: list[DeploymentSpec] = []

    @property
    def deployment_stride(self) -> int:
        """How far the deployments' ids of one copy lie from the next one's."""
        return _span(deployment.id for deployment in self.deployments)

    @property
    def template_stride(self) -> int:
        """How far the templates' ids of one copy lie from the next one's."""
        return _span(template.id for deployment in self.deployments for template in deployment.templates)


def _span(ids: Iterable[int]) -> int:
    known = list(ids) or [0]
    return max(known) - min(known) + 1


class Scenario(ScenarioModel):
    """The whole simulated cloud."""

    key_id: Name = "demo-key"
    secret_key: Name = "demo-secret"  # noqa: S105 - protects nothing
    extra_keys: list[Credential] = Field(
        default=[], description="Further keys: expired, read only, or plain."
    )
    optional_fields: bool = Field(
        default=True, description="False: no field that the contract marks optional; pods are name and state."
    )
    idempotency: bool = Field(default=True, description="False: the Idempotency-Key header is ignored.")
    sort_templates: bool = Field(
        default=True, description="False: templates come in ascending order of id whatever `sortby` says."
    )
    page_size_limit: int = Field(default=100, ge=1, le=100)
    publish_lock: Seconds = Field(
        default=0, description="How long another publish to the same place is answered 409001."
    )
    timings: Timings = Timings()
    apps: list[AppSpec] = Field(
        default_factory=lambda: [AppSpec.model_validate(app) for app in article.apps()],
        description="Left out, the article's app.",
    )
    faults: list[Fault] = []

    @model_validator(mode="after")
    def _ids_once(self) -> Self:
        apps: set[int] = set()
        deployments: set[int] = set()
        templates: set[int] = set()
        for app in self.apps:
            for copy in range(app.copies):
                _add(apps, app.id + copy, "app")
                for deployment in app.deployments:
                    _add(deployments, deployment.id + copy * app.deployment_stride, "deployment")
                    for template in deployment.templates:
                        _add(templates, template.id + copy * app.template_stride, "template")
        for app in self.apps:
            names: set[str] = set()
            for deployment in app.deployments:
                if deployment.name in names:
                    raise ValueError(f"app {app.id} has two deployments named {deployment.name!r}")
                names.add(deployment.name)
        if len(self.keys()) <= len(self.extra_keys):
            raise ValueError("a key_id stands twice")
        return self

    def keys(self) -> dict[str, Credential]:
        """All keys by their id."""
        first = Credential(key_id=self.key_id, secret_key=self.secret_key)
        return {key.key_id: key for key in (first, *self.extra_keys)}


def _add(ids: set[int], new: int, noun: str) -> None:
    if new in ids:
        raise ValueError(f"{noun} id {new} stands twice, copies included")
    ids.add(new)


def load_scenario(path: Path | str) -> Scenario:
    """The scenario in a YAML or JSON file.

    Raises:
        ConfigurationError: the file cannot be read, or a field is wrong; the message names it.
    """
    where = Path(path)
    advice = "Correct that field; every field may be left out, and then has its default."
    try:
        # JSON is read as YAML, of which it is a subset as far as scenarios go.
        content = yaml.safe_load(where.read_text(encoding="utf-8"))
        return Scenario.model_validate({} if content is None else content)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(
            f"the scenario {one_line(where)} cannot be read: {one_line(error, 160)}",
            advice="Name a readable YAML or JSON file.",
        ) from error
    except yaml.YAMLError as error:
        raise ConfigurationError(
            f"the scenario {one_line(where)} is neither YAML nor JSON: {one_line(error, 200)}", advice=advice
        ) from error
    except ValidationError as error:
        raise ConfigurationError(
            f"the scenario {one_line(where)}: {first_mistake(error)}", advice=advice
        ) from error
