"""Nothing leaks: secrets are planted, every path is gone, and then all that anyone could read is searched.

Prefect, its database, its results and each process are this module's own and log at debug level.
"""

import base64
import bz2
import gzip
import json
import lzma
import os
import re
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import zlib
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import psutil
import pytest

from prefect_rollout.simulator import Scenario, SimulatorServer
from servers import prefect_server
from support import BIN, free_port
from tap import Tap, tapped

pytestmark = [pytest.mark.server, pytest.mark.promise("No secret leaks")]

# The letters that are looked for stand the same in JSON, in a repr and percent-encoded; what stands
# around them does not, and has the code go through each of these.
PLANTED = {
    "the block's key id": "blockIdQz81xVw7",
    "the block's secret": "blockSecretKj27RtYq",
    "a reader's key id": "readerIdPm55sLd3",
    "a reader's secret": "readerSecretGf83NvXz",
    "the environment's key id": "environIdWc46bHn9",
    "the environment's secret": "environSecretTy92LpMk",
    "a mistyped secret": "mistypedSecretBv74QwEr",
    "an environment value of a template": "dbPasswordUi38ZxCv",
    "an annotation of a template": "annotationOp61HjKl",
    "an environment value that is replaced": "olderPasswordXe71MbTq",
}
ID, SECRET, READER, READS, ENV_ID, ENV_SECRET, MISTYPED, VALUE, NOTE, OLDER_VALUE = PLANTED.values()
CARELESS = "carelessAs52DfGh"
META = "metaDataRt19YuIo"


def dressed(secret: str) -> str:
    return f'é/+" %密{secret}&<'


# ---- the paths ----------------------------------------------------------------------------------

SPEC = {
    "metadata": {"labels": {"app": "web"}, "annotations": {"note": NOTE}},
    "spec": {
        "containers": [
            {"name": "web", "image": "r/web:1", "env": [{"name": "DB_PASSWORD", "value": dressed(VALUE)}]}
        ]
    },
}
TEMPLATE = {
    "kind": "Deployment",
    "apiVersion": "apps/v1",
    "metadata": {"annotations": {"note": NOTE}},
    "spec": {"selector": {"matchLabels": {"app": "web"}}, "template": SPEC},
}
OLDER = {**TEMPLATE, "spec": {"template": json.loads(json.dumps(SPEC).replace(VALUE, OLDER_VALUE))}}
# Newer than what is online in every field that is shown, and in many that are not.
CHANGED: dict[str, Any] = {
    "name": "web",
    "image": "r/web:2",
    "args": ["--password", VALUE],
    "command": [VALUE],
    "workingDir": VALUE,
    "env": [{"name": "DB_PASSWORD", "value": VALUE}, {"name": "OTHER", "value": VALUE}],
    "livenessProbe": {"exec": {"command": [VALUE]}, "httpGet": {"path": f"/?token={VALUE}", "port": 80}},
    VALUE: VALUE,
}
TO_PLAN = [
    {"id": 80, "template": OLDER},
    {
        "id": 81,
        "template": {
            **TEMPLATE,
            "spec": {
                "template": {
                    "metadata": {"annotations": {"note": NOTE, "other": VALUE}, VALUE: NOTE},
                    "spec": {"containers": [CHANGED], "hostAliases": [{"ip": VALUE}]},
                }
            },
        },
    },
]
NO_WORKLOAD = {
    "kind": "Deployment",
    "spec": {"template": {"spec": {"containers": [{"name": {VALUE: NOTE}}]}}},
}


def deployment(number: int, name: str, template: Any = TEMPLATE, **more: Any) -> dict[str, Any]:
    templates = [{"id": number * 10, "template": template}]
    return {"id": number, "name": name, "clusters": {"c1": 1}, "templates": templates, **more}


SCENARIO = {
    "key_id": ID,
    "secret_key": dressed(SECRET),
    "extra_keys": [
        {"key_id": READER, "secret_key": dressed(READS), "read_only": True},
        {"key_id": ENV_ID, "secret_key": dressed(ENV_SECRET)},
    ],
    "apps": [
        {
            "id": 1,
            "name": "shop",
            "deployments": [
                deployment(1, "web", online={"c1": 10}),
                deployment(2, "never-ready", behaviour={"kind": "never_ready"}),
                deployment(3, "broken", f'{{"DB_PASSWORD": "{VALUE}'),
                deployment(4, "no-workload", json.dumps(NO_WORKLOAD)),
                deployment(5, "no-deployment", json.dumps({**TEMPLATE, "kind": VALUE})),
                deployment(6, "bad-meta", metaData=json.dumps({"clusters": {"c1": {"replica": META}}})),
                deployment(7, "no-page"),
                {**deployment(8, "to-plan", OLDER, online={"c1": 80}), "templates": TO_PLAN},
            ],
        }
    ],
}


