"""Address and credentials of API servers, as kubectl finds them.

They come from kubernetes_asyncio, so that exec plugins, client certificates, tokens and private CAs work.
It is imported when the first request is sent, because it is slow to import.
"""

import ssl
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from prefect_rollout.errors import ConfigurationError
from prefect_rollout.text import one_line


class Login(NamedTuple):
    """Address and credentials of an API server, as far as a request needs them."""

    host: str
    verify: ssl.SSLContext
    server_name: str | None
    proxy: str | None
    headers: Callable[[], Awaitable[dict[str, str]]]


_TOKEN = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")

Logins = Callable[[], Awaitable[Login]]


def kubeconfig_login(path: str | None = None, context: str | None = None) -> Logins:
    """Return the login of a context of a kubeconfig, by default the current one, as kubectl uses it."""

    async def load() -> Login:
        library = _library()
        from kubernetes_asyncio.config import ConfigException, load_kube_config  # noqa: PLC0415

        configuration = library()
        try:
            await load_kube_config(path, context, client_configuration=configuration, persist_config=False)
        except (ConfigException, OSError) as error:
            shown = f"context {one_line(context, 120)}" if context else "current context"
            raise ConfigurationError(
                f"the {shown} of the kubeconfig cannot be used: {one_line(error, 300)}",
                advice="Look at `kubectl config get-contexts`, and set KUBECONFIG.",
            ) from error
        return _login(configuration)

    return load


class Config(NamedTuple):
    """A kubeconfig that is saved elsewhere, and the context to use."""

    content: Mapping[str, Any]
    context: str


def config_login(read: Callable[[], Awaitable[Config | None]]) -> Logins:
    """Return the login of the kubeconfig that `read` returns; without one, that of this pod or machine."""

    async def load() -> Login:
        library = _library()
        from kubernetes_asyncio.config import ConfigException, load_kube_config_from_dict  # noqa: PLC0415

        saved = await read()
        if saved is None:
            return await (in_cluster_login() if in_pod() else kubeconfig_login())()
        content, context = saved
        configuration = library()
        try:
            await load_kube_config_from_dict(dict(content), context, client_configuration=configuration)
        except (ConfigException, OSError) as error:
            raise ConfigurationError(
                f"the context {one_line(context, 120)} of the saved kubeconfig cannot be used: "
                f"{one_line(error, 300)}",
                advice="Save the credentials again, with a kubeconfig that has the context.",
            ) from error
        return _login(configuration)

    return load


def in_pod() -> bool:
    """Return whether this process runs in a pod that has a service account."""
    return _TOKEN.exists()


def current_context() -> str:
    """Return the name of the kubeconfig's current context.

    Raises:
        ConfigurationError: there is no kubeconfig, or it has no current context.
    """
    _library()
    from kubernetes_asyncio.config import ConfigException, list_kube_config_contexts  # noqa: PLC0415

    try:
        _, active = list_kube_config_contexts()
    except (ConfigException, OSError) as error:
        raise ConfigurationError(
            f"there is no usable kubeconfig: {one_line(error, 300)}",
            advice="Set KUBECONFIG, or save a block `kubernetes/default` that names the clusters.",
        ) from error
    if not active:
        raise ConfigurationError(
            "the kubeconfig has no current context",
            advice="Choose one with `kubectl config use-context`, or save a block `kubernetes/default`.",
        )
    return str(active["name"])


def in_cluster_login() -> Logins:
    """Return the login of the service account of the pod that this process runs in."""

    async def load() -> Login:
        library = _library()
        from kubernetes_asyncio.config import ConfigException, load_incluster_config  # noqa: PLC0415

        configuration = library()
        try:
            load_incluster_config(client_configuration=configuration)  # type: ignore[no-untyped-call]
        except ConfigException as error:
            raise ConfigurationError(
                f"the service account of this pod cannot be used: {one_line(error, 300)}",
                advice="Mount the service account's token, or name a kubeconfig context.",
            ) from error
        return _login(configuration)

    return load


def _library() -> Any:
    try:
        from kubernetes_asyncio.client import Configuration  # noqa: PLC0415 - imported late, as it is slow
    except ImportError as error:
        raise ConfigurationError(
            "releases on Kubernetes need the extra `kubernetes`",
            advice='Install it where releases run: `pip install "prefect-rollout[kubernetes]"`.',
        ) from error
    return Configuration


def _login(configuration: Any) -> Login:
    """Return what requests need of kubernetes_asyncio's configuration."""
    try:
        context = ssl.create_default_context(cafile=configuration.ssl_ca_cert)
        if configuration.disable_strict_ssl_verification:
            context.verify_flags &= ~ssl.VERIFY_X509_STRICT
        if not configuration.verify_ssl:
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        if configuration.cert_file:
            context.load_cert_chain(Path(configuration.cert_file), configuration.key_file)
    except (OSError, ssl.SSLError) as error:
        raise ConfigurationError(
            f"the certificates of {one_line(configuration.host, 120)} cannot be read: {one_line(error, 160)}",
            advice="Correct certificate-authority, client-certificate and client-key of the kubeconfig.",
        ) from error

    async def headers() -> dict[str, str]:
        settings = await configuration.auth_settings()
        token = settings.get("BearerToken") or {}
        return {"Authorization": token["value"]} if token.get("value") else {}

    return Login(
        host=configuration.host.rstrip("/"),
        verify=context,
        server_name=configuration.tls_server_name,
        proxy=configuration.proxy,
        headers=headers,
    )
