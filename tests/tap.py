"""A tap on the wire between a release and a simulated cloud: it keeps all bytes, and may change answers."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

Rewrite = Callable[[str, bytes], bytes]
"""`(path, body of the answer)` to the body that is passed on."""


class Tap:
    """What went through: `asked` are whole requests, `served` whole answers."""

    def __init__(self, upstream: str, rewrite: Rewrite) -> None:
        self.upstream = urlsplit(upstream).netloc
        self.rewrite = rewrite
        self.url = ""
        self.asked: list[bytes] = []
        self.served: list[bytes] = []


@contextmanager
def tapped(upstream: str, rewrite: Rewrite = lambda path, body: body) -> Iterator[Tap]:
    """Listens before `upstream` while the context lasts."""
    tap = Tap(upstream, rewrite)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            head = f"{self.requestline}\r\n{self.headers}".encode("latin-1")
            tap.asked.append(head + body)
            onward = HTTPConnection(tap.upstream, timeout=30)
            onward.request(self.command, self.path, body, dict(self.headers))
            answer = onward.getresponse()
            content = tap.rewrite(self.path, answer.read())
            onward.close()
            tap.served.append(content)
            self.send_response_only(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in {"content-length", "connection", "transfer-encoding"}:
                    self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            with suppress(ConnectionError):  # the client may have given up
                self.wfile.write(content)

        do_POST = do_GET  # noqa: N815 - the base's name

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base's name
            """Nothing: the requests are kept."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.block_on_close = False
    tap.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield tap
    finally:
        server.shutdown()
        server.server_close()
