"""Credentials for registries, found as `docker`, `oras` and `crane` find them."""

import asyncio
import base64
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from prefect_rollout.release.image_errors import RegistryAccessError
from prefect_rollout.text import one_line


class Credentials(NamedTuple):
    """A user name and password, or a refresh token that `docker login` stored."""

    username: str = ""
    password: str = ""
    identity_token: str = ""
    source: str = ""  # for people, such as `the block image-registry/shop`

    def __repr__(self) -> str:
        """Return the credentials without their secrets."""
        return f"Credentials(username={self.username!r}, source={self.source!r})"

    @property
    def basic(self) -> str:
        """Value of an `Authorization` header."""
        return f"Basic {base64.b64encode(f'{self.username}:{self.password}'.encode()).decode()}"

    @property
    def secrets(self) -> tuple[str, ...]:
        """Values to mask in texts."""
        basic = self.basic.removeprefix("Basic ") if self.password else ""
        return tuple(filter(None, (self.password, self.identity_token, basic)))


async def find_credentials(registry: str) -> Credentials | None:
    """Return the credentials of the first file that has some for `registry`; `None` if there are none.

    The files are `config.json` in `DOCKER_CONFIG` or `~/.docker`, then `REGISTRY_AUTH_FILE`, then
    `auth.json` of Podman. Credential helpers that such a file names are run.

    Raises:
        RegistryAccessError: a file or a helper's answer cannot be read.
    """
    for file in _files():
        if file.is_file() and (found := await asyncio.to_thread(_find, file, registry)):
            return found
    return None


def _files() -> Iterator[Path]:
    folder = os.environ.get("DOCKER_CONFIG")
    yield Path(folder or Path.home() / ".docker") / "config.json"
    if named := os.environ.get("REGISTRY_AUTH_FILE"):
        yield Path(named)
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        yield Path(runtime) / "containers" / "auth.json"


def _find(file: Path, registry: str) -> Credentials | None:
    # docker imports requests: nearly half a second, which a release without such a file does not spend.
    from docker.auth import AuthConfig  # noqa: PLC0415
    from docker.errors import DockerException  # noqa: PLC0415

    shown = one_line(file, 200)
    try:
        config = json.loads(file.read_bytes())
        auths = AuthConfig.load_config(None, dict(config))
        helper = auths.get_credential_store(registry)
    except (OSError, ValueError, TypeError, AttributeError, DockerException) as error:
        raise RegistryAccessError(
            f"the credentials in {shown} cannot be read: {type(error).__name__}",
            advice=f"Correct {shown}, or remove it and run `docker login {one_line(registry, 120)}`.",
            registry=registry,
        ) from None  # its text may hold a part of the file
    if helper and shutil.which(f"docker-credential-{helper}") is None:
        raise RegistryAccessError(
            f"{shown} names the credential helper docker-credential-{one_line(helper, 80)}, which is missing",
            advice="Install the helper where releases run, or save a block image-registry.",
            registry=registry,
        )
    try:
        found: dict[str, Any] = auths.resolve_authconfig(registry) or {}
    except (DockerException, ValueError, KeyError, OSError) as error:
        raise RegistryAccessError(
            f"the credential helper of {shown} failed: {type(error).__name__}",
            advice=f"Run `docker login {one_line(registry, 120)}`, or save a block image-registry.",
            registry=registry,
        ) from None
    lower = {key.lower(): value for key, value in found.items()}
    given = Credentials(
        str(lower.get("username") or ""),
        str(lower.get("password") or ""),
        str(lower.get("identitytoken") or ""),
        shown,
    )
    return given if given.password or given.identity_token else None
