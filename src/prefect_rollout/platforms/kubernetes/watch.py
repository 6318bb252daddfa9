"""Observation of a workload in a cluster: a list, then watches that keep it current."""

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import suppress
from datetime import datetime, timedelta
from typing import NoReturn
from urllib.parse import quote

from prefect_rollout.errors import AccessDeniedError, NotFoundError, PlatformError
from prefect_rollout.platforms.kubernetes.connection import Connection, ExpiredError
from prefect_rollout.platforms.kubernetes.objects import Kind, Object, apps_path, selector_of
from prefect_rollout.platforms.kubernetes.status import Snapshot, ended_containers, settles_after, status_of
from prefect_rollout.verdict.reasons import LOG_LINES_SHOWN
from prefect_rollout.verdict.status import Observation, Status

_CONTAINERS = 3  # whose output is read
SHORTEST_WATCH = 1.0
"""Seconds between two watches of a list, even if the API server ends each at once."""

_TOGETHER = 0.05  # seconds in which changes count as one observation
_LONGEST_PAUSE = 10.0  # seconds before a broken watch is opened again


class Listed:
    """The objects of one list, kept current by a watch.

    Args:
        connection: the cluster.
        path: path of the list.
        query: its selectors.
    """

    def __init__(self, connection: Connection, path: str, query: Mapping[str, str]) -> None:
        self._connection, self._path, self._query = connection, path, query
        self._objects: dict[str, Object] = {}
        self._version = ""

    @property
    def objects(self) -> list[Object]:
        """The objects as last reported."""
        return list(self._objects.values())

    async def read(self) -> datetime:
        """List the objects, and return the API server's time."""
        answer = await self._connection.items(self._path, self._query)
        self._objects = {each["metadata"]["uid"]: each for each in answer.data["items"]}
        self._version = (answer.data.get("metadata") or {}).get("resourceVersion") or ""
        return answer.at

    async def follow(self, changed: asyncio.Event) -> NoReturn:
        """Apply the changes that watches report, after `read`; set `changed` after each.

        Raises:
            PlatformError: a watch broke off.
        """
        while True:
            opened = time.monotonic()
            try:
                async for event in self._connection.changes(self._path, self._query, self._version):
                    found = event["object"]
                    self._version = found["metadata"]["resourceVersion"]
                    if event["type"] == "BOOKMARK":
                        continue
                    if event["type"] == "DELETED":
                        self._objects.pop(found["metadata"]["uid"], None)
                    else:
                        self._objects[found["metadata"]["uid"]] = found
                    changed.set()
            except ExpiredError:
                await self.read()
                changed.set()
            await asyncio.sleep(max(0.0, opened + SHORTEST_WATCH - time.monotonic()))


