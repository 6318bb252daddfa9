"""Tuning of a Prefect server on SQLite, for the servers that this package starts.

If a transaction reads and then writes, and another one has written in between, SQLite refuses it at once,
because waiting does not help. The server answers 503, and the client retries after seconds; this happened
three times in a release of a batch. So each transaction acquires the write lock first, and SQLite waits.

SQLAlchemy's aiosqlite adapter does not close the cursor of a statement that fails. The cursor stays in the
traceback, which is a cycle, so the garbage collector closes it: on the server's event loop, at any time. If
its connection waits for the database's write lock at that time, SQLite blocks the event loop too. The holder
of the lock needs the loop to release it, so everything blocks until SQLite's timeout: 60 s with Prefect.
So the cursor is closed as soon as its statement fails.
"""

import traceback
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sqlalchemy.engine import ExceptionContext


def install() -> None:
    """Tune the SQLite databases of this process."""
    from sqlalchemy import Engine, event

    event.listen(Engine, "handle_error", close_cursor)
    event.listen(Engine, "before_cursor_execute", begin_as_writer, retval=True)


def close_cursor(context: "ExceptionContext") -> None:
    """Close the cursor of the statement that failed, in its connection's own thread."""
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
    """Have a transaction begin with the write lock."""
    return ("BEGIN IMMEDIATE" if statement == "BEGIN DEFERRED" else statement), parameters
