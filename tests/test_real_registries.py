"""The client against real registries: Debian's docker-registry, and distribution 3, which pages."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import go_programs
import httpx
import pytest

from prefect_rollout.platforms.registry import client as client_module
from prefect_rollout.platforms.registry.client import RegistryClient
from prefect_rollout.platforms.registry.credentials import Credentials
from prefect_rollout.release.image_errors import (
    ImageNotFoundError,
    RegistryAccessError,
    RegistryUnreachableError,
    UnsuitableImageError,
)
from prefect_rollout.release.newest import newest
from prefect_rollout.release.request import NewestPolicy
from registries import HTPASSWD, ISSUER, PASSWORD, SERVICE, USER, Certificate, running, token_server
from tiny_images import image, index, push

DEBIAN = shutil.which("docker-registry")
PAGING = go_programs.PAGING_REGISTRY
needs_debian = pytest.mark.skipif(not DEBIAN, reason="no docker-registry: run tests/cluster/needs.sh")
needs_paging = pytest.mark.skipif(
    not PAGING.exists(), reason="no distribution 3: run `make kubernetes-test`, which builds it"
)
KEY = Credentials(USER, PASSWORD, source="the block image-registry/tests")
ONE, TWO = image(), index("linux/amd64", "linux/arm64")
ARM = image("linux/arm64", text="arm")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return Certificate.make(tmp_path_factory.mktemp("certificate"))


@pytest.fixture(scope="module")
def private(certificate: Certificate, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A registry with a password and its own certificate."""
    folder = tmp_path_factory.mktemp("private")
    (folder / "htpasswd").write_text(HTPASSWD)
    tls = {"certificate": str(certificate.file), "key": str(certificate.key_file)}
    auth = {"htpasswd": {"realm": "tests", "path": str(folder / "htpasswd")}}
    assert DEBIAN
    with running(DEBIAN, folder, http={"tls": tls}, auth=auth) as host:
        with httpx.Client(base_url=f"https://{host}/v2/", auth=(USER, PASSWORD), verify=False) as http:
            push(http, "shop/web", ONE, "1.2.0", "1.2.1", "latest")
            push(http, "shop/web", TWO, "1.3.0")
            push(http, "shop/arm", ARM, "1")
        yield host


@pytest.fixture
def ca(certificate: Certificate) -> Path:
    return certificate.file


@needs_debian
async def test_images_are_found_by_password_behind_a_private_ca(private: str, ca: Path) -> None:
    async with RegistryClient(private, credentials=KEY, ca_file=ca) as client:
        found = await client.image(f"{private}/shop/web:1.2.0")
        assert (found.digest, found.size) == (ONE.digest, ONE.size)
        for platform in ("linux/amd64", "linux/arm64"):
            assert (await client.image(f"{private}/shop/web:1.3.0", platform)).digest == TWO.digest
        assert await client.digest(f"{private}/shop/web:1.3.0") == TWO.digest
        assert (await client.image(f"{private}/shop/web@{TWO.digest}")).digest == TWO.digest
        with pytest.raises(UnsuitableImageError, match="its platforms are linux/arm64"):
            await client.image(f"{private}/shop/arm:1")
        tags = await client.tags("shop/web")
        assert newest(NewestPolicy(range="^1.2"), tags, repository="shop/web").tag == "1.3.0"


@needs_debian
async def test_what_is_missing_is_told(private: str, ca: Path) -> None:
    async with RegistryClient(private, credentials=KEY, ca_file=ca) as client:
        for look in (client.image, client.digest):
            with pytest.raises(ImageNotFoundError, match=r"has no tag '1\.2\.2'\. Similar tags: 1\.2\.\d, 1"):
                await look(f"{private}/shop/web:1.2.2")
            with pytest.raises(ImageNotFoundError, match="has no repository 'shop/wob'"):
                await look(f"{private}/shop/wob:1")
            with pytest.raises(ImageNotFoundError, match="has no digest"):
                await look(f"{private}/shop/web@sha256:{'a' * 64}")
        with pytest.raises(ImageNotFoundError, match="has no repository"):
            await client.tags("shop/wob")


