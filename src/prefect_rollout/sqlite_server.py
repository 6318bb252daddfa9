"""Keeps a Prefect server on SQLite from refusing what it could do, and from standing still for a minute.

A transaction that reads and then writes is refused at once where another has written in between: waiting
would not help it. The server answers 503, and the client comes again after seconds; of a batch, a release
met three of those. So each transaction takes the write lock at its beginning, where SQLite has it wait.

SQLAlchemy's aiosqlite adapter does not close the cursor of a statement that fails. It stays in the
traceback, which is a cycle, and so the garbage collector ends it: on the server's event loop, at any time.
Does its connection wait for the database's write lock by then, SQLite lets nobody else touch it, and the
loop waits with it. Whoever holds the lock needs the loop to give it back, so that nothing moves until
SQLite's patience ends, which Prefect sets to 60 s. So the cursor is closed as soon as its statement fails.

Prefect's server loads this as it loads collections of blocks, by the entry point in pyproject.toml.
"""

import sys
import traceback
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sqlalchemy.engine import ExceptionContext


def close_cursor(context: "ExceptionContext") -> None:
    """Closes the cursor of the statement that has failed, in its connection's own thread."""
    from aiosqlite import Cursor

    for frame, _ in traceback.walk_tb(context.original_exception.__traceback__):
        cursor = frame.f_locals.get("_cursor")
        if isinstance(cursor, Cursor) and context.connection is not None:
            adapted: Any = context.connection.connection.dbapi_connection
            adapted.run_async(lambda _connection, cursor=cursor: cursor.close())
            return


def begin_as_writer(
    _connection: object,
    _cursor: object,
    statement: str,
    parameters: object,
    _context: object,
    _many: bool,
) -> tuple[str, object]:
    """Has a transaction of Prefect's, which says how it begins, begin with the write lock."""
    return ("BEGIN IMMEDIATE" if statement == "BEGIN DEFERRED" else statement), parameters


# Whatever else loads collections has no database.
if "prefect.server.database.configurations" in sys.modules:
    from sqlalchemy import Engine, event

    event.listen(Engine, "handle_error", close_cursor)
    event.listen(Engine, "before_cursor_execute", begin_as_writer, retval=True)
