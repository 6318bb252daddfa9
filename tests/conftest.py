"""What the tests run against: a Prefect server of their own, and simulated clouds over real sockets."""

import gc
import os
import shutil
import ssl
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import certifi

# Prefect and the tasks read their settings when they are imported: nothing of the user's may count.
for _name in [name for name in os.environ if name.startswith(("PREFECT_", "K8S_", "REGISTRY_AUTH"))]:
    del os.environ[_name]
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ.setdefault("ROLLOUT_TESTS", str(uuid.uuid4()))
    # It outlives an interrupt, and ends when this process, whose pipe it reads, has ended.
    _guardian = subprocess.Popen(
        [sys.executable, Path(__file__).with_name("guardian.py"), os.environ["ROLLOUT_TESTS"]],
        stdin=subprocess.PIPE,
        start_new_session=True,
    )
gc.set_threshold(100_000, 50, 100)
_HOME = Path(tempfile.mkdtemp(prefix="prefect-rollout-tests-"))
os.environ |= {
    "PREFECT_HOME": str(_HOME),
    "PREFECT_ROLLOUT_RETRY_DELAY_SECONDS": "0.01",
    # The images of most tests are in no registry.
    "PREFECT_ROLLOUT_CHECK_IMAGES": "off",
    "DOCKER_CONFIG": str(_HOME),
    "XDG_RUNTIME_DIR": str(_HOME),
    "PREFECT_ROLLOUT_LONGEST_RETRY_AFTER_SECONDS": "5",
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_BATCH_SIZE": "200",
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_READ_BATCH_SIZE": "50",
    # Prefect cuts fractions off: the server never rests, and no test waits for what it records.
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_FLUSH_INTERVAL": "1",
    "PREFECT_SERVER_SERVICES_EVENT_PERSISTER_FLUSH_INTERVAL": "0.2",
    "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
    "DO_NOT_TRACK": "1",
    # Prefect reads all of the world's authorities anew for each of a flow's clients, for no TLS at all.
    "PREFECT_API_SSL_CERT_FILE": str(_HOME / "authority.pem"),
}
_authorities = ssl.create_default_context(cafile=certifi.where()).get_ca_certs(binary_form=True)
(_HOME / "authority.pem").write_text(ssl.DER_cert_to_PEM_cert(_authorities[0]))

import oci_server  # noqa: E402
import pytest  # noqa: E402
from prefect.context import SettingsContext, get_settings_context  # noqa: E402
from prefect.settings import PREFECT_API_URL, Settings  # noqa: E402

import servers  # noqa: E402
import tiny_images  # noqa: E402
from prefect_rollout.simulator import Scenario, SimulatorServer  # noqa: E402
from support import Cloud, cells, tables  # noqa: E402


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Hands what this process's tests recorded cell by cell to the process that prints it."""
    if (output := getattr(session.config, "workeroutput", None)) is not None:
        output["cells"] = cells


def pytest_unconfigure() -> None:
    """Remove this process's Prefect home."""
    shutil.rmtree(_HOME, ignore_errors=True)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Takes over what a worker's tests recorded."""
    for title, rows in getattr(node, "workeroutput", {}).get("cells", {}).items():
        for row, columns in rows.items():
            cells.setdefault(title, {}).setdefault(row, {}).update(columns)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints what the tests recorded cell by cell."""
    for title, lines in tables():
        terminalreporter.section(title)
        for line in lines:
            terminalreporter.write_line(line)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the tests that share a module's fixtures on one worker, and put the slowest first."""
    ranks: dict[str, int] = {}
    groups: dict[pytest.Item, str] = {}
    for item in items:
        if "prefect_server" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.server)
        server = item.get_closest_marker("server") is not None
        marker = item.get_closest_marker("xdist_group")
        groups[item] = str(marker.args[0]) if marker else item.path.name
        if marker is None and server and not _shares(item):
            groups[item] = item.nodeid
        elif marker is None:
            item.add_marker(pytest.mark.xdist_group(item.path.name))
        # Groups of tests with a server take long.
        rank = 2 if not server else 0 if marker or _shares(item) else 1
        ranks[groups[item]] = min(rank, ranks.get(groups[item], rank))
    items.sort(key=lambda item: (ranks[groups[item]], groups[item]))


def _shares(item: pytest.Item) -> bool:
    """Return whether the item uses a fixture that its module makes once."""
    found: dict[str, Any] = getattr(item, "_fixtureinfo").name2fixturedefs  # noqa: B009 - pytest has no other way
    return any(each[-1].scope == "module" for each in found.values())


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[str]:
    """Yield the API address of a Prefect server with a database of its own."""
    with servers.prefect_server(_HOME) as url:
        yield url
        servers.forget_events()


@pytest.fixture(scope="session")
def _settings(prefect_server: str) -> Settings:
    """Prefect's settings with the tests' server; Prefect takes long to check them."""
    return get_settings_context().settings.copy_with_update(updates={PREFECT_API_URL: prefect_server})


@pytest.fixture
def prefect_api(prefect_server: str, _settings: Settings) -> Iterator[str]:
    """Has this process speak to the tests' Prefect server."""
    with SettingsContext(profile=get_settings_context().profile, settings=_settings):
        yield prefect_server


@pytest.fixture
def make_cloud(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Starts a cloud by scenario; its key and address stand in the environment."""
    with ExitStack() as stack:

        def make(speed: float = 20, **scenario: Any) -> Cloud:
            server = stack.enter_context(SimulatorServer(Scenario.model_validate(scenario), speed=speed))
            cloud = Cloud(server)
            for name, value in cloud.environment.items():
                monkeypatch.setenv(name, value)
            return cloud

        yield make


@pytest.fixture
def registry() -> Iterator[oci_server.Registry]:
    """A registry of images with shop/web 1.1.0 and 1.2.0."""
    with oci_server.serving() as found:
        found.put("shop/web", tiny_images.OLD, "1.1.0")
        found.put("shop/web", tiny_images.NEW, "1.2.0")
        yield found


@pytest.fixture
def cloud(make_cloud: Any) -> Cloud:
    """The article's cloud, twenty times as fast."""
    made: Cloud = make_cloud()
    return made
