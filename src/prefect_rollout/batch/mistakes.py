"""Mistakes in a plan: pydantic errors in plain words, and mistakes between releases. Pure."""

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

from prefect_rollout.batch.yaml_lines import Path
from prefect_rollout.release.request import DEFAULT_TARGET
from prefect_rollout.text import one_line

_SUGGESTIONS = 20  # each compares all names
_LONGEST_CYCLE = 12  # names in a message


def default_name(app_id: object, deployment: object) -> str:
    """Return the name of a release that has no `name`."""
    return f"{app_id}/{deployment}"


# ---- pydantic -----------------------------------------------------------------------------------


def mistake(path: Path, problem: str) -> InitErrorDetails:
    """Return a mistake for pydantic to raise."""
    kind = PydanticCustomError("plan", "{problem}", {"problem": problem})
    return InitErrorDetails(type=kind, loc=path, input=None)


def same_mistake(details: Any) -> InitErrorDetails:
    """Convert a pydantic error so that it can be raised again together with others."""
    context = details.get("ctx", {})
    if details["type"] in {"value_error", "assertion_error"}:
        return mistake(details["loc"], str(context["error"]))
    if "problem" in context:  # from `mistake`
        return mistake(details["loc"], context["problem"])
    return InitErrorDetails(type=details["type"], loc=details["loc"], input=details["input"], ctx=context)


def in_words(error: ValidationError, values: Any, keys: Callable[[Path], Sequence[str]]) -> dict[Path, str]:
    """Return a clause for each path in `values`, the validated input. A union's errors are merged.

    `keys` returns the keys that the model allows at the path of an unknown key.
    """
    clauses: dict[Path, list[str]] = {}
    for details in error.errors(include_url=False):
        kind, loc = details["type"], details["loc"]
        path = _path(loc, values)
        if kind == "missing":
            path = (*path, loc[-1])
            problem = "is missing"
        elif kind == "extra_forbidden":
            near = difflib.get_close_matches(str(loc[-1]), keys(loc), 1)
            problem = f"there is no such key; did you mean {near[0]}?" if near else "there is no such key"
        elif kind in {"model_type", "model_attributes_type"}:
            problem = "should be a mapping of keys to values"
        else:
            problem = details["msg"]
        problems = clauses.setdefault(path, [])
        if problem not in problems:
            problems.append(problem)
    return {path: "; or: ".join(problems) for path, problems in clauses.items()}


def _path(loc: Path, values: Any) -> Path:
    """Return `loc` without the names of a union's branches, which pydantic adds."""
    path: list[str | int] = []
    for part in loc:
        held: Any = values.__dict__ if isinstance(values, BaseModel) else values
        if isinstance(held, dict):
            there = part in held
        else:
            there = isinstance(held, list | tuple) and isinstance(part, int) and part < len(held)
        if there:
            values = held[part]
            path.append(part)
    return tuple(path)


# ---- between releases ---------------------------------------------------------------------------


@dataclass(frozen=True)
class _Outline:
    """The fields of a release that can be read; `None` marks an invalid field."""

    name: str | None
    wave: int | None
    after: dict[int, str]
    place: tuple[str, str, str] | None
    clusters: list[str] | None


def between_releases(plan: Mapping[str, Any]) -> Iterator[tuple[Path, str]]:
    """Yield path and problem of each mistake between releases, such as a cycle."""
    releases, defaults = plan.get("releases"), _mapping(plan.get("defaults"))
    target = plan.get("target") or DEFAULT_TARGET
    outlines = [
        _outline(_mapping(release), defaults, target)
        for release in (releases if isinstance(releases, list | tuple) else ())
    ]
    yield from _overlaps(outlines)
    numbers: dict[str, int] = {}
    for number, outline in enumerate(outlines):
        if outline.name is not None and (first := numbers.setdefault(outline.name, number)) != number:
            yield (
                ("releases", number, "name"),
                f"releases.{first} has the name {_quoted(outline.name)} too; give one another `name`",
            )
    yield from _order(outlines, numbers)


