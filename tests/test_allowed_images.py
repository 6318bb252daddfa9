"""Allowed sources of images: by a block for everybody, by an MCP server for its clients."""

from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

import pytest
import pytest_asyncio
from prefect import tags
from prefect.client.schemas.objects import FlowRun
from pydantic import SecretStr, ValidationError

from prefect_rollout.batch.errors import PlanError
from prefect_rollout.batch.plan import Plan
from prefect_rollout.blocks import ContainerCloud
from prefect_rollout.errors import ConfigurationError, InputError
from prefect_rollout.flows import deploy_batch, deploy_latest_image, rollback
from prefect_rollout.mcp.policy import Policy
from prefect_rollout.release.images import allows, registry_patterns, usable_pattern
from prefect_rollout.runs.children import ChildRuns
from support import Cloud

HOME: dict[str, Any] = {"app_id": 3290, "deployment": "qapm-home"}
EVIL = {"qapm-home": "evil.example/x:1"}
SHA = "sha256:" + "a" * 64


@pytest.mark.parametrize(
    ("pattern", "image", "allowed"),
    [
        ("*", "evil.example/x:1", True),
        ("*", "not a reference", False),
        ("harbor.example", "harbor.example/team/web:1", True),
        ("harbor.example/", "harbor.example/team/web:1", True),
        ("harbor.example/team", "harbor.example/team/web:1", True),
        ("harbor.example/team", f"harbor.example/team/web:1@{SHA}", True),
        ("harbor.example/team/web", "harbor.example/team/web", True),
        ("harbor.example/team-*", "harbor.example/team-a/web:1", True),
        ("harbor.example/*/web", "harbor.example/team/web:1", True),
        ("*.example", "harbor.example/web:1", True),
        ("HARBOR.example/team", "Harbor.Example:443/team/web:1", True),
        ("harbor.example:443", "harbor.example/web:1", True),
        ("harbor.example:5000", "harbor.example:5000/web:1", True),
        ("harbor.example:*", "harbor.example:5000/web:1", True),
        ("localhost:5000", "localhost:5000/web", True),
        ("docker.io", "nginx:1", True),
        ("nginx", "docker.io/library/nginx:1", True),
        ("index.docker.io/library", "nginx:1", True),
        ("team/*", "docker.io/team/web:1", True),
        ("r", "r/web:1", False),
        ("harbor.example", "evil.example/x:1", False),
        ("harbor.example", "harbor.example.evil.example/x:1", False),
        ("harbor.example", "evil.example/harbor.example/x:1", False),
        ("harbor.example", "harbor.example:5000/x:1", False),
        ("harbor.example", "harbor.example@evil.example/x:1", False),
        ("harbor.example", "harbor.example./x:1", False),
        ("harbor.example", "harbor-example/x:1", False),
        ("harbor.example", "nginx", False),
        ("harbor.example/team", "harbor.example/team-b/web:1", False),
        ("harbor.example/team", "harbor.example/other/team/web:1", False),
        ("harbor.example/team/web", "harbor.example/team/web2:1", False),
        ("harbor.example/team", f"harbor.example/evil/web:team@{SHA}", False),
        ("*.example", "evil.test/x.example/web:1", False),
        ("*.example", "evil.test/x/harbor.example", False),
        ("*/web", "evil.test/web:1", False),
    ],
)
def test_a_pattern_covers_repositories_and_what_is_below(pattern: str, image: str, allowed: bool) -> None:
    assert allows([usable_pattern(pattern)], image) is allowed
    assert usable_pattern(usable_pattern(pattern)) == usable_pattern(pattern)


def test_no_pattern_allows_nothing() -> None:
    assert not allows([], "nginx:1")


@pytest.mark.parametrize(
    "pattern",
    [
        "",
        " ",
        "https://harbor.example",
        "harbor.example/web:1",
        f"harbor.example/web@{SHA}",
        "a b",
        "${REGISTRY}",
    ],
)
def test_what_is_no_pattern_is_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match="is not an image pattern"):
        usable_pattern(pattern)
    with pytest.raises(ValidationError, match="allowed_images"):
        ContainerCloud(key_id=SecretStr("k"), secret_key=SecretStr("s"), allowed_images=[pattern])
    with pytest.raises(ConfigurationError, match="allow_image: ") as caught:
        Policy(images=[pattern]).check_settings({})
    assert caught.value.data["field"] == "allow_image"


@pytest.mark.parametrize(
    ("registry", "patterns"),
    [
        (None, []),
        ("", []),
        ("harbor.example", ["harbor.example"]),
        ("https://Harbor.example:443/team/", ["harbor.example/team"]),
        ("https://harbor.example/?q=1", []),
    ],
)
def test_a_registrys_address_stands_for_its_images(registry: str | None, patterns: list[str]) -> None:
    assert registry_patterns(registry) == patterns


