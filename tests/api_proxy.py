"""A proxy before a Kubernetes API server: it tells each exchange before it passes on, and may spoil it."""

import json
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from enum import StrEnum
from http.client import HTTPResponse, HTTPSConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, urlsplit

import yaml

from control_plane import ControlPlane


class Fault(StrEnum):
    """A fault that spoils an exchange."""

    RESET_BEFORE = "reset before the effect"
    RESET_AFTER = "reset after the effect"
    CUT = "the answer is cut off"
    THROTTLED = "429, Retry-After: 1"
    FAILED = "500"
    UNAVAILABLE = "503"
    SILENT_BEFORE = "no answer, no effect"
    SILENT_AFTER = "no answer, with the effect"

    @property
    def status(self) -> int | None:
        """The status with which the proxy answers in the place of the API server."""
        return {"429": 429, "500": 500, "503": 503}.get(self.value[:3])


class Exchange(NamedTuple):
    """A request: its verb, and the object or list in the namespace."""

    verb: str
    what: str

    def __str__(self) -> str:
        return f"{self.verb} {self.what}"

    @classmethod
    def of(cls, method: str, path: str) -> "Exchange":
        """Return the exchange of a request."""
        parts = urlsplit(path)
        query = parse_qs(parts.query)
        _, _, what = parts.path.partition("/namespaces/")
        kind = what.partition("/")[2]
        verb = "WATCH" if "watch" in query else "TRY" if "dryRun" in query else method
        if kind.startswith("pods/"):
            kind = "pods/log"
        return cls(verb, kind)


Passing = Callable[[Exchange], Fault | None]


class Proxy:
    """A proxy that runs.

    Attributes:
        kubeconfig: a kubeconfig of the releaser, through the proxy.
        passing: called with each exchange before it passes, in any thread; returns its fault.
    """

    def __init__(self, kubeconfig: Path) -> None:
        self.kubeconfig = kubeconfig
        self.passing: Passing = lambda _: None


@contextmanager
def proxied(plane: ControlPlane, folder: Path) -> Iterator[Proxy]:
    """Run a proxy before the control plane."""
    upstream, over = urlsplit(plane.url).netloc, threading.Event()
    turn = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def _pass(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            exchange = Exchange.of(self.command, self.path)
            with turn:  # one at a time, as the test sees them
                fault = proxy.passing(exchange)
            self.close_connection = True
            if fault and fault.status:
                text = json.dumps({"kind": "Status", "code": fault.status, "message": "the proxy says so"})
                self.send_response_only(fault.status)
                self.send_header("Retry-After", "1")
                self.end_headers()
                self.wfile.write(text.encode())
                return None
            if fault is Fault.RESET_BEFORE:
                return self._reset()
            if fault is Fault.SILENT_BEFORE:
                over.wait()
                return None
            # The API server's certificate is the proxy's business: the client speaks plain HTTP to it.
            onward = HTTPSConnection(upstream, context=trusted, timeout=90)
            try:
                onward.request(self.command, self.path, body, dict(self.headers))
                self._answer(onward.getresponse(), fault)
            finally:
                onward.close()
            return None

        def _answer(self, answer: HTTPResponse, fault: Fault | None) -> None:
            if fault in {Fault.RESET_AFTER, Fault.SILENT_AFTER}:
                answer.read1()
                if fault is Fault.RESET_AFTER:
                    return self._reset()
                over.wait()
                return None
            self.send_response_only(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in {"connection", "content-length", "transfer-encoding"}:
                    self.send_header(name, value)
            if fault is Fault.CUT:
                self.send_header("Content-Length", "1000000")
            self.end_headers()
            with suppress(ConnectionError, TimeoutError):  # the client, or the watch, may be gone
                while part := answer.read1():
                    if fault is Fault.CUT:
                        self.wfile.write(part[:10])
                        break
                    self.wfile.write(part)
            return None

        def _reset(self) -> None:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.rfile.close()  # which keeps the socket open
            self.connection.close()

        do_GET = do_PATCH = _pass  # noqa: N815 - the base's names

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base's name
            """Nothing: the test sees the exchanges."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.block_on_close = True, False
    server.request_queue_size = 50
    trusted: ssl.SSLContext = plane.trusted
    config = yaml.safe_load(plane.kubeconfig("releaser").read_text("utf-8"))
    config["clusters"][0]["cluster"] = {"server": f"http://127.0.0.1:{server.server_address[1]}"}
    kubeconfig = folder / f"proxy-{server.server_address[1]}.kubeconfig"
    kubeconfig.write_text(yaml.safe_dump(config), encoding="utf-8")
    proxy = Proxy(kubeconfig)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield proxy
    finally:
        over.set()
        server.shutdown()
        server.server_close()
