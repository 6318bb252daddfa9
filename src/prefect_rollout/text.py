"""Text that others wrote, made safe to show: pod names, messages of the cloud, typed reasons."""

import re
import unicodedata

_MARKDOWN = re.compile(r"([\\`*_{}\[\]()#+!|<>~&])")


def one_line(text: object, limit: int = 300) -> str:
    """`text` on one line of at most `limit` characters, without characters that steer a terminal.

    Control, format and surrogate characters (Unicode categories C*) would let a message of the cloud
    colour a terminal, forge a log line or reverse the reading direction; each becomes `�`, and runs
    of white space become one blank. Chinese and any other letters stay as they are.
    """
    # Cut before working through it: a message of megabytes must cost no more than a short one.
    whole = str(text)
    shown = " ".join(whole[: limit * 4].split())
    shown = "".join("�" if unicodedata.category(char)[0] == "C" else char for char in shown)
    return shown if len(shown) <= limit and len(whole) <= limit * 4 else shown[: limit - 1] + "…"


def markdown(text: object, limit: int = 300) -> str:
    """`text` as plain words inside a markdown line or table cell: no markup or HTML of its own works."""
    escaped = _MARKDOWN.sub(r"\\\1", one_line(text, limit))
    return escaped.replace(r"\<", "&lt;").replace(r"\>", "&gt;")
