"""Kubernetes clusters as a Prefect block."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, HttpUrl, field_validator, model_validator

from prefect_rollout.blocks.load import load_values
from prefect_rollout.blocks.target import TargetBlock
from prefect_rollout.errors import ConfigurationError
from prefect_rollout.ids import usable_cluster
from prefect_rollout.platforms.kubernetes.client import KubernetesClient
from prefect_rollout.platforms.kubernetes.connection import Connection
from prefect_rollout.platforms.kubernetes.credentials import (
    Config,
    Logins,
    config_login,
    current_context,
    in_cluster_login,
    in_pod,
    kubeconfig_login,
)
from prefect_rollout.text import one_line

_CREDENTIALS = "kubernetes-credentials"
"""Type of the credentials that prefect-kubernetes saves."""


class Cluster(BaseModel):
    """A cluster, and the credentials for it.

    They are a KubernetesCredentials block of prefect-kubernetes, a kubeconfig context, or the service account
    of this pod.
    """

    model_config = ConfigDict(extra="forbid")

    name: str
    credentials: str | None = None
    context: str | None = None
    kubeconfig: Path | None = None
    in_cluster: bool = False

    @field_validator("name")
    @classmethod
    def _usable(cls, value: str) -> str:
        return usable_cluster(value)

    @field_validator("credentials")
    @classmethod
    def _without_type(cls, value: str | None) -> str | None:
        return value and value.removeprefix(f"{_CREDENTIALS}/")

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        ways = [bool(self.credentials), bool(self.context or self.kubeconfig), self.in_cluster]
        if sum(ways) > 1:
            raise ValueError(
                f"{one_line(self.name, 60)}: give one of credentials, a kubeconfig context and in_cluster"
            )
        return self

    @property
    def shown(self) -> str:
        """The credentials, for people."""
        if self.credentials:
            return f"{_CREDENTIALS}/{self.credentials}"
        return self.context or ("this pod's service account" if self.in_cluster else self.name)

    @property
    def options(self) -> list[str]:
        """Options with which kubectl reaches the cluster on this machine."""
        found = {"--kubeconfig": self.kubeconfig, "--context": self.context}
        return [part for name, value in found.items() if value for part in (name, str(value))]

    def login(self) -> Logins:
        """Return the login of the cluster."""
        if self.credentials:
            return _credentials_login(self.credentials)
        if self.in_cluster:
            return in_cluster_login()
        return kubeconfig_login(str(self.kubeconfig) if self.kubeconfig else None, self.context)


class Kubernetes(TargetBlock):
    """Kubernetes clusters and the credentials for them.

    Example:
        Save a block with two clusters of your kubeconfig:
        ```python
        from prefect_rollout.blocks import Kubernetes

        clusters = [{"name": "beijing", "context": "prod-bj"}, {"name": "shanghai", "context": "prod-sh"}]
        Kubernetes(clusters=clusters).save("BLOCK_NAME")
        ```
        Load a saved block and read a workload:
        ```python
        from prefect_rollout.blocks import Kubernetes

        async with Kubernetes.load("BLOCK_NAME").get_client() as client:
            print(await client.workload("shop", "deployment/web"))
        ```
    """

    _block_type_name: ClassVar[str] = "Kubernetes"
    _block_type_slug: ClassVar[str] = "kubernetes"
    _description = "Release Deployments, StatefulSets and DaemonSets on Kubernetes clusters."
    _logo_url = HttpUrl(
        "https://cdn.sanity.io/images/3ugk85nk/production/"
        "2d0b896006ad463b49c28aaac14f31e00e32cfab-250x250.png"
    )
    _documentation_url = HttpUrl("https://pypi.org/project/prefect-rollout/")

    variables: ClassVar[str] = "KUBECONFIG"
    unsaved_name: ClassVar[str] = "kubeconfig"

    # An error in one field must not print the others.
    model_config = ConfigDict(hide_input_in_errors=True)

    clusters: list[Cluster] = Field(
        default_factory=list,
        title="Clusters",
        description="Clusters in the order of releases, by kubeconfig context, such as "
        '[{"name": "beijing", "context": "prod-bj"}], by the name of a KubernetesCredentials block, such as '
        '[{"name": "beijing", "credentials": "prod-bj"}], or [{"name": "here", "in_cluster": true}] for the '
        "service account of the worker's pod. Empty: the current context, or in a pod its service account.",
    )
    namespaces: list[str] = Field(
        default_factory=list,
        title="Namespaces",
        description="Namespaces that may be released to, such as shop-*; all that the credentials allow if "
        "empty.",
    )
    namespace_of: dict[str, str] = Field(
        default_factory=dict,
        title="Namespace of an app",
        description='Namespaces of apps whose id is not the name of theirs, such as {"shop": "shop-prod"}.',
    )
    settle_seconds: float = Field(
        default=10,
        ge=0,
        le=600,
        title="Settle time",
        description="Seconds that a pod without readiness probes and minReadySeconds has to stay ready.",
    )
    connect_timeout_seconds: float = Field(
        default=5,
        gt=0,
        le=3600,
        title="Connect time-out",
        description="Timeout for a connection, in seconds.",
    )
    request_timeout_seconds: float = Field(
        default=30, gt=0, le=3600, title="Request time-out", description="Timeout for a request, in seconds."
    )

    @field_validator("clusters")
    @classmethod
    def _told_apart(cls, value: list[Cluster]) -> list[Cluster]:
        names = [cluster.name for cluster in value]
        if twice := sorted({one_line(name, 60) for name in names if names.count(name) > 1}):
            raise ValueError(f"a cluster has a name of its own; given twice: {', '.join(twice)}")
        return value

    @classmethod
    def unsaved(cls) -> Self | None:
        """Return the block of the cluster that kubectl would use here."""
        return cls(clusters=[_current()])

    @property
    def address(self) -> str:
        """The credentials of the clusters."""
        shown = [each.shown for each in self.clusters]
        return one_line(", ".join(shown) or "the current kubeconfig context", 200)

    def get_client(self, *_: Any, **__: Any) -> KubernetesClient:
        """Return a client with its own connection pools; use it in `async with`.

        Raises:
            ConfigurationError: no cluster is named, and there is no current context.
        """
        connections = {}
        for cluster in self.clusters or [_current()]:
            connections[cluster.name] = Connection(
                cluster.name,
                cluster.login(),
                connect_timeout_seconds=self.connect_timeout_seconds,
                request_timeout_seconds=self.request_timeout_seconds,
                options=cluster.options,
            )
        return KubernetesClient(
            connections,
            settle_seconds=self.settle_seconds,
            namespaces=self.namespaces,
            namespace_of=self.namespace_of,
        )


def _credentials_login(name: str) -> Logins:
    """Return the login of a saved KubernetesCredentials block; prefect-kubernetes is not needed for that."""
    shown = f"{_CREDENTIALS}/{one_line(name, 120)}"

    async def read() -> Config | None:
        saved = await load_values(_CREDENTIALS, name, field="clusters")
        if saved is None:
            raise ConfigurationError(
                f"there is no block {shown}",
                advice="Save it with prefect-kubernetes, or name a kubeconfig context instead.",
                field="clusters",
            )
        if (found := saved.get("cluster_config")) is None:
            return None  # then prefect-kubernetes uses the service account or the kubeconfig, too
        content, context = found.get("config"), found.get("context_name")
        if not isinstance(content, Mapping) or not isinstance(context, str):
            raise ConfigurationError(
                f"the cluster config of the block {shown} cannot be read",
                advice="Save it again with prefect-kubernetes, or name a kubeconfig context instead.",
                field="clusters",
            )
        return Config(content, context)

    return config_login(read)


def _current() -> Cluster:
    """Return the cluster that kubectl would use here: the current context, or in a pod its own cluster."""
    configured = os.environ.get("KUBECONFIG") or (Path.home() / ".kube" / "config").exists()
    if not configured and in_pod():
        return Cluster(name="in-cluster", in_cluster=True)
    context = current_context()
    return Cluster(name=context, context=context)
