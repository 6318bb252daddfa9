"""Settings from environment variables: the article's `K8S_*` and this package's `PREFECT_ROLLOUT_*`."""

from typing import TypeVar

from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from prefect_rollout.errors import ConfigurationError
from prefect_rollout.ids import first_mistake

S = TypeVar("S", bound=BaseSettings)


class CloudEnvironment(BaseSettings):
    """The article's variables, such as `K8S_KEY_ID`. An empty variable counts as unset."""

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
    """Return the article's variables; raise `ConfigurationError` if one cannot be used."""
    return _read(CloudEnvironment)


def patience() -> "RetrySettings":
    """Return the retry settings; raise `ConfigurationError` if a variable cannot be used."""
    return _read(RetrySettings)


def liveness() -> "LivenessSettings":
    """Return the heartbeat settings; raise `ConfigurationError` if a variable cannot be used."""
    return _read(LivenessSettings)


def batches() -> "BatchSettings":
    """Return the settings of batches; raise `ConfigurationError` if a variable cannot be used."""
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
    """Return the local service's settings; raise `ConfigurationError` if a variable cannot be used."""
    return _read(LocalServiceSettings)


class _Settings(BaseSettings):
    """Settings of this package. An empty variable counts as unset."""

    model_config = SettingsConfigDict(env_prefix="PREFECT_ROLLOUT_", env_ignore_empty=True, extra="ignore")


class RetrySettings(_Settings):
    """Retries of the steps, such as `PREFECT_ROLLOUT_RETRIES`; read when the tasks are imported."""

    retries: int = Field(default=5, ge=0, le=20, description="Tries after the first.")
    retry_delay_seconds: float = Field(
        default=1, ge=0, le=60, description="Pause before the first retry; it doubles with each."
    )
    longest_retry_after_seconds: float = Field(
        default=300, ge=0, description="A platform that asks to wait longer than this ends the step."
    )


class LivenessSettings(_Settings):
    """Heartbeat interval: `PREFECT_ROLLOUT_HEARTBEAT_SECONDS`."""

    heartbeat_seconds: float = Field(
        default=20,
        ge=1,
        le=600,
        description="Seconds between heartbeats; a run silent for 4.5 times as long is marked Crashed.",
    )


class BatchSettings(_Settings):
    """Releases of a batch that may use the Prefect API at once: `PREFECT_ROLLOUT_API_TURNS`."""

    api_turns: int = Field(
        default=6,
        ge=1,
        le=500,
        description="Releases of one process that may start at once; half as many may end at the same time. "
        "Releases that wait for pods do not count. A Prefect API on SQLite handles six.",
    )


class LocalServiceSettings(_Settings):
    """Idle time of the local service: `PREFECT_ROLLOUT_LINGER_SECONDS`."""

    linger_seconds: float = Field(
        default=60,
        ge=0,
        le=86_400,
        description="Seconds that the local server stays after its last command or client has ended.",
    )
