"""The simulated cloud: its calls, without HTTP.

Thread safety: one re-entrant lock. Every public method takes it, so that a test may ask from its own
thread while the server answers from its loop.
"""

import itertools
import time
from collections import deque
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta, timezone
from functools import wraps
from threading import RLock
from typing import Concatenate, Literal, ParamSpec, TypeVar

from prefect_rollout.errors import ConfigurationError
from prefect_rollout.simulator import shapes, views
from prefect_rollout.simulator.blueprint import Blueprint, with_images
from prefect_rollout.simulator.exchange import StoredAnswer
from prefect_rollout.simulator.fault import Fault, FaultPlan
from prefect_rollout.simulator.refusal import Refusal
from prefect_rollout.simulator.scenario import Behaviour, Scenario
from prefect_rollout.simulator.signature import Doorkeeper
from prefect_rollout.simulator.state import App, Deployment, Online, Publication, Template, build_apps
from prefect_rollout.text import one_line

POD_QUOTA = 1000
REQUESTS_KEPT = 10_000

_BEIJING = timezone(timedelta(hours=8))

P = ParamSpec("P")
T = TypeVar("T")


def _locked(method: Callable[Concatenate["Cloud", P], T]) -> Callable[Concatenate["Cloud", P], T]:
    @wraps(method)
    def guarded(self: "Cloud", /, *args: P.args, **kwargs: P.kwargs) -> T:
        with self.lock:
            return method(self, *args, **kwargs)

    return guarded