def _mapping(value: Any) -> Mapping[str, Any]:
    if isinstance(value, BaseModel):
        return value.__dict__
    return value if isinstance(value, dict) else {}


def _outline(release: Mapping[str, Any], defaults: Mapping[str, Any], target: object) -> _Outline:
    app_id, deployment = release.get("app_id"), release.get("deployment")
    known = isinstance(app_id, int | str) and isinstance(deployment, str) and deployment != ""
    name = release.get("name") or (default_name(app_id, deployment) if known else None)
    wave, after, clusters = release.get("wave", 1), release.get("after"), release.get("clusters")
    if clusters is None:
        clusters = defaults.get("clusters")
    readable = clusters is None or (
        isinstance(clusters, list | tuple) and all(isinstance(cluster, str) for cluster in clusters)
    )
    names = after if isinstance(after, list | tuple) else ()
    place = (str(release.get("target") or target), str(app_id), str(deployment))
    return _Outline(
        name=name if isinstance(name, str) else None,
        wave=wave if type(wave) is int else None,
        after={number: other for number, other in enumerate(names) if isinstance(other, str)},
        place=place if known and readable else None,
        clusters=list(clusters) if readable and clusters else None,
    )


def _overlaps(outlines: Sequence[_Outline]) -> Iterator[tuple[Path, str]]:
    """Yield the releases of one deployment that run in the same cluster."""
    taken: dict[tuple[str, str, str], dict[str | None, int]] = {}
    for number, outline in enumerate(outlines):
        if outline.place is None:
            continue
        here = taken.setdefault(outline.place, {})
        clusters: Sequence[str | None] = outline.clusters or [None]  # None means all
        if outline.clusters is None:
            clash = min(here.values(), default=None)
        else:
            clash = min((here[name] for name in (None, *clusters) if name in here), default=None)
        if clash is not None:
            yield (
                ("releases", number, "deployment"),
                f"releases.{clash} releases this deployment too; remove one, or give both other `clusters`",
            )
        for cluster in clusters:
            here.setdefault(cluster, number)


def _order(outlines: Sequence[_Outline], numbers: Mapping[str, int]) -> Iterator[tuple[Path, str]]:
    """Yield mistakes in `after`: unknown names, later waves and cycles."""
    graph: dict[int, list[int]] = {}
    suggestions = _SUGGESTIONS
    for number, outline in enumerate(outlines):
        for index, other in outline.after.items():
            path = ("releases", number, "after", index)
            if other not in numbers:
                near = _near(other, numbers) if suggestions > 0 else ""
                suggestions -= 1
                yield path, f"there is no release named {_quoted(other)}{near}"
                continue
            wave = outlines[numbers[other]].wave
            if outline.wave is not None and wave is not None and wave > outline.wave:
                yield path, f"{_quoted(other)} is in wave {wave}, and this release in wave {outline.wave}"
            else:
                graph.setdefault(number, []).append(numbers[other])
    for cycle in _cycles(graph):
        names = [_quoted(outlines[number].name or "") for number in [*cycle, cycle[0]]]
        if len(names) > _LONGEST_CYCLE:
            names[6:-5] = [f"… {len(names) - 11} more …"]
        yield ("releases", cycle[0], "after"), f"these wait for each other: {' after '.join(names)}"


def _cycles(graph: Mapping[int, Sequence[int]]) -> Iterator[list[int]]:
    """Yield cycles that share no release. Each starts with its first release, which waits for the next."""
    while True:
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as error:
            cycle: list[int] = error.args[1][:0:-1]  # in `args`, each node precedes the next
            first = cycle.index(min(cycle))
            yield cycle[first:] + cycle[:first]
            found = set(cycle)
            graph = {
                number: [other for other in others if other not in found]
                for number, others in graph.items()
                if number not in found
            }
        else:
            return


def _quoted(name: str) -> str:
    return repr(one_line(name, 120))


def _near(name: str, known: Mapping[str, int]) -> str:
    same = [other for other in known if other.rpartition("/")[2] == name]
    near = same[:1] or difflib.get_close_matches(name[:200], list(known), 1)
    return f"; did you mean {_quoted(near[0])}?" if near else ""
