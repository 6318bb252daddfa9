"""Untrusted text made safe for display: pod names, messages of the cloud, typed reasons."""

import base64
import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from urllib.parse import quote, urlsplit

_MARKDOWN = re.compile(r"([\\`*_{}\[\]()#+!|<>~&]|(?:(?<=\w)|^)\.(?=\w))")
_OF_URLS = ":/?#[]@!$&'*+,;=%~"  # URL characters, except parentheses, which end a markdown link
_USER_INFO = re.compile(r"(?<=://)[^\s/?#]*@")
_ADDRESS = re.compile(r"([^\s|`]*(?://|www\.|@)[^\s|`]*)", re.IGNORECASE)


def one_line(text: object, limit: int = 300) -> str:
    """Return `text` on one line of at most `limit` characters, safe for a terminal.

    Each control, format or surrogate character (Unicode categories C*) becomes `�`: it could color a
    terminal, forge a log line or reverse the reading direction. Runs of white space become one blank. Chinese
    and other letters are kept. Addresses lose the user name and password before their host.
    """
    # Cut first: a message of megabytes must not cost more than a short one.
    whole = str(text)
    shown = _USER_INFO.sub("", " ".join(whole[: limit * 4].split()))
    shown = "".join("�" if unicodedata.category(char)[0] == "C" else char for char in shown)
    return shown if len(shown) <= limit and len(whole) <= limit * 4 else shown[: limit - 1] + "…"


def number(count: int | None) -> str:
    """Return a count, or `?` if it is unknown."""
    return "?" if count is None else str(count)


def when(moment: datetime | None) -> str:
    """Return a moment to the minute, in UTC: `2026-11-26 10:12 UTC`."""
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M} UTC" if moment else "an unknown time"


def markdown(text: object, limit: int = 300) -> str:
    """Return `text` as plain words for a markdown line or table cell, without working markup or HTML.

    Addresses become code, because some renderers link bare addresses even if they are escaped.
    """
    parts = _ADDRESS.split(one_line(text, limit))  # every second part is an address
    return "".join(f"`{part}`" if number % 2 else _escaped(part) for number, part in enumerate(parts))


def _escaped(text: str) -> str:
    return _MARKDOWN.sub(r"\\\1", text).replace(r"\<", "&lt;").replace(r"\>", "&gt;")


def id_in(given: str) -> str:
    """Return the id that was given by itself or as the address of its page in the Prefect UI."""
    return re.sub(r"[?#].*", "", given.strip()).rstrip("/").rpartition("/")[2].lower()


def address(url: str) -> str:
    """Return an http(s) address without user name, password, query and fragment; empty for anything else."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        return ""
    readable = url.isprintable() and not re.search(r"[\s\\]", parts.netloc)
    if parts.scheme not in {"http", "https"} or not host or not readable:
        return ""
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def shown_address(url: str) -> str:
    """Return `address(url)`; if that is empty, the text without any user name or password."""
    return address(url) or one_line(re.sub(r"\S*@", "", url), 200)


def with_scheme(host: str) -> str:
    """Return `host`, with `https://` if it has no scheme."""
    return host if "://" in host else f"https://{host}"


def link(label: str, url: str) -> str:
    """Return a markdown link to an http(s) address, or plain words for anything else."""
    if not (found := address(url)):
        return f"{markdown(label)}: {markdown(shown_address(url))}"
    return f"[{markdown(label)}]({quote(found, safe=_OF_URLS)})"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a markdown table. The cells must be markdown already."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(text: object, limit: int = 300) -> str:
    """Return `text` as plain words for a table cell, which the Prefect UI parses as a whole document."""
    return re.sub(r"^(\d*)([-.])(?=[\s-]|$)", r"\1\\\2", markdown(text, limit))


def json_line(value: object) -> str:
    """Return `value` as JSON on one line; keep Chinese and escape everything that `one_line` replaces."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return "".join(char if char.isprintable() else json.dumps(char)[1:-1] for char in text)


def masked(text: str, secrets: Iterable[str]) -> str:
    """Return `text` with `********` for each secret: plain, escaped for JSON or a URL, in hex or base64."""
    found = {form for secret in secrets for form in _forms(secret) if form}
    if not found:
        return text
    # Longest first: a key id may be a part of the secret.
    pattern = "|".join(re.escape(form) for form in sorted(found, key=len, reverse=True))
    return re.sub(pattern, "********", text, flags=re.IGNORECASE)


def _forms(secret: str) -> Iterable[str]:
    raw = secret.encode()
    yield secret
    for ascii_only in (True, False):
        yield json.dumps(secret, ensure_ascii=ascii_only)[1:-1]
    for safe in ("", "/"):
        yield quote(secret, safe=safe)
        yield quote(secret, safe=safe + " ").replace(" ", "+")
    if len(raw) < 4:  # such a short text occurs in half of all base64
        return
    yield raw.hex()
    for before in range(3):  # base64 differs at each of three offsets
        encoded = base64.b64encode(b"\0" * before + raw).decode()[
            -(-before * 8 // 6) : (before + len(raw)) * 8 // 6
        ]
        yield encoded
        yield encoded.translate(str.maketrans("+/", "-_"))
