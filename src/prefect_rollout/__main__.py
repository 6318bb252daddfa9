"""The console script, and the net around every command: errors, `--json` and the exit code.

The MCP server starts fast: without the imports of the other commands.
"""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from cyclopts import App, CycloptsError, CycloptsPanel, MissingArgumentError
from pydantic import ValidationError

from prefect_rollout.cli.output import WRONG_USE, Ended, accept_all_characters, err, say
from prefect_rollout.errors import InputError, RolloutError, UnforeseenError
from prefect_rollout.ids import first_mistake
from prefect_rollout.text import json_line, one_line


def main() -> None:
    """Run the command of this process."""
    if sys.argv[1:2] == ["mcp"]:
        from prefect_rollout.mcp.command import app
    else:
        from prefect_rollout.cli.commands import app
    run(app)


def run(app: App) -> None:
    """Run the command of this process, then exit."""
    # SIGTERM ends the command as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    accept_all_characters()
    for name, value in os.environ.items():
        if name.startswith(("K8S_", "PREFECT_")):  # those from a file end with a newline
            os.environ[name] = value.strip()
    with _stdout_for_json("--json" in sys.argv) as stdout:
        ended = _ended(app, [each for each in sys.argv[1:] if each != "--debug"])
        if stdout and ended.document:
            stdout.write(json_line(ended.document) + "\n")
    sys.exit(ended.code)


def _ended(app: App, arguments: list[str]) -> Ended:
    """Run the command, show any error, and return how it ended."""
    try:
        ended = app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
        return ended if isinstance(ended, Ended) else Ended(ended if isinstance(ended, int) else 0, {})
    except CycloptsError as error:
        # A misspelled option is a likelier mistake than the missing one that cyclopts reports before it.
        unknown = [each for each in error.unused_tokens or () if each.startswith("-")]
        missing = isinstance(error, MissingArgumentError)
        problem = f"Unknown option: {one_line(unknown[0])}." if missing and unknown else str(error)
        if isinstance(error.__cause__, ValidationError):  # of an option with parts, such as --newest.range
            part = first_mistake(error.__cause__)
            problem = f"{error.argument.name if error.argument else ''}.{part}"
        err.print(CycloptsPanel(problem))
        return Ended(WRONG_USE, {"outcome": "failed", "error": InputError(one_line(problem)).to_dict()})
    except KeyboardInterrupt:
        say(
            "\nInterrupted. What the release has published stays, and the cloud continues to apply it; "
            "roll back to undo it."
        )
        return Ended(130, {"outcome": "cancelled"})
    except Exception as error:  # noqa: BLE001 - shown with its type, and with its traceback by --debug
        from prefect_rollout.cli.results import end

        if "--debug" in sys.argv:
            err.print_exception()
        if not isinstance(error, RolloutError):
            error = UnforeseenError(
                f"{type(error).__name__}: {one_line(error)}",
                advice="Run the command again with --debug, and report the traceback to the maintainers.",
            )
        return end(error.result, error)


@contextmanager
def _stdout_for_json(wanted: bool) -> Iterator[TextIO | None]:
    """Reserve standard output for the JSON result; anything else that writes there goes to stderr."""
    if not wanted:
        yield None
        return
    sys.stdout.flush()
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as stdout:
        os.dup2(2, 1)
        try:
            yield stdout
        finally:
            sys.stdout.flush()
            os.dup2(stdout.fileno(), 1)


if __name__ == "__main__":
    main()
