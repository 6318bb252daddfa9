"""Console, messages, JSON and exit of all commands."""

import codecs
import getpass
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from cyclopts import App
from rich.console import Console
from rich.table import Table
from rich.text import Text

from prefect_rollout.text import one_line

WRONG_USE = 2
"""Exit code of wrong use or configuration."""


class Ended(NamedTuple):
    """Exit code of a command, and the object that it prints with `--json`."""

    code: int
    document: dict[str, Any]


class QuietConsole(Console):
    """A console that ignores a closed pipe, so that the release continues."""

    def on_broken_pipe(self) -> None:
        """Print nothing more."""
        self.quiet = True


# Without emoji: the tag in an image name such as r/app:bug:1 is not an emoji.
err = QuietConsole(stderr=True, highlight=False, emoji=False)
out = QuietConsole(highlight=False, emoji=False)


def me() -> str:
    """Return the name of the user of this process, or an empty string."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # the user of a container may have no name
        return ""


def program(name: str) -> str:
    """Return how this shell calls a program: its name if that is on the path, else its file beside Python."""
    return name if shutil.which(name) else shlex.quote(str(Path(sys.executable).with_name(name)))


def say(line: str, style: str | None = None) -> None:
    """Print a line as plain text, without markup."""
    err.print(line, style=style, markup=False, soft_wrap=True)


def label(name: str, text: object, console: Console | None = None) -> None:
    """Print a labelled line, by default on standard error; on a terminal, all its lines are indented."""
    console = console or err
    plain = Text(one_line(text, 2000))
    if not console.is_terminal:
        console.print(Text(f"  {name:<9} {plain}"), soft_wrap=True)
        return
    grid = Table.grid(padding=(0, 1))
    grid.add_column(width=10)
    grid.add_column(overflow="fold")
    grid.add_row(Text(f"  {name}", style="dim"), plain)
    console.print(grid)


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Show a spinner and the elapsed time within the context, on a terminal and without `--json` only."""
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn("line"), TextColumn("{task.description}"), TimeElapsedColumn())
    hidden = not err.is_terminal or "--json" in sys.argv
    with Progress(*columns, console=err, transient=True, disable=hidden) as shown:
        shown.add_task(what, total=None)
        yield


# Signs of this package in words that every encoding has; other characters become escapes.
_ASCII = {
    "→": "->",
    "…": "...",
    "✔": "+",
    "✘": "x",
    "●": "*",
    "·": ".",
    "↻": "~",
    "■": "#",
    "�": "?",
    "–": "-",
    **dict.fromkeys("─━", "-"),
    **dict.fromkeys("│┃", "|"),
    **dict.fromkeys("╭╮╰╯", "+"),
}


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    part = error.object[error.start : error.end]
    return "".join(_ASCII.get(char) or ascii(char)[1:-1] for char in part), error.end


def accept_all_characters() -> None:
    """Have both outputs accept characters that their encoding does not have."""
    codecs.register_error("prefect-rollout", _in_ascii)
    for stream in (sys.stdout, sys.stderr):
        # Not every stream can be changed: one that cannot keeps its own way.
        with suppress(AttributeError, OSError):
            stream.reconfigure(errors="prefect-rollout")  # type: ignore[union-attr]


def command_line(text: str = "", **more: Any) -> App:
    """Return a command line without commands; `text` is its help."""
    return App(
        **more,
        name="prefect-rollout",
        help=text,
        version=version("prefect-rollout"),
        help_format="plaintext",
        suppress_keyboard_interrupt=False,  # `run` handles interrupts
    )
