"""The tuning of Prefect servers on SQLite, against SQLAlchemy and SQLite themselves."""

import asyncio
import gc
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from prefect.server.database.configurations import AioSqliteConfiguration
from sqlalchemy import Engine, event, text
from sqlalchemy.exc import IntegrityError, OperationalError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from prefect_rollout.execution import local_server


def open_cursors() -> int:
    """Return how many cursors a collection would have to close."""
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
    """Switch the garbage collector off."""
    gc.disable()
    yield
    gc.enable()


async def fail(path: Path) -> int:
    """Have a statement fail; return how many cursors it leaves open."""
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


@pytest.fixture(autouse=True)
def _installed() -> Iterator[None]:
    """The tuning, in this process for one test."""
    local_server.tune_sqlite()
    yield
    event.remove(Engine, "handle_error", local_server.close_cursor)
    event.remove(Engine, "before_cursor_execute", local_server.begin_as_writer)


@pytest.mark.usefixtures("no_collection")
async def test_a_failed_statement_leaves_no_cursor_to_the_garbage_collector(tmp_path: Path) -> None:
    assert await fail(tmp_path / "with") == 0
    event.remove(Engine, "handle_error", local_server.close_cursor)
    try:
        assert await fail(tmp_path / "without") == 1, "SQLAlchemy closes it itself: the module can go"
    finally:
        event.listen(Engine, "handle_error", local_server.close_cursor)


async def count_up(database: AioSqliteConfiguration, engine: AsyncEngine) -> None:
    """Increment a number in a transaction as the server begins them."""
    session = await database.session(engine)
    async with session, database.begin_transaction(session):
        number = (await session.execute(text("SELECT number FROM t"))).scalar_one()
        await asyncio.sleep(0.01)
        await session.execute(text("UPDATE t SET number = :number"), {"number": number + 1})


async def counted_up(path: Path, times: int) -> int:
    """Increment concurrently; return the result."""
    database = AioSqliteConfiguration(f"sqlite+aiosqlite:///{path}")
    engine = await database.engine()
    async with engine.connect() as connection:
        await connection.execute(text("CREATE TABLE t (number INTEGER)"))
        await connection.execute(text("INSERT INTO t VALUES (0)"))
    async with asyncio.TaskGroup() as group:
        for _ in range(times):
            group.create_task(count_up(database, engine))
    async with engine.connect() as connection:
        return int((await connection.execute(text("SELECT number FROM t"))).scalar_one())


async def test_transactions_that_read_and_then_write_wait_for_each_other(tmp_path: Path) -> None:
    assert await counted_up(tmp_path / "with", 8) == 8
    event.remove(Engine, "before_cursor_execute", local_server.begin_as_writer)
    try:
        with pytest.raises(ExceptionGroup) as refused:
            await counted_up(tmp_path / "without", 8)
    finally:
        event.listen(Engine, "before_cursor_execute", local_server.begin_as_writer, retval=True)
    assert refused.group_contains(OperationalError, match="database is locked")
