"""YAML and JSON with the line of every value, for messages that point at a mistake.

Scalars follow YAML 1.2 as editors read it: `no`, `0123` and `2026-01-02` are text, and only `true` and
`false` are booleans. JSON is read as the YAML that it is.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import yaml
from yaml.reader import Reader

Path = tuple[str | int, ...]
"""Keys and indices of a value from the root, which is `()`."""

DEEPEST = 20  # levels: libyaml's composer overflows the stack on many more
MOST_VALUES = 200_000  # after aliases are expanded: a few lines of them expand to billions

_TAG = "tag:yaml.org,2002:"
_SCALARS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "null": (r"~|null|Null|NULL|", lambda _: None),
    "bool": (r"true|True|TRUE|false|False|FALSE", lambda text: json.loads(text.lower())),
    "int": (r"-?(0|[1-9][0-9]*)", int),
    "float": (r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?", float),
    "merge": (r"<<", str),
    "str": (r"(?!)", str),  # any other scalar
}
_RESOLVERS = {None: [(_TAG + kind, re.compile(rf"(?:{form})\Z")) for kind, (form, _) in _SCALARS.items()]}


@dataclass(frozen=True)
class Flaw:
    """A mistake in the text itself, at a line (from 1) and a path."""

    line: int
    path: Path
    problem: str


@dataclass
class Document:
    """A document and its lines.

    Attributes:
        value: dicts with text as keys, lists and scalars; `None` if nothing is readable.
        lines: the line, from 1, of each value, or of its key if it has one.
        flaws: duplicate keys, unknown tags and syntax errors, in order.
    """

    value: Any = None
    lines: dict[Path, int] = field(default_factory=dict)
    flaws: list[Flaw] = field(default_factory=list)

    def line(self, path: Path) -> int | None:
        """Return the line of the value at `path`, or of the innermost value that contains it."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path)


class _RefusedError(Exception):
    """The whole text is refused. The arguments are the line and the problem."""


def read_yaml(raw: bytes) -> Document:
    """Read the one YAML or JSON document in `raw`, which is UTF-8. Mistakes are flaws, not errors."""
    document = Document()
    try:
        text = _text(raw)
        _check_depth(text)
        if (root := _loader(text).get_single_node()) is not None:
            document.value = _Construction(document).value(root, (), _line(root))
    except _RefusedError as error:
        return Document(flaws=[Flaw(error.args[0], (), error.args[1])])
    except yaml.YAMLError as error:
        context, problem = getattr(error, "context", None), getattr(error, "problem", None) or str(error)
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        # libyaml reports the end of a truncated file on a line after the last one.
        line = min(mark.line, raw.count(b"\n")) + 1 if mark else 1
        problem = ", ".join(part for part in (context, problem) if part)
        return Document(flaws=[Flaw(line, (), f"neither YAML nor JSON: {problem}")])
    return document


def _text(raw: bytes) -> str:
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise _RefusedError(line, "the file is not UTF-8; save it as UTF-8") from None
    if bad := Reader.NON_PRINTABLE.search(text):
        line = text.count("\n", 0, bad.start()) + 1
        raise _RefusedError(line, f"the character U+{ord(bad.group()):04X} is not allowed in YAML")
    return text


def _check_depth(text: str) -> None:
    """Refuse deep nesting. Events are read one by one, whereas nodes are built by recursion."""
    loader, depth = _loader(text), 0
    while loader.check_event():
        event = loader.get_event()
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise _RefusedError(_line(event), f"nested deeper than {DEEPEST} levels")


def _loader(text: str) -> Any:
    loader = (yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader)(text)
    loader.yaml_implicit_resolvers = _RESOLVERS
    return loader


def _line(of: Any) -> int:
    return int(of.start_mark.line) + 1


class _Construction:
    """Builder of plain values from nodes, with aliases and merges expanded."""

    def __init__(self, document: Document) -> None:
        self._document = document
        self._count = 0
        self._open: set[int] = set()  # the collections that contain the current node

    def value(self, node: yaml.Node, path: Path, line: int) -> Any:
        self._count += 1
        if self._count > MOST_VALUES:
            raise _RefusedError(_line(node), f"more than {MOST_VALUES} values, aliases and merges counted")
        self._document.lines[path] = line
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, path)
        if id(node) in self._open or len(path) > DEEPEST:
            return self._flaw(line, path, "an alias inside its own value, or nested too deep")
        self._open.add(id(node))
        try:
            mapping = isinstance(node, yaml.MappingNode)
            if node.tag != _TAG + ("map" if mapping else "seq"):
                self._flaw(_line(node), path, f"the tag {node.tag} has no meaning here")
            if not mapping:
                return [self.value(each, (*path, n), _line(each)) for n, each in enumerate(node.value)]
            entries = self._entries(node, path)
            return {
                key: self.value(value, (*path, key), _line(name)) for key, (name, value) in entries.items()
            }
        finally:
            self._open.discard(id(node))

    def _entries(self, node: yaml.Node, path: Path) -> dict[str, tuple[yaml.Node, yaml.Node]]:
        """Return the entries of a mapping: its own before those that it merges (`<<`)."""
        entries: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        merged: list[yaml.Node] = []
        for name, value in node.value:
            if name.tag == _TAG + "merge":
                merged += value.value if isinstance(value, yaml.SequenceNode) else [value]
            elif not isinstance(name, yaml.ScalarNode):
                self._flaw(_line(name), path, "a key is text, not a list or a mapping")
            elif name.value in entries:
                first = _line(entries[name.value][0])
                self._flaw(_line(name), (*path, name.value), f"the key is given twice, first on line {first}")
            else:
                entries[name.value] = (name, value)
        for source in merged:
            if not isinstance(source, yaml.MappingNode) or id(source) in self._open:
                self._flaw(_line(source), path, "<< merges other mappings only")
                continue
            self._open.add(id(source))
            for key, entry in self._entries(source, path).items():
                entries.setdefault(key, entry)
            self._open.discard(id(source))
        self._count += len(entries)
        return entries

    def _scalar(self, node: yaml.ScalarNode, path: Path) -> Any:
        kind = node.tag.removeprefix(_TAG)
        if kind not in _SCALARS:
            return self._flaw(_line(node), path, f"the tag {node.tag} has no meaning here")
        try:
            return _SCALARS[kind][1](node.value)
        except ValueError:
            return self._flaw(_line(node), path, f"not a value of the type {kind}")

    def _flaw(self, line: int, path: Path, problem: str) -> None:
        self._document.flaws.append(Flaw(line, path, problem))
