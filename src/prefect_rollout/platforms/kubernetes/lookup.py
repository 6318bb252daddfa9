"""Workloads by name: in all clusters, of any kind."""

import asyncio
import difflib
from collections.abc import Collection, Mapping, Sequence
from typing import NoReturn
from urllib.parse import quote

from prefect_rollout.errors import (
    AccessDeniedError,
    AppNotFoundError,
    DeploymentNotFoundError,
    InputError,
    NotFoundError,
)
from prefect_rollout.platforms.kubernetes.connection import Connection
from prefect_rollout.platforms.kubernetes.objects import Kind, Object, apps_path
from prefect_rollout.text import one_line


async def find_workloads(
    clusters: Mapping[str, Connection], namespace: str, kinds: Sequence[Kind], name: str
) -> dict[str, tuple[Kind, Object]]:
    """Return the workload of that name in each cluster that has it.

    Raises:
        InputError: the name means workloads of several of the `kinds`.
        AppNotFoundError: no cluster has the namespace.
        DeploymentNotFoundError: no cluster has the workload; the error lists similar names.
    """
    every = await asyncio.gather(*(_lookup(each, namespace, kinds, name) for each in clusters.values()))
    found = {cluster: here for cluster, here in zip(clusters, every, strict=True) if here}
    for cluster, here in found.items():
        if len(here) > 1:
            listed = ", ".join(f"{kind.prefix}/{name}" for kind, _ in here)
            raise InputError(
                f"deployment: {one_line(name, 120)!r} is the name of several workloads in "
                f"{one_line(cluster, 60)}",
                advice=f"Name one of {listed}.",
                field="deployment",
            )
    if not found:
        await _missing(clusters, namespace, kinds, name)
    if len({kind.prefix for here in found.values() for kind, _ in here}) > 1:
        listed = ", ".join(
            f"{kind.prefix}/{name} in {one_line(cluster, 60)}"
            for cluster, here in found.items()
            for kind, _ in here
        )
        raise InputError(
            f"deployment: {one_line(name, 120)!r} is of another kind in each cluster",
            advice=f"Name one of {listed}.",
            field="deployment",
        )
    return {cluster: here[0] for cluster, here in found.items()}


async def _lookup(
    connection: Connection, namespace: str, kinds: Sequence[Kind], name: str
) -> list[tuple[Kind, Object]]:
    """Return the workloads of that name in a cluster, of any of `kinds`."""
    found: list[tuple[Kind, Object]] = []
    denied: AccessDeniedError | None = None
    for kind in kinds:
        try:
            path = f"{apps_path(kind, namespace)}/{quote(name, safe='')}"
            found.append((kind, (await connection.call("GET", path)).data))
        except NotFoundError:
            continue
        except AccessDeniedError as error:
            denied = error
    if denied and not found:
        raise denied
    return found


async def _missing(
    clusters: Mapping[str, Connection], namespace: str, kinds: Sequence[Kind], name: str
) -> NoReturn:
    """Raise the error for a workload that no cluster has, with the names that there are."""
    names: set[str] = set()
    for connection in clusters.values():
        for kind in kinds:
            listed = await connection.items(apps_path(kind, namespace))
            names |= {f"{kind.prefix}/{each['metadata']['name']}" for each in listed.data["items"]}
    if not names and not await _has_namespace(clusters, namespace):
        raise AppNotFoundError(
            f"there is no namespace {one_line(namespace, 120)!r}",
            advice="Look at `kubectl get namespaces`, and at the context or block in use.",
            app_id=namespace,
        )
    raise DeploymentNotFoundError.named(
        name,
        _nearest(name, names),
        f"in namespace {one_line(namespace, 80)}",
        f"Look at `kubectl -n {one_line(namespace, 80)} get deployments,statefulsets,daemonsets`.",
        app_id=namespace,
    )


async def _has_namespace(clusters: Mapping[str, Connection], namespace: str) -> bool:
    for connection in clusters.values():
        try:
            await connection.call("GET", f"/api/v1/namespaces/{quote(namespace, safe='')}")
        except NotFoundError:
            continue
        except AccessDeniedError:
            return True  # the least Role does not read namespaces
        return True
    return False


def _nearest(name: str, known: Collection[str]) -> list[str]:
    """Return `kind/name` of at most 20 workloads, similar names first."""
    short = {each.partition("/")[2] for each in known}
    near = difflib.get_close_matches(name, short, n=20, cutoff=0.4)
    rank = {each: number for number, each in enumerate(near)}
    return sorted(known, key=lambda each: (rank.get(each.partition("/")[2], len(rank)), each))[:20]
