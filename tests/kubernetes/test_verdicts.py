"""Verdicts on a real control plane: green only if the pods run, red early and with the cause."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from control_plane import Namespace
from prefect_rollout.errors import ReleaseError, RolloutError, WorkloadError
from prefect_rollout.flows import deploy_latest_image
from prefect_rollout.release.result import ReleaseResult
from prefect_rollout.verdict.diagnosis import Category
from support import record_cell

AT_ONCE = 5
TABLE = "verdicts on a real control plane"

Scene = Callable[[Namespace], Awaitable[None]]


async def nothing(_: Namespace) -> None:
    """Leave the namespace as it is."""


class Case(NamedTuple):
    """A release of the workload `web` with two ready pods, or of what `before` creates in its place.

    Attributes:
        tag: the tag of the new image, which says how the pods fare.
        ends: the category of the failure; `None` if it is released.
        says: a part of the error's text.
        before: prepares the namespace.
        meanwhile: what others do while the release waits for pods.
        after: checks the namespace at the end.
        options: parameters of the release.
        kind: the kind of the workload.
    """

    tag: str
    ends: Category | None = None
    says: str = ""
    before: Scene = nothing
    meanwhile: Scene = nothing
    after: Scene = nothing
    options: Mapping[str, Any] = MappingProxyType({})
    kind: str = "deployments"


def created(**options: Any) -> Scene:
    async def create(space: Namespace) -> None:
        await space.deploy(**options)

    return create


def quota(pods: int = 2, **options: Any) -> Scene:
    """Create the workload, and then a quota of `pods`."""

    async def create(space: Namespace) -> None:
        await space.deploy(**options)
        space.create("resourcequotas", {"metadata": {"name": "all"}, "spec": {"hard": {"pods": str(pods)}}})
        async with asyncio.timeout(60):  # until then, the API server counts nothing
            while "used" not in space.get("resourcequotas", "all").get("status", {}):  # noqa: ASYNC110
                await asyncio.sleep(0.1)

    return create


def account_gone(**options: Any) -> Scene:
    """Create the workload, and delete its service account."""

    async def create(space: Namespace) -> None:
        space.create("serviceaccounts", {"metadata": {"name": "shop"}})
        await space.deploy(pod={"serviceAccountName": "shop"}, **options)
        space.plane.call("DELETE", space.path("serviceaccounts", "shop"))

    return create


async def too_large(space: Namespace) -> None:
    """Fill both nodes, so that a third pod does not fit."""
    container = {"name": "app", "image": "shop/web:1", "resources": {"requests": {"cpu": "40"}}}
    await space.deploy(pod={"containers": [container]})


async def undone(space: Namespace) -> None:
    space.set_image("deployments", "web", "shop/web:1")


async def replaced(space: Namespace) -> None:
    space.set_image("deployments", "web", "shop/web:3")


async def scaled_up(space: Namespace) -> None:
    space.patch("deployments", "web", {"spec": {"replicas": 4}})


async def pod_deleted(space: Namespace) -> None:
    new = [pod for pod in space.items("pods") if "web:2" in pod["spec"]["containers"][0]["image"]]
    space.plane.call("DELETE", space.path("pods", new[0]["metadata"]["name"]))


async def autoscaled(space: Namespace) -> None:
    await space.deploy(replicas=3)
    scaled = {"apiVersion": "apps/v1", "kind": "Deployment", "name": "web"}
    spec = {"scaleTargetRef": scaled, "minReplicas": 2, "maxReplicas": 5}
    space.create("horizontalpodautoscalers", {"metadata": {"name": "web"}, "spec": spec})


async def paused(space: Namespace) -> None:
    await space.deploy()
    space.patch("deployments", "web", {"spec": {"paused": True}})


def replicas(count: int) -> Scene:
    async def check(space: Namespace) -> None:
        web = space.get("deployments", "web")
        assert web["spec"]["replicas"] == count
        assert space.running("shop/web:2") + space.running("shop/web:2-slow-2") == count

    return check


async def untouched(space: Namespace) -> None:
    assert space.writes() == []


LATE: dict[str, Any] = {"poll_attempts": 12}
"""For releases of which nothing tells that they have failed."""

ONE_LESS = {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 1}}

CASES = {
    "healthy": Case("2"),
    "healthy without a probe": Case("2", before=created(probed=False)),
    "healthy with minReadySeconds": Case("2", before=created(minReadySeconds=2)),
    "Recreate": Case("2", before=created(strategy={"type": "Recreate"})),
    "slow": Case("2-slow-3"),
    "a pod is deleted meanwhile": Case("2-slow-2", meanwhile=pod_deleted),
    "scaled up meanwhile": Case("2-slow-2", meanwhile=scaled_up, after=replicas(4)),
    "autoscaled": Case("2", before=autoscaled, after=replicas(3)),
    "nothing to release": Case("1", after=untouched),
    "image missing": Case("2-missing", Category.IMAGE_PULL_ERROR, "not found"),
    "image name invalid": Case("2-badname", Category.INVALID_IMAGE_NAME),
    "ConfigMap missing": Case("2-config", Category.CONTAINER_CONFIG_ERROR, 'configmap "settings" not found'),
    "volume not mounted": Case("2-mount", Category.CONTAINER_CONFIG_ERROR, "MountVolume", options=LATE),
    "crash loop": Case("2-crash", Category.CRASH_LOOP_BACK_OFF, "exit code 1"),
    "crash loop without a probe": Case(
        "2-crash", Category.CRASH_LOOP_BACK_OFF, "exit code 1", created(probed=False)
    ),
    "crash two seconds after it was ready": Case(
        "2-crash-2", Category.CRASH_LOOP_BACK_OFF, "exit code 1", created(probed=False)
    ),
    "out of memory": Case("2-oom", Category.OOM_KILLED),
    "never ready, time-out": Case("2-unready", Category.CONTAINER_NOT_READY, options=LATE),
    "never ready, progressDeadlineSeconds": Case(
        "2-unready", Category.PROGRESS_DEADLINE_EXCEEDED, "4 s", created(progressDeadlineSeconds=4)
    ),
    "quota": Case("2", Category.QUOTA_EXCEEDED, "exceeded quota", quota()),
    "quota that suffices once an old pod is gone": Case(
        "2", before=quota(strategy=ONE_LESS), options={"grace_seconds": 30}
    ),
    "service account missing": Case(
        "2", Category.POD_CREATION_FAILED, 'serviceaccount "shop"', account_gone()
    ),
    "unschedulable": Case("2", Category.UNSCHEDULABLE, "Insufficient cpu", too_large),
    "undone meanwhile": Case("2-slow-30", Category.SUPERSEDED, meanwhile=undone),
    "replaced meanwhile": Case("2-slow-30", Category.SUPERSEDED, meanwhile=replaced),
    "paused": Case("2", Category.WORKLOAD, "paused", paused, after=untouched),
    "StatefulSet": Case("2", kind="statefulsets"),
    "StatefulSet, crash loop": Case("2-crash", Category.CRASH_LOOP_BACK_OFF, kind="statefulsets"),
    "StatefulSet, quota": Case(
        "2", Category.QUOTA_EXCEEDED, "exceeded quota", quota(1, kind="statefulsets"), kind="statefulsets"
    ),
    "DaemonSet": Case("2", kind="daemonsets"),
    "DaemonSet, image missing": Case("2-missing", Category.IMAGE_PULL_ERROR, "not found", kind="daemonsets"),
    "DaemonSet, service account missing": Case(
        "2",
        Category.POD_CREATION_FAILED,
        'serviceaccount "shop"',
        account_gone(kind="daemonsets"),
        kind="daemonsets",
    ),
}


class Ended(NamedTuple):
    """The end of a case."""

    space: Namespace
    outcome: ReleaseResult | RolloutError
    seconds: float


@pytest.fixture(scope="module")
def ended(
    request: pytest.FixtureRequest, prefect_server: str, target: str, new_space: Callable[..., Namespace]
) -> dict[str, Ended]:
    """Play the cases of the selected tests side by side."""
    names = [
        str(item.callspec.params["name"])
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.path == request.path and hasattr(item, "callspec")
    ]
    free = asyncio.Semaphore(AT_ONCE)

    async def play(name: str) -> Ended:
        case = CASES[name]
        async with free:
            space = new_space()
            await (created(kind=case.kind) if case.before is nothing else case.before)(space)
            others = asyncio.create_task(while_it_waits(space, case.meanwhile))
            started = time.monotonic()
            try:
                outcome: ReleaseResult | RolloutError = await deploy_latest_image(
                    app_id=space.name,
                    deployment=f"{case.kind.removesuffix('s')}/web",
                    images={"app": f"shop/web:{case.tag}"},
                    target=target,
                    **{"poll_seconds": 0.5, "poll_attempts": 120, "grace_seconds": 2, **case.options},
                )
            except RolloutError as error:
                outcome = error
            seconds = time.monotonic() - started
            await others
            if isinstance(outcome, RolloutError):  # its pods crash on and on
                space.plane.call("DELETE", space.path(case.kind, "web"))
            return Ended(space, outcome, seconds)

    async def play_all() -> list[Ended]:
        return await asyncio.gather(*map(play, names))

    with temporary_settings({PREFECT_API_URL: prefect_server}):
        return dict(zip(names, asyncio.run(play_all()), strict=True))


async def while_it_waits(space: Namespace, act: Scene) -> None:
    """Act once the release is written and a new pod is there."""
    if act is nothing:
        return
    async with asyncio.timeout(60):
        while not any(  # noqa: ASYNC110 - it comes true elsewhere
            "web:2" in pod["spec"]["containers"][0]["image"] for pod in space.items("pods")
        ):
            await asyncio.sleep(0.1)
    await act(space)


@pytest.mark.parametrize("name", CASES)
async def test_a_release_ends_as_its_pods_do(ended: dict[str, Ended], name: str) -> None:
    case, (space, outcome, seconds) = CASES[name], ended[name]
    if case.ends is None:
        assert isinstance(outcome, ReleaseResult), outcome
        record_cell(TABLE, name, "verdict", f"{outcome.outcome}, {seconds:.1f} s")
        assert outcome.outcome == "released"
    else:
        assert isinstance(outcome, RolloutError), outcome
        assert isinstance(outcome, WorkloadError if case.ends is Category.WORKLOAD else ReleaseError)
        record_cell(TABLE, name, "verdict", f"{outcome.diagnosis.category}, {seconds:.1f} s")
        assert outcome.diagnosis.category is case.ends, str(outcome)
        assert case.says in str(outcome), str(outcome)
    if case.after is not untouched:
        assert space.writes() == [f"patch {case.kind}/web"]
    await case.after(space)
