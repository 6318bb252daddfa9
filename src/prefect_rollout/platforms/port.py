"""What a release needs of a platform, whichever it is.

Flows, tasks and verdicts know only this protocol: no path, header or envelope of a platform shows
above it. Implementations raise nothing but errors of `prefect_rollout.errors`, and retry nothing:
retrying is Prefect's.
"""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Protocol, Self, runtime_checkable

from prefect_rollout.models import (
    App,
    ClusterStatus,
    Deployment,
    Id,
    OnlineTemplate,
    Publication,
    Template,
)


@runtime_checkable
class Platform(AbstractAsyncContextManager["Platform"], Protocol):
    """A platform that runs apps in clusters. Entered once a run; closing it frees its connections.

    Every method may raise `PlatformError`; those that name an object raise the `NotFoundError` of its
    kind. `key` is an idempotency key: a platform that knows such keys applies a repeat only once, and
    no caller may rely on it.
    """

    async def __aenter__(self) -> Self: ...

    @property
    def identity(self) -> str:
        """Names the platform itself, such as its host, whichever block it was reached through."""
        ...

    def links(self) -> dict[str, str]:
        """Pages where a person looks further, `{label: address}`."""
        ...

    async def app(self, app_id: Id) -> App:
        """The app with that id."""
        ...

    async def deployment(self, app_id: Id, name: str) -> Deployment:
        """The deployment of exactly that name. `DeploymentNotFoundError` lists near names."""
        ...

    def templates(self, deployment: Deployment) -> AsyncIterator[Template]:
        """Every template of the deployment, page after page as they are asked for, in any order."""
        ...

    async def template(self, deployment: Deployment, template_id: Id) -> Template:
        """One template, which need not be the deployment's: the caller compares `deployment_id`."""
        ...

    async def upgrade(
        self,
        deployment: Deployment,
        *,
        template_id: Id,
        clusters: Sequence[str],
        images: Mapping[str, str],
        description: str,
        key: str,
    ) -> list[Id]:
        """Creates a template from `template_id` with `images`; the ids of what it created.

        Sent twice, it creates two: a caller looks for its mark in `Template.description` first.
        """
        ...

    async def publish(
        self, deployment: Deployment, template_id: Id, cluster: str, replicas: int, *, key: str
    ) -> None:
        """Has the cluster run `replicas` pods of the template. Returns when the write is accepted."""
        ...

    async def status(self, deployment: Deployment, clusters: Sequence[str]) -> dict[str, ClusterStatus]:
        """The state in each of `clusters`; one that the platform says nothing of is absent."""
        ...

    async def online(self, deployment: Deployment) -> list[OnlineTemplate]:
        """Which template is online in each cluster."""
        ...

    def history(self, deployment: Deployment) -> AsyncIterator[Publication]:
        """The publish history, newest first."""
        ...

    async def restart(self, deployment: Deployment, cluster: str, *, key: str) -> None:
        """Replaces the cluster's pods by new ones of the same template."""
        ...

    async def scale(self, deployment: Deployment, cluster: str, replicas: int, *, key: str) -> None:
        """Changes the number of pods in the cluster."""
        ...
