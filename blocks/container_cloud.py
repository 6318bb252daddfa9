"""The container cloud as a Prefect block."""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Self
from urllib.parse import urlsplit

import httpx
from pydantic import (
    ConfigDict,
    Field,
    HttpUrl,
    ImportString,
    SecretStr,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from prefect_rollout.blocks.target import TargetBlock
from prefect_rollout.errors import ConfigurationError
from prefect_rollout.ids import first_mistake
from prefect_rollout.platforms.container_cloud.client import ContainerCloudClient
from prefect_rollout.platforms.container_cloud.exchange import Exchange, PathTable
from prefect_rollout.platforms.http import host_of, is_local
from prefect_rollout.release.images import registry_patterns
from prefect_rollout.settings import cloud_environment
from prefect_rollout.text import address, one_line, shown_address, with_scheme

Seconds = Annotated[float, Field(gt=0, le=3600)]


_SIGNER = "prefect_rollout.platforms.container_cloud.signing:StarkHmacSigner"


class ContainerCloud(TargetBlock):
    """Credentials and address of a 360 container cloud.

    Example:
        Load a saved block and read an app:
        ```python
        from prefect_rollout.blocks import ContainerCloud

        cloud = ContainerCloud.load("BLOCK_NAME")
        async with cloud.get_client() as client:
            print(await client.app(3290))
        ```
    """

    _block_type_name: ClassVar[str] = "Container Cloud"
    _block_type_slug: ClassVar[str] = "container-cloud"
    _description = "Release apps on a 360 container cloud through its Open API."
    _logo_url = HttpUrl(
        "https://cdn.sanity.io/images/3ugk85nk/production/"
        "2d0b896006ad463b49c28aaac14f31e00e32cfab-250x250.png"
    )
    _documentation_url = HttpUrl("https://pypi.org/project/prefect-rollout/")

    variables: ClassVar[str] = "K8S_KEY_ID and K8S_SECRET_KEY"

    # An error in one field must not print the other fields, such as the secret.
    model_config = ConfigDict(hide_input_in_errors=True)

    api_url: str = Field(
        default="https://k8s.qihoo.net",
        title="API URL",
        description="Address of the cloud's Open API, such as https://k8s.qihoo.net.",
    )
    key_id: SecretStr = Field(title="Key id", description="Id of an API key (K8S_KEY_ID).")
    secret_key: SecretStr = Field(title="Secret key", description="Secret of that key (K8S_SECRET_KEY).")
    env: str = Field(
        default="prod",
        title="Environment",
        pattern=r"^[!-~]+$",
        description="Environment that is sent with every request (K8S_ENV).",
    )
    registry_url: str | None = Field(
        default=None,
        title="Registry",
        description="Image registry such as harbor.qihoo.net, linked in reports (K8S_REGISTRY_URL).",
    )
    ca_file: Path | None = Field(
        default=None,
        title="CA file",
        description="PEM file of certificates to trust instead of the system's, on every worker.",
    )
    connect_timeout_seconds: Seconds = Field(
        default=5, title="Connect time-out", description="Timeout for a connection, in seconds."
    )
    request_timeout_seconds: Seconds = Field(
        default=30,
        title="Request time-out",
        description="Timeout for a request, until the last byte of its answer, in seconds.",
    )
    paths: dict[str, str] = Field(
        default_factory=dict,
        title="Paths",
        description='API paths that differ from the contract, by call: {"app": "/v2/apps/{app_id}"}.',
    )
    signer: str = Field(
        default=_SIGNER,
        title="Signer",
        description="Import path of the class that signs requests, as package.module:Class.",
    )
    allow_plain_http: bool = Field(
        default=False,
        title="Allow plain HTTP",
        description="Allow http:// for another host. Anyone on the network can read such requests.",
    )

    @field_validator("key_id", "secret_key")
    @classmethod
    def _given(cls, value: SecretStr, info: Any) -> SecretStr:
        secret = value.get_secret_value()
        if not secret.strip():
            raise ValueError("must not be empty")
        if any("\ud800" <= char <= "\udfff" for char in secret):
            raise ValueError("must be UTF-8 text")
        if info.field_name == "key_id" and not (secret.isascii() and secret.isprintable()):
            raise ValueError("must be printable ASCII, because it is sent in a header")
        return value

    @field_validator("signer")
    @classmethod
    def _moved(cls, value: str) -> str:
        """Replace the former import path of the default signer, which older saved blocks name."""
        return _SIGNER if value == "prefect_rollout.platforms.signing:StarkHmacSigner" else value

    @field_validator("registry_url")
    @classmethod
    def _web_address(cls, value: str | None) -> str | None:
        # Reports link to it: reject javascript:, file: and the like, and passwords.
        if value and ("@" in value or not address(with_scheme(value))):
            raise ValueError(
                "must be a host such as harbor.qihoo.net, or http:// or https:// with one, "
                "without user name and password"
            )
        return value

    @field_validator("paths")
    @classmethod
    def _known_paths(cls, value: dict[str, str]) -> dict[str, str]:
        try:
            PathTable.model_validate(value)
        except ValidationError as error:
            raise ValueError(f"{first_mistake(error)}; calls: {', '.join(PathTable.model_fields)}") from None
        return value

    @model_validator(mode="after")
    def _address(self) -> Self:
        try:
            url = urlsplit(self.api_url)
            host, _ = url.hostname, url.port
        except ValueError:
            host, url = None, urlsplit("")
        if url.scheme not in {"http", "https"} or not host or url.query or url.fragment:
            raise ValueError("api_url: must be https://host, with an optional port and path")
        if url.username is not None or url.password is not None:
            raise ValueError("api_url: must not contain a user name or password")
        if url.scheme == "http" and not self.allow_plain_http and not is_local(self.api_url):
            raise ValueError(
                "api_url: anyone on the network can read plain http://; use https://, or set allow_plain_http"
            )
        return self

    @classmethod
    def from_environment(cls) -> Self | None:
        """Return the block that the article's `K8S_` variables describe; `None` if they have no key.

        Raises:
            ConfigurationError: only one half of the key is set, or a variable cannot be used.
        """
        environment = cloud_environment()
        fields = {"api_url", "key_id", "secret_key", "env", "registry_url"}
        given = environment.model_dump(include=fields, exclude_none=True)
        if not {"key_id", "secret_key"} & given.keys():
            return None
        try:
            return cls(**given)
        except ValidationError as error:
            mistake = first_mistake(error)
            raise ConfigurationError(
                f"the K8S_ environment variables cannot be used: {mistake}",
                advice="Set K8S_KEY_ID and K8S_SECRET_KEY, and K8S_API_URL if it is not the default.",
            ) from None

    @property
    def address(self) -> str:
        """Address of the cloud."""
        return address(self.api_url)

    @property
    def registries(self) -> list[str]:
        """Pattern of the images in the block's registry."""
        return registry_patterns(self.registry_url)

    def environment_says(self) -> str:
        """Return the `K8S_` variables that name another cloud, key or environment, as a clause."""
        given = cloud_environment()
        says = []
        if given.api_url and _place(given.api_url) != _place(self.api_url):
            says.append(f"K8S_API_URL is {shown_address(given.api_url)}")
        if given.key_id and given.key_id != self.key_id:
            says.append("K8S_KEY_ID differs")
        if given.secret_key and given.secret_key != self.secret_key:
            says.append("K8S_SECRET_KEY differs")
        if given.env and given.env != self.env:
            says.append(f"K8S_ENV is {one_line(given.env, 40)} and not {one_line(self.env, 40)}")
        return ", ".join(says)

    def get_client(self, *_: Any, **__: Any) -> ContainerCloudClient:
        """Return a client with its own connection pool; close it, or use it in `async with`.

        Raises:
            ConfigurationError: the signer or the CA file cannot be loaded.
        """
        key_id, secret_key = self.key_id.get_secret_value(), self.secret_key.get_secret_value()
        try:
            factory = TypeAdapter(ImportString[Any]).validate_python(self.signer)
            signer = factory(key_id=key_id, secret_key=secret_key, env=self.env)
        except Exception as error:  # noqa: BLE001 - a third-party class may raise anything
            raise ConfigurationError(
                f"signer: {self.signer!r} cannot be imported and called with key_id, secret_key and env: "
                f"{type(error).__name__}",
                advice="Name a class as package.module:Class that is installed where releases run.",
                field="signer",
            ) from None  # the original message may contain the key
        if not isinstance(signer, httpx.Auth):
            raise ConfigurationError(
                f"signer: {self.signer!r} does not create an httpx.Auth",
                advice="Derive the signer from httpx.Auth.",
                field="signer",
            )
        cloud = Exchange(
            self.api_url,
            signer=signer,
            secrets=(key_id, secret_key),
            paths=PathTable.model_validate(self.paths),
            ca_file=self.ca_file,
            connect_timeout_seconds=self.connect_timeout_seconds,
            request_timeout_seconds=self.request_timeout_seconds,
        )
        return ContainerCloudClient(cloud, registry_url=self.registry_url)


def _place(api_url: str) -> tuple[str, str]:
    return host_of(api_url), urlsplit(api_url).path.rstrip("/")
