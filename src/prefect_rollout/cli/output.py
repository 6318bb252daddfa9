"""Console, messages and exit of all commands."""

import getpass
import signal
import sys
from importlib.metadata import version

from cyclopts import App, CycloptsError
from rich.console import Console

from prefect_rollout.errors import InputError, ReleaseCancelledError, ReleaseTimedOutError, RolloutError
from prefect_rollout.text import json_line, one_line

WRONG_USE = 2
"""Exit code of wrong use or configuration."""


class QuietConsole(Console):
    """A console that ignores a closed pipe, so that the release continues."""

    def on_broken_pipe(self) -> None:
        """Print nothing more."""
        self.quiet = True


# Without emoji: the tag in an image name such as r/app:bug:1 is not an emoji.
err = QuietConsole(stderr=True, highlight=False, emoji=False)


def me() -> str:
    """Return the name of the user of this process, or an empty string."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # the user of a container may have no name
        return ""


def say(line: str, style: str | None = None) -> None:
    """Print a line as plain text, without markup."""
    err.print(line, style=style, markup=False, soft_wrap=True)


def complain(error: RolloutError) -> None:
    """Print the error that a command ended with."""
    kind = "Failed"
    if isinstance(error, ReleaseTimedOutError):
        kind = "Timed out"
    elif isinstance(error, ReleaseCancelledError):
        kind = "Cancelled"
    say(f"{kind}: {error}", style="red")


def command_line(text: str = "") -> App:
    """Return a command line without commands; `text` is its help."""
    return App(
        name="prefect-rollout",
        help=text,
        version=version("prefect-rollout"),
        help_format="plaintext",
        suppress_keyboard_interrupt=False,  # `run` handles interrupts
    )


def run(app: App) -> None:
    """Run the command of this process, then exit."""
    # SIGTERM ends the command as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        code = app(exit_on_error=False, error_console=err, result_action="return_value")
    except CycloptsError as error:
        code = WRONG_USE  # cyclopts has printed what is wrong
        if "--json" in sys.argv:
            wrong = InputError(one_line(error))
            sys.stdout.write(json_line({"outcome": "failed", "error": wrong.to_dict()}) + "\n")
    except RolloutError as error:
        complain(error)
        code = WRONG_USE
    except KeyboardInterrupt:
        err.print(
            "\nInterrupted. What the release has published stays, and the cloud continues to apply it; "
            "roll back to undo it.",
            soft_wrap=True,
        )
        code = 130
    sys.exit(code if isinstance(code, int) else 0)
