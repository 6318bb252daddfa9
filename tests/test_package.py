"""The distribution, as it is built and installed."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from support import BIN, Cloud

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    subprocess.run([BIN / "uv", "build", "--wheel", "--quiet", "--out-dir", out, ROOT], check=True)
    (built,) = out.glob("*.whl")
    return built


def test_the_wheel_holds_every_module_and_nothing_else(wheel: Path) -> None:
    below = {"": "src/prefect_rollout", "flows/": "flows", "tasks/": "tasks", "blocks/": "blocks"}
    sources = {
        f"prefect_rollout/{prefix}{file.relative_to(ROOT / folder).as_posix()}"
        for prefix, folder in below.items()
        for file in (ROOT / folder).rglob("*.py")
    }
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        (entry_points,) = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
        declared = archive.read(entry_points).decode()
    data = {
        "py.typed",
        "prefect.yaml",
        *(f"automations/{name}.yaml" for name in ("failed", "killed", "released")),
    }
    assert names == sources | {f"prefect_rollout/{name}" for name in data}
    assert "prefect-rollout = prefect_rollout.__main__:main" in declared
    assert "prefect_rollout = prefect_rollout.blocks" in declared


def test_an_install_with_nothing_but_its_dependencies_runs_a_flow(
    wheel: Path, cloud: Cloud, prefect_server: str, tmp_path: Path
) -> None:
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([BIN / "uv", "venv", "--quiet", "--python", sys.executable, tmp_path / "venv"], check=True)
    subprocess.run(
        # To compile all of it takes longer than to run what is needed of it once.
        [BIN / "uv", "pip", "install", "--quiet", "--no-compile-bytecode", "--python", python, wheel],
        check=True,
    )
    ended = subprocess.run(
        [
            *(python.with_name("prefect-rollout"), "deploy", "--app-id", "3290"),
            *("--deployment", "qapm-home", "--poll-seconds", "0.1"),
        ],
        env={**os.environ, **cloud.environment, "PREFECT_API_URL": prefect_server},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert len(cloud.record) == 2


PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "bench/RESULTS.md"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_files_that_a_page_names_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)]+)\)", text):
        target, _, anchor = link.partition("#")
        path = page.parent / target if target else page
        assert target.startswith("https://") or path.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in headings}, (
                link
            )
    for name in re.findall(r"`((?:tests|docs|deploy|bench)/[\w./-]+)`", text):
        assert (ROOT / name).exists(), name


def test_the_cheap_import_stays_cheap() -> None:
    code = "import sys, prefect_rollout.cli.commands; sys.exit('prefect' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