def without_ids(path: str, body: bytes) -> bytes:
    """The templates of `no-page` come without ids: what stands in their place must not be shown."""
    if "deploymentId=7&" not in path:
        return body
    page = json.loads(body)
    page["data"]["list"] = [{"template": each["template"]} for each in page["data"]["list"]]
    return json.dumps(page).encode()


def path(flow: str = "deploy_latest_image", block: str = "good", **more: Any) -> dict[str, Any]:
    parameters = {"app_id": 1, "deployment": "web", "target": f"container-cloud/{block}"}
    parameters |= {"poll_seconds": 0.1, "poll_attempts": 60, "lock_wait_seconds": 0}
    rest: dict[str, Any] = {key: more.pop(key) for key in ("faults", "environment") if key in more}
    return {"flow": flow, "parameters": {**parameters, **more}, **rest}


def says(status: int, call: str = "any") -> dict[str, Any]:
    """A fault whose message gives away all that the cloud knows of the key, in many a form."""
    secret = dressed(SECRET)
    forms = [ID, secret, json.dumps(secret), httpx.QueryParams({"": secret}), secret.encode().hex()]
    forms += [base64.b64encode(form.encode()).decode() for form in (secret, f"x{secret}", f"{ID}:{secret}")]
    message = " ".join(map(str, forms))
    return {"faults": [{"kind": "status", "status": status, "message": message, "call": call}]}


PATHS: dict[str, tuple[dict[str, Any], str]] = {
    "released": (path(), "released"),
    "rolled back": (path("rollback"), "released"),
    "restarted": (path("restart"), "released"),
    "scaled": (path("scale", replicas=2), "released"),
    "planned": (path(deployment="to-plan", dry_run=True), "planned"),
    "a plan that changed": (path(deployment="to-plan", expect_plan="0" * 16), "PlanChangedError"),
    "a rollback planned": (path("rollback", deployment="to-plan", to_template=81, dry_run=True), "planned"),
    "by the environment's key": (path(block="default"), "released"),
    "401": (path(block="mistyped"), "AuthenticationError"),
    "403": (path(block="reader"), "AccessDeniedError"),
    "404": (path(deployment="nothing"), "DeploymentNotFoundError"),
    "400 that echoes": (path(**says(400)), "RejectedError"),
    "500 that echoes": (path(**says(500, "upgrade")), "ServerFaultError"),
    "404 that echoes": (path(**says(404)), "AppNotFoundError"),
    "polls that echo": (path(**says(502, "status"), poll_attempts=2), "ServerFaultError"),
    "an HTML page": (path(faults=[{"kind": "html"}]), "UnusableAnswerError"),
    "pods that time out": (path(deployment="never-ready", poll_attempts=3), "ReleaseTimedOutError"),
    "rolled back by itself": (
        path(deployment="never-ready", poll_attempts=3, on_failure="rollback"),
        "RollbackFailedError",
    ),
    "no answer": (path(block="impatient", faults=[{"kind": "delay", "seconds": 1}]), "UnreachableError"),
    "unreachable": (path(block="unreachable"), "UnreachableError"),
    "metaData of another shape": (path(deployment="bad-meta"), "WorkloadError"),
    "template that is no JSON": (path(deployment="broken"), "UnreadableTemplateError"),
    "template of another shape": (path(deployment="no-workload"), "UnreadableTemplateError"),
    "template of another kind": (path(deployment="no-deployment"), "UnreadableTemplateError"),
    "templates without ids": (path(deployment="no-page"), "UnusableAnswerError"),
    "a signer that is none": (path(block="no-signer"), "ConfigurationError"),
    "a signer that is not there": (path(block="missing-signer"), "ConfigurationError"),
    "a signer that refuses the key": (path(block="refuses-the-key"), "ConfigurationError"),
    "a signer that fails": (path(block="fails-while-signing"), "ConfigurationError"),
    "a signer that sends no header": (path(block="signs-what-cannot-be-sent"), "ConfigurationError"),
    "half a key in the environment": (
        path(block="default", environment={"K8S_KEY_ID": ""}),
        "ConfigurationError",
    ),
    "a key that is no text": (
        path(block="default", environment={"K8S_KEY_ID": f"{ENV_ID}\udcff"}),
        "ConfigurationError",
    ),
    "a secret that is no text": (
        path(block="default", environment={"K8S_KEY_ID": ENV_ID, "K8S_SECRET_KEY": f"{ENV_SECRET}\udcff"}),
        "ConfigurationError",
    ),
}


