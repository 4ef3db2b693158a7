# ruff: noqa: E501 - a case is one line: what is written, and the whole text it gets
"""YAML as a job file takes it: 1.2's scalars, text keys, lines of every place, and advice where it trips people."""

import json
from contextlib import suppress

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from batchpipe.jobfile.yaml_text import YamlTextError, read_scalar, read_yaml

# PyYAML takes no DEL, JSON writes it as it is; and a key of more than 1,024 characters is no simple key.
TEXT = st.text(st.characters(exclude_characters="\x7f", exclude_categories=["Cs"]), max_size=200)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT
DOCUMENTS = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner), max_leaves=20)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *[(word, word) for word in ("NO", "no", "yes", "on", "Off", "y", "2024-01-01", "1:30", "1_000", "0b1", "1e", ".")],
        ("true", True), ("False", False), ("null", None), ("~", None), ("", None),
        ("12", 12), ("-7", -7), ("007", 7), ("0x1F", 31), ("0o17", 15),
        ("1.5", 1.5), (".5", 0.5), ("1e3", 1000.0), ("-.inf", float("-inf")), (".INF", float("inf")),
    ],
)  # fmt: skip
def test_scalars_are_those_of_yaml_1_2(text: str, value: object):
    read = read_yaml(f"a: {text}").value["a"]

    assert (read, type(read)) == (value, type(value))


def test_quoted_scalars_are_text():
    assert read_yaml("[\"1\", 'true', !!str 5, |-\n null\n]".replace("|-\n null\n", "'~'")).value == [
        "1",
        "true",
        "5",
        "~",
    ]


@settings(deadline=None)
@given(DOCUMENTS)
def test_json_is_yaml(document: object):
    assert read_yaml(json.dumps(document)).value == document


@settings(deadline=None)
@given(st.text())
def test_any_text_is_read_or_refused(text: str):
    with suppress(YamlTextError):
        read_yaml(text)


@settings(deadline=None)
@given(st.integers() | st.booleans() | st.none() | st.floats(allow_nan=False))
def test_scalars_that_yaml_writes_are_read_back(value: object):
    assert read_scalar(yaml.safe_dump(value).removesuffix("...\n").strip()) == value


def test_json_indented_with_tabs_is_read():
    assert read_yaml('{\n\t"a": {\n\t\t"b": [1]\n\t}\n}').value == {"a": {"b": [1]}}


def test_json_escapes_above_the_first_plane_are_one_character():
    assert read_yaml('{"a": "\\ud83d\\ude00"}').value == {"a": "😀"}


def test_keys_are_text():
    assert read_yaml("{1: a, NO: b, true: c, ~: d}").value == {"1": "a", "NO": "b", "true": "c", "~": "d"}


def test_lines_of_keys_and_items_are_kept():
    document = read_yaml("a:\n  b: 1\n  c:\n    - x\n    - y\n")

    assert document.lines == {(): 1, ("a",): 1, ("a", "b"): 2, ("a", "c"): 3, ("a", "c", 0): 4, ("a", "c", 1): 5}


def test_anchors_and_merges_are_read_with_their_own_lines():
    document = read_yaml("a: &a {x: 1, y: 2}\nb:\n  <<: *a\n  y: 3\nc: *a\n")

    assert document.value == {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}, "c": {"x": 1, "y": 2}}
    assert document.lines["b", "y"] == 4
    assert not document.problems


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: 1\nb: 2\na: 3\n", (("a",), "stated twice, also on line 3")),
        ("a: !!python/object:os.system x", (("a",), "YAML tags are not taken here: remove 'tag:yaml.org,2002:python/object:os.system'")),
        ("? [1]\n: 2", ((), "a key must be text, and here is a list or mapping")),
        ("a: &a [*a]", (("a", 0), "an alias makes this value contain itself")),
        ("a: {<<: 1}", (("a", "<<"), "expected an alias of a mapping, or a list of them")),
    ],
)  # fmt: skip
def test_single_places_are_refused_in_place(text: str, problem: tuple[object, str]):
    assert read_yaml(text).problems == [problem]


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("uri: *.csv", 1, 'a value that begins with * is an alias to YAML: quote it, as in "*.csv"'),
        ("a: 1\nuri: **/*.csv", 2, 'a value that begins with * is an alias to YAML: quote it, as in "*.csv"'),
        ("uri: *csv", 1, 'a value that begins with * is an alias to YAML: quote it, as in "*.csv"'),
        ("a: [&.x]", 1, "a value that begins with & is an anchor to YAML: quote it"),
        ("a:\n\tb: 1", 2, "YAML takes no tabs here: indent with spaces"),
        ("a: @x", 1, "a value cannot begin with @: quote it"),
        ("a: x: y", 1, "a value that holds ': ' must be quoted; or the line is indented wrongly"),
        ("{a: s3://${ds}/x}", 1, "a value inside {} or [] that holds one of {}[], must be quoted; or a bracket is missing"),
        ("a: [1, 2", 1, "a value inside {} or [] that holds one of {}[], must be quoted; or a bracket is missing"),
        ("a:\n  - x\n b: 1", 3, "the line is indented wrongly"),
        ("a: 'x' y", 1, "text follows a closing quote or bracket: quote the whole value"),
        ("a: 'x", 1, "a quote is not closed"),
        ('a: "\\q"', 1, "in \"double quotes\" a \\ begins an escape, and this is none; use 'single quotes'"),
        ("a: 1\nb\nc: 2", 3, "expected 'key: value'"),
        ("a: 1\n---\nb: 2", 2, "a job file holds one YAML document; this begins a second"),
        ("a: 1\nb: \x01", 2, "character #x0001 cannot stand in YAML"),
        ("%YAML 3.0\n---\na: 1", 1, "not YAML: found incompatible YAML document (version 1.* is required)"),
        ("[" * 1000, 0, "nested too deeply"),
        ("a:\n  " + "[" * 100 + "]" * 100, 2, "nested too deeply"),
    ],
)  # fmt: skip
def test_text_that_is_not_yaml_gets_advice(text: str, line: int, message: str):
    with pytest.raises(YamlTextError) as raised:
        read_yaml(text)

    assert (raised.value.line, raised.value.message) == (line, message)


def test_aliases_that_multiply_are_bounded():
    levels = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]

    with pytest.raises(YamlTextError, match="aliases expand to more than 100,000 values"):
        read_yaml("\n".join(["a0: &a0 [x]", *levels]))
