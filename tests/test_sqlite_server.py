"""What a Prefect server on SQLite loads of this package, against SQLAlchemy and SQLite themselves."""

import gc
import sqlite3
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path

import prefect.server.database.configurations  # noqa: F401 - what makes a process a server
import pytest
from sqlalchemy import Engine, event, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import create_async_engine


def open_cursors() -> int:
    """How many cursors a collection would have to end in SQLite."""
    found = 0
    for each in gc.get_objects():
        if isinstance(each, sqlite3.Cursor):
            try:
                each.execute("")
                found += 1
            except sqlite3.ProgrammingError as error:
                assert "closed" in str(error)  # noqa: PT017 - most say so
    return found


@pytest.fixture
def no_collection() -> Iterator[None]:
    """The garbage collector at rest."""
    gc.disable()
    yield
    gc.enable()


async def fail(path: Path) -> int:
    """Has a statement fail; how many cursors it leaves open."""
    before = open_cursors()
    engine = create_async_engine(f"sqlite+aiosqlite:///{path}")
    async with engine.connect() as connection:
        await connection.execute(text("CREATE TABLE t (id INTEGER PRIMARY KEY)"))
        await connection.execute(text("INSERT INTO t VALUES (1)"))
        with pytest.raises(IntegrityError):
            await connection.execute(text("INSERT INTO t VALUES (1)"))
        left = open_cursors() - before
    await engine.dispose()
    return left


@pytest.mark.usefixtures("no_collection")
async def test_a_failed_statement_leaves_no_cursor_to_the_garbage_collector(tmp_path: Path) -> None:
    (entry,) = entry_points(group="prefect.collections", name="prefect_rollout_server")
    module = entry.load()
    assert await fail(tmp_path / "with") == 0
    event.remove(Engine, "handle_error", module.close_cursor)
    try:
        assert await fail(tmp_path / "without") == 1, "SQLAlchemy closes it itself: the module can go"
    finally:
        event.listen(Engine, "handle_error", module.close_cursor)
