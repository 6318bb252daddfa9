"""Settings from environment variables: the article's `K8S_*` and this package's `PREFECT_ROLLOUT_*`."""

from typing import Any, TypeVar

from pydantic import Field, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from prefect_rollout.errors import ConfigurationError
from prefect_rollout.ids import first_mistake
from prefect_rollout.release.images import CheckImages


class _Settings(BaseSettings):
    """Settings without outer blanks: a secret from a file ends with a newline. A blank variable is unset."""

    model_config = SettingsConfigDict(env_ignore_empty=True, extra="ignore", hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _stripped(cls, values: dict[str, Any]) -> dict[str, Any]:
        stripped = {name: each.strip() if isinstance(each, str) else each for name, each in values.items()}
        return {name: each for name, each in stripped.items() if each != ""}


S = TypeVar("S", bound=_Settings)


class CloudEnvironment(_Settings):
    """The article's variables, such as `K8S_KEY_ID`."""

    model_config = SettingsConfigDict(env_prefix="K8S_")

    key_id: SecretStr | None = None
    secret_key: SecretStr | None = None
    app_id: str | None = None
    env: str | None = None
    api_url: str | None = None
    deploy_name: str | None = None
    template_id: str | None = None
    registry_url: str | None = None


VARIABLES = {"app_id": "K8S_APP_ID", "deployment": "K8S_DEPLOY_NAME", "template_id": "K8S_TEMPLATE_ID"}
"""Fields of a request that have a default in a variable."""


class RolloutSettings(_Settings):
    """Settings of this package, such as `PREFECT_ROLLOUT_RETRIES`."""

    model_config = SettingsConfigDict(env_prefix="PREFECT_ROLLOUT_")

    retries: int = Field(
        default=5,
        ge=0,
        le=20,
        description="Retries of a step; read when the tasks are imported.",
    )
    retry_delay_seconds: float = Field(
        default=1, ge=0, le=60, description="Delay before the first retry; it doubles with each."
    )
    longest_retry_after_seconds: float = Field(
        default=300, ge=0, description="A platform that asks to wait longer than this ends the step."
    )
    heartbeat_seconds: float = Field(
        default=20,
        ge=1,
        le=600,
        description="Seconds between heartbeats; a run silent for 4.5 times as long is marked Crashed.",
    )
    api_turns: int = Field(
        default=6,
        ge=1,
        le=500,
        description="Releases of one process that may start at once; half as many may end at the same time. "
        "Releases that wait for pods do not count. A Prefect API on SQLite handles six.",
    )
    check_images: CheckImages = Field(
        default="auto", description="`check_images` of releases that do not set it, as for `deploy`."
    )
    linger_seconds: float = Field(
        default=60,
        ge=0,
        le=86_400,
        description="Seconds that the local server stays after its last command or client has ended.",
    )


def cloud_environment() -> CloudEnvironment:
    """Return the article's variables; raise `ConfigurationError` if one cannot be used."""
    return _read(CloudEnvironment)


def rollout_settings() -> RolloutSettings:
    """Return this package's settings; raise `ConfigurationError` if a variable cannot be used."""
    return _read(RolloutSettings)


def _read(settings: type[S]) -> S:
    try:
        return settings()
    except ValidationError as error:
        raise ConfigurationError(
            f"{settings.model_config['env_prefix']} settings: {first_mistake(error)}",
            advice="Correct or unset the environment variable.",
        ) from None
