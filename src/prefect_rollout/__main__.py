"""The console script. A client waits for the MCP server: it starts without what the other commands need."""

import sys


def main() -> None:
    """Runs the command that the process was started with."""
    from prefect_rollout.console import run

    if sys.argv[1:2] == ["mcp"]:
        from prefect_rollout.mcp.command import app
    else:
        from prefect_rollout.cli import app
    run(app)


if __name__ == "__main__":
    main()
