"""Credentials of clusters, from kubeconfigs and from the block."""

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.blocks.core import Block
from pydantic import ValidationError

from prefect_rollout.blocks import Kubernetes
from prefect_rollout.errors import ConfigurationError, InputError
from prefect_rollout.platforms.kubernetes.credentials import (
    Login,
    current_context,
    in_cluster_login,
    kubeconfig_login,
)
from prefect_rollout.runs.lock import lock_name

EXEC = """import json
print(json.dumps({"apiVersion": "client.authentication.k8s.io/v1", "kind": "ExecCredential",
                  "status": {"token": "from-the-plugin"}}))
"""


@pytest.fixture
def kubeconfig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    plugin = tmp_path / "plugin.py"
    plugin.write_text(EXEC, encoding="utf-8")
    run = {
        "apiVersion": "client.authentication.k8s.io/v1",
        "command": sys.executable,
        "args": [str(plugin)],
        "interactiveMode": "Never",
    }
    users: list[dict[str, Any]] = [
        {"name": "token", "user": {"token": "t0ken"}},
        {"name": "plugin", "user": {"exec": run}},
    ]
    clusters = [
        {
            "name": name,
            "cluster": {"server": f"https://{name}.example:6443", "insecure-skip-tls-verify": True},
        }
        for name in ("beijing", "shanghai")
    ]
    contexts = [
        {"name": "bj", "context": {"cluster": "beijing", "user": "token"}},
        {"name": "sh", "context": {"cluster": "shanghai", "user": "plugin"}},
    ]
    content = {"users": users, "clusters": clusters, "contexts": contexts, "current-context": "bj"}
    file = tmp_path / "config"
    file.write_text(yaml.safe_dump({"apiVersion": "v1", "kind": "Config", **content}), encoding="utf-8")
    monkeypatch.setenv("KUBECONFIG", str(file))
    # The library reads the variable once, when it is imported.
    monkeypatch.setattr("kubernetes_asyncio.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(file))
    return file


async def authorization(login: Login) -> tuple[str, str]:
    return login.host, (await login.headers())["Authorization"]


@pytest.mark.parametrize(
    ("context", "expected"),
    [
        ("bj", ("https://beijing.example:6443", "Bearer t0ken")),
        ("sh", ("https://shanghai.example:6443", "Bearer from-the-plugin")),
    ],
)
async def test_a_context_has_an_address_and_a_token(
    kubeconfig: Path, context: str, expected: tuple[str, str]
) -> None:
    assert await authorization(await kubeconfig_login(str(kubeconfig), context)()) == expected


async def test_an_unknown_context_is_a_setting(kubeconfig: Path) -> None:
    with pytest.raises(ConfigurationError, match="context gz of the kubeconfig"):
        await kubeconfig_login(str(kubeconfig), "gz")()


async def test_outside_a_pod_there_is_no_service_account(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(ConfigurationError, match="service account"):
        await in_cluster_login()()


def test_the_current_context_is_the_default(kubeconfig: Path) -> None:
    assert current_context() == "bj"
    client = Kubernetes().get_client()
    assert list(client._clusters) == ["bj"]


async def test_the_clusters_of_a_block_have_hosts_of_their_own(kubeconfig: Path) -> None:
    clusters = [{"name": "one", "context": "bj"}, {"name": "two", "context": "sh"}]
    async with Kubernetes.model_validate({"clusters": clusters}).get_client() as client:
        assert client.identity == "beijing.example:6443,shanghai.example:6443"


async def test_two_blocks_that_share_a_cluster_share_its_locks(kubeconfig: Path) -> None:
    both = [{"name": "one", "context": "bj"}, {"name": "two", "context": "sh"}]
    one = [{"name": "beijing", "context": "bj"}]
    async with (
        Kubernetes.model_validate({"clusters": both}).get_client() as of_both,
        Kubernetes.model_validate({"clusters": one}).get_client() as of_one,
    ):
        names = [
            lock_name(of_both.realm, "shop", "deployment/web", of_both.place(cluster))
            for cluster in ("one", "two")
        ]
        same = lock_name(of_one.realm, "shop", "deployment/web", of_one.place("beijing"))
        assert [of_both.cluster_at(of_both.place(name)) for name in ("one", "two")] == ["one", "two"]
        assert of_one.cluster_at("shanghai.example:6443") == "shanghai.example:6443"
    assert same == names[0] != names[1]


class SavedConfig(Block):
    """The cluster config of prefect-kubernetes 0.8, as the Prefect API stores it."""

    _block_type_name = "Kubernetes Cluster Config"

    config: dict[str, Any]
    context_name: str


class SavedCredentials(Block):
    """The credentials of prefect-kubernetes 0.8, as the Prefect API stores them."""

    _block_type_name = "Kubernetes Credentials"

    cluster_config: SavedConfig | None = None


def content_of(kubeconfig: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(kubeconfig.read_text(encoding="utf-8"))
    return content


def clusters_of(*names: str) -> Kubernetes:
    return Kubernetes.model_validate({"clusters": [{"name": name, "credentials": name} for name in names]})


async def test_credentials_of_prefect_kubernetes_keep_clusters_apart(
    prefect_api: str, kubeconfig: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = content_of(kubeconfig)
    for context in ("bj", "sh"):
        saved = SavedConfig(config=content, context_name=context)
        await saved.save(f"config-{context}", overwrite=True)  # the credentials refer to it
        await SavedCredentials(cluster_config=saved).save(context, overwrite=True)
    await SavedCredentials().save("here", overwrite=True)
    monkeypatch.setenv("KUBECONFIG", "/nowhere")
    async with clusters_of("bj", "sh", "here").get_client() as client:
        assert [client.place(name) for name in ("bj", "sh")] == [
            "beijing.example:6443",
            "shanghai.example:6443",
        ]
        assert client.place("here") == "beijing.example:6443"  # the current context of this machine
    token = await authorization(await clusters_of("sh").clusters[0].login()())
    assert token == ("https://shanghai.example:6443", "Bearer from-the-plugin")


async def test_credentials_that_are_not_saved_are_named(prefect_api: str) -> None:
    with pytest.raises(ConfigurationError, match="no block kubernetes-credentials/nowhere"):
        async with clusters_of("nowhere").get_client():
            pass


async def test_a_context_that_saved_credentials_do_not_have_is_named_without_their_secrets(
    prefect_api: str, kubeconfig: Path
) -> None:
    content = content_of(kubeconfig)
    await SavedCredentials(cluster_config=SavedConfig(config=content, context_name="gz")).save(
        "gz", overwrite=True
    )
    with pytest.raises(ConfigurationError, match="context gz") as caught:
        async with clusters_of("kubernetes-credentials/gz").get_client():
            pass
    assert "t0ken" not in str(caught.value)


@pytest.mark.parametrize(
    ("namespaces", "namespace_of", "app", "expected"),
    [
        ([], {}, "shop", "shop"),
        (["shop-*"], {"shop": "shop-prod"}, "shop", "shop-prod"),
        (["shop-*"], {}, "shop", None),
        (["shop-*"], {"shop": "kube-system"}, "shop", None),
    ],
)
def test_a_block_says_which_namespaces_are_released_to(
    kubeconfig: Path, namespaces: list[str], namespace_of: dict[str, str], app: str, expected: str | None
) -> None:
    block = Kubernetes.model_validate({"namespaces": namespaces, "namespace_of": namespace_of})
    if expected is None:
        with pytest.raises(InputError, match="does not allow the namespace"):
            block.get_client()._namespace(app)
    else:
        assert block.get_client()._namespace(app) == expected


@pytest.mark.parametrize(
    ("clusters", "says"),
    [
        ([{"name": "a"}, {"name": "a"}], "given twice: a"),
        ([{"name": "a,b"}], "not contain a comma"),
        ([{"name": "a", "in_cluster": True, "context": "x"}], "give one of"),
        ([{"name": "a", "credentials": "x", "context": "x"}], "give one of"),
        ([{"name": "a", "contxt": "x"}], "Extra inputs"),
    ],
)
def test_clusters_that_cannot_be_meant_are_refused(clusters: list[Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        Kubernetes.model_validate({"clusters": clusters})