@needs_debian
async def test_wrong_missing_and_unneeded_credentials_are_told_apart(private: str, ca: Path) -> None:
    async with RegistryClient(private, ca_file=ca) as client:
        with pytest.raises(RegistryAccessError, match="no credentials were found"):
            await client.image(f"{private}/shop/web:1.2.0")
    wrong = KEY._replace(password="other-s3cret")
    async with RegistryClient(private, credentials=wrong, ca_file=ca) as client:
        with pytest.raises(
            RegistryAccessError, match="does not accept the credentials of the block"
        ) as caught:
            await client.image(f"{private}/shop/web:1.2.0")
        assert "other-s3cret" not in str(caught.value)
    async with RegistryClient(private, credentials=KEY) as client:
        with pytest.raises(RegistryUnreachableError, match=r"is not trusted.*ca_file"):
            await client.image(f"{private}/shop/web:1.2.0")


@needs_debian
async def test_tokens_are_fetched_from_a_token_server(certificate: Certificate, tmp_path: Path) -> None:
    assert DEBIAN
    with token_server(certificate) as (realm, seen):
        token = {
            "realm": realm,
            "service": SERVICE,
            "issuer": ISSUER,
            "rootcertbundle": str(certificate.file),
        }
        with running(DEBIAN, tmp_path, auth={"token": token}) as host:
            # The tests push with a token of their own: the client asks for the right to pull only.
            for repository in ("shop/web", "public/web"):
                wanted = {"service": SERVICE, "scope": f"repository:{repository}:pull,push"}
                pushing = httpx.get(realm, params=wanted, auth=(USER, PASSWORD)).json()["token"]
                headers = {"Authorization": f"Bearer {pushing}"}
                with httpx.Client(base_url=f"http://{host}/v2/", headers=headers) as http:
                    push(http, repository, TWO, "1.0.0")
            seen.clear()
            async with RegistryClient(host, credentials=KEY, plain_http=True) as client:
                assert (await client.image(f"{host}/shop/web:1.0.0")).digest == TWO.digest
                assert await client.tags("shop/web") == ["1.0.0"]
            assert len(seen) == 1
            async with RegistryClient(host, plain_http=True) as client:
                assert (await client.image(f"{host}/public/web:1.0.0")).digest == TWO.digest
                with pytest.raises(RegistryAccessError, match="needs credentials or does not exist"):
                    await client.image(f"{host}/shop/web:1.0.0")
            wrong = KEY._replace(password="wrong")
            async with RegistryClient(host, credentials=wrong, plain_http=True) as client:
                with pytest.raises(RegistryAccessError, match="incorrect username or password"):
                    await client.image(f"{host}/shop/web:1.0.0")


@pytest.mark.parametrize(
    "binary",
    [
        pytest.param(DEBIAN, id="all at once", marks=needs_debian),
        pytest.param(str(PAGING), id="in pages", marks=needs_paging),
    ],
)
async def test_hundreds_of_tags_are_listed(
    binary: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "PAGE_SIZE", 50)
    tags = [f"1.0.{number}" for number in range(300)]
    with running(binary, tmp_path) as host:
        with httpx.Client(base_url=f"http://{host}/v2/") as http:
            push(http, "shop/web", ONE, "1.0.0")
        # By the storage: a tag is a link to a digest.
        folder = tmp_path / "storage/docker/registry/v2/repositories/shop/web/_manifests/tags"
        for tag in tags[1:]:
            shutil.copytree(folder / "1.0.0", folder / tag)
        async with RegistryClient(host, plain_http=True) as client:
            listed = await client.tags("shop/web")
            assert sorted(listed) == sorted(tags)
            assert newest(NewestPolicy(), listed, repository="shop/web").tag == "1.0.299"
            assert await client.digest(f"{host}/shop/web:1.0.299") == ONE.digest
