import asyncio
import base64
import json
import os
import socket
import stat
from pathlib import Path

import pytest
from oci_server import Registry
from prefect.blocks.core import Block
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import BlockDocumentCreate
from prefect.testing.standard_test_suites.blocks import BlockStandardTestSuite
from pydantic import SecretStr, ValidationError

from prefect_rollout.blocks import ImageRegistry, Registries, image_registry, open_registry, sharing_blocks
from prefect_rollout.blocks.image_registry import registry_of
from prefect_rollout.errors import ConfigurationError
from prefect_rollout.platforms.registry.credentials import Credentials, find_credentials
from prefect_rollout.release.image_errors import RegistryAccessError, RegistryUnreachableError
from tiny_images import NEW

HOST = "registry.example"
AUTH = base64.b64encode(b"robot:s3cret").decode()


@pytest.fixture(autouse=True)
def docker(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Return the folder of Docker's configuration; it is empty."""
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    monkeypatch.delenv("REGISTRY_AUTH_FILE", raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    (tmp_path / "docker").mkdir()
    return tmp_path / "docker"


def helper(folder: Path, name: str, script: str) -> None:
    """Put a credential helper on the path."""
    file = folder / f"docker-credential-{name}"
    file.write_text(f"#!/bin/sh\nread server\n{script}\n")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    os.environ["PATH"] = f"{folder}:{os.environ['PATH']}"


# ---- the block ----------------------------------------------------------------------------------


class TestPrefectsConventions(BlockStandardTestSuite):
    @pytest.fixture
    def block(self) -> type[Block]:
        return ImageRegistry


def test_the_password_is_marked_and_never_printed() -> None:
    block = ImageRegistry(host=HOST, username="robot", password=SecretStr("s3cret"))
    assert ImageRegistry.model_json_schema()["secret_fields"] == ["password"]
    assert "s3cret" not in repr(block) + str(block) + block.model_dump_json()


@pytest.mark.parametrize(
    ("given", "host"),
    [
        ("registry.example", HOST),
        ("https://Registry.example/", HOST),
        ("registry.example:5000", "registry.example:5000"),
        ("localhost:5000", "localhost:5000"),
        ("https://index.docker.io/v1/", "docker.io"),
        ("registry.hub.docker.com", "docker.io"),
        ("docker.io", "docker.io"),
    ],
)
def test_a_registry_is_named_as_in_images(given: str, host: str) -> None:
    assert ImageRegistry(host=given).host == registry_of(given) == host


@pytest.mark.parametrize(
    "fields",
    [
        {"host": ""},
        {"host": "shop"},
        {"host": "registry.example/team"},
        {"host": "https://me:s3cret@registry.example"},
        {"host": "ftp://registry.example"},
        {"host": HOST, "password": SecretStr("s3cret")},
        {"host": HOST, "username": "robot"},
        {"host": HOST, "username": "a:b", "password": SecretStr("s3cret")},
        {"host": HOST, "plain_http": True},
        {"host": "10.0.0.1:5000", "plain_http": True},
        {"host": "localhost.evil.example", "plain_http": True},
        {"host": HOST, "user": "x"},
    ],
)
def test_a_field_that_cannot_work_is_refused_without_showing_the_password(fields: dict[str, object]) -> None:
    with pytest.raises(ValidationError) as caught:
        ImageRegistry(**fields)
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("host", ["localhost:5000", "127.0.0.1:5000", "[::1]:5000"])
def test_plain_http_is_for_this_machine_only(host: str) -> None:
    assert ImageRegistry(host=host, plain_http=True).get_client().registry == host


async def test_a_name_that_is_no_registry_block_is_refused() -> None:
    for named in ("registry.example", "container-cloud/default", "image-registry/"):
        with pytest.raises(ConfigurationError, match="names no registry"):
            await open_registry(HOST, [named])


# ---- credentials of docker login ----------------------------------------------------------------


async def test_without_any_file_what_is_public_is_read() -> None:
    assert await find_credentials(HOST) is None


@pytest.mark.parametrize(
    ("registry", "auths"),
    [
        (HOST, {HOST: {"auth": AUTH}}),
        (HOST, {"https://registry.example/v2/": {"auth": AUTH}}),
        ("docker.io", {"https://index.docker.io/v1/": {"auth": AUTH}}),
        ("registry.example:5000", {"registry.example:5000": {"auth": AUTH}}),
    ],
)
async def test_the_password_of_docker_login_is_found(
    docker: Path, registry: str, auths: dict[str, object]
) -> None:
    file = docker / "config.json"
    file.write_text(json.dumps({"auths": auths}))
    assert await find_credentials(registry) == Credentials("robot", "s3cret", "", str(file))
    assert await find_credentials("other.example") is None


async def test_a_refresh_token_is_found(docker: Path) -> None:
    auths = {HOST: {"identitytoken": "refresh"}}
    (docker / "config.json").write_text(json.dumps({"auths": auths}))
    found = await find_credentials(HOST)
    assert found is not None
    assert found.identity_token == "refresh"


async def test_files_of_podman_are_read_after_that_of_docker(
    docker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (docker / "config.json").write_text(json.dumps({"auths": {"other.example": {"auth": AUTH}}}))
    named = tmp_path / "auth.json"
    named.write_text(json.dumps({"auths": {HOST: {"auth": AUTH}}}))
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(named))
    found = await find_credentials(HOST)
    assert found is not None
    assert found.source == str(named)


@pytest.mark.parametrize("config", [{"credsStore": "tiny"}, {"credHelpers": {HOST: "tiny"}}])
async def test_a_credential_helper_is_run(
    docker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: dict[str, object]
) -> None:
    monkeypatch.setenv("PATH", os.environ["PATH"])
    answer = json.dumps({"ServerURL": HOST, "Username": "robot", "Secret": "s3cret"})
    helper(tmp_path, "tiny", f"echo '{answer}'")
    (docker / "config.json").write_text(json.dumps(config))
    found = await find_credentials(HOST)
    assert found is not None
    assert found[:2] == ("robot", "s3cret")


async def test_a_helper_that_knows_no_credentials_leaves_the_rest_to_the_file(
    docker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", os.environ["PATH"])
    helper(tmp_path, "tiny", "echo 'credentials not found in native keychain'; exit 1")
    (docker / "config.json").write_text(json.dumps({"credsStore": "tiny"}))
    assert await find_credentials(HOST) is None


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "cannot be read: JSONDecodeError"),
        ("[1]", "cannot be read"),
        (json.dumps({"auths": {HOST: {"auth": "s3cret!"}}}), "cannot be read"),
        (json.dumps({"credsStore": "absent"}), "docker-credential-absent, which is missing"),
    ],
)
async def test_a_file_that_cannot_be_used_is_named_and_not_quoted(
    docker: Path, content: str, problem: str
) -> None:
    (docker / "config.json").write_text(content)
    with pytest.raises(RegistryAccessError, match=problem) as caught:
        await find_credentials(HOST)
    assert "config.json" in str(caught.value)
    assert "s3cret" not in str(caught.value)


