"""Real registries: Debian's docker-registry, and distribution 3, with a certificate or a token server."""

import base64
import json
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlsplit

import httpx
import jwt
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from support import free_port

USER, PASSWORD = "robot", "s3cret"
HTPASSWD = f"{USER}:$2b$04$FdsET4Jy56hnUhGhOUgZw.YEZvGgepBwAGn7uhduX2pPU22uHLXJm\n"
ISSUER, SERVICE = "tests", "registry"


class Certificate(NamedTuple):
    """A self-signed certificate of this machine, and its key, as PEM files."""

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate
    key_file: Path
    file: Path

    @classmethod
    def make(cls, folder: Path) -> "Certificate":
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
        now = datetime.now(UTC)
        names = x509.SubjectAlternativeName(
            [x509.DNSName("localhost"), x509.IPAddress(ip_address("127.0.0.1"))]
        )
        made = (
            x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
            .not_valid_before(now - timedelta(minutes=5))
            .not_valid_after(now + timedelta(days=1))
            .add_extension(names, critical=False)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(key, hashes.SHA256())
        )
        pem, none = serialization.Encoding.PEM, serialization.NoEncryption()
        key_file, file = folder / "key.pem", folder / "certificate.pem"
        key_file.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.TraditionalOpenSSL, none))
        file.write_bytes(made.public_bytes(pem))
        return cls(key, made, key_file, file)


@contextmanager
def running(binary: str, folder: Path, **parts: Any) -> Iterator[str]:
    """Run a registry with `parts` of its configuration; yield its host and port."""
    port = free_port()
    http = {"addr": f"127.0.0.1:{port}", "secret": "tests", **parts.pop("http", {})}
    config = {
        "version": 0.1,
        "log": {"level": "error"},
        "storage": {"filesystem": {"rootdirectory": str(folder / "storage")}},
        "http": http,
        **parts,
    }
    file = folder / "config.yml"
    file.write_text(yaml.safe_dump(config))
    with (folder / "log").open("wb") as log:
        environment = {"OTEL_TRACES_EXPORTER": "none", "PATH": "/usr/bin:/bin"}
        process = subprocess.Popen([binary, "serve", file], stdout=log, stderr=log, env=environment)
    scheme = "https" if "tls" in http else "http"
    try:
        for _ in range(600):
            try:
                httpx.get(f"{scheme}://127.0.0.1:{port}/v2/", verify=False)
                break
            except httpx.TransportError:
                assert process.poll() is None, (folder / "log").read_text()
                time.sleep(0.05)
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(10)


@contextmanager
def token_server(certificate: Certificate) -> Iterator[tuple[str, list[str]]]:
    """Run a token server; yield its address and the requests that it answered."""
    seen: list[str] = []
    encoded = certificate.certificate.public_bytes(serialization.Encoding.DER)
    basic = f"Basic {base64.b64encode(f'{USER}:{PASSWORD}'.encode()).decode()}"

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.path)
            given = self.headers.get("Authorization")
            query = parse_qs(urlsplit(self.path).query)
            if given not in {None, basic}:
                self.answer(401, {"details": "incorrect username or password"})
                return
            access = []
            for scope in query.get("scope", []):
                kind, name, actions = scope.split(":")
                allowed = actions.split(",") if given else ["pull"] * name.startswith("public/")
                access.append({"type": kind, "name": name, "actions": allowed})
            now = int(time.time())
            claims: dict[str, Any] = {
                "iss": ISSUER,
                "aud": SERVICE,
                "sub": USER,
                "jti": str(len(seen)),
                "access": access,
            }
            claims |= {"iat": now - 10, "nbf": now - 10, "exp": now + 300}
            x5c = [base64.b64encode(encoded).decode()]
            token = jwt.encode(claims, certificate.key, algorithm="ES256", headers={"x5c": x5c})
            self.answer(200, {"token": token, "expires_in": 300})

        def answer(self, status: int, body: dict[str, Any]) -> None:
            content = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
            """Stay silent."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/token", seen
        finally:
            server.shutdown()
            thread.join()
