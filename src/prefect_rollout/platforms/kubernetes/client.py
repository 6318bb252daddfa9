"""Client of Kubernetes clusters, an implementation of the platform port.

An app is a namespace. A deployment is a Deployment, StatefulSet or DaemonSet. A change is one JSON patch of
its pod template, conditional on the resource version that was read right before.
"""

import asyncio
import shlex
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from typing import Any, Self
from urllib.parse import quote

from prefect_rollout.errors import (
    ClusterNotFoundError,
    ConflictError,
    DeploymentNotFoundError,
    InputError,
    NotFoundError,
    TemplateNotFoundError,
    UpgradeError,
    WorkloadError,
)
from prefect_rollout.ids import Id, usable_id
from prefect_rollout.platforms.kubernetes.connection import Connection
from prefect_rollout.platforms.kubernetes.lookup import find_workloads
from prefect_rollout.platforms.kubernetes.managers import managed_by
from prefect_rollout.platforms.kubernetes.objects import (
    KINDS,
    NEWEST,
    RESTART,
    RESTARTED,
    Kind,
    Object,
    Stored,
    apps_path,
    blocking,
    desired_of,
    find_revision,
    observed,
    obstacle,
    parse_name,
    refuse,
    revision_id,
    selector_of,
    stored_revisions,
    strategy_of,
    template_of,
    without_images,
)
from prefect_rollout.platforms.kubernetes.patches import (
    JSON_PATCH,
    MANAGER,
    MERGE_PATCH,
    History,
    annotate,
    applied,
    check_unchanged,
    conditional,
    release_patch,
    restarted_by,
)
from prefect_rollout.platforms.kubernetes.watch import View, watched
from prefect_rollout.release.workload import (
    Applied,
    Baseline,
    Change,
    ListedRevision,
    Placement,
    Revision,
    Strategy,
    Workload,
)
from prefect_rollout.text import one_line
from prefect_rollout.verdict.status import Observation, Status

_WRITES = 5
"""Attempts of a conditional patch."""

_CHECKS, _CHECK_SECONDS = 20, 0.25
"""Checks, and seconds between them, that the controller has observed a change."""


