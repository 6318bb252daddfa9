"""A small registry over a real socket: it answers as distribution does, and counts what it was asked."""

import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tiny_images import Content, TinyImage


class Registry:
    """The content of a registry, `{repository: {tag or digest: content}}`, and its requests.

    Attributes:
        host: host and port, as images name it.
        asked: number of requests by method and path.
        status: answers every request with this status, if it is not 0.
    """

    def __init__(self, host: str) -> None:
        self.host = host
        self.asked: Counter[str] = Counter()
        self.status = 0
        self._content: dict[str, dict[str, Content]] = {}
        self._tags: dict[str, dict[str, str]] = {}

    def put(self, repository: str, image: TinyImage, *tags: str) -> str:
        """Store an image under tags, which move if they exist; return its digest."""
        stored = self._content.setdefault(repository, {})
        stored |= {each.digest: each for each in (*image.manifests, *image.blobs)}
        self._tags.setdefault(repository, {}).update(dict.fromkeys(tags, image.digest))
        return image.digest

    def answer(self, method: str, path: str) -> tuple[int, Content]:
        self.asked[f"{method} {path.partition('?')[0]}"] += 1
        if self.status:
            return self.status, _refusal("DENIED")
        *parts, kind, name = path.partition("?")[0].removeprefix("/v2/").split("/")
        repository = "/".join(parts)
        if repository not in self._tags:
            return 404, _refusal("NAME_UNKNOWN")
        tags = self._tags[repository]
        if (kind, name) == ("tags", "list"):
            return 200, Content("application/json", json.dumps({"tags": list(tags)}).encode())
        found = self._content[repository].get(tags.get(name, name))
        return (200, found) if found else (404, _refusal("MANIFEST_UNKNOWN"))


def _refusal(code: str) -> Content:
    return Content("application/json", json.dumps({"errors": [{"code": code, "message": code}]}).encode())


@contextmanager
def serving() -> Iterator[Registry]:
    """Run a registry."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            status, content = registry.answer(self.command, self.path)
            self.send_response(status)
            self.send_header("Content-Type", content.media_type)
            self.send_header("Content-Length", str(len(content.content)))
            self.send_header("Docker-Content-Digest", content.digest)
            self.end_headers()
            self.wfile.write(content.content)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            """Stay silent."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        registry = Registry(f"127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield registry
        finally:
            server.shutdown()
            thread.join()