class Cloud:
    """A container cloud in memory.

    Args:
        scenario: what it holds and how it misbehaves.
        speed: simulated seconds that pass in one second.
        clock: seconds of real time that never run backwards.
    """

    def __init__(
        self, scenario: Scenario, *, speed: float = 1.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.lock = RLock()
        self._speed = speed
        self._clock = clock
        self.load(scenario)

    # ---- the whole --------------------------------------------------------------------------

    @_locked
    def load(self, scenario: Scenario) -> None:
        """Begins anew with `scenario`: time, records and counters start from nothing.

        Raises:
            ConfigurationError: a template that the scenario says is online is unreadable.
        """
        try:
            apps = build_apps(scenario)
        except ValueError as error:
            raise ConfigurationError(
                f"the scenario cannot be built: {one_line(error)}", advice="Correct the scenario."
            ) from error
        self.scenario = scenario
        self._apps = apps
        self._deployments = {each.id: each for app in apps.values() for each in app.deployments.values()}
        self._clusters = {
            cluster for each in self._deployments.values() for cluster in each.spec.allowed_clusters()
        }
        known = [template for each in self._deployments.values() for template in each.templates]
        self._template_ids = itertools.count(max(known, default=0) + 1)
        self._rows = itertools.count(1)
        self._request_ids = itertools.count(1)
        self._began = self._clock()
        self._epoch = datetime.now(UTC)
        self._jumped = 0.0
        self._record: list[shapes.Written] = []
        self._requests: deque[shapes.RequestSeen] = deque(maxlen=REQUESTS_KEPT)
        self._request_numbers = itertools.count(1)
        self.faults = FaultPlan(scenario.faults)
        self.doorkeeper = Doorkeeper()
        self.answers: dict[tuple[str, str], StoredAnswer] = {}

    @_locked
    def reset(self) -> None:
        """Begins anew with the same scenario."""
        self.load(self.scenario)

    @_locked
    def now(self) -> float:
        """The simulated time in seconds."""
        return (self._clock() - self._began) * self._speed + self._jumped

    @_locked
    def advance(self, seconds: float) -> float:
        """Jumps ahead by so many simulated seconds; the new time."""
        self._jumped += seconds
        return self.now()

    @_locked
    def set_faults(self, faults: Sequence[Fault]) -> None:
        """Replaces the faults, with counters at nothing."""
        self.faults.replaced.set()
        self.faults = FaultPlan(faults)

    @_locked
    def set_behaviour(self, app_id: int, deployment: str, behaviours: Sequence[Behaviour]) -> None:
        """Replaces a deployment's behaviour; pods that exist keep their fate."""
        for each in self._app(app_id).deployments.values():
            if each.name == deployment:
                each.behaviours = list(behaviours)
                return
        raise Refusal(404, f"应用 {app_id} 下没有部署 {deployment}")

    # ---- what really happened ---------------------------------------------------------------

    @_locked
    def record(self, kind: str | None = None) -> list[shapes.Written]:
        """The writes that took effect, oldest first; of one kind if named."""
        return [each for each in self._record if kind is None or each.kind == kind]

    @_locked
    def requests(self, call: str | None = None) -> list[shapes.RequestSeen]:
        """The last requests as they arrived, oldest first; of one call if named."""
        return [each for each in self._requests if call is None or each.call == call]

    @_locked
    def note_request(self, seen: shapes.RequestSeen) -> None:
        """Keeps a request for `requests`."""
        self._requests.append(seen.model_copy(update={"number": next(self._request_numbers)}))

    @_locked
    def truth(self, app_id: int | None = None, deployment: str | None = None) -> list[shapes.Truth]:
        """What each rollout has come to, of one app or one deployment name if given."""
        now = self.now()
        found = []
        for each in self._deployments.values():
            if app_id in {None, each.app.id} and deployment in {None, each.name}:
                for cluster, rollout in each.rollouts.items():
                    rollout.advance(now)
                    found.append(
                        shapes.Truth(
                            app=each.app.id,
                            deployment=each.name,
                            cluster=cluster,
                            template=rollout.spec.template_id if rollout.spec else None,
                            wanted=rollout.spec.wanted if rollout.spec else None,
                            pods=views.pods_of(each, rollout, now, self._iso),
                            rolled_out=rollout.rolled_out,
                            at=rollout.done_at,
                        )
                    )
        return found

    @_locked
    def rolled_out(self, deployment: str, cluster: str, app_id: int | None = None) -> bool:
        """Whether what was last asked for runs in full and nothing else is left.

        `app_id` may be left out where only one app has a deployment of that name.
        """
        found = [each for each in self.truth(app_id, deployment) if each.cluster == cluster]
        if len(found) != 1:
            raise LookupError(f"{len(found)} deployments named {deployment!r} in {cluster!r}")
        return found[0].rolled_out

    @_locked
    def request_id(self) -> str | None:
        """A new request id; none where the scenario leaves optional fields out."""
        return f"sim-{next(self._request_ids):08d}" if self.scenario.optional_fields else None

    @_locked
    def deployment_name(self, *, deployment_id: int | None, template_id: int | None) -> str | None:
        """The name of the deployment with that id, or with a template of that id, if there is one."""
        found = self._deployments.get(deployment_id or 0)
        if found is None and template_id is not None:
            found = next((each for each in self._deployments.values() if template_id in each.templates), None)
        return found.name if found else None

    # ---- reads ------------------------------------------------------------------------------

    @_locked
    def app(self, app_id: int) -> shapes.AppShape:
        """An app."""
        app = self._app(app_id)
        return shapes.AppShape(
            id=app.id, name=app.name, namespace=app.namespace, kube_namespace=app.namespace
        )

    @_locked
    def deployments(
        self, app_id: int, *, exact: str | None, containing: str | None, page: int, size: int
    ) -> shapes.Page[shapes.DeploymentShape]:
        """An app's deployments, by id; of one exact name, or of names that contain a text."""
        found = [
            shapes.DeploymentShape(id=each.id, name=each.name, meta_data=each.spec.meta_text(), app_id=app_id)
            for each in self._app(app_id).deployments.values()
            if (exact is None or each.name == exact) and (containing is None or containing in each.name)
        ]
        return self._page(found, page, size)

    @_locked
    def templates(
        self, app_id: int, *, deployment_id: int | None, newest_first: bool, page: int, size: int
    ) -> shapes.Page[shapes.TemplateShape]:
        """The templates of an app, or of one of its deployments."""
        app = self._app(app_id)
        deployments = (
            app.deployments.values() if deployment_id is None else [self._deployment(app_id, deployment_id)]
        )
        found = sorted(
            (template for each in deployments for template in each.templates.values()),
            key=lambda template: template.id,
            reverse=newest_first and self.scenario.sort_templates,
        )
        shown = self._page(found, page, size)
        return shapes.Page[shapes.TemplateShape](
            page_no=shown.page_no,
            page_size=shown.page_size,
            total_page=shown.total_page,
            total_count=shown.total_count,
            list=[_template(each) for each in shown.list] if shown.list else None,
        )

    @_locked
    def template(self, app_id: int, template_id: int) -> shapes.TemplateShape:
        """One template of an app."""
        for each in self._app(app_id).deployments.values():
            if template_id in each.templates:
                return _template(each.templates[template_id])
        raise Refusal(404, f"模板 {template_id} 不存在")

    @_locked
    def status(self, app_id: int, deployment_id: int, clusters: Sequence[str]) -> list[shapes.StatusShape]:
        """A deployment's status in some clusters, in the order asked for."""
        deployment = self._deployment(app_id, deployment_id)
        now = self.now()
        found = []
        for cluster in clusters:
            self._allowed(deployment, cluster)
            deployment.rollout(cluster).advance(now)
            found.append(
                views.status_of(deployment, cluster, now, self._iso, full=self.scenario.optional_fields)
            )
        return found

    @_locked
    def online(self, deployment_id: int) -> list[shapes.OnlineShape]:
        """Which template is online in each cluster."""
        deployment = self._deployment(None, deployment_id)
        return [
            shapes.OnlineShape(
                id=row.id, resource_id=deployment_id, template_id=row.template_id, cluster=cluster
            )
            for cluster, row in deployment.online.items()
        ]

    @_locked
    def history(self, deployment_id: int, *, page: int, size: int) -> shapes.Page[shapes.HistoryShape]:
        """The publishes of a deployment, newest first."""
        deployment = self._deployment(None, deployment_id)
        found = [
            shapes.HistoryShape(
                id=each.id,
                resource_id=deployment_id,
                template_id=each.template_id,
                cluster=each.cluster,
                status=1 if each.accepted else 0,
                message=each.message,
                user=each.user,
                create_time=each.create_time,
            )
            for each in reversed(deployment.history)
        ]
        return self._page(found, page, size)

    # ---- writes -----------------------------------------------------------------------------

    @_locked
    def upgrade(
        self, app_id: int, deployment_id: int, body: shapes.UpgradeBody, *, user: str, key: str | None
    ) -> int:
        """Creates a template like another with other images; its id."""
        deployment = self._deployment(app_id, deployment_id)
        base = self._template(deployment, body.template_id)
        for cluster in body.clusters:
            self._allowed(deployment, cluster)
        containers = dict(_readable(base).revision.images)
        for container in body.images:
            if container not in containers:
                raise Refusal(400, f"模板 {base.id} 中没有容器 {container}")
        now = self.now()
        new = Template(
            id=next(self._template_ids),
            deployment_id=deployment.id,
            name=base.name,
            text=with_images(base.text, body.images),
            description=body.description,
            create_time=self._iso(now),
            user=user,
        )
        deployment.templates[new.id] = new
        self._note("template", deployment, template=new.id, key=key, description=new.description)
        return new.id

    @_locked
    def publish(
        self,
        app_id: int,
        deployment_id: int,
        template_id: int,
        cluster: str,
        replicas: int,
        *,
        user: str,
        key: str | None,
    ) -> None:
        """Puts a template online in a cluster; the rollout begins and may yet fail."""
        deployment = self._deployment(app_id, deployment_id)
        template = self._template(deployment, template_id)
        self._allowed(deployment, cluster)
        now = self.now()
        entry = Publication(next(self._rows), template_id, cluster, user, self._iso(now))
        try:
            blueprint = self._publishable(deployment, template, cluster, replicas, now)
        except Refusal as refusal:
            entry.message = refusal.message
            deployment.history.append(entry)
            raise
        entry.accepted = True
        deployment.history.append(entry)
        row = deployment.online.get(cluster)
        row_id = row.id if row else next(self._rows)
        deployment.online[cluster] = Online(row_id, template_id, blueprint.selector)
        deployment.locked_until[cluster] = now + self.scenario.publish_lock
        deployment.rollout(cluster).publish(
            now, deployment.release(template_id, blueprint, cluster, replicas)
        )
        self._note("publish", deployment, template=template_id, cluster=cluster, replicas=replicas, key=key)

    @_locked
    def restart(self, app_id: int, deployment_id: int, cluster: str, *, key: str | None) -> None:
        """Has all pods replaced."""
        deployment = self._published(app_id, deployment_id, cluster)
        deployment.rollout(cluster).restart(self.now())
        self._note("restart", deployment, cluster=cluster, key=key)

    @_locked
    def scale(self, app_id: int, deployment_id: int, cluster: str, replicas: int, *, key: str | None) -> None:
        """Changes the number of pods; the metaData stays as it is."""
        deployment = self._published(app_id, deployment_id, cluster)
        deployment.rollout(cluster).scale(self.now(), replicas)
        self._note("scale", deployment, cluster=cluster, replicas=replicas, key=key)

    # ---- looking up -------------------------------------------------------------------------

    def _publishable(
        self, deployment: Deployment, template: Template, cluster: str, replicas: int, now: float
    ) -> Blueprint:
        if deployment.is_down(cluster):
            raise Refusal(500, f"集群 {cluster} 连接失败: dial tcp 10.0.0.1:6443: i/o timeout")
        blueprint = _readable(template)
        online = deployment.online.get(cluster)
        if online and online.selector != blueprint.selector:
            raise Refusal(400, "spec.selector: field is immutable, 模板修改了 matchLabels")
        if now < deployment.locked_until.get(cluster, 0):
            raise Refusal(409, f"{deployment.name} 在集群 {cluster} 正在发布中", 409001)
        behaviour = deployment.behaviour(cluster, dict(blueprint.revision.images))
        if behaviour.kind == "quota_refused" or replicas > POD_QUOTA:
            namespace = deployment.app.namespace
            raise Refusal(403, f"命名空间 {namespace} 在集群 {cluster} 的资源配额不足", 403001)
        return blueprint

    def _app(self, app_id: int) -> App:
        if app_id not in self._apps:
            raise Refusal(404, f"应用 {app_id} 不存在")
        return self._apps[app_id]

    def _deployment(self, app_id: int | None, deployment_id: int) -> Deployment:
        if app_id is not None:
            self._app(app_id)
        found = self._deployments.get(deployment_id)
        if found is None or app_id not in {None, found.app.id}:
            raise Refusal(404, f"部署 {deployment_id} 不存在")
        return found

    def _template(self, deployment: Deployment, template_id: int) -> Template:
        if template_id not in deployment.templates:
            raise Refusal(404, f"部署 {deployment.name} 没有模板 {template_id}")
        return deployment.templates[template_id]

    def _allowed(self, deployment: Deployment, cluster: str) -> None:
        if cluster in deployment.spec.allowed_clusters():
            return
        if cluster in self._clusters:
            raise Refusal(403, f"部署 {deployment.name} 不允许使用集群 {cluster}")
        raise Refusal(404, f"集群 {cluster} 不存在")

    def _published(self, app_id: int, deployment_id: int, cluster: str) -> Deployment:
        deployment = self._deployment(app_id, deployment_id)
        self._allowed(deployment, cluster)
        if cluster not in deployment.online:
            raise Refusal(404, f"{deployment.name} 尚未发布到集群 {cluster}")
        if deployment.is_down(cluster):
            raise Refusal(500, f"集群 {cluster} 连接失败")
        return deployment

    def _page(self, found: Sequence[T], page: int, size: int) -> shapes.Page[T]:
        return views.page_of(found, page, min(size, self.scenario.page_size_limit))

    def _iso(self, at: float) -> str:
        """A simulated moment as the cloud writes times, in Beijing's."""
        return (self._epoch + timedelta(seconds=at)).astimezone(_BEIJING).isoformat(timespec="seconds")

    def _note(
        self,
        kind: Literal["template", "publish", "restart", "scale"],
        deployment: Deployment,
        *,
        template: int | None = None,
        cluster: str | None = None,
        replicas: int | None = None,
        key: str | None = None,
        description: str | None = None,
    ) -> None:
        self._record.append(
            shapes.Written(
                kind=kind,
                app=deployment.app.id,
                deployment=deployment.name,
                template=template,
                cluster=cluster,
                replicas=replicas,
                at=self.now(),
                idempotency_key=key,
                description=description,
            )
        )


def _readable(template: Template) -> Blueprint:
    try:
        return template.blueprint()
    except ValueError as error:
        raise Refusal(400, f"模板 {template.id} 无法解析: {one_line(error, 160)}") from error


def _template(template: Template) -> shapes.TemplateShape:
    return shapes.TemplateShape(
        id=template.id,
        name=template.name,
        template=template.text,
        deployment_id=template.deployment_id,
        description=template.description,
        create_time=template.create_time,
        user=template.user,
    )
