"""An HTTP listener that unauthenticated clients cannot exhaust: it limits connections and request times.

uvicorn limits neither the time in which a request arrives nor the number of connections without a complete
request, so half-sent headers can use up the file descriptors of the process.
"""

import asyncio
import logging
import socket
import sys
from typing import Any

import h11
import uvicorn
from starlette.requests import ClientDisconnect
from uvicorn.protocols.http.h11_impl import H11Protocol

if sys.platform != "win32":
    import resource

REQUEST_SECONDS = 20.0
"""Seconds in which the headers and body of a request have to arrive."""

MOST_CONNECTIONS = 512


class BoundedProtocol(H11Protocol):
    """Protocol that closes connections whose requests arrive too late, and the oldest above the limit."""

    request_seconds = REQUEST_SECONDS
    most = MOST_CONNECTIONS

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Accept the connection; above the limit, close the one that has waited longest for its request."""
        super().connection_made(transport)
        self._deadline: asyncio.TimerHandle | None = None
        if len(self.connections) > self.most:
            incomplete = [
                each for each in self.connections if isinstance(each, BoundedProtocol) and each._deadline
            ]
            oldest = min(incomplete, key=lambda each: each._deadline.when(), default=self)  # type: ignore[union-attr]
            oldest.transport.abort()
        self._expect_request()

    def data_received(self, data: bytes) -> None:
        """Pass the data on; complete requests and web sockets have no deadline."""
        super().data_received(data)
        complete = self.cycle is not None and not self.cycle.more_body and not self.cycle.response_complete
        if complete or self.transport.get_protocol() is not self:
            self._cancel_deadline()
        elif self._deadline is None:
            self._expect_request()

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        """Open a web socket; they may use half of the connections, so that requests have the rest."""
        if sum(not isinstance(each, BoundedProtocol) for each in self.connections) >= self.most // 2:
            self.transport.abort()
        else:
            super().handle_websocket_upgrade(event)

    def on_response_complete(self) -> None:
        """Leave an idle connection to uvicorn's keep-alive timeout."""
        self._cancel_deadline()
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel the deadline."""
        self._cancel_deadline()
        super().connection_lost(exc)

    def _expect_request(self) -> None:
        self._deadline = self.loop.call_later(self.request_seconds, self.transport.abort)

    def _cancel_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


def bounded() -> type[BoundedProtocol]:
    """Return the protocol, with a limit that leaves file descriptors for the rest of the process."""
    return type("Protocol", (BoundedProtocol,), {"most": _most_connections()})


async def serve(app: Any, listening: socket.socket) -> None:
    """Serve an ASGI application on the socket until the process is interrupted."""
    # asyncio accepts a whole backlog, several times, before the limit applies to a connection.
    config = uvicorn.Config(app, http=bounded(), ws="none", log_config=None, access_log=False, backlog=16)
    logging.getLogger("mcp.server.streamable_http").addFilter(_without_traceback)
    await uvicorn.Server(config).serve(sockets=[listening])


def _without_traceback(record: logging.LogRecord) -> bool:
    """Log a client that disconnects within its request as one line."""
    if record.exc_info and isinstance(record.exc_info[1], ClientDisconnect):
        record.msg, record.args = "A client disconnected before its request was complete", ()
        record.exc_info = None
        record.levelno, record.levelname = logging.WARNING, "WARNING"
    return True


def _most_connections() -> int:
    if sys.platform == "win32":
        return MOST_CONNECTIONS
    # The rest is for connections that are not counted yet, and for Prefect, platforms and files.
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return min(MOST_CONNECTIONS, files // 4)
