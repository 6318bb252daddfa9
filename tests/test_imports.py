"""The house: imports run one way, no module is long, and a platform's terms stay in its package."""

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = {"prefect_rollout": ROOT / "src" / "prefect_rollout"} | {
    f"prefect_rollout.{name}": ROOT / name for name in ("flows", "tasks", "blocks")
}
LAYERS = (
    {"__main__"},
    {"cli", "mcp"},
    {"execution"},
    {"flows"},
    {"tasks"},
    {"runs"},
    {"blocks"},
    {"settings"},
    {"platforms"},
    {"batch"},
    {"release"},
    {"errors"},
    {"verdict"},
    {"ids", "text"},
)
"""Packages and modules, each of which imports only from its own layer and those below."""


def modules() -> dict[str, Path]:
    """Return the modules without the simulator, `{dotted name: file}`."""
    found = {}
    for package, folder in SOURCES.items():
        for file in folder.rglob("*.py"):
            parts = (package, *file.relative_to(folder).with_suffix("").parts)
            if "simulator" not in parts:
                found[".".join(parts).removesuffix(".__init__")] = file
    return found


MODULES = modules()


def imports(file: Path) -> Iterator[str]:
    """Yield the modules of ours that a module imports, wherever in it."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module in {*MODULES, "prefect_rollout"}:
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in MODULES else node.module


def layer(module: str) -> int:
    """Return the number of a module's layer, the highest first."""
    part = module.split(".")[1] if "." in module else "text"
    return next(number for number, names in enumerate(LAYERS) if part in names)


def test_imports_run_one_way() -> None:
    wrong = [
        f"{name} imports {other}"
        for name, file in MODULES.items()
        for other in imports(file)
        if layer(other) < layer(name)
    ]
    assert wrong == []


def test_no_module_is_longer_than_500_lines() -> None:
    lengths = {name: len(file.read_text(encoding="utf-8").splitlines()) for name, file in MODULES.items()}
    assert {name: length for name, length in lengths.items() if length > 500} == {}


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = {name: set(imports(file)) - {name} for name, file in MODULES.items()}
    assert len(list(TopologicalSorter(graph).static_order())) >= len(MODULES)


def test_terms_of_the_container_cloud_stay_in_its_package() -> None:
    terms = re.compile(
        r"meta_?data\b(?<!metadata)|publish(ing)? histor|release_mark|podState|/openapi", re.IGNORECASE
    )
    wrong = [
        f"{name}: {line.strip()}"
        for name, file in MODULES.items()
        if ".platforms.container_cloud" not in name
        for line in file.read_text(encoding="utf-8").splitlines()
        if terms.search(line)
    ]
    assert wrong == []