async def test_a_helper_that_fails_is_told_without_its_words(
    docker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", os.environ["PATH"])
    helper(tmp_path, "broken", "echo s3cret; exit 3")
    (docker / "config.json").write_text(json.dumps({"credsStore": "broken"}))
    with pytest.raises(RegistryAccessError, match="the credential helper of") as caught:
        await find_credentials(HOST)
    assert "s3cret" not in str(caught.value)


# ---- the choice of a block ----------------------------------------------------------------------


async def save_docker_block(name: str, **values: str) -> None:
    """Save a block DockerRegistryCredentials, whose type the server knows without prefect-docker."""
    async with get_client() as api:
        kind = await api.read_block_type_by_slug("docker-registry-credentials")
        schema = await api.get_most_recent_block_schema_for_block_type(kind.id)
        assert schema is not None
        await api.create_block_document(
            BlockDocumentCreate(name=name, data=values, block_schema_id=schema.id, block_type_id=kind.id)
        )


@pytest.mark.usefixtures("prefect_api")
async def test_the_first_block_of_the_registry_counts_and_docker_login_after_all(docker: Path) -> None:
    name = f"shop-{os.getpid()}"
    password = SecretStr("s3cret")
    await ImageRegistry(host=HOST, username="robot", password=password).asave(name, overwrite=True)
    await save_docker_block(
        name, username="hub", password="t0ken", registry_url="https://index.docker.io/v1/"
    )
    blocks = [f"image-registry/{name}", f"docker-registry-credentials/{name}"]
    found = {}
    for registry in (HOST, "docker.io", "other.example"):
        async with await open_registry(registry, blocks) as client:
            found[registry] = client._credentials
    assert found == {
        HOST: Credentials("robot", "s3cret", source=f"the block image-registry/{name}"),
        "docker.io": Credentials("hub", "t0ken", source=f"the block docker-registry-credentials/{name}"),
        "other.example": None,
    }
    for kind in ("image-registry", "docker-registry-credentials"):
        with pytest.raises(ConfigurationError, match=f"there is no block {kind}/absent"):
            await open_registry(HOST, [f"{kind}/absent"])


# ---- the registries of a release ----------------------------------------------------------------


async def test_a_registry_that_does_not_answer_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_registry, "_unreachable", {})
    monkeypatch.setattr(image_registry, "UNCONFIGURED_REQUEST_SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        host = f"127.0.0.1:{listener.getsockname()[1]}"
        for insist, connections in ((False, 1), (False, 0), (True, 1)):
            async with Registries((), insist=insist) as registries:
                with pytest.raises(RegistryUnreachableError, match="did not answer in time"):
                    await registries.image(f"{host}/web:1", "linux/amd64")
            listener.setblocking(False)
            for _ in range(connections):
                listener.accept()[0].close()
            with pytest.raises(BlockingIOError):
                listener.accept()


async def test_what_a_registry_answers_is_shared_for_a_while(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    web = f"{registry.host}/shop/web:1.2.0"

    async def look() -> list[str]:
        async with Registries((), insist=False) as registries:
            found = await asyncio.gather(*(registries.image(web, "linux/amd64") for _ in range(5)))
            return [each.digest for each in found]

    with sharing_blocks():
        assert await look() == await look() == [NEW.digest] * 5
        assert registry.asked["GET /v2/shop/web/manifests/1.2.0"] == 1
        monkeypatch.setattr(image_registry, "SHARED_SECONDS", 0)
        await look()
        assert registry.asked["GET /v2/shop/web/manifests/1.2.0"] == 6
