"""Parts of HTTP that the clients of platforms and registries share."""

import ssl
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cache
from ipaddress import ip_address
from pathlib import Path

import httpx

from prefect_rollout.errors import ConfigurationError
from prefect_rollout.text import one_line


def host_of(url: str) -> str:
    """Return the normalized host and port of an address.

    It ignores letter case, a final dot, the default port, and the way in which an IP address or localhost is
    written. Names are not resolved: two names of the same host are different hosts.
    """
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL:
        return url
    if not (host := parsed.raw_host.decode("ascii").rstrip(".")):
        return url
    with suppress(ValueError):
        ip = ip_address(host)
        ip = getattr(ip, "ipv4_mapped", None) or ip
        host = "localhost" if ip.is_loopback else f"[{ip}]" if ip.version == 6 else str(ip)
    return host if parsed.port is None else f"{host}:{parsed.port}"


def is_local(url: str) -> bool:
    """Return whether an address is on this machine: requests to it pass no network."""
    return host_of(url).partition(":")[0] == "localhost"


@cache
def _system_trust() -> ssl.SSLContext:
    """Return the system's trusted certificates. They are cached: loading takes longer than a request."""
    return ssl.create_default_context()


def trust(ca_file: Path | None) -> ssl.SSLContext:
    """Return the certificates of `ca_file`, or the system's; raise `ConfigurationError` if it is unusable."""
    if ca_file is None:
        return _system_trust()
    try:
        return ssl.create_default_context(cafile=str(ca_file))
    except (OSError, ssl.SSLError) as error:
        raise ConfigurationError(
            f"ca_file: {one_line(ca_file)} cannot be read as PEM certificates",
            advice="Name a readable PEM file, on every machine where releases run.",
            field="ca_file",
        ) from error


def seconds_to_wait(value: str | None) -> float | None:
    """Return the seconds to wait by a `Retry-After` header, which has seconds or an HTTP date."""
    if value is None:
        return None
    if value.strip().isascii() and value.strip().isdigit():
        return float(value.strip()[:9])
    try:
        until = parsedate_to_datetime(value)
        if until.tzinfo is None:
            until = until.replace(tzinfo=UTC)
        return max(0.0, (until - datetime.now(UTC)).total_seconds())
    except (ValueError, OverflowError):
        return None


def untrusted(error: BaseException | None) -> bool:
    """Return True if the cause of `error` is a certificate that is not trusted."""
    seen: set[BaseException] = set()  # the causes of an error that is raised again may lead back to it
    while error is not None and error not in seen:
        if isinstance(error, ssl.SSLCertVerificationError):
            return True
        seen.add(error)
        error = error.__cause__ or error.__context__
    return False