# One of each way for a secret to get somewhere; `make test-all` goes all of them.
QUICK = {
    "released",
    "planned",
    "400 that echoes",
    "metaData of another shape",
}
QUICK_COMMANDS = {"deploy", "configure"}


def blocks(url: str) -> dict[str, dict[str, Any]]:
    good = {"key_id": ID, "secret_key": dressed(SECRET), "api_url": url}
    signers = ("RefusesTheKey", "FailsWhileSigning", "SignsWhatCannotBeSent")
    return {
        "good": good,
        "mistyped": {**good, "secret_key": dressed(MISTYPED)},
        "reader": {**good, "key_id": READER, "secret_key": dressed(READS)},
        "unreachable": {**good, "api_url": f"http://127.0.0.1:{free_port()}"},
        "impatient": {**good, "request_timeout_seconds": 0.2},
        "no-signer": {**good, "signer": "json:loads"},
        "missing-signer": {**good, "signer": "nothing.at:All"},
        **{
            re.sub(r"(?<!^)(?=[A-Z])", "-", name).lower(): {**good, "signer": f"leak_paths:{name}"}
            for name in signers
        },
    }


# ---- what there is to be read afterwards ---------------------------------------------------------


class Evidence(NamedTuple):
    """All that was kept, said or sent, `(where, bytes)`, unwrapped; and what it came from."""

    kept: list[tuple[str, list[bytes]]]
    endings: dict[str, str]
    tap: Tap
    commands: dict[str, subprocess.CompletedProcess[bytes]]
    documents: dict[str, Any]

    def places(self, secret: str) -> dict[str, bytes]:
        """Where the secret stands, as it is, in hex or in base64, and what stands before it."""
        found = {}
        for form in forms(secret):
            for where, blobs in self.kept:
                for blob in blobs:
                    if (at := blob.find(form)) >= 0:
                        found[where] = blob[max(0, at - 99) : at]
        return found


