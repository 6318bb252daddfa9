"""Releases and blocks in the user's Prefect home, where the command line of earlier versions kept them."""

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from prefect_rollout.local import HOME

_TOLD = "earlier-home-told"

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
    """Say once per user that an earlier version left something in the user's Prefect home.

    Args:
        say: is called with what there is to say.
        home: folder of the local service, which remembers that it was said.
    """
    if (told := home / _TOLD).exists():
        return
    from prefect.settings import PREFECT_HOME

    if left := left_in(PREFECT_HOME.value() / "prefect.db"):
        say(left)
    told.touch()


def left_in(database: Path) -> str:
    """Return what to say of a database of Prefect's; nothing if it holds nothing of this package."""
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
        f"{database} has {', '.join(found)}, of an earlier version or of a Prefect server of yours. They are "
        "not in the local server, which is used now. To use them, run `prefect server start` and set "
        "PREFECT_API_URL=http://127.0.0.1:4200/api; to move on, save the blocks again with "
        "`prefect-rollout configure`. This is said once."
    )
