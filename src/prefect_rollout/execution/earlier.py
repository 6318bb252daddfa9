"""Releases and blocks in the user's Prefect home, which earlier versions of the command line used."""

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from prefect_rollout.execution.endpoint import HOME

_REPORTED = "earlier-home-reported"

_RELEASES = """
SELECT count(*) FROM flow_run JOIN flow ON flow.id = flow_run.flow_id
WHERE flow.name IN ('deploy-latest-image', 'deploy-batch')
"""
_BLOCKS = """
SELECT block_type.slug || '/' || block_document.name
FROM block_document JOIN block_type ON block_type.id = block_document.block_type_id
WHERE block_type.slug IN ('container-cloud', 'release-windows') AND NOT block_document.is_anonymous
ORDER BY 1
"""


def tell_once(say: Callable[[str], None], home: Path = HOME) -> None:
    """Report once per user, by a file in `home`, what an earlier version left in the user's Prefect home."""
    if (reported := home / _REPORTED).exists():
        return
    from prefect.settings import PREFECT_HOME

    if left := left_in(PREFECT_HOME.value() / "prefect.db"):
        say(left)
    reported.touch()


def left_in(database: Path) -> str:
    """Return the report on a Prefect database; empty if it holds nothing of this package."""
    try:
        # Read-only: a Prefect server of the user's own may use it.
        with closing(sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True, timeout=1)) as connection:
            ((releases,),) = connection.execute(_RELEASES)
            blocks = [str(name) for (name,) in connection.execute(_BLOCKS)]
    except sqlite3.Error:  # there is none, or it is not one of Prefect 3
        return ""
    found = [f"{releases} release{'' if releases == 1 else 's'}"] if releases else []
    found += [f"the block {name}" for name in blocks]
    if not found:
        return ""
    return (
        f"{database} has {', '.join(found)}, from an earlier version or from a Prefect server of yours. They "
        "are not in the local server, which is used now. To use them, run `prefect server start` and set "
        "PREFECT_API_URL=http://127.0.0.1:4200/api; to move on, save the blocks again with "
        "`prefect-rollout configure`. This is reported once."
    )