def forms(secret: str) -> list[bytes]:
    raw = secret.encode()
    found = [raw, raw.hex().encode(), raw.hex().upper().encode(), secret.encode("utf-16-le")]
    for before in range(3):  # base64 reads otherwise at each of three offsets
        encoded = base64.b64encode(b"\0" * before + raw)
        found.append(encoded[-(-before * 8 // 6) : (before + len(raw)) * 8 // 6])
    return found


BASE64 = re.compile(rb"(?:[A-Za-z0-9+/]|\\n|\n){24,}={0,2}")
OPENERS: dict[bytes, Callable[[bytes], bytes]] = {
    b"\x1f\x8b": gzip.decompress,
    b"\x78": zlib.decompress,
    b"BZh": bz2.decompress,
    b"\xfd7z": lzma.decompress,
}


def unwrapped(blob: bytes, deep: int = 3) -> Iterator[bytes]:
    """The bytes, and whatever is base64 or compressed in them, again and again."""
    yield blob
    if not deep:
        return
    for magic, opened in OPENERS.items():
        if blob.startswith(magic):
            with suppress(Exception):
                yield from unwrapped(opened(blob), deep - 1)
    for run in BASE64.findall(blob):
        text = run.replace(b"\\n", b"").replace(b"\n", b"")
        with suppress(ValueError):
            yield from unwrapped(base64.b64decode(text + b"=" * (-len(text) % 4)), deep - 1)


def of_database(file: Path) -> Iterator[tuple[str, bytes]]:
    database = sqlite3.connect(file)
    database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    for (table,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
        cursor = database.execute(f'SELECT * FROM "{table}"')
        columns = [column[0] for column in cursor.description]
        for row in cursor:
            for column, value in zip(columns, row, strict=True):
                if isinstance(value, str | bytes):
                    yield f"{table}.{column}", value.encode() if isinstance(value, str) else value
    database.close()


def of_files(home: Path) -> Iterator[tuple[str, bytes]]:
    for file in home.rglob("*"):
        if file.is_file():
            yield "/".join(file.relative_to(home).parts[:1]), file.read_bytes()


@contextmanager
def watched_arguments() -> Iterator[set[bytes]]:
    """The arguments of every process below this one while the context lasts."""
    seen: set[bytes] = set()
    over = threading.Event()

    def watch() -> None:
        while not over.wait(1):
            for process in psutil.Process().children(recursive=True):
                with suppress(psutil.Error):
                    seen.add("\0".join(process.cmdline()).encode())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


def environment(home: Path, **variables: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "K8S_"))}
    tuned = {name: value for name, value in os.environ.items() if name.startswith("PREFECT_SERVER_")}
    debug = {
        "HOME": str(home),
        "PREFECT_HOME": str(home),
        "PREFECT_LOGGING_LEVEL": "DEBUG",
        "PREFECT_LOGGING_SERVER_LEVEL": "DEBUG",
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "DEBUG",
        "PREFECT_LOGGING_EXTRA_LOGGERS": "httpx,httpcore,prefect_rollout",
        "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
        "PREFECT_DEBUG_MODE": "1",
        "PREFECT_ROLLOUT_RETRIES": "1",
        "PREFECT_ROLLOUT_RETRY_DELAY_SECONDS": "0.01",
    }
    return {**kept, **tuned, **debug, **variables}


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("quick", marks=pytest.mark.sample),
        pytest.param("complete", marks=pytest.mark.complete),
    ],
)
def evidence(request: pytest.FixtureRequest) -> Iterator[Evidence]:
    quick = request.param == "quick"
    with ExitStack() as stack:
        home, aside = (Path(stack.enter_context(tempfile.TemporaryDirectory())) for _ in range(2))
        simulator = stack.enter_context(SimulatorServer(Scenario.model_validate(SCENARIO), speed=50))
        tap = stack.enter_context(tapped(simulator.url, without_ids))
        arguments = stack.enter_context(watched_arguments())
        with prefect_server(home, environment(home), aside / "server.log") as api:
            variables = environment(
                home,
                PREFECT_API_URL=api,
                K8S_API_URL=tap.url,
                K8S_KEY_ID=ENV_ID,
                K8S_SECRET_KEY=dressed(ENV_SECRET),
            )
            plan = {
                "blocks": blocks(tap.url),
                "paths": {name: path for name, (path, _) in PATHS.items() if not quick or name in QUICK},
                "control": simulator.url,
                "careless": CARELESS,
            }
            plan_file, endings_file = aside / "plan", aside / "endings"
            plan_file.write_text(json.dumps(plan))
            script = Path(__file__).with_name("leak_paths.py")
            commands = {"paths": ended([sys.executable, script, plan_file, endings_file], variables)}
            assert commands["paths"].returncode == 0, commands["paths"].stdout.decode()[-5000:]
            commands |= command_line(variables, QUICK_COMMANDS if quick else None)
            documents = {
                each["name"]: each["data"]
                for each in httpx.post(
                    f"{api}/block_documents/filter", json={"include_secrets": True}, timeout=30
                ).json()
            }
        kept = [(f"the output of {name}", run.stdout) for name, run in commands.items()]
        kept += [("the server's output", (aside / "server.log").read_bytes())]
        kept += [("arguments", each) for each in arguments]
        endings = json.loads(endings_file.read_text())
        kept += [(f"the ending of {name}", ending.encode()) for name, ending in endings.items()]
        kept += list(of_database(home / "prefect.db"))
        kept += list(of_files(home))
        searched = [(where, list(unwrapped(blob))) for where, blob in kept]
        yield Evidence(searched, endings, tap, commands, documents)


def ended(command: list[Any], variables: dict[str, str]) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        command,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        timeout=240,
        check=False,
    )


