"""What all commands have in common: where they speak to a person, and how they end."""

import getpass
import signal
import sys
from importlib.metadata import version

from cyclopts import App, CycloptsError
from rich.console import Console

from prefect_rollout.errors import (
    InputError,
    ReleaseCancelledError,
    ReleaseTimedOutError,
    RolloutError,
)
from prefect_rollout.text import json_line, one_line

WRONG_USE = 2
"""The exit code of wrong use or configuration."""


class QuietConsole(Console):
    """A console whose reader may go away: the release goes on all the same."""

    def on_broken_pipe(self) -> None:
        """Says nothing more."""
        self.quiet = True


# Without emoji: the tag in an image's name such as r/app:bug:1 is no picture.
err = QuietConsole(stderr=True, highlight=False, emoji=False)


def me() -> str:
    """Who runs this process, as far as that is known."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user may have no name
        return ""


def say(line: str, style: str | None = None) -> None:
    """Prints a line as it is, whatever its words look like."""
    err.print(line, style=style, markup=False, soft_wrap=True)


def complain(error: RolloutError) -> None:
    """Says how a command ended that did not end well."""
    kind = "Failed"
    if isinstance(error, ReleaseTimedOutError):
        kind = "Timed out"
    elif isinstance(error, ReleaseCancelledError):
        kind = "Cancelled"
    say(f"{kind}: {error}", style="red")


def command_line(told: str = "") -> App:
    """A command line without commands."""
    return App(
        name="prefect-rollout",
        help=told,
        version=version("prefect-rollout"),
        help_format="plaintext",
        suppress_keyboard_interrupt=False,  # `run` says what an interrupt leaves behind
    )


def run(app: App) -> None:
    """Runs the command that the process was started with, and ends the process."""
    # SIGTERM ends the command as Ctrl-C does: it says what stays.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        code = app(exit_on_error=False, error_console=err, result_action="return_value")
    except CycloptsError as error:
        code = WRONG_USE  # cyclopts has said what is wrong
        if "--json" in sys.argv:
            wrong = InputError(one_line(error))
            sys.stdout.write(json_line({"outcome": "failed", "error": wrong.to_dict()}) + "\n")
    except RolloutError as error:
        complain(error)
        code = WRONG_USE
    except KeyboardInterrupt:
        err.print(
            "\nInterrupted. What a release published by then stays, and the cloud continues with it: "
            "roll back to undo it.",
            soft_wrap=True,
        )
        code = 130
    sys.exit(code if isinstance(code, int) else 0)
