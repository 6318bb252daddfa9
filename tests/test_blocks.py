import sys
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType

import httpx
import pytest
from prefect.blocks.core import Block
from prefect.testing.standard_test_suites.blocks import BlockStandardTestSuite
from pydantic import SecretStr, ValidationError

from prefect_rollout.blocks import ContainerCloud
from prefect_rollout.errors import ConfigurationError
from prefect_rollout.platforms.container_cloud.client import ContainerCloudClient

KEY = {"key_id": SecretStr("key"), "secret_key": SecretStr("s3cret")}
VARIABLES = ["KEY_ID", "SECRET_KEY", "APP_ID", "ENV", "API_URL", "DEPLOY_NAME", "TEMPLATE_ID", "REGISTRY_URL"]


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(f"K8S_{name}", raising=False)


def test_the_block_type_registers_through_the_entry_point() -> None:
    (entry,) = [e for e in entry_points(group="prefect.collections") if e.name == "prefect_rollout"]
    assert entry.load().ContainerCloud is ContainerCloud


class TestPrefectsConventions(BlockStandardTestSuite):
    @pytest.fixture
    def block(self) -> type[Block]:
        return ContainerCloud


def test_the_secret_is_marked_and_never_printed() -> None:
    block = ContainerCloud(**KEY)
    assert sorted(ContainerCloud.model_json_schema()["secret_fields"]) == ["key_id", "secret_key"]
    assert "s3cret" not in repr(block) + str(block) + block.model_dump_json()


@pytest.mark.parametrize(
    "url",
    [
        "https://k8s.qihoo.net",
        "https://cloud:8443/gateway/",
        "http://127.0.0.1:8360",
        "http://localhost",
        "http://[::1]:1",
    ],
)
def test_an_address_that_keeps_the_secret_is_taken(url: str) -> None:
    assert ContainerCloud(**KEY, api_url=url).get_client()


@pytest.mark.parametrize(
    "url",
    [
        "http://k8s.qihoo.net",
        "http://127.0.0.1.evil.example",
        "http://10.0.0.1",
        "ftp://cloud",
        "cloud",
        "",
        "https://",
        "https://cloud:port",
        "https://cloud/?a=1",
        "https://cloud/#a",
        "https://me:pass@cloud",
    ],
)
def test_any_other_address_is_refused(url: str) -> None:
    with pytest.raises(ValidationError, match="api_url"):
        ContainerCloud(**KEY, api_url=url)


def test_plain_http_can_be_allowed_by_name() -> None:
    assert ContainerCloud(**KEY, api_url="http://10.0.0.1", allow_plain_http=True)


@pytest.mark.parametrize(
    "fields",
    [
        {"secret_key": SecretStr("")},
        {"key_id": SecretStr(" ")},
        {"key_id": SecretStr("密钥")},
        {"key_id": SecretStr("a\nb")},
        {"env": "生产"},
        {"env": ""},
        {"request_timeout_seconds": 0},
        {"paths": {"apps": "/x"}},
        {"paths": {"app": "x"}},
    ],
)
def test_a_field_that_cannot_work_is_refused_without_showing_the_secret(fields: dict[str, object]) -> None:
    with pytest.raises(ValidationError) as caught:
        ContainerCloud(**{**KEY, **fields})
    assert "s3cret" not in str(caught.value)


def test_the_articles_variables_make_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ContainerCloud.from_environment() is None
    monkeypatch.setenv("K8S_KEY_ID", "key")
    monkeypatch.setenv("K8S_SECRET_KEY", "密钥")
    monkeypatch.setenv("K8S_ENV", "")
    block = ContainerCloud.from_environment()
    assert block is not None
    assert (block.api_url, block.env, block.registry_url) == ("https://k8s.qihoo.net", "prod", None)
    assert block.secret_key.get_secret_value() == "密钥"
    monkeypatch.setenv("K8S_API_URL", "https://other")
    monkeypatch.setenv("K8S_ENV", "test")
    monkeypatch.setenv("K8S_REGISTRY_URL", "harbor.qihoo.net")
    block = ContainerCloud.from_environment()
    assert block is not None
    assert (block.api_url, block.env) == ("https://other", "test")
    assert block.get_client().links() == {
        "Container cloud": "https://other",
        "Image registry": "https://harbor.qihoo.net",
    }