class View:
    """A workload in one cluster, with its revisions, pods and warnings.

    Args:
        connection: the cluster.
        kind: the workload's kind.
        namespace: its namespace.
        name: its name.
    """

    def __init__(self, connection: Connection, kind: Kind, namespace: str, name: str) -> None:
        self._connection, self._kind, self._namespace = connection, kind, namespace
        self._workload = Listed(
            connection, apps_path(kind, namespace), {"fieldSelector": f"metadata.name={name}"}
        )
        self._others: list[Listed] = []
        self._clock: tuple[datetime, float] | None = None
        self._output: dict[tuple[str, str, int], list[str]] = {}
        self.error: PlatformError | None = None

    @property
    def known(self) -> bool:
        """True if the cluster has answered at least once."""
        return self._clock is not None

    async def read(self) -> None:
        """List the workload and everything that belongs to it."""
        at = await self._workload.read()
        if not self._others and (workload := self._found()):
            core = f"/api/v1/namespaces/{quote(self._namespace, safe='')}"
            own = {"labelSelector": selector_of(workload)}
            holders = apps_path(self._kind, self._namespace, self._kind.revisions)
            self._others = [
                Listed(self._connection, holders, own),
                Listed(self._connection, f"{core}/pods", own),
                Listed(self._connection, f"{core}/events", {"fieldSelector": "type=Warning"}),
            ]
        await asyncio.gather(*(each.read() for each in self._others))
        self._clock = (at, time.monotonic())

    async def read_output(self) -> None:
        """Read the last lines of containers that have ended, each once; not being able to is no error."""
        wanted = {each.key: each for each in ended_containers(self._snapshot())[:_CONTAINERS]}
        self._output = {key: lines for key, lines in self._output.items() if key in wanted}
        for key, each in wanted.items():
            if key in self._output:
                continue
            namespace, pod = quote(self._namespace, safe=""), quote(each.pod, safe="")
            query = {"container": each.name, "tailLines": str(LOG_LINES_SHOWN)}
            if each.previous:
                query["previous"] = "true"
            try:
                text = await self._connection.text(f"/api/v1/namespaces/{namespace}/pods/{pod}/log", query)
            except (PlatformError, NotFoundError):
                text = ""
            self._output[key] = text.splitlines()[-LOG_LINES_SHOWN:]

    async def keep_current(self, changed: asyncio.Event, pause_seconds: float) -> NoReturn:
        """Read, then follow the changes; after an error, which `error` shows meanwhile, start again.

        Raises:
            AccessDeniedError: the lists may be read, but not watched.
        """
        while True:
            may_list = False
            try:
                await self.read()
                may_list, self.error = True, None
                changed.set()
                await _follow_all([self._workload, *self._others], changed)
            except PlatformError as error:
                if may_list and isinstance(error, AccessDeniedError):
                    raise
                self.error = error
                changed.set()
                await asyncio.sleep(max(pause_seconds, error.retry_after or 0))

    def _found(self) -> Object | None:
        return next(iter(self._workload.objects), None)

    def _snapshot(self) -> Snapshot:
        if self._clock is None:
            raise RuntimeError("nothing has been read")
        at, read_at = self._clock
        holders, pods, events = (each.objects for each in self._others) if self._others else ([], [], [])
        now = at + timedelta(seconds=time.monotonic() - read_at)
        return Snapshot(self._found(), holders, pods, events, now)

    def status(self, settle_seconds: float) -> Status:
        """Return the status of the workload now."""
        output = {(pod, container): lines for (pod, container, _), lines in self._output.items()}
        return status_of(self._kind, self._snapshot(), settle_seconds, output)

    def settles_after(self, settle_seconds: float) -> float | None:
        """Return the seconds until time alone makes a pod count as running; `None` if it makes none."""
        return settles_after(self._snapshot(), settle_seconds)


async def watched(
    views: Mapping[str, View], every_seconds: float, settle_seconds: float
) -> AsyncGenerator[Observation]:
    """Observe clusters until the caller stops: after each change, and at least every `every_seconds`."""
    changed = asyncio.Event()
    pause = min(every_seconds, _LONGEST_PAUSE)
    tasks = [asyncio.create_task(view.keep_current(changed, pause)) for view in views.values()]
    try:
        while True:
            unknown = any(not view.known and not view.error for view in views.values())
            error = next((view.error for view in views.values() if view.error), None)
            if error:
                yield Observation(time.monotonic(), None, error)
            elif not unknown:
                await asyncio.gather(*(view.read_output() for view in views.values()))
                clusters = {name: view.status(settle_seconds) for name, view in views.items()}
                yield Observation(time.monotonic(), clusters)
            due = [view.settles_after(settle_seconds) for view in views.values() if view.known]
            with suppress(TimeoutError):
                async with asyncio.timeout(min([every_seconds, *(each for each in due if each is not None)])):
                    await _changed_or_failed(changed, tasks)
            await asyncio.sleep(_TOGETHER)
            changed.clear()
    finally:
        await _cancel(tasks)


async def _changed_or_failed(changed: asyncio.Event, tasks: list[asyncio.Task[NoReturn]]) -> None:
    """Return after a change; raise the error of a task that has ended."""
    waiting = asyncio.create_task(changed.wait())
    try:
        await asyncio.wait([waiting, *tasks], return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            if task.done():
                task.result()
    finally:
        waiting.cancel()


async def _follow_all(listed: list[Listed], changed: asyncio.Event) -> None:
    """Follow all lists until one of their watches breaks off, and raise its error."""
    tasks = [asyncio.create_task(each.follow(changed)) for each in listed]
    try:
        await asyncio.gather(*tasks)
    finally:
        await _cancel(tasks)


async def _cancel(tasks: list[asyncio.Task[NoReturn]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