def interrupted(command: list[Any], variables: dict[str, str]) -> subprocess.CompletedProcess[bytes]:
    """Run a release until it waits for its pods, and end it with Ctrl-C."""
    process = subprocess.Popen(
        command,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    assert process.stdout
    said = b""
    for line in process.stdout:
        said += line
        if b"wait for pods running" in line:
            os.killpg(process.pid, signal.SIGINT)
            break
    said += process.stdout.read()
    return subprocess.CompletedProcess(command, process.wait(60), said)


def command_line(
    variables: dict[str, str], only: Collection[str] | None
) -> dict[str, subprocess.CompletedProcess[bytes]]:
    ours = BIN / "prefect-rollout"
    deploy: list[Any] = [ours, "deploy", "--app-id", "1", "--poll-seconds", "0.1", "--json", "--deployment"]
    configure = [ours, "configure", "--app-id", "1", "--name"]
    mistyped = {**variables, "K8S_SECRET_KEY": dressed(MISTYPED)}
    no_text = {**variables, "K8S_SECRET_KEY": f"{MISTYPED}\udcff"}
    commands: dict[str, Callable[[], subprocess.CompletedProcess[bytes]]] = {
        "deploy": lambda: ended([*deploy, "web", "--reason", CARELESS], variables),
        "deploy, dry run": lambda: ended([*deploy, "to-plan", "--dry-run"], variables),
        "configure": lambda: ended([*configure, "made"], variables),
        "configure with a mistyped secret": lambda: ended([*configure, "unmade"], mistyped),
        "configure with a secret that is no text": lambda: ended([*configure, "unmade"], no_text),
        "deploy, interrupted": lambda: interrupted(
            [*deploy, "never-ready", "--poll-attempts", "600"], variables
        ),
    }
    with ThreadPoolExecutor() as side_by_side:
        runs = {
            name: side_by_side.submit(command)
            for name, command in commands.items()
            if only is None or name in only
        }
        return {name: run.result() for name, run in runs.items()}


# ---- what is found -------------------------------------------------------------------------------


def test_each_path_ends_as_it_is_meant_to(evidence: Evidence) -> None:
    assert {
        name: text for name, text in evidence.endings.items() if not text.startswith(PATHS[name][1])
    } == {}


def test_each_command_ends_as_it_is_meant_to(evidence: Evidence) -> None:
    codes = {name: run.returncode for name, run in evidence.commands.items()}
    expected = {
        "paths": 0,
        "deploy": 0,
        "deploy, dry run": 0,
        "configure": 0,
        "configure with a mistyped secret": 1,
        "configure with a secret that is no text": 2,
        "deploy, interrupted": 130,
    }
    assert codes == {name: expected[name] for name in codes}


def test_the_search_finds_what_does_leak(evidence: Evidence) -> None:
    assert {
        "flow_run.parameters",
        "flow_run_state.message",
        "log.message",
        "artifact.data",
        "storage",
        "arguments",
        "prefect.db",
        "the output of paths",
    } <= evidence.places(CARELESS).keys()
    kept = [blobs for where, blobs in evidence.kept if where == "storage"]
    compressed = b"".join(b"".join(blobs[1:]) for blobs in kept if b'"lzma"' in blobs[0])
    assert CARELESS.encode() in compressed, "it looks into compressed results"
    assert any(b"httpcore" in blob for where, blobs in evidence.kept for blob in blobs if where == "log.name")


@pytest.mark.parametrize("what", PLANTED)
def test_a_secret_is_found_nowhere(evidence: Evidence, what: str) -> None:
    assert evidence.places(PLANTED[what]) == {}


def test_metadata_is_kept_with_the_results_of_its_step_alone(evidence: Evidence) -> None:
    """A run that is retried reads it there. It is shown nowhere."""
    assert evidence.places(META).keys() == {"storage"}


def test_blocks_hold_their_secrets_and_templates_are_served_with_theirs(evidence: Evidence) -> None:
    """What is searched for is there to be found: in clear text where it must be, and nowhere else."""
    assert evidence.documents["good"]["secret_key"] == dressed(SECRET)
    assert evidence.documents["made"]["secret_key"] == dressed(ENV_SECRET)
    served = b"".join(evidence.tap.served)
    assert VALUE.encode() in served
    assert NOTE.encode() in served
    assert SECRET.encode() in served, "the cloud echoed it"


def test_the_wire_carries_no_secret_and_the_key_id_in_its_header_alone(evidence: Evidence) -> None:
    assert len(evidence.tap.asked) > 20
    for asked in evidence.tap.asked:
        rest, signed = re.subn(
            rb"(?mi)^authorization: STARK-HMAC-SHA256 KeyId=[^,]+, Signature=[0-9a-f]{64}\r?$", b"", asked
        )
        assert signed == 1
        found = [what for what, secret in PLANTED.items() for form in forms(secret) if form in rest]
        assert found == []