def test_half_a_key_in_the_environment_is_an_error_that_names_the_other_half(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("K8S_SECRET_KEY", "s3cret")
    with pytest.raises(ConfigurationError, match="key_id") as caught:
        ContainerCloud.from_environment()
    assert "s3cret" not in str(caught.value)


def test_a_signer_of_ones_own_is_named_by_its_import_path(monkeypatch: pytest.MonkeyPatch) -> None:
    class OwnSigner(httpx.Auth):
        def __init__(self, *, key_id: str, secret_key: str, env: str) -> None:
            self.made_of = (key_id, secret_key, env)

    module = ModuleType("own_signer")
    module.OwnSigner = OwnSigner  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "own_signer", module)
    client = ContainerCloud(**KEY, signer="own_signer:OwnSigner").get_client()
    assert isinstance(client, ContainerCloudClient)
    signer = client._cloud._http.auth
    assert isinstance(signer, OwnSigner)
    assert signer.made_of == ("key", "s3cret", "prod")


@pytest.mark.parametrize("signer", ["nowhere:Signer", "json:nothing", "json:dumps", "builtins:dict", ""])
def test_a_signer_that_cannot_sign_is_refused_before_anything_is_sent(signer: str) -> None:
    with pytest.raises(ConfigurationError, match="signer"):
        ContainerCloud(**KEY, signer=signer).get_client()


def test_a_missing_ca_file_is_refused_before_anything_is_sent(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="ca_file"):
        ContainerCloud(**KEY, ca_file=tmp_path / "missing.pem").get_client()


@pytest.mark.parametrize(
    ("registry", "link"),
    [
        ("harbor.qihoo.net", "https://harbor.qihoo.net"),
        ("harbor.qihoo.net:8443/qdgc", "https://harbor.qihoo.net:8443/qdgc"),
        ("http://harbor.qihoo.net", "http://harbor.qihoo.net"),
    ],
)
def test_a_registry_is_linked_by_its_web_address(registry: str, link: str) -> None:
    assert ContainerCloud(**KEY, registry_url=registry).get_client().links()["Image registry"] == link


@pytest.mark.parametrize(
    "registry",
    [
        "javascript:alert(1)",
        "javascript://x/%0aalert(1)",
        "data:text/html,x",
        "file:///etc/passwd",
        "ftp://harbor.qihoo.net",
        "https://me:s3cret@harbor.qihoo.net",
        "me:s3cret@harbor.qihoo.net",
        "two words",
        "https://",
    ],
)
def test_a_registry_that_is_no_web_address_is_refused(monkeypatch: pytest.MonkeyPatch, registry: str) -> None:
    with pytest.raises(ValidationError, match="registry_url") as caught:
        ContainerCloud(**KEY, registry_url=registry)
    assert "s3cret" not in str(caught.value)
    for name, value in {"KEY_ID": "key", "SECRET_KEY": "s3cret", "REGISTRY_URL": registry}.items():
        monkeypatch.setenv(f"K8S_{name}", value)
    with pytest.raises(ConfigurationError, match="registry_url") as wrong:
        ContainerCloud.from_environment()
    assert "s3cret" not in str(wrong.value)


def test_outer_blanks_of_fields_do_not_count() -> None:
    block = ContainerCloud(
        api_url=" https://k8s.example\n",
        key_id=SecretStr("id\n"),
        secret_key=SecretStr("\tsecret\r\n"),
        env="test ",
        registry_url="harbor.example\n",
        windows="default\n",
    )
    assert (block.api_url, block.env) == ("https://k8s.example", "test")
    assert (block.key_id.get_secret_value(), block.secret_key.get_secret_value()) == ("id", "secret")
    assert (block.registry_url, block.windows) == ("harbor.example", "default")