def test_an_mcp_server_marks_its_runs_with_what_it_allows() -> None:
    assert Policy().tags(None) == ["allow-image:(ran before)"]
    assert Policy().tags("harbor.example") == ["allow-image:(ran before)", "allow-image:harbor.example"]
    assert Policy(images=["Harbor.example/team/"]).tags("x.example") == ["allow-image:harbor.example/team"]
    batch = FlowRun(flow_id=uuid4(), tags=["trigger:mcp", "allow-image:r.example", "x"])
    known = ChildRuns(client=None, batch=batch, kind="release")  # type: ignore[arg-type]
    kept = known.tags("1/web", {"app_id": 1, "deployment": "web"})
    assert kept == [f"batch:{batch.id}", "release:1/web", "app:1", "deployment:web", "allow-image:r.example"]


def test_what_an_mcp_server_does_not_allow_is_refused_at_submission() -> None:
    policy = Policy(images=["harbor.example/team"])
    for parameters in (
        {**HOME, "images": EVIL},
        {"plan": {"releases": [HOME | {"images": EVIL}]}},
    ):
        with pytest.raises(InputError, match="x:1' is not allowed here") as caught:
            policy.check(parameters)
        assert "Allowed: harbor.example/team." in str(caught.value)
    policy.check({**HOME, "images": {"qapm-home": "harbor.example/team/web:2"}})


# ---- in the flow --------------------------------------------------------------------------------


@pytest_asyncio.fixture
async def target(cloud: Cloud, prefect_api: str) -> AsyncIterator[Any]:
    """Saves a block that allows these images, and returns it as a target."""
    assert prefect_api

    async def save(*patterns: str) -> str:
        block = ContainerCloud(
            api_url=cloud.url,
            key_id=SecretStr("demo-key"),
            secret_key=SecretStr("demo-secret"),
            allowed_images=list(patterns),
        )
        await block.asave("allowing", overwrite=True)
        return "container-cloud/allowing"

    yield save


@pytest.mark.promise("Only images are released")
async def test_a_blocks_list_counts_for_everybody(cloud: Cloud, target: Any) -> None:
    asked: dict[str, Any] = {**HOME, "target": await target("harbor.qihoo.net/qdgc-*")}
    with pytest.raises(InputError) as caught:
        await deploy_latest_image(**asked, images=EVIL)
    assert str(caught.value) == (
        "images.qapm-home: 'evil.example/x:1' is not allowed: the block container-cloud/allowing allows "
        "harbor.qihoo.net/qdgc-*. Add its registry or repository to the block's allowed_images in the "
        "Prefect UI. Nothing was written."
    )
    planned = await deploy_latest_image(**asked, dry_run=True)
    assert planned.images["qapm-home"].startswith("harbor.qihoo.net/qdgc-qapm/")
    with pytest.raises(PlanError) as refused:
        await deploy_batch(
            plan=Plan.model_validate({"target": asked["target"], "releases": [HOME | {"images": EVIL}]})
        )
    (mistake,) = refused.value.data["mistakes"]
    assert mistake["field"] == "releases.0.images.qapm-home"
    assert cloud.record == []


@pytest.mark.promise("Only images are released")
async def test_it_counts_for_the_images_of_templates_too(cloud: Cloud, target: Any) -> None:
    asked: dict[str, Any] = {**HOME, "target": await target("other.example"), "dry_run": True}
    with pytest.raises(InputError, match=r"allows other\.example"):
        await deploy_latest_image(**asked)
    with pytest.raises(InputError, match=r"allows other\.example"):
        await rollback(**asked, to_template=1342977)


@pytest.mark.promise("Only images are released")
async def test_an_assistants_image_comes_from_where_images_came_before(
    cloud: Cloud, prefect_api: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert prefect_api
    with tags("allow-image:(ran before)"):
        for image in ("evil.example/x:1", "harbor.qihoo.net/other/qapm-web:1", "qapm-web:1"):
            with pytest.raises(InputError, match="is not allowed: this MCP server, by what ran") as caught:
                await deploy_latest_image(**HOME, images={"qapm-home": image})
            assert "allows harbor.qihoo.net/qdgc-qapm." in str(caught.value)
            assert "--allow-image" in str(caught.value)
        same = {"qapm-home": "harbor.qihoo.net/qdgc-qapm/qapm-web:next"}
        assert (await deploy_latest_image(**HOME, images=same, dry_run=True)).images == same
        monkeypatch.setenv("K8S_REGISTRY_URL", "https://evil.example")  # of the runner's block
        assert (await deploy_latest_image(**HOME, images=EVIL, dry_run=True)).images == EVIL
    assert cloud.record == []


async def test_an_assistant_that_is_restricted_releases_no_other_template_either(
    cloud: Cloud, prefect_api: str
) -> None:
    assert prefect_api
    with (
        tags("allow-image:harbor.qihoo.net/other"),
        pytest.raises(InputError, match="this MCP server allows"),
    ):
        await deploy_latest_image(**HOME)
    assert cloud.record == []
