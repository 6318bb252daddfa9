"""Releases whose images are in a registry over a real socket, on simulated clouds."""

import shutil
from pathlib import Path
from typing import Any

import httpx
import pytest
from oci_server import Registry
from pydantic import SecretStr

from prefect_rollout.blocks import ContainerCloud, image_registry
from prefect_rollout.errors import InputError, PlanChangedError, RolloutError
from prefect_rollout.flows import deploy_batch, deploy_latest_image
from prefect_rollout.release.image_errors import (
    ImageNotFoundError,
    RegistryAccessError,
    RegistryUnreachableError,
    UnsuitableImageError,
)
from prefect_rollout.release.image_facts import CheckedImage, image_warnings, with_digests
from prefect_rollout.release.plan_words import plan_lines
from prefect_rollout.release.report import render, render_plan
from prefect_rollout.release.request import NewestPolicy, ReleaseRequest
from prefect_rollout.release.result import Outcome, ReleaseResult
from prefect_rollout.runs.history import changes
from prefect_rollout.tasks.look_up_images import containers_to_choose
from registries import running
from support import BAD_IMAGE, Cloud, free_port, shop
from tiny_images import NEW, OLD, image, index, push

pytestmark = pytest.mark.usefixtures("prefect_api")
DEBIAN = shutil.which("docker-registry")
FAST: dict[str, Any] = {"poll_seconds": 0.1, "poll_attempts": 100, "check_images": "auto"}


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget which registries did not answer."""
    monkeypatch.setattr(image_registry, "_unreachable", {})


def shop_of(registry: str, count: int = 1, *behaviour: dict[str, Any]) -> dict[str, Any]:
    """A scenario of apps whose `web` runs shop/web:1.1.0 of the registry."""
    return shop(count, dict(enumerate(behaviour, 1)), image=f"{registry}/shop/web:1.1.0")


@pytest.fixture
def cloud(make_cloud: Any, registry: Registry) -> Cloud:
    made: Cloud = make_cloud(**shop_of(registry.host))
    return made


async def release(tag: str = "", **options: Any) -> ReleaseResult:
    """Release app 1; `tag` is a whole image."""
    images = {"images": {"web": tag}} if tag else {}
    result = await deploy_latest_image(1, "web", **{**FAST, **images, **options})
    assert isinstance(result, ReleaseResult)
    return result


async def failure(kind: type[RolloutError], tag: str = "", **options: Any) -> RolloutError:
    with pytest.raises(kind) as caught:
        await release(tag, **options)
    assert caught.value.step == "build image list"
    return caught.value


# ---- what is checked ----------------------------------------------------------------------------


async def test_plan_report_and_history_show_what_the_registry_has(cloud: Cloud, registry: Registry) -> None:
    wanted = f"{registry.host}/shop/web:1.2.0"
    planned = await release(wanted, dry_run=True)
    assert planned.plan
    (checked,) = planned.plan.checked
    assert (checked.container, checked.image, checked.digest) == ("web", wanted, NEW.digest)
    assert (checked.size, checked.platform, checked.problem) == (NEW.size, "linux/amd64", "")
    lines = "\n".join(plan_lines(planned.plan))
    assert f"image web: {registry.host}/shop/web:1.1.0 → {wanted}" in lines
    assert f"in the registry: web is {NEW.digest[:19]}, built 2026-11-25, " in lines
    assert NEW.digest in render_plan(planned.plan)

    result = await release(wanted, expect_plan=planned.plan.plan_hash)
    assert result.outcome is Outcome.RELEASED
    assert result.images == {"web": wanted}
    assert NEW.digest in render(result)
    (change,) = changes(result, result.checked[0].created)  # type: ignore[arg-type]
    assert change.images == f"web: {registry.host}/shop/web:1.1.0 → {wanted}@{NEW.digest}"


@pytest.mark.promise("Only images are released")
@pytest.mark.parametrize("check", ["auto", "require"])
async def test_a_missing_tag_is_refused_before_any_write(
    cloud: Cloud, registry: Registry, check: str
) -> None:
    error = await failure(ImageNotFoundError, f"{registry.host}/shop/web:1.22.0", check_images=check)
    assert "has no tag '1.22.0'. Similar tags: 1.2.0" in str(error)
    assert cloud.record == []


async def test_an_image_for_other_nodes_is_refused(make_cloud: Any, registry: Registry) -> None:
    registry.put("shop/web", image("linux/arm64"), "arm")
    registry.put("shop/web", index("linux/amd64", "linux/arm64"), "both")
    cloud: Cloud = make_cloud(**shop_of(registry.host))
    error = await failure(UnsuitableImageError, f"{registry.host}/shop/web:arm")
    assert "is not built for linux/amd64: its platforms are linux/arm64" in str(error)
    block = ContainerCloud(
        api_url=cloud.url,
        key_id=SecretStr("demo-key"),
        secret_key=SecretStr("demo-secret"),
        node_platform="linux/aarch64",
    )
    await block.asave("on-arm", overwrite=True)
    for tag in ("arm", "both"):
        planned = await release(
            f"{registry.host}/shop/web:{tag}", target="container-cloud/on-arm", dry_run=True
        )
        assert planned.plan
        assert planned.plan.checked[0].platform == "linux/arm64"
    assert cloud.record == []


async def test_a_check_may_warn_only_or_be_off(cloud: Cloud, registry: Registry) -> None:
    missing = f"{registry.host}/shop/web:1.3.0"
    warned = await release(missing, check_images="warn", dry_run=True)
    assert warned.plan
    (problem,) = image_warnings(warned.plan.checked)
    assert problem.startswith(f"image of web: {registry.host}/shop/web has no tag '1.3.0'. Similar tags: 1.")
    assert any(line.startswith("Image of web: ") for line in plan_lines(warned.plan))
    registry.asked.clear()
    unchecked = await release(missing, check_images="off", dry_run=True)
    assert unchecked.plan
    assert unchecked.plan.checked == []
    assert not registry.asked
    assert unchecked.plan.plan_hash == warned.plan.plan_hash  # no digest was read


async def test_a_registry_out_of_reach_is_a_warning_unless_it_is_required(
    make_cloud: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    nobody = f"127.0.0.1:{free_port()}"
    cloud: Cloud = make_cloud(**shop_of(nobody))
    error = await failure(RegistryUnreachableError, check_images="require")
    assert error.may_pass
    assert cloud.record == []
    result = await release()
    assert result.outcome is Outcome.RELEASED
    (note,) = result.notes
    assert note.startswith(f"image of web: not checked, because {nobody} cannot be reached")
    assert "not checked, because" in render(result)
    assert list(image_registry._unreachable) == [nobody]
    # It is not asked again for a while, not even after it has come back.
    monkeypatch.setitem(image_registry._unreachable, nobody, (float("inf"), "it slept", "Wake it up."))
    assert (await release(dry_run=True)).notes == ["image of web: not checked, because it slept. Wake it up"]


@pytest.mark.parametrize("status", [401, 403, 500])
async def test_a_registry_that_does_not_say_is_a_warning(
    cloud: Cloud, registry: Registry, status: int
) -> None:
    registry.status = status
    planned = await release(dry_run=True)
    assert planned.plan
    assert planned.plan.checked[0].problem.startswith("not checked, because ")
    assert not image_registry._unreachable  # it answered
    if status == 401:
        error = await failure(RegistryAccessError, check_images="require")
        assert "needs credentials or does not exist" in str(error)
    assert cloud.record == []


# ---- moved tags and pins ------------------------------------------------------------------------


@pytest.mark.promise("What was planned is what is done")
async def test_a_tag_that_moved_since_the_plan_is_refused(cloud: Cloud, registry: Registry) -> None:
    wanted = f"{registry.host}/shop/web:1.2.0"
    planned = await release(wanted, dry_run=True)
    assert planned.plan
    moved = registry.put("shop/web", image(text="moved"), "1.2.0")
    with pytest.raises(PlanChangedError, match=f"web is {moved[:19]}"):
        await release(wanted, expect_plan=planned.plan.plan_hash)
    assert cloud.record == []


async def test_a_pinned_release_is_by_digest(cloud: Cloud, registry: Registry) -> None:
    wanted = f"{registry.host}/shop/web:1.2.0"
    result = await release(wanted, pin_digest=True, check_images="off")
    assert result.images == {"web": f"{wanted}@{NEW.digest}"}
    again = await release(result.images["web"], pin_digest=True, dry_run=True)
    assert again.images == result.images
    registry.status = 500
    await failure(RegistryUnreachableError, wanted, pin_digest=True, check_images="warn")


# ---- the newest tag -----------------------------------------------------------------------------


async def test_the_newest_tag_is_chosen_by_a_policy(cloud: Cloud, registry: Registry) -> None:
    registry.put("shop/web", NEW, "1.10.0", "1.11.0-rc.1", "2.0.0", "latest")
    options: dict[str, Any] = {"newest": {"range": "^1"}, "dry_run": True}
    for images in ("", f"{registry.host}/shop/web"):
        planned = await release(images, **options)
        assert planned.images == {"web": f"{registry.host}/shop/web:1.10.0"}
        assert planned.plan
        lines = "\n".join(plan_lines(planned.plan))
        assert "Tag of web: 1.10.0 is the highest version in ^1, of 3 such tags; next: 1.2.0, 1.1.0" in lines
        assert "1 are pre-releases: 1.11.0-rc.1" in lines
    unchecked = await release(**options | {"check_images": "off"})
    assert unchecked.images == planned.images
    assert unchecked.checked[0].choice.startswith("1.10.0 is the highest version in ^1")
    tagged = await release(f"{registry.host}/shop/web:1.1.0", **options)
    assert tagged.images == {"web": f"{registry.host}/shop/web:1.1.0"}
    error = await failure(ImageNotFoundError, newest={"range": "^3"})
    assert "no tag of" in str(error)
    assert cloud.record == []


async def test_a_tag_whose_release_failed_is_left_out(make_cloud: Any, registry: Registry) -> None:
    make_cloud(**shop_of(registry.host, 1, {**BAD_IMAGE, "images": ":1.2.0"}))
    with pytest.raises(RolloutError):
        await release(newest=NewestPolicy(), grace_seconds=0.5)
    planned = await release(newest=NewestPolicy(), dry_run=True)
    assert planned.images == {"web": f"{registry.host}/shop/web:1.1.0"}
    assert "failed before (its release failed on" in planned.checked[0].choice
    assert "1.2.0" in planned.checked[0].choice


def test_a_policy_names_its_containers() -> None:
    with pytest.raises(InputError, match="newest: the template has the containers web, proxy"):
        containers_to_choose({"web": "r/web:1", "proxy": "r/proxy:1"}, None)
    named = {"web": "r/web", "proxy": "r/proxy:1"}
    assert containers_to_choose({"web": "r/web:0", "proxy": "r/proxy:0"}, named) == ["web"]


# ---- batches ------------------------------------------------------------------------------------


async def test_a_batch_asks_a_registry_once_for_each_image(make_cloud: Any, registry: Registry) -> None:
    make_cloud(**shop_of(registry.host, 12))
    one = f"{registry.host}/shop/web:1.1.0"
    plan: Any = {
        "defaults": {**FAST, "newest": {"by": "semver"}},
        "releases": [
            *({"app_id": app, "deployment": "web"} for app in range(1, 12)),
            {"app_id": 12, "deployment": "web", "images": {"web": one}, "pin_digest": True},
        ],
    }
    planned = await deploy_batch(plan, dry_run=True)
    result = await deploy_batch(plan, expect_plan=planned.plan_hash)
    assert result.outcome is Outcome.RELEASED
    expected = dict.fromkeys(range(1, 12), f"{registry.host}/shop/web:1.2.0") | {12: f"{one}@{OLD.digest}"}
    assert {
        row.app_id: row.plan.clusters[0].images["web"] for row in planned.releases if row.plan
    } == expected
    # Once for the first batch, and for the second once for its plan and once for its releases.
    assert registry.asked["GET /v2/shop/web/tags/list"] == 3
    assert registry.asked["GET /v2/shop/web/manifests/1.2.0"] == 3
    registry.put("shop/web", image(text="moved"), "1.2.0")
    with pytest.raises(PlanChangedError):
        await deploy_batch(plan, expect_plan=planned.plan_hash)


# ---- a real registry ----------------------------------------------------------------------------


@pytest.mark.skipif(not DEBIAN, reason="no docker-registry: run tests/cluster/needs.sh")
async def test_a_release_checks_a_real_registry(make_cloud: Any, tmp_path: Path) -> None:
    assert DEBIAN
    with running(DEBIAN, tmp_path) as host:
        with httpx.Client(base_url=f"http://{host}/v2/") as http:
            push(http, "shop/web", OLD, "1.1.0", "1.2.0")
        cloud: Cloud = make_cloud(**shop_of(host))
        error = await failure(ImageNotFoundError, f"{host}/shop/web:1.3.0")
        assert "has no tag '1.3.0'. Similar tags: 1." in str(error)
        assert cloud.record == []
        result = await release(newest={"by": "numerical"}, pin_digest=True)
    assert result.outcome is Outcome.RELEASED
    assert result.images == {"web": f"{host}/shop/web:1.2.0@{OLD.digest}"}


# ---- without a registry -------------------------------------------------------------------------


def test_the_same_problem_is_told_once() -> None:
    checked = [
        CheckedImage(container=name, image=f"r.example/{name}:1", problem=why)
        for name, why in {"web": "not checked", "proxy": "not checked", "log": "", "db": "gone"}.items()
    ]
    assert image_warnings(checked) == ["image of web, proxy: not checked", "image of db: gone"]


def test_a_digest_is_added_where_it_is_known() -> None:
    checked = [CheckedImage(container="web", image="r/web:1", digest=NEW.digest)]
    images = {"web": "r/web:1", "proxy": "r/proxy:1"}
    assert with_digests(images, checked) == {"web": f"r/web:1@{NEW.digest}", "proxy": "r/proxy:1"}
    pinned = {"web": f"r/web:1@{NEW.digest}"}
    assert with_digests(pinned, checked) == pinned
    # Another cluster runs another image in a container of that name.
    checked.append(CheckedImage(container="web", image="r/web:0", digest=OLD.digest))
    assert with_digests(images, checked)["web"] == f"r/web:1@{NEW.digest}"


def test_a_policy_of_a_request_is_checked() -> None:
    with pytest.raises(InputError, match=r"newest\.range: .*no range of versions"):
        ReleaseRequest.of(app_id=1, deployment="web", newest={"range": "latest"})
