"""YAML and JSON with the line of every value, for messages that show where a mistake stands.

Scalars are read as YAML 1.2 and editors read them: `no`, `0123` and `2026-01-02` are text, and only
`true` and `false` are booleans. JSON is read as the YAML that it is.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import yaml
from yaml.reader import Reader

Path = tuple[str | int, ...]
"""Where a value stands: keys and indices from the root, which is `()`."""

DEEPEST = 20  # levels: libyaml's composer overflows the stack on many more
MOST_VALUES = 200_000  # aliases written out: a few lines of them stand for billions

_TAG = "tag:yaml.org,2002:"
_SCALARS = {
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"-?(0|[1-9][0-9]*)",
    "float": r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?",
    "merge": r"<<",
}
_RESOLVERS = {None: [(_TAG + kind, re.compile(rf"(?:{form})\Z")) for kind, form in _SCALARS.items()]}


@dataclass(frozen=True)
class Flaw:
    """What is wrong in the text itself, at a line from 1 and a path."""

    line: int
    path: Path
    problem: str


@dataclass
class Document:
    """What was read.

    Attributes:
        value: dicts with text as keys, lists and scalars; `None` where nothing was readable.
        lines: the line, from 1, of each value, or of its key where it has one.
        flaws: duplicate keys, tags and whatever else YAML allows or forbids, in order.
    """

    value: Any = None
    lines: dict[Path, int] = field(default_factory=dict)
    flaws: list[Flaw] = field(default_factory=list)

    def line(self, path: Path) -> int | None:
        """The line of the value at `path`, or of the nearest around it; `None` where nothing was read."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path)


def read_yaml(raw: bytes) -> Document:
    """The one YAML or JSON document in `raw`, which is UTF-8. Never raises: what is wrong is a flaw."""
    try:
        root = _root(_text(raw))
        return Document() if root is None else _Construction().of(root)
    except _RefusedError as error:
        return Document(flaws=[Flaw(error.line, (), error.problem)])
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = ", ".join(part for part in (error.context, error.problem) if part)
        # libyaml puts the end of a file that ends too early on a line that the file does not have.
        line = min(mark.line, raw.count(b"\n")) + 1 if mark else 1
        return Document(flaws=[Flaw(line, (), f"neither YAML nor JSON: {problem}")])
    except yaml.YAMLError as error:
        return Document(flaws=[Flaw(1, (), f"neither YAML nor JSON: {error}")])


class _RefusedError(Exception):
    """The whole text is refused, for what stands on `line`."""

    def __init__(self, line: int, problem: str) -> None:
        super().__init__(problem)
        self.line = line
        self.problem = problem


def _text(raw: bytes) -> str:
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise _RefusedError(line, "the file is not UTF-8; save it as UTF-8") from None
    if unprintable := Reader.NON_PRINTABLE.search(text):
        line = text.count("\n", 0, unprintable.start()) + 1
        raise _RefusedError(line, f"the character U+{ord(unprintable.group()):04X} is not allowed in YAML")
    return text


def _root(text: str) -> yaml.Node | None:
    """The root of the document. Its depth is looked at first: events come one by one, nodes by recursion."""
    loader = _loader(text)
    depth = 0
    while loader.check_event():
        event = loader.get_event()
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > DEEPEST:
                raise _RefusedError(_line(event), f"nested deeper than {DEEPEST} levels")
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
    root: yaml.Node | None = _loader(text).get_single_node()
    return root


def _loader(text: str) -> Any:
    loader = (yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader)(text)
    loader.yaml_implicit_resolvers = _RESOLVERS
    return loader


def _line(of: Any) -> int:
    return int(of.start_mark.line) + 1


Entries = dict[str, tuple[yaml.Node, yaml.Node]]


class _Construction:
    """Makes plain values of nodes, aliases written out."""

    def __init__(self) -> None:
        self.document = Document()
        self.count = 0
        self.open: set[int] = set()
        self.entries_of: dict[int, Entries] = {}

    def of(self, root: yaml.Node) -> Document:
        self.document.value = self.value(root, (), _line(root))
        return self.document

    def flaw(self, line: int, path: Path, problem: str) -> None:
        self.document.flaws.append(Flaw(line, path, problem))

    def counted(self, number: int, node: yaml.Node) -> None:
        self.count += number
        if self.count > MOST_VALUES:
            raise _RefusedError(_line(node), f"more than {MOST_VALUES} values, aliases and merges counted")

    def value(self, node: yaml.Node, path: Path, line: int) -> Any:
        self.counted(1, node)
        self.document.lines[path] = line
        if isinstance(node, yaml.ScalarNode):
            return self.scalar(node, path)
        if id(node) in self.open or len(path) > DEEPEST:
            problem = "an alias stands inside what it stands for, or too deep"
            self.flaw(line, path, problem)
            return None
        self.open.add(id(node))
        try:
            kind = "map" if isinstance(node, yaml.MappingNode) else "seq"
            if node.tag != _TAG + kind:
                self.flaw(_line(node), path, f"the tag {node.tag} has no meaning here")
            if isinstance(node, yaml.MappingNode):
                entries = self.entries(node, path)
                return {
                    key: self.value(value, (*path, key), _line(name))
                    for key, (name, value) in entries.items()
                }
            return [self.value(item, (*path, index), _line(item)) for index, item in enumerate(node.value)]
        finally:
            self.open.discard(id(node))

    def entries(self, node: yaml.MappingNode, path: Path) -> Entries:
        """The entries of a mapping, its own before those it merges (`<<`), which never override."""
        known = self.entries_of.get(id(node))
        if known is not None:
            self.counted(len(known), node)
            return known
        own: Entries = {}
        self.entries_of[id(node)] = own  # a mapping that merges itself adds nothing
        merged: list[yaml.Node] = []
        for name, value in node.value:
            if name.tag == _TAG + "merge":
                merged += value.value if isinstance(value, yaml.SequenceNode) else [value]
            elif not isinstance(name, yaml.ScalarNode):
                self.flaw(_line(name), path, "a key is text, not a list or a mapping")
            elif name.value in own:
                first = _line(own[name.value][0])
                self.flaw(_line(name), (*path, name.value), f"the key stands twice, first on line {first}")
            else:
                own[name.value] = (name, value)
        for source in merged:
            if not isinstance(source, yaml.MappingNode):
                self.flaw(_line(source), path, "<< merges mappings only")
                continue
            for key, entry in self.entries(source, path).items():
                own.setdefault(key, entry)
        self.counted(len(own), node)
        return own

    def scalar(self, node: yaml.ScalarNode, path: Path) -> Any:
        kind = node.tag.removeprefix(_TAG)
        text: str = node.value
        if kind in {"str", "merge"}:
            return text
        if kind not in _SCALARS:
            self.flaw(_line(node), path, f"the tag {node.tag} has no meaning here")
        elif not re.fullmatch(_SCALARS[kind], text):
            self.flaw(_line(node), path, f"not of the type that the tag !!{kind} says")
        elif kind == "int" and len(text) > 1000:
            self.flaw(_line(node), path, "a number of more than 1000 digits")
        else:
            return _READ[kind](text)
        return text


_READ: dict[str, Callable[[str], Any]] = {
    "null": lambda _: None,
    "bool": lambda text: text.lower() == "true",
    "int": int,
    "float": float,
}