class KubernetesClient:
    """Kubernetes clusters behind the `Platform` port.

    Args:
        clusters: connections by the name of the cluster, in the order of publishing; the client closes them.
        settle_seconds: time that a pod without readiness probes has to stay ready.
        namespaces: patterns of the namespaces that may be used; all if empty.
        namespace_of: namespaces of apps whose id is not the name of theirs.
    """

    def __init__(
        self,
        clusters: Mapping[str, Connection],
        *,
        settle_seconds: float = 10,
        namespaces: Sequence[str] = (),
        namespace_of: Mapping[str, str] | None = None,
    ) -> None:
        self._clusters = dict(clusters)
        self._settle = settle_seconds
        self._namespaces, self._namespace_of = tuple(namespaces), dict(namespace_of or {})
        self._hosts: dict[str, str] = {}

    async def __aenter__(self) -> Self:
        self._hosts = {name: await each.host() for name, each in self._clusters.items()}
        return self

    async def __aexit__(self, *_: object) -> None:
        for connection in self._clusters.values():
            await connection.aclose()

    @property
    def identity(self) -> str:
        return ",".join(sorted(self._hosts.values()))

    @property
    def realm(self) -> str:
        return "kubernetes"

    def place(self, cluster: str) -> str:
        return self._hosts.get(cluster, cluster)

    def cluster_at(self, place: str) -> str:
        return next((name for name, host in self._hosts.items() if host == place), place)

    def links(self) -> dict[str, str]:
        return {}

    def commands(
        self, workload: Workload, cluster: str, pod: str | None = None, container: str | None = None
    ) -> list[str]:
        here = ["kubectl", *self._connection(cluster).options, "-n", str(workload.app_id)]
        selector = _handle(workload)["selectors"].get(cluster, "")
        shown = [
            ["describe", str(workload.id)],
            ["get", "pods", "-l", selector],
            ["rollout", "history", str(workload.id)],
        ]
        if pod:
            ended = ["--previous", "-c", container] if container else ["--all-containers"]
            shown = [["describe", f"pod/{pod}"], ["logs", pod, *ended]]
        return [shlex.join([*here, *each]) for each in shown]

    # ---- reads ------------------------------------------------------------------------------

    async def workload(self, app_id: Id, name: str) -> Workload:
        kinds, short = parse_name(name)
        namespace = self._namespace(app_id)
        _segment("deployment", short)
        found = await find_workloads(self._clusters, namespace, kinds, short)
        (kind, _), *_rest = found.values()
        strategies = [strategy.model_dump() for _, each in found.values() if (strategy := strategy_of(each))]
        named = f"{kind.prefix}/{short}"
        workload = Workload(app_id=namespace, app=str(app_id), id=named, name=named)
        scaled_by = {cluster: await self._scaled_by(workload, cluster) for cluster in found}
        workload.handle = {
            "clusters": list(found),
            "scaled_by": {cluster: by for cluster, by in scaled_by.items() if by},
            "selectors": {cluster: selector_of(each) for cluster, (_, each) in found.items()},
            "notes": {cluster: [*managed_by(each)] for cluster, (_, each) in found.items()},
            "obstacles": {
                cluster: [*why]
                for cluster, (_, each) in found.items()
                if (why := obstacle(kind, each, cluster))
            },
            "strategy": next(iter(strategies), None),
        }
        return workload

    def _namespace(self, app_id: Id) -> str:
        namespace = _segment("app_id", self._namespace_of.get(str(app_id), app_id))
        if self._namespaces and not any(fnmatchcase(namespace, each) for each in self._namespaces):
            raise InputError(
                f"app_id: this target does not allow the namespace {one_line(namespace, 120)!r}",
                advice=f"Allowed are: {', '.join(one_line(each, 80) for each in self._namespaces)}.",
                field="app_id",
            )
        return namespace

    def placement(self, workload: Workload, clusters: Sequence[str] | None = None) -> Placement:
        handle = _handle(workload)
        known: list[str] = handle["clusters"]
        for cluster in clusters or []:
            if cluster not in known:
                raise ClusterNotFoundError.named(
                    cluster, known, f"with {workload.id} in namespace {one_line(workload.app_id, 80)}"
                )
        chosen = [name for name in known if not clusters or name in clusters]
        for cluster in chosen:
            refuse(handle["obstacles"].get(cluster), cluster)
        strategy = handle["strategy"]
        return Placement(
            # The replicas of the workload are the configured ones: a release has none to restore.
            replicas=dict.fromkeys(chosen),
            scaled_by=handle["scaled_by"],
            notes=handle["notes"],
            strategy=Strategy.model_validate(strategy) if strategy else None,
        )

    def groups(self, clusters: Sequence[str]) -> list[list[str]]:
        return [[cluster] for cluster in clusters]

    @property
    def starts_from_live(self) -> bool:
        return True

    async def revisions(self, workload: Workload, cluster: str | None = None) -> list[ListedRevision]:
        found: dict[str, ListedRevision] = {}
        for name in [cluster] if cluster else _handle(workload)["clusters"]:
            for each in (await self._history(workload, name)).stored:
                found.setdefault(each.id, each.listed)
        return list(found.values())

    async def revision(self, workload: Workload, revision: Id, cluster: str | None = None) -> Revision:
        stored = await self._find(workload, revision, cluster)
        kept = stored.listed.model_dump(include=set(Revision.model_fields))
        return Revision(**kept)

    async def pod_template(self, workload: Workload, revision: Id) -> dict[str, Any]:
        return without_images((await self._find(workload, revision)).template)

    async def _find(self, workload: Workload, revision: Id, cluster: str | None = None) -> Stored:
        known: list[str] = []
        for name in [cluster] if cluster else _handle(workload)["clusters"]:
            stored = (await self._history(workload, name)).stored
            if found := find_revision(stored, revision):
                return found
            known += [f"{each.number} ({each.id})" for each in stored if each.number < NEWEST]
        where = f"of {one_line(workload.id, 120)}" + (f" in {one_line(cluster, 60)}" if cluster else "")
        raise TemplateNotFoundError.named(revision, known[:20], where)

    async def online(self, workload: Workload) -> dict[str, Id]:
        clusters = list(_handle(workload)["clusters"])
        found = await asyncio.gather(*(self._get(workload, cluster) for cluster in clusters))
        return {
            cluster: revision_id(template_of(each)) for cluster, each in zip(clusters, found, strict=True)
        }

    async def published(self, workload: Workload) -> AsyncIterator[tuple[str, Id]]:
        for cluster in _handle(workload)["clusters"]:
            for each in (await self._history(workload, cluster)).stored:
                yield cluster, each.id

    async def status(self, workload: Workload, clusters: Sequence[str]) -> dict[str, Status]:
        views = {cluster: self._view(workload, cluster) for cluster in clusters}
        await asyncio.gather(*(view.read() for view in views.values()))
        await asyncio.gather(*(view.read_output() for view in views.values()))
        return {cluster: view.status(self._settle) for cluster, view in views.items()}

    def watch(
        self, workload: Workload, clusters: Sequence[str], every_seconds: float
    ) -> AsyncGenerator[Observation]:
        views = {cluster: self._view(workload, cluster) for cluster in clusters}
        return watched(views, every_seconds, self._settle)

    # ---- writes -----------------------------------------------------------------------------

    async def prepared(self, workload: Workload, release_id: str) -> Change | None:
        return None  # a dry run leaves nothing behind

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
        cause = one_line(note, 200) or f"prefect-rollout: {', '.join(sorted(set(images.values())))}"
        plan = {
            "base": str(base.id),
            "images": dict(images),
            "release": release_id,
            "cause": cause,
            "requester": one_line(requested_by, 200),
        }
        made: dict[str, str] = {}
        for cluster in clusters:
            history = await self._history(workload, cluster)
            patch = release_patch(history, plan, revision=None)
            answer = await self._write(workload, cluster, patch, dry_run=True)
            made[cluster] = revision_id(template_of(answer))
        if len(set(made.values())) != 1:
            listed = ", ".join(f"{one_line(name, 60)} {each}" for name, each in made.items())
            raise UpgradeError(
                f"the clusters would run different pod templates: {listed}",
                advice="Nothing was written. Release each cluster by itself, with its name in clusters.",
            )
        (revision,) = set(made.values())
        return Change(base=base.id, images=dict(images), revision=revision, handle=plan)

    async def revert(self, workload: Workload, revision: Revision) -> Change:
        plan = {"base": str(revision.id), "images": dict(revision.images), "release": ""}
        return Change(base=revision.id, images=revision.images, revision=revision.id, handle=plan)

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
        plan = change.handle
        if not isinstance(plan, dict) or change.revision is None:
            raise UpgradeError("the change was not prepared for Kubernetes")
        revision = str(change.revision)

        def patch(history: History) -> list[dict[str, Any]] | None:
            now = revision_id(template_of(history.workload))
            if now == revision:
                return None
            check_unchanged(workload, cluster, now, over)
            refuse(obstacle(_kind(workload), history.workload, cluster), cluster)
            return release_patch(history, plan, revision=revision)

        return applied(await self._change(workload, cluster, patch))

    async def unblock(self, workload: Workload, cluster: str, *, revision: Id) -> list[str]:
        history = await self._observed(workload, cluster)
        if (found := find_revision(history.stored, revision)) is None:
            return []
        pods = f"/api/v1/namespaces/{quote(str(workload.app_id), safe='')}/pods"
        query = {"labelSelector": selector_of(history.workload)}
        listed = (await self._connection(cluster).items(pods, query)).data["items"]
        deleted = []
        for pod in blocking(_kind(workload), history.workload, listed, found.label):
            metadata = pod["metadata"]
            same = {key: metadata[key] for key in ("uid", "resourceVersion")}
            with suppress(NotFoundError, ConflictError):  # it is gone, or has just become ready
                path = f"{pods}/{quote(metadata['name'], safe='')}"
                await self._connection(cluster).call("DELETE", path, body={"preconditions": same})
                deleted.append(metadata["name"])
        return deleted

    async def _observed(self, workload: Workload, cluster: str) -> History:
        """Return the history once the controller has seen the last change, or after some seconds."""
        for _ in range(_CHECKS):
            history = await self._history(workload, cluster)
            if observed(history.workload):
                break
            await asyncio.sleep(_CHECK_SECONDS)
        return history

    async def restarted(
        self, workload: Workload, cluster: str, before: Baseline, *, key: str
    ) -> Applied | None:
        return restarted_by(key, await self._get(workload, cluster))

    async def restart(self, workload: Workload, cluster: str, *, online: Id, key: str) -> Applied:
        def patch(history: History) -> list[dict[str, Any]] | None:
            found = history.workload
            if restarted_by(key, found):
                return None
            live = template_of(found)
            check_unchanged(workload, cluster, revision_id(live), online)
            refuse(obstacle(_kind(workload), found, cluster), cluster)
            at = datetime.now(UTC).isoformat(timespec="seconds")
            notes = {**((live.get("metadata") or {}).get("annotations") or {}), RESTARTED: at}
            template = {**live, "metadata": {**(live.get("metadata") or {}), "annotations": notes}}
            mark = f"{key} {revision_id(template)}"
            return [*conditional(found, template), *annotate(found, {RESTART: mark})]

        found = await self._change(workload, cluster, patch)
        return restarted_by(key, found) or applied(found)

    async def scale(
        self, workload: Workload, cluster: str, replicas: int, *, online: Id, key: str
    ) -> Applied:
        kind = _kind(workload)
        if kind.name == "DaemonSet":
            raise WorkloadError(
                f"{workload.id} has a pod on each node that it fits: it has no replicas",
                advice="Change its nodeSelector, affinity or tolerations instead; nothing was written.",
                cluster=cluster,
            )
        if desired_of(kind, await self._get(workload, cluster)) != replicas:
            await self._connection(cluster).call(
                "PATCH",
                f"{_object_path(workload)}/scale",
                {"fieldManager": MANAGER},
                body={"spec": {"replicas": replicas}},
                content_type=MERGE_PATCH,
            )
        return Applied(revision=online)

    async def _change(
        self,
        workload: Workload,
        cluster: str,
        patch: Callable[[History], list[dict[str, Any]] | None],
    ) -> Object:
        """Apply a conditional patch, and return the workload after it.

        The status also changes the resource version: after a conflict, `patch` sees the workload again and
        decides. It returns `None` if the workload is as it should be.
        """
        for attempt in range(1, _WRITES + 1):
            history = await self._history(workload, cluster)
            operations = patch(history)
            if operations is None:
                return history.workload
            try:
                return await self._write(workload, cluster, operations)
            except ConflictError:
                if attempt == _WRITES:
                    raise
        raise AssertionError("unreachable")

    # ---- the wire ---------------------------------------------------------------------------

    async def _get(self, workload: Workload, cluster: str) -> Object:
        try:
            return (await self._connection(cluster).call("GET", _object_path(workload))).data
        except NotFoundError as error:
            raise DeploymentNotFoundError.named(
                workload.id, (), f"in namespace {workload.app_id} of {one_line(cluster, 60)} any more",
                cluster=cluster,
            ) from error  # fmt: skip

    async def _history(self, workload: Workload, cluster: str) -> History:
        kind, connection = _kind(workload), self._connection(cluster)
        live = await self._get(workload, cluster)
        query = {"labelSelector": selector_of(live)}
        holders = await connection.items(apps_path(kind, str(workload.app_id), kind.revisions), query)
        return History(kind, live, stored_revisions(kind, live, holders.data["items"]))

    def _view(self, workload: Workload, cluster: str) -> View:
        return View(self._connection(cluster), _kind(workload), str(workload.app_id), _short(workload))

    async def _write(
        self, workload: Workload, cluster: str, patch: Sequence[Mapping[str, Any]], *, dry_run: bool = False
    ) -> Object:
        query = {"fieldManager": MANAGER, "fieldValidation": "Strict", "dryRun": "All" if dry_run else ""}
        answer = await self._connection(cluster).call(
            "PATCH", _object_path(workload), query, body=patch, content_type=JSON_PATCH
        )
        return answer.data

    async def _scaled_by(self, workload: Workload, cluster: str) -> str:
        """Return what sets the replicas of a workload; empty if people do."""
        kind = _kind(workload)
        if kind.name == "DaemonSet":
            return "the number of nodes that it fits"
        namespace = quote(str(workload.app_id), safe="")
        listed = await self._connection(cluster).items(
            f"/apis/autoscaling/v2/namespaces/{namespace}/horizontalpodautoscalers"
        )
        for each in listed.data["items"]:
            scaled = each["spec"]["scaleTargetRef"]
            if (scaled["kind"], scaled["name"]) == (kind.name, _short(workload)):
                return f"the HorizontalPodAutoscaler {each['metadata']['name']}"
        return ""

    def _connection(self, cluster: str) -> Connection:
        return self._clusters[cluster]


def _object_path(workload: Workload) -> str:
    return f"{apps_path(_kind(workload), str(workload.app_id))}/{quote(_short(workload), safe='')}"


def _kind(workload: Workload) -> Kind:
    return KINDS[str(workload.id).partition("/")[0]]


def _short(workload: Workload) -> str:
    return str(workload.id).partition("/")[2]


def _handle(workload: Workload) -> dict[str, Any]:
    if not isinstance(workload.handle, dict):
        raise WorkloadError(f"{one_line(workload.id, 120)} was not read from Kubernetes")
    return workload.handle


def _segment(field: str, value: Id) -> str:
    try:
        return str(usable_id(value))
    except ValueError as error:
        raise InputError(f"{field}: {error}", field=field) from None
