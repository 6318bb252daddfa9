"""What the cloud keeps: apps, deployments, templates, and what was published."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from prefect_rollout.release.images import is_reference
from prefect_rollout.simulator.blueprint import Blueprint, read_blueprint
from prefect_rollout.simulator.engine import Rollout, Spec
from prefect_rollout.simulator.pod import Fate
from prefect_rollout.simulator.scenario import AppSpec, Behaviour, DeploymentSpec, Scenario, Timings

# Pods that are online when the simulation begins started a day before.
_STARTED = -86_400.0


@dataclass(slots=True)
class Template:
    """A stored version of a deployment."""

    id: int
    deployment_id: int
    name: str
    text: str
    description: str
    create_time: str
    user: str

    def blueprint(self) -> Blueprint:
        """What its text says; ValueError when it is unreadable."""
        return read_blueprint(self.text)


@dataclass(slots=True)
class Online:
    """A row of the publish status: which template is online in a cluster."""

    id: int
    template_id: int
    selector: tuple[tuple[str, str], ...]


@dataclass(slots=True)
class Publication:
    """A row of the publish history."""

    id: int
    template_id: int
    cluster: str
    user: str
    create_time: str
    accepted: bool = False
    message: str = ""


@dataclass(slots=True)
class Deployment:
    """A deployment of an app, with its pods in every cluster."""

    id: int
    app: "App"
    spec: DeploymentSpec
    timings: Timings
    behaviours: list[Behaviour]
    templates: dict[int, Template] = field(default_factory=dict)
    online: dict[str, Online] = field(default_factory=dict)
    history: list[Publication] = field(default_factory=list)
    rollouts: dict[str, Rollout] = field(default_factory=dict)
    locked_until: dict[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Its name, also the name of its templates."""
        return self.spec.name

    def behaviour(self, cluster: str, images: Mapping[str, str]) -> Behaviour:
        """How pods with these images behave in `cluster`."""
        for behaviour in self.behaviours:
            if behaviour.concerns(cluster, images.values()):
                return behaviour
        return Behaviour()

    def is_down(self, cluster: str) -> bool:
        """Whether the cluster does not answer for this deployment."""
        return any(each.kind == "cluster_down" and each.concerns(cluster, ()) for each in self.behaviours)

    def rollout(self, cluster: str) -> Rollout:
        """Its pods in `cluster`; an empty rollout where nothing was ever published."""
        if cluster not in self.rollouts:

            def fate(images: Mapping[str, str]) -> Fate:
                behaviour = self.behaviour(cluster, images)
                pull, start = self.timings.pull, self.timings.start
                # A pod that no node takes never comes to its images.
                if behaviour.kind != "unschedulable" and not all(map(is_reference, images.values())):
                    return Fate(pull, start, "invalid_image")
                if behaviour.kind == "slow_start" and behaviour.seconds is not None:
                    start = behaviour.seconds
                if behaviour.kind == "slow_pull" and behaviour.seconds is not None:
                    pull += behaviour.seconds
                return Fate(pull, start, behaviour.kind, behaviour.seconds or 0)

            self.rollouts[cluster] = Rollout(
                self.name,
                cluster,
                observe=self.timings.observe,
                terminate=self.timings.terminate,
                fate=fate,
            )
        return self.rollouts[cluster]

    def release(self, template_id: int, blueprint: Blueprint, cluster: str, wanted: int) -> Spec:
        """What a publish of that template asks of the cluster."""
        behaviour = self.behaviour(cluster, dict(blueprint.revision.images))
        no_pods_for = 0.0
        if behaviour.kind == "no_pods":
            no_pods_for = math.inf if behaviour.seconds is None else behaviour.seconds
        surge, unavailable, in_place = self.spec.rolling()
        return Spec(
            template_id=template_id,
            revision=blueprint.revision,
            wanted=wanted,
            max_surge=surge,
            max_unavailable=unavailable,
            in_place=in_place,
            no_pods_for=no_pods_for,
        )


@dataclass(slots=True)
class App:
    """An app."""

    id: int
    name: str
    namespace: str
    deployments: dict[int, Deployment] = field(default_factory=dict)


def build_apps(scenario: Scenario) -> dict[int, App]:
    """The apps of a scenario, copies included, by id.

    Raises:
        ValueError: a template that the scenario says is online is unreadable.
    """
    apps: dict[int, App] = {}
    for spec in scenario.apps:
        texts = {
            template.id: template.text(deployment.name, spec.name, spec.namespace)
            for deployment in spec.deployments
            for template in deployment.templates
        }
        for copy in range(spec.copies):
            app = _build_app(spec, copy, scenario.timings, texts)
            apps[app.id] = app
    return apps


def _build_app(spec: AppSpec, copy: int, timings: Timings, texts: Mapping[int, str]) -> App:
    name = spec.name if copy == 0 else f"{spec.name}-{copy + 1}"
    app = App(spec.id + copy, name, spec.namespace)
    shift = copy * spec.template_stride
    for deployment_spec in spec.deployments:
        deployment = Deployment(
            id=deployment_spec.id + copy * spec.deployment_stride,
            app=app,
            spec=deployment_spec,
            timings=deployment_spec.timings or timings,
            behaviours=list(deployment_spec.behaviour),
        )
        app.deployments[deployment.id] = deployment
        for template in deployment_spec.templates:
            deployment.templates[template.id + shift] = Template(
                id=template.id + shift,
                deployment_id=deployment.id,
                name=deployment.name,
                text=texts[template.id],
                description=template.description,
                create_time=template.create_time,
                user=template.user,
            )
        for number, (cluster, template_id) in enumerate(deployment_spec.online.items(), start=1):
            _put_online(deployment, cluster, template_id + shift, deployment.id * 100 + number)
    return app


def _put_online(deployment: Deployment, cluster: str, template_id: int, row: int) -> None:
    try:
        blueprint = deployment.templates[template_id].blueprint()
    except ValueError as error:
        raise ValueError(
            f"deployment {deployment.name}: template {template_id} is online and unreadable: {error}"
        ) from error
    wanted = deployment.spec.replicas(cluster)
    spec = deployment.release(template_id, blueprint, cluster, wanted)
    deployment.rollout(cluster).start_online(spec, _STARTED)
    deployment.online[cluster] = Online(row, template_id, blueprint.selector)
    template = deployment.templates[template_id]
    deployment.history.append(
        Publication(row, template_id, cluster, template.user, template.create_time, accepted=True)
    )
