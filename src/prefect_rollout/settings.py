"""Settings from the environment: the article's `K8S_*`, and how patient a release is."""

from typing import TypeVar

from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from prefect_rollout.errors import ConfigurationError
from prefect_rollout.models import first_mistake

S = TypeVar("S", bound=BaseSettings)


class CloudEnvironment(BaseSettings):
    """The article's variables: `K8S_KEY_ID`, `K8S_SECRET_KEY`, `K8S_APP_ID` and so on.

    An empty variable counts as unset.
    """

    model_config = SettingsConfigDict(
        env_prefix="K8S_", env_ignore_empty=True, extra="ignore", hide_input_in_errors=True
    )

    key_id: SecretStr | None = None
    secret_key: SecretStr | None = None
    app_id: str | None = None
    env: str | None = None
    api_url: str | None = None
    deploy_name: str | None = None
    template_id: str | None = None
    registry_url: str | None = None


def cloud_environment() -> CloudEnvironment:
    """The article's variables, as the environment has them.

    Raises:
        ConfigurationError: a variable cannot be used.
    """
    return _read(CloudEnvironment)


def patience() -> "RetrySettings":
    """The retry settings of the environment.

    Raises:
        ConfigurationError: a variable cannot be used.
    """
    return _read(RetrySettings)


def liveness() -> "LivenessSettings":
    """The settings of a release's heartbeat.

    Raises:
        ConfigurationError: a variable cannot be used.
    """
    return _read(LivenessSettings)


def batches() -> "BatchSettings":
    """The settings of batches.

    Raises:
        ConfigurationError: a variable cannot be used.
    """
    return _read(BatchSettings)


def _read(settings: type[S]) -> S:
    try:
        return settings()
    except ValidationError as error:
        raise ConfigurationError(
            f"{settings.model_config['env_prefix']} settings: {first_mistake(error)}",
            advice="Correct or unset the environment variable.",
        ) from None


def local_service() -> "LocalServiceSettings":
    """Return the settings of the local service.

    Raises:
        ConfigurationError: a variable cannot be used.
    """
    return _read(LocalServiceSettings)


class _Settings(BaseSettings):
    """Settings of this package; an empty variable counts as unset."""

    model_config = SettingsConfigDict(env_prefix="PREFECT_ROLLOUT_", env_ignore_empty=True, extra="ignore")


class RetrySettings(_Settings):
    """How the steps retry: `PREFECT_ROLLOUT_RETRIES` and so on, read when the tasks are imported."""

    retries: int = Field(default=5, ge=0, le=20, description="Tries after the first.")
    retry_delay_seconds: float = Field(
        default=1, ge=0, le=60, description="Pause before the first retry; it doubles with each."
    )
    longest_retry_after_seconds: float = Field(
        default=300, ge=0, description="A platform that asks to wait longer than this ends the step."
    )


class LivenessSettings(_Settings):
    """How often a release tells Prefect that it lives: `PREFECT_ROLLOUT_HEARTBEAT_SECONDS`."""

    heartbeat_seconds: float = Field(
        default=20,
        ge=1,
        le=600,
        description="Seconds between heartbeats; a run silent for 4.5 times as long is marked Crashed.",
    )


class BatchSettings(_Settings):
    """How hard a batch leans on the Prefect API: `PREFECT_ROLLOUT_API_TURNS`."""

    api_turns: int = Field(
        default=6,
        ge=1,
        le=500,
        description="Releases of one process that begin at once, as far as the Prefect API is concerned; "
        "waiting for pods does not count, and half as many may end meanwhile. An API on SQLite bears six.",
    )


class LocalServiceSettings(_Settings):
    """Seconds that the local service stays: `PREFECT_ROLLOUT_LINGER_SECONDS`."""

    linger_seconds: float = Field(
        default=60,
        ge=0,
        le=86_400,
        description="Seconds that the local server stays after its last command or client has ended.",
    )
