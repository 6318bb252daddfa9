"""The Role of `deploy/kubernetes-rbac.yaml`: releases need all of it, and the error names what is missing.

All other tests of this folder release with exactly that Role.
"""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from control_plane import Namespace
from prefect_rollout.errors import AccessDeniedError, ReleaseFailedError, RolloutError
from prefect_rollout.flows import deploy_latest_image, scale
from prefect_rollout.verdict.diagnosis import Category

pytestmark = pytest.mark.usefixtures("prefect_api")

FAST: dict[str, Any] = {"poll_seconds": 0.5, "poll_attempts": 40, "grace_seconds": 2}
NEEDED = [
    ("deployments", "get"),
    ("deployments", "list"),
    ("deployments", "watch"),
    ("deployments", "patch"),
    ("deployments/scale", "patch"),
    ("replicasets", "list"),
    ("replicasets", "watch"),
    ("pods", "list"),
    ("pods", "watch"),
    ("events", "list"),
    ("events", "watch"),
    ("horizontalpodautoscalers", "list"),
]


async def test_without_one_verb_the_error_names_verb_resource_and_namespace(
    new_space: Callable[..., Namespace], target: str
) -> None:
    free = asyncio.Semaphore(4)

    async def refused(resource: str, verb: str) -> str:
        async with free:
            space = new_space(without=(resource, verb))
            await space.deploy(replicas=1)
            parameters = {"app_id": space.name, "deployment": "deployment/web", "target": target, **FAST}
            try:
                if resource == "deployments/scale":
                    await scale(replicas=2, **parameters)
                else:
                    # Slow, so that the last watch is refused before all pods run.
                    await deploy_latest_image(images={"app": "shop/web:2-slow-10"}, **parameters)
            except RolloutError as error:
                return str(error).replace(space.name, "SPACE")
            return "released"

    errors = await asyncio.gather(*(refused(*each) for each in NEEDED))
    unnamed = {
        each: error
        for each, error in zip(NEEDED, errors, strict=True)
        if f'cannot {each[1]} resource "{each[0]}"' not in error or 'in the namespace "SPACE"' not in error
    }
    assert unnamed == {}


async def test_without_the_right_to_write_nothing_is_tried_again(
    new_space: Callable[..., Namespace], target: str
) -> None:
    space = new_space(without=("deployments", "patch"))
    await space.deploy(replicas=1)
    with pytest.raises(AccessDeniedError, match=r"kubernetes-rbac\.yaml"):
        await deploy_latest_image(
            app_id=space.name, deployment="web", images={"app": "shop/web:2"}, target=target, **FAST
        )
    patches = [each for each in space.plane.audit(space.name) if each["verb"] == "patch"]
    assert [each["responseStatus"]["code"] for each in patches] == [403]


async def test_without_the_logs_a_crash_is_explained_without_its_last_lines(
    new_space: Callable[..., Namespace], target: str
) -> None:
    async def crashed(without: tuple[str, str] | None) -> ReleaseFailedError:
        space = new_space(without=without)
        await space.deploy(replicas=1)
        with pytest.raises(ReleaseFailedError) as caught:
            await deploy_latest_image(
                app_id=space.name, deployment="web", images={"app": "shop/web:2-crash"}, target=target, **FAST
            )
        space.patch("deployments", "web", {"spec": {"replicas": 0}})
        return caught.value

    with_logs, without_logs = await asyncio.gather(crashed(None), crashed(("pods/log", "get")))
    for each in (with_logs, without_logs):
        assert each.diagnosis.category is Category.CRASH_LOOP_BACK_OFF
    assert with_logs.diagnosis.log_lines[-1] == "panic: connection refused"
    assert without_logs.diagnosis.log_lines == ()
