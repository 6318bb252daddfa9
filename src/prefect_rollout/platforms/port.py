"""The port through which a release speaks to a platform.

Flows, tasks and the verdict know only this protocol: no path, header or envelope of a platform appears
above it. Implementations raise only errors of `prefect_rollout.errors` and retry nothing: Prefect retries.
"""

from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol, Self, runtime_checkable

from prefect_rollout.ids import Id
from prefect_rollout.release.workload import (
    Applied,
    Baseline,
    Change,
    ListedRevision,
    Placement,
    Revision,
    Workload,
)
from prefect_rollout.verdict.status import Observation, Status


@runtime_checkable
class Platform(AbstractAsyncContextManager["Platform"], Protocol):
    """A platform that runs workloads in clusters. A flow run enters it once; leaving it closes connections.

    Every method may raise `PlatformError`; those that look up an object raise the `NotFoundError` of its
    kind. `key` is an idempotency key: a platform that supports such keys applies a repeated write once, and
    no caller relies on it.
    """

    async def __aenter__(self) -> Self: ...

    @property
    def identity(self) -> str:
        """Identify the platform with its clusters, such as by its host, independent of the block's name."""
        ...

    @property
    def realm(self) -> str:
        """Name the platform in locks and records, which all blocks share that reach the same cluster."""
        ...

    def place(self, cluster: str) -> str:
        """Name a cluster in locks and records, whatever its name is in the block."""
        ...

    def cluster_at(self, place: str) -> str:
        """Return the cluster that `place` names; `place` itself if the block does not have it."""
        ...

    def links(self) -> dict[str, str]:
        """Return pages for a person, `{label: address}`."""
        ...

    def commands(
        self, workload: Workload, cluster: str, pod: str | None = None, container: str | None = None
    ) -> list[str]:
        """Return commands that a person can copy to see more of a workload, or of one of its pods.

        With a `container`, they show why it ended.
        """
        ...

    # ---- reads ------------------------------------------------------------------------------

    async def workload(self, app_id: Id, name: str) -> Workload:
        """Return the deployment with exactly that name (step 1).

        Raises:
            AppNotFoundError: the platform has no such app.
            DeploymentNotFoundError: the app has no such deployment; the error lists similar names.
        """
        ...

    def placement(self, workload: Workload, clusters: Sequence[str] | None = None) -> Placement:
        """Return the chosen clusters of the workload, or all, in its order, and their replicas (step 2).

        Raises:
            ClusterNotFoundError: the workload does not have one of `clusters`.
            WorkloadError: its configuration cannot be read or is incomplete.
        """
        ...

    def groups(self, clusters: Sequence[str]) -> list[list[str]]:
        """Return the clusters in groups that share their revisions: a release chooses one for each group."""
        ...

    @property
    def starts_from_live(self) -> bool:
        """True if the newest revision is the live one, so that a release has to name images or a revision."""
        ...

    async def revisions(self, workload: Workload, cluster: str | None = None) -> list[ListedRevision]:
        """Return all revisions of the workload, or those of a cluster, newest first (step 3)."""
        ...

    async def revision(self, workload: Workload, revision: Id, cluster: str | None = None) -> Revision:
        """Return one revision of the workload; with `cluster`, one that the cluster has.

        Raises:
            TemplateNotFoundError: there is no such revision.
            ForeignTemplateError: it belongs to another workload.
        """
        ...

    async def pod_template(self, workload: Workload, revision: Id) -> dict[str, Any]:
        """Return the pod template of a revision without its images. It may hold secrets: never keep it.

        Raises:
            TemplateNotFoundError: there is no such revision.
            UnreadableTemplateError: it cannot be read.
        """
        ...

    async def online(self, workload: Workload) -> dict[str, Id]:
        """Return the revision that each cluster was last asked for, `{cluster: revision}`."""
        ...

    def published(self, workload: Workload) -> AsyncIterator[tuple[str, Id]]:
        """Yield `(cluster, revision)` of every accepted write, newest first."""
        ...

    async def status(self, workload: Workload, clusters: Sequence[str]) -> dict[str, Status]:
        """Return one observation of `clusters`; a cluster that the platform does not report is absent."""
        ...

    def watch(
        self, workload: Workload, clusters: Sequence[str], every_seconds: float
    ) -> AsyncGenerator[Observation]:
        """Observe `clusters` until the caller stops: at once, then at least every `every_seconds`.

        `polling.polled` implements it for a platform without a watch of its own.
        """
        ...

    # ---- writes -----------------------------------------------------------------------------

    async def prepared(self, workload: Workload, release_id: str) -> Change | None:
        """Return the change that an earlier attempt of the release prepared, if there is one.

        Raises:
            UpgradeError: there are several.
        """
        ...

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
        """Prepare a change of `clusters` from `base` to `images` (step 5).

        `images` has all images of the new revision, `{container: image}`. `prepared` finds the change by
        `release_id`. `note` and `requested_by` describe it for people.

        Raises:
            UpgradeError: the platform did not prepare exactly one change. Nothing is published.
        """
        ...

    async def revert(self, workload: Workload, revision: Revision) -> Change:
        """Return the change back to an existing revision. Write nothing."""
        ...

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
        """Apply the change to a cluster (step 6). Return when the platform has accepted the write.

        `replicas` are the pods to run; `None` leaves their number unchanged. `over` is the revision that the
        cluster was asked for before, if there was one.

        Raises:
            QuotaExceededError: the quota of the namespace does not suffice.
            ConflictError: another write is running, or replaced `over`, as far as the platform checks that.
        """
        ...

    async def unblock(self, workload: Workload, cluster: str, *, revision: Id) -> list[str]:
        """Delete pods of other revisions that keep the platform from replacing them; return their names.

        A repeat deletes no pod of `revision`. A platform that replaces all pods by itself deletes none.
        """
        ...

    async def restarted(
        self, workload: Workload, cluster: str, before: Baseline, *, key: str
    ) -> Applied | None:
        """Return what an earlier `restart` with that key asked for; `None` if it did not take effect.

        `before` is the state of the cluster before it. A platform without keys concludes it from that.
        """
        ...

    async def restart(self, workload: Workload, cluster: str, *, online: Id, key: str) -> Applied:
        """Replace the pods of a cluster with new ones of the revision that is `online`."""
        ...

    async def scale(
        self, workload: Workload, cluster: str, replicas: int, *, online: Id, key: str
    ) -> Applied:
        """Change the replicas of a cluster; it keeps the revision that is `online`."""
        ...


def revision_groups(platform: Platform, clusters: Sequence[str]) -> list[tuple[list[str], str | None]]:
    """Return the groups of clusters that share their revisions, each with the cluster to read them from.

    That is `None` if all clusters share theirs.
    """
    groups = platform.groups(clusters)
    return [(group, group[0] if len(groups) > 1 else None) for group in groups]
