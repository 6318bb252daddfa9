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
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    import uvicorn

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


def main() -> None:
    """Serve until the daemon ends, or this process is interrupted."""
    listener = _handed_over()
    import uvicorn
    from prefect.server.api.server import create_app
    from prefect.settings import get_current_settings

    from prefect_rollout.execution import sqlite_tuning
    from prefect_rollout.execution.listener import bounded

    sqlite_tuning.install()
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
