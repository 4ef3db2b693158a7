"""Variables in a job file: where values come from, how they are typed, and what is refused."""

import re
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchpipe.jobfile.variables import fill_variables, variable_values
from batchpipe.jobfile.yaml_text import Unquoted, read_scalar

NAMES = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]*", fullmatch=True).filter(lambda name: name != "run_id")


def fill(value: Any, values: dict[str, str] | None = None) -> tuple[Any, list[str]]:
    problems: list[str] = []
    return fill_variables(value, values or {}, lambda _place, text: problems.append(text)), problems


@settings(deadline=None)
@given(
    name=NAMES,
    value=st.text().filter(lambda text: "${run_id}" not in text),
    around=st.text(st.characters(exclude_characters="$")),
)
def test_value_is_put_in_unchanged_and_only_once(name: str, value: str, around: str):
    assert fill(f"{around}${{{name}}}{around}", {name: value}) == (f"{around}{value}{around}", [])


@settings(deadline=None)
@given(st.text().filter(lambda text: "${run_id}" not in text))
def test_escaped_text_comes_back(text: str):
    assert fill(re.sub(r"\$\{", "$${", text)) == (text, [])


@settings(deadline=None)
@given(st.text())
def test_any_text_is_filled_or_told(text: str):
    filled, problems = fill(text)

    assert filled == text or problems or "$${" in text or ":-" in text


@settings(deadline=None)
@given(st.text(st.characters(exclude_characters="$")))
def test_unquoted_value_is_typed_as_if_it_stood_there(text: str):
    assert fill(Unquoted("${A}"), {"A": text})[0] == pytest.approx(read_scalar(text), nan_ok=True)


@pytest.mark.parametrize(
    ("text", "filled"),
    [
        ("${A:-x}", "x"), ("${SET:-x}", "s"), ("${EMPTY:-x}", "x"), ("${EMPTY}", ""), ("${A:-}", ""), ("$A $", "$A $"),
        ("$${A}", "${A}"), ("$$${SET}", "$${SET}"), ("${A:-a:-b}", "a:-b"),
    ],
)  # fmt: skip
def test_defaults_and_escapes(text: str, filled: str):
    assert fill(text, {"SET": "s", "EMPTY": ""}) == (filled, [])


@pytest.mark.parametrize("text", ["${", "${}", "${1A}", "${A B}", "${A:-${B}}", "${A?x}"])
def test_what_is_no_variable_is_told(text: str):
    assert "expected ${NAME} or ${NAME:-default} after ${; write $${ for a literal ${" in fill(text, {"B": "b"})[1]


def test_unset_variable_is_told_with_what_to_type():
    expected = "variable 'MONTH' is not set; set it with --var MONTH=... or in the environment"

    assert fill("in/${MONTH}") == ("in/${MONTH}", [expected])


def test_quoted_value_stays_text():
    assert fill(["${N}", Unquoted("${N}")], {"N": "2"}) == (["2", 2], [])


def test_places_of_problems_lead_through_mappings_and_lists():
    places: list[Any] = []
    fill_variables({"a": [{"b": "${X}"}]}, {}, lambda place, _text: places.append(place))

    assert places == [("a", 0, "b")]


def test_given_value_comes_before_built_in_and_environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("A", "environment")
    monkeypatch.setenv("B", "environment")
    monkeypatch.setenv("ds", "environment")

    values = variable_values({"A": "given"}, None)

    assert (values["A"], values["B"]) == ("given", "environment")
    assert values["ds"] == datetime.now(UTC).date().isoformat()
    assert variable_values({"ds": "2013-01-01"}, None)["ds"] == "2013-01-01"


def test_run_id_stands_for_itself_until_it_is_known():
    assert fill(Unquoted("${run_id}"), variable_values({}, None)) == ("${run_id}", [])
    assert fill(Unquoted("${run_id}"), variable_values({}, "123")) == ("123", [])


@pytest.mark.parametrize("text", ["$${run_id}", "${A}"])
def test_literal_run_id_is_refused(text: str):
    problems = fill(text, {"A": "${run_id}", "run_id": "${run_id}"})[1]

    assert problems == ["a literal ${run_id} cannot be written: it always stands for the run id"]
