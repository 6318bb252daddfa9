"""Client of 360's container cloud, an implementation of the platform port."""

import difflib
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from functools import partial
from typing import Any, Self

from pydantic import TypeAdapter

from prefect_rollout.errors import (
    AppNotFoundError,
    DeploymentNotFoundError,
    ForeignTemplateError,
    NotFoundError,
    TemplateNotFoundError,
    UpgradeError,
)
from prefect_rollout.ids import CamelCase, Id, by_age, same_id
from prefect_rollout.platforms.container_cloud.exchange import Exchange, read
from prefect_rollout.platforms.container_cloud.payloads import (
    App,
    ClusterStatus,
    Deployment,
    OnlineTemplate,
    Publication,
    Template,
    placement_of,
    release_mark,
)
from prefect_rollout.platforms.http import host_of
from prefect_rollout.platforms.polling import polled
from prefect_rollout.release.workload import (
    Applied,
    Baseline,
    Change,
    ListedRevision,
    Placement,
    Revision,
    Workload,
)
from prefect_rollout.text import address, one_line, with_scheme
from prefect_rollout.verdict.status import Observation, Status


class ContainerCloudClient:
    """The container cloud behind the `Platform` port, over one pool of connections.

    It does not retry, and raises only errors of `prefect_rollout.errors`.

    Args:
        cloud: exchanges with the cloud; the client closes them.
        registry_url: the image registry, used only by `links`.
    """

    def __init__(self, cloud: Exchange, *, registry_url: str | None = None) -> None:
        self._cloud = cloud
        self._registry_url = registry_url

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._cloud.aclose()

    @property
    def identity(self) -> str:
        return host_of(self._cloud.base)

    @property
    def realm(self) -> str:
        return self.identity

    def place(self, cluster: str) -> str:
        return cluster

    def cluster_at(self, place: str) -> str:
        return place

    def links(self) -> dict[str, str]:
        links = {"Container cloud": address(self._cloud.base)}
        if self._registry_url:
            links["Image registry"] = address(with_scheme(self._registry_url))
        return links

    def commands(
        self, workload: Workload, cluster: str, pod: str | None = None, container: str | None = None
    ) -> list[str]:
        return []

    # ---- reads ------------------------------------------------------------------------------

    async def workload(self, app_id: Id, name: str) -> Workload:
        app = await self.app(app_id)
        deployment = await self._deployment(app_id, name)
        return Workload(
            app_id=app.id, app=app.name, id=deployment.id, name=deployment.name, handle=deployment.meta_data
        )

    async def app(self, app_id: Id) -> App:
        """Return an app. `configure` uses it to test a key."""
        try:
            app = read(App, await self._cloud.call("app", {"app_id": app_id}))
        except NotFoundError as error:
            advice = "Look up the app's id in the cloud's console; the key must belong to its project."
            raise AppNotFoundError.named(app_id, advice=advice, app_id=app_id, **error.data) from error
        if not same_id(app.id, app_id):
            raise AppNotFoundError.named(app_id, [str(app.id)], app_id=app_id)
        return app

    async def _deployment(self, app_id: Id, name: str) -> Deployment:
        places = {"app_id": app_id}
        async for deployment in self._cloud.pages(
            Deployment, "deployments", places, {"filter": f"name__exact={name}"}
        ):
            if deployment.name == name and same_id(deployment.app_id or app_id, app_id):
                return deployment
        names = [other.name async for other in self._cloud.pages(Deployment, "deployments", places, {})]
        near = difflib.get_close_matches(name, names, n=10, cutoff=0.4)
        others = sorted(set(names) - set(near))
        raise DeploymentNotFoundError.named(
            name,
            [*near, *others][:20],
            f"in app {one_line(app_id, 80)}",
            "Create it in the cloud's console.",
            app_id=app_id,
        )

    def placement(self, workload: Workload, clusters: Sequence[str] | None = None) -> Placement:
        return placement_of(workload, clusters)

    def groups(self, clusters: Sequence[str]) -> list[list[str]]:
        return [list(clusters)]

    @property
    def starts_from_live(self) -> bool:
        return False

    async def revisions(self, workload: Workload, cluster: str | None = None) -> list[ListedRevision]:
        # Sorted here: an installation may sort in another order, or not at all.
        found = [template.listed for template in await self._templates(workload)]
        return sorted(found, key=lambda revision: by_age(revision.id), reverse=True)

    async def _templates(self, workload: Workload) -> list[Template]:
        query = {"deploymentId": str(workload.id), "sortby": "-id"}
        pages = self._cloud.pages(Template, "templates", {"app_id": workload.app_id}, query)
        return [
            template
            async for template in pages
            if template.deployment_id is None or same_id(template.deployment_id, workload.id)
        ]

    async def revision(self, workload: Workload, revision: Id, cluster: str | None = None) -> Revision:
        return (await self._template(workload, revision)).revision

    async def pod_template(self, workload: Workload, revision: Id) -> dict[str, Any]:
        _, pods = (await self._template(workload, revision)).read()
        return pods

    async def _template(self, workload: Workload, template_id: Id) -> Template:
        places = {"app_id": workload.app_id, "template_id": template_id}
        try:
            template = read(Template, await self._cloud.call("template", places))
        except NotFoundError as error:
            raise TemplateNotFoundError.named(template_id, **error.data) from error
        if not same_id(template.id, template_id):
            raise TemplateNotFoundError.named(template_id, (), f"of {one_line(workload.name, 120)}")
        owned = template.deployment_id is not None and same_id(template.deployment_id, workload.id)
        if template.deployment_id is None:
            # If the template does not name its deployment, look it up in the deployment's own list.
            owned = any(same_id(each.id, template_id) for each in await self._templates(workload))
        if not owned:
            raise ForeignTemplateError(
                f"template {one_line(template_id, 120)} does not belong to {one_line(workload.name, 120)}",
                template_id=template_id,
            )
        return template

    async def status(self, workload: Workload, clusters: Sequence[str]) -> dict[str, Status]:
        found = await self._statuses(workload, clusters)
        if any(status.cluster is None for status in found):
            # Without the [X] field `cluster`, an answer identifies its cluster only if one cluster was
            # requested.
            found = [one for cluster in clusters for one in await self._statuses(workload, [cluster])]
        return {one.cluster: one.status for one in found if one.cluster and one.cluster in clusters}

    def watch(
        self, workload: Workload, clusters: Sequence[str], every_seconds: float
    ) -> AsyncGenerator[Observation]:
        return polled(partial(self.status, workload, clusters), every_seconds)

    async def _statuses(self, workload: Workload, clusters: Sequence[str]) -> list[ClusterStatus]:
        data = await self._cloud.call("status", _places(workload), {"cluster": ",".join(clusters)})
        found = [status for status in read(_STATUSES, data) or [] if status]
        if len(clusters) == 1:
            return [status.model_copy(update={"cluster": status.cluster or clusters[0]}) for status in found]
        return found

    async def online(self, workload: Workload) -> dict[str, Id]:
        query = {"type": "0", "resourceId": str(workload.id)}
        listed = read(_ONLINE, await self._cloud.call("online", {"app_id": workload.app_id}, query)) or []
        return {each.cluster: each.template_id for each in listed}

    async def published(self, workload: Workload) -> AsyncIterator[tuple[str, Id]]:
        query = {"type": "0", "resourceId": str(workload.id)}
        async for each in self._cloud.pages(Publication, "history", {"app_id": workload.app_id}, query):
            if each.status == 1:
                yield each.cluster, each.template_id

    # ---- writes -----------------------------------------------------------------------------

    async def prepared(self, workload: Workload, release_id: str) -> Change | None:
        # An upgrade that is sent twice creates two templates, so each description ends in a mark
        # (contract, Idempotency).
        mark = release_mark(release_id)
        found = [each for each in await self._templates(workload) if (each.description or "").endswith(mark)]
        if not found:
            return None
        _only([each.id for each in found])
        return await self.revert(workload, found[0].revision)

    async def prepare(
        self,
        workload: Workload,
        base: Revision,
        images: Mapping[str, str],
        *,
        clusters: Sequence[str],
        release_id: str,
        note: str,
        requested_by: str,
        key: str,
    ) -> Change:
        body = {
            "templateId": base.id,
            "clusters": list(clusters),
            "images": dict(images),
            "description": f"{one_line(note, 200)} {release_mark(release_id)}".strip(),
        }
        data = await self._cloud.call("upgrade", _places(workload), body=body, key=key)
        created = _only(read(_Upgraded, data).template_ids or [])
        return Change(base=base.id, images=dict(images), revision=created)

    async def revert(self, workload: Workload, revision: Revision) -> Change:
        return Change(base=revision.id, images=revision.images, revision=revision.id)

    async def apply(
        self,
        workload: Workload,
        cluster: str,
        change: Change,
        *,
        replicas: int | None,
        over: Id | None,
        key: str,
    ) -> Applied:
        if change.revision is None or replicas is None:
            raise UpgradeError("the change names no template or no replicas to publish")
        places = {**_places(workload), "template_id": change.revision, "cluster": cluster}
        await self._cloud.call("publish", places, body={"replicas": replicas}, key=key)
        return Applied(revision=change.revision)

    async def unblock(self, workload: Workload, cluster: str, *, revision: Id) -> list[str]:
        return []

    async def restarted(
        self, workload: Workload, cluster: str, before: Baseline, *, key: str
    ) -> Applied | None:
        # The generation is newer, or there is a pod that was not there before.
        now = (await self.status(workload, [cluster])).get(cluster)
        if now is None or before.online is None:
            return None
        arrived = before.pods is not None and not set(now.pod_states or {}) <= set(before.pods)
        if now.generation is not None and before.generation is not None:
            arrived = arrived or now.generation > before.generation
        return Applied(revision=before.online) if arrived else None

    async def restart(self, workload: Workload, cluster: str, *, online: Id, key: str) -> Applied:
        await self._cloud.call("restart", {**_places(workload), "cluster": cluster}, body={}, key=key)
        return Applied(revision=online)

    async def scale(
        self, workload: Workload, cluster: str, replicas: int, *, online: Id, key: str
    ) -> Applied:
        places = {**_places(workload), "cluster": cluster}
        await self._cloud.call("scale", places, body={"replicas": replicas}, key=key)
        return Applied(revision=online)


class _Upgraded(CamelCase):
    template_ids: list[Id] | None = None


_STATUSES = TypeAdapter(list[ClusterStatus | None] | None)
_ONLINE = TypeAdapter(list[OnlineTemplate] | None)


def _only(created: Sequence[Id]) -> Id:
    """Return the one template that an upgrade created.

    Raises:
        UpgradeError: it created none, or several.
    """
    if len(created) != 1:
        listed = ", ".join(one_line(template_id, 40) for template_id in created) or "none"
        raise UpgradeError(
            f"the upgrade must create one new template for all clusters, and created: {listed}",
            advice="Nothing was published. Look at the deployment's templates in the cloud's console.",
            template_ids=list(created),
        )
    return created[0]


def _places(workload: Workload) -> dict[str, Id | None]:
    return {"app_id": workload.app_id, "deployment_id": workload.id}
