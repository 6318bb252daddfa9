"""The console script. The MCP server starts fast: without the imports of the other commands."""

import sys


def main() -> None:
    """Run the command of this process."""
    from prefect_rollout.cli.output import run

    if sys.argv[1:2] == ["mcp"]:
        from prefect_rollout.mcp.command import app
    else:
        from prefect_rollout.cli.commands import app
    run(app)


if __name__ == "__main__":
    main()
