"""The process of the local Prefect server: Prefect's API and UI on a socket that it is given.

The daemon binds the port and listens before it starts this process, and keeps the socket open: no other
program can take the port and receive the password. `prefect server start` accepts no socket, so this module
starts the same application with the same settings of uvicorn.
"""

import os
import socket
import subprocess
import sys
import threading
import traceback
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    import uvicorn
    from sqlalchemy.engine import ExceptionContext

_END_SECONDS = 10


def start(listener: socket.socket, log: IO[bytes]) -> "subprocess.Popen[bytes]":
    """Start the server on a listening socket, with its output in `log`. It ends with this process, too."""
    command = [sys.executable, "-m", __name__]
    if sys.platform == "win32":
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log)  # noqa: S603
        shared = listener.share(process.pid)
        process.stdin.write(len(shared).to_bytes(4) + shared)
        process.stdin.flush()
        return process
    number = listener.fileno()
    return subprocess.Popen(  # noqa: S603 - no part of it is input
        [*command, str(number)], pass_fds=[number], stdin=subprocess.PIPE, stdout=log, stderr=log
    )


def _handed_over() -> socket.socket:
    """Return the socket that `start` passed."""
    if sys.platform == "win32":
        return socket.fromshare(os.read(0, int.from_bytes(os.read(0, 4))))
    return socket.socket(fileno=int(sys.argv[1]))


class OwnPages:
    """Middleware that refuses requests from pages other than the server's own.

    A page in the user's browser can reach the server under another name (DNS rebinding), which the Host
    header shows. Any other page has another origin. `address` is the `host:port` of the server.
    """

    def __init__(self, app: Any, address: str) -> None:
        self._app = app
        self._address = address

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request, or refuse it."""
        refusal = self._refusal(scope) if scope["type"] in {"http", "websocket"} else None
        await (refusal or self._app)(scope, receive, send)

    def _refusal(self, scope: Any) -> Any:
        from starlette.datastructures import Headers
        from starlette.responses import PlainTextResponse

        headers = Headers(scope=scope)
        if headers.getlist("host") != [self._address]:
            return PlainTextResponse(f"Only http://{self._address} is answered here.", 421)
        if any(origin != f"http://{self._address}" for origin in headers.getlist("origin")):
            return PlainTextResponse("Requests of other origins are refused.", 403)
        return None


def _end_with_the_daemon(server: "uvicorn.Server") -> None:
    """End the server when the daemon ends, which holds the other end of standard input."""

    def wait() -> None:
        os.read(0, 1)
        server.should_exit = True

    threading.Thread(target=wait, daemon=True).start()


def tune_sqlite() -> None:
    """Tune the SQLite databases of this process.

    If a transaction reads and then writes, and another one has written in between, SQLite refuses it at once,
    because waiting does not help. The server answers 503, and the client retries after seconds; this happened
    three times in a release of a batch. So each transaction acquires the write lock first, and SQLite waits.

    SQLAlchemy's aiosqlite adapter does not close the cursor of a statement that fails. The cursor stays in
    the traceback, which is a cycle, so the garbage collector closes it: on the server's event loop, at any
    time. If its connection waits for the database's write lock at that time, SQLite blocks the event loop
    too. The holder of the lock needs the loop to release it, so everything blocks until SQLite's timeout: 60
    s with Prefect. So the cursor is closed as soon as its statement fails.
    """
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


def main() -> None:
    """Serve until the daemon ends, or this process is interrupted."""
    listener = _handed_over()
    import uvicorn
    from prefect.server.api.server import create_app
    from prefect.settings import get_current_settings

    from prefect_rollout.execution.listener import bounded

    tune_sqlite()
    host, port = listener.getsockname()
    settings = get_current_settings().server
    server = uvicorn.Server(
        uvicorn.Config(
            OwnPages(create_app(final=True), f"{host}:{port}"),
            http=bounded(),
            backlog=64,
            timeout_keep_alive=settings.api.keepalive_timeout,
            timeout_graceful_shutdown=_END_SECONDS,
            ws_ping_interval=settings.api.websocket_ping_interval,
            ws_ping_timeout=settings.api.websocket_ping_timeout,
            log_level=settings.logging_level.lower(),
            proxy_headers=False,
        )
    )
    _end_with_the_daemon(server)
    server.run(sockets=[listener])


if __name__ == "__main__":
    main()
