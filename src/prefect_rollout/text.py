"""Text that others wrote, made safe to show: pod names, messages of the cloud, typed reasons."""

import base64
import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from urllib.parse import quote, urlsplit

_MARKDOWN = re.compile(r"([\\`*_{}\[\]()#+!|<>~&]|(?:(?<=\w)|^)\.(?=\w))")
_OF_URLS = ":/?#[]@!$&'*+,;=%~"  # what may stand in a URL, less the parentheses that end one in markdown
_WRITTEN = re.compile(r"`([^`]*)`|\\(.)|&[lg]t;")
_USER_INFO = re.compile(r"(?<=://)[^\s/?#]*@")
_ADDRESS = re.compile(r"([^\s|`]*(?://|www\.|@)[^\s|`]*)", re.IGNORECASE)


def one_line(text: object, limit: int = 300) -> str:
    """`text` on one line of at most `limit` characters, without characters that steer a terminal.

    Control, format and surrogate characters (Unicode categories C*) would let a message of the cloud
    colour a terminal, forge a log line or reverse the reading direction; each becomes `�`, and runs
    of white space become one blank. Chinese and any other letters stay as they are. Addresses lose the user
    name and password before their host.
    """
    # Cut before working through it: a message of megabytes must cost no more than a short one.
    whole = str(text)
    shown = _USER_INFO.sub("", " ".join(whole[: limit * 4].split()))
    shown = "".join("�" if unicodedata.category(char)[0] == "C" else char for char in shown)
    return shown if len(shown) <= limit and len(whole) <= limit * 4 else shown[: limit - 1] + "…"


def when(moment: datetime | None) -> str:
    """Return a moment to the minute, with its zone: `2026-11-26 10:12 UTC`."""
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M} UTC" if moment else "an unknown time"


def markdown(text: object, limit: int = 300) -> str:
    """`text` as plain words inside a markdown line or table cell: no markup or HTML of its own works.

    Addresses become code: some renderers make links of bare ones even where they are escaped.
    """
    parts = _ADDRESS.split(one_line(text, limit))  # every other part is an address
    return "".join(f"`{part}`" if number % 2 else _escaped(part) for number, part in enumerate(parts))


def _escaped(text: str) -> str:
    return _MARKDOWN.sub(r"\\\1", text).replace(r"\<", "&lt;").replace(r"\>", "&gt;")


def address(url: str) -> str:
    """Return an http(s) address as it may be shown: without user name, password, query and fragment.

    Empty for anything else, which is no address to follow.
    """
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
    """Return `address(url)`, or the words of what is no http(s) address without any user name or password."""
    return address(url) or one_line(re.sub(r"\S*@", "", url), 200)


def with_scheme(host: str) -> str:
    """Return the address of a host that may have been written without `https://`."""
    return host if "://" in host else f"https://{host}"


def link(label: str, url: str) -> str:
    """Return a markdown link to an http(s) address; plain words for anything else."""
    if not (found := address(url)):
        return f"{markdown(label)}: {markdown(shown_address(url))}"
    return f"[{markdown(label)}]({quote(found, safe=_OF_URLS)})"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A markdown table; its cells are markdown already."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(text: object, limit: int = 300) -> str:
    """`text` as plain words that are a whole markdown text: the Prefect UI reads each cell of a table so."""
    return re.sub(r"^(\d*)([-.])(?=[\s-]|$)", r"\1\\\2", markdown(text, limit))


def plain(written: str) -> str:
    """What `markdown` or `cell` was given, on its one line."""
    return _WRITTEN.sub(
        lambda found: found[1] or found[2] or {"&lt;": "<", "&gt;": ">"}.get(found[0], ""), written
    )


def json_line(value: object) -> str:
    """`value` as JSON on one line, in which Chinese stays and all that `one_line` replaces is escaped."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return "".join(char if char.isprintable() else json.dumps(char)[1:-1] for char in text)


def masked(text: str, secrets: Iterable[str]) -> str:
    """`text` with `********` for each secret, as it is, escaped for JSON or a URL, in hex or base64."""
    found = {form for secret in secrets for form in _forms(secret) if form}
    if not found:
        return text
    # The longest first: a key id may be a part of the secret.
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
    if len(raw) < 4:  # so short a text stands in half of all base64
        return
    yield raw.hex()
    for before in range(3):  # base64 reads otherwise at each of three offsets
        encoded = base64.b64encode(b"\0" * before + raw).decode()[
            -(-before * 8 // 6) : (before + len(raw)) * 8 // 6
        ]
        yield encoded
        yield encoded.translate(str.maketrans("+/", "-_"))
