import json

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from prefect_rollout.batch import yaml_lines
from prefect_rollout.batch.yaml_lines import Flaw, read_yaml


@pytest.fixture(params=[True, False], ids=["libyaml", "pure"], autouse=True)
def _either_parser(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param and not yaml.__with_libyaml__:
        pytest.skip("PyYAML was built without libyaml")
    monkeypatch.setattr(yaml, "__with_libyaml__", request.param)


def test_every_value_has_its_line() -> None:
    document = read_yaml(b"a: 1\nb:\n  - x\n  - {c: y,\n     d: z}\n")
    assert document.value == {"a": 1, "b": ["x", {"c": "y", "d": "z"}]}
    assert document.flaws == []
    lines = {(): 1, ("a",): 1, ("b",): 2, ("b", 0): 3, ("b", 1): 4, ("b", 1, "c"): 4, ("b", 1, "d"): 5}
    assert document.lines == lines
    assert document.line(("b", 1, "missing", "below")) == 4


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lines_end_as_on_any_system(end: str) -> None:
    document = read_yaml(f"a: 1{end}{end}b: x{end}".encode())
    assert (document.value, document.line(("b",))) == ({"a": 1, "b": "x"}, 3)


def test_a_byte_order_mark_is_no_part_of_the_text() -> None:
    assert read_yaml(b"\xef\xbb\xbfa: 1").value == {"a": 1}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(
            (word, word)
            for word in ("no", "on", "yes", "off", "0123", "1_000", "12:30", "0x1f", "2026-01-02")
        ),
        *((word, True) for word in ("true", "True")),
        *((word, None) for word in ("null", "~", "")),
        ("0", 0),
        ("-7", -7),
        ("1.50", 1.5),
        ("2e3", 2000.0),
        ("'1'", "1"),
        ("!!str 1", "1"),
        ("10%", "10%"),
    ],
)
def test_scalars_are_what_an_editor_takes_them_for(text: str, value: object) -> None:
    document = read_yaml(f"a: {text}".encode())
    assert (document.value, document.flaws) == ({"a": value}, [])
    assert type(document.value["a"]) is type(value)


def test_keys_are_text_as_it_is_written() -> None:
    assert read_yaml(b"{on: 1, 7: 2, null: 3, true: 4}").value == {"on": 1, "7": 2, "null": 3, "true": 4}


TEXT = st.text(st.characters(min_codepoint=32, max_codepoint=126) | st.sampled_from("中文\n\t"), max_size=5)
NUMBER = st.integers(-(10**30), 10**30) | st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBER | TEXT,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text("abc<~1", min_size=1, max_size=3), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(JSON, st.sampled_from([None, 2]))
def test_json_is_read_as_json(value: object, indent: int | None) -> None:
    document = read_yaml(json.dumps(value, indent=indent).encode())
    assert (document.value, document.flaws) == (value, [])


def test_anchors_and_merges_are_written_out_and_a_mappings_own_keys_win() -> None:
    document = read_yaml(
        b"base: &base {x: 1, y: 2}\nmore: &more\n  <<: *base\n  y: 3\nall:\n"
        b"  <<: [*more, {z: 4, x: 9}]\n  z: 5\nlist: [&one a, *one]\n"
    )
    assert document.value["all"] == {"z": 5, "y": 3, "x": 1}
    assert document.value["list"] == ["a", "a"]
    assert document.flaws == []
    assert document.line(("all", "x")) == 1  # where it is written
    assert read_yaml(b"'<<': {x: 1}").value == {"<<": {"x": 1}}


def test_a_key_that_stands_twice_is_a_flaw_at_any_depth() -> None:
    document = read_yaml(b"a: 1\nb:\n  - {c: 1,\n     c: 2}\na: 3\n")
    assert document.value == {"a": 1, "b": [{"c": 1}]}
    assert sorted(document.flaws, key=lambda flaw: flaw.line) == [
        Flaw(4, ("b", 0, "c"), "the key is given twice, first on line 3"),
        Flaw(5, ("a",), "the key is given twice, first on line 1"),
    ]


CHAIN = "\n".join(["a: &a [x]", "a0: &a0 [*a]", *(f"a{n}: &a{n} [*a{n - 1}]" for n in range(1, 99))])


@pytest.mark.parametrize(
    ("text", "line", "problem"),
    [
        (b"a: 1\nb: \xff", 2, "not UTF-8"),
        ("a: 1".encode("utf-16"), 1, "not UTF-8"),
        (b"a: 1\n\nb: \x07", 3, "U+0007"),
        (b"a: 1\nb: [", None, "neither YAML nor JSON"),
        (b"a: 1\n b: 2", 2, "neither YAML nor JSON"),
        (b"a: *nothing", 1, "neither YAML nor JSON"),
        (b"a: 1\n---\nb: 2", 2, "neither YAML nor JSON"),
        (b"a: !!python/object/apply:os.system [ls]", 1, "has no meaning here"),
        (b"a: 1\nb: !secret x", 2, "!secret has no meaning here"),
        (b"a: !!set {x}", 1, "has no meaning here"),
        (b"a: !!int x", 1, "not a value of the type int"),
        (b"a: " + b"1" * 5000, 1, "not a value of the type int"),
        (b"a:\n  ? [x]\n  : 1", 2, "a key is text"),
        (b"a:\n  <<: [1]", 2, "merges other mappings only"),
        (b"a: &a\n  - *a", 1, "inside its own value"),
        (b"a: &a\n  b: *a", 2, "inside its own value"),
        (b"[" * 100_000, 1, "nested deeper"),
        (b"- " * 100_000 + b"x", 1, "nested deeper"),
        (CHAIN.encode(), None, "nested too deep"),
    ],
)
def test_what_cannot_be_read_is_a_flaw_at_its_line(text: bytes, line: int | None, problem: str) -> None:
    flaws = read_yaml(text).flaws
    assert flaws
    assert problem in flaws[0].problem
    if line is not None:
        assert flaws[0].line == line


def test_a_mapping_that_merges_itself_is_a_flaw_and_keeps_its_own_keys() -> None:
    document = read_yaml(b"a: &a\n  <<: *a\n  x: 1")
    assert document.value == {"a": {"x": 1}}
    assert [flaw.problem for flaw in document.flaws] == ["<< merges other mappings only"]


@pytest.mark.parametrize("open_", ["[{}]", "{{k: [{}]}}"])
def test_a_few_aliases_never_stand_for_billions(open_: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(yaml_lines, "MOST_VALUES", 10_000)
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} " + open_.format(", ".join([f"*a{n - 1}"] * 10)) for n in range(1, 9)]
    [flaw] = read_yaml("\n".join(lines).encode()).flaws[:1]
    assert f"more than {yaml_lines.MOST_VALUES}" in flaw.problem


def test_a_few_merges_never_stand_for_billions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(yaml_lines, "MOST_VALUES", 10_000)
    wide = "a: &a {" + ", ".join(f"k{n}: 1" for n in range(500)) + "}\n"
    [flaw] = read_yaml((wide + "b: [" + ", ".join(["{<<: *a}"] * 500) + "]").encode()).flaws
    assert f"more than {yaml_lines.MOST_VALUES}" in flaw.problem


@given(st.binary(max_size=60) | st.text("ab:-[]{}*&!<?|>#'\" \n,1~%@`", max_size=60).map(str.encode))
def test_whatever_stands_in_a_file_is_read_or_refused(raw: bytes) -> None:
    document = read_yaml(raw)
    assert all(flaw.line >= 1 for flaw in document.flaws)
