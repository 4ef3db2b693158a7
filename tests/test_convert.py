"""Conversions at a stage's edge: dtypes that no batch changes, answers of every kind, casts that lose nothing."""

import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchpipe.batch import ByteRecords
from batchpipe.convert import (
    CastError,
    Kind,
    cast_table,
    from_answer,
    index_was_reordered,
    output_schema,
    to_argument,
    wanted,
)
from tests.formats_kit import schema_of

MIXED = schema_of(
    i=pa.int64(), u=pa.uint8(), b=pa.bool_(), f=pa.float32(), s=pa.string(), d=pa.date32(), t=pa.timestamp("us", "UTC")
)
VALUES = {"i": 1, "u": 2, "b": True, "f": 0.5, "s": "x", "d": 15_000, "t": 1}


def table_of(schema: pa.Schema, *rows: dict[str, Any]) -> pa.Table:
    return pa.table({field.name: pa.array([row.get(field.name) for row in rows], field.type) for field in schema})


# Arguments


@pytest.mark.parametrize(("annotation", "kind"), [
    (None, Kind.UNSTATED), (Any, Kind.UNSTATED), (pd.DataFrame, Kind.DATAFRAME), ("pd.DataFrame", Kind.DATAFRAME),
    (pa.Table, Kind.TABLE), ("pa.Table", Kind.TABLE), (dict[str, np.ndarray], Kind.ARRAYS),
    (Mapping[str, np.ndarray], Kind.ARRAYS), (dict[str, np.typing.NDArray[np.float64]], Kind.ARRAYS),
    ("dict[str, np.ndarray]", Kind.ARRAYS), (list[dict[str, int]], Kind.DICTS), (Sequence[dict[str, Any]], Kind.DICTS),
    ("list[dict[str, Any]]", Kind.DICTS), (bytes, Kind.BODY), (list[bytes], Kind.LIST), ("list[bytes]", Kind.LIST),
])  # fmt: skip
def test_an_annotation_says_what_records_are_given_as(annotation, kind):
    assert wanted(annotation) is kind


@pytest.mark.parametrize(("annotation", "shown"), [
    (str, "str"), (list[int], "list[int]"), (dict[int, np.ndarray], "dict[int, numpy.ndarray]"),
    ("list[str]", "list[str]"), (pd.Series, "Series"), (tuple[bytes, ...], "tuple[bytes, ...]"),
])  # fmt: skip
def test_another_annotation_is_refused_with_those_there_are(annotation, shown):
    with pytest.raises(TypeError) as caught:
        wanted(annotation)

    assert str(caught.value) == (
        f"asks for {shown}, which records cannot be given as; they can as pandas.DataFrame, pyarrow.Table, "
        "dict[str, numpy.ndarray], list[dict], bytes, list[bytes]"
    )


def test_only_bytes_are_not_tabular():
    assert [kind for kind in Kind if not kind.is_tabular] == [Kind.BODY, Kind.LIST]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sets(st.sampled_from(sorted(VALUES))), max_size=4))
def test_dtypes_do_not_depend_on_the_nulls_of_a_batch(present):
    table = table_of(MIXED, *({name: VALUES[name] for name in names} for names in present))
    frame = to_argument(table, Kind.DATAFRAME)

    assert [str(kind) for kind in frame.dtypes] == [
        "Int64", "UInt8", "boolean", "float32", "str", "datetime64[ms]", "datetime64[us, UTC]",
    ]  # fmt: skip
    assert list(frame.index) == list(range(len(present)))


def test_a_column_that_allows_no_null_is_a_plain_one():
    fields = [field.with_nullable(False) for field in schema_of(i=pa.int64(), b=pa.bool_())]
    table = pa.table({"i": [1], "b": [True]}).cast(pa.schema(fields))

    assert [str(kind) for kind in to_argument(table, Kind.UNSTATED).dtypes] == ["int64", "bool"]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sets(st.sampled_from(sorted(VALUES))), max_size=4))
def test_a_dataframe_comes_back_as_the_table_it_was(present):
    table = table_of(MIXED, *({name: VALUES[name] for name in names} for names in present))

    back = from_answer(to_argument(table, Kind.DATAFRAME))

    assert isinstance(back, pa.Table)
    assert back.cast(MIXED).to_pylist() == table.to_pylist()


def test_arrays_have_a_dtype_of_their_type():
    schema = MIXED.append(pa.field("v", pa.list_(pa.float32(), 2)))
    for count in (0, 2):
        arrays = to_argument(table_of(schema, *[{**VALUES, "v": [1, 2]}] * count), Kind.ARRAYS)
        assert {name: str(array.dtype) for name, array in arrays.items()} == {
            "i": "int64", "u": "uint8", "b": "bool", "f": "float32", "s": "object", "d": "datetime64[D]",
            "t": "datetime64[us]", "v": "float32",
        }  # fmt: skip
        assert arrays["v"].shape == (count, 2)


def test_an_integer_array_cannot_hold_a_null_and_says_what_can():
    assert np.isnan(to_argument(pa.table({"f": [None, 1.5]}), Kind.ARRAYS)["f"][0])
    with pytest.raises(
        ValueError, match="column 'i' holds a null, which an array of int64 cannot; state its type as float64"
    ):
        to_argument(pa.table({"i": [None, 1]}), Kind.ARRAYS)


def test_records_of_the_other_sort_are_refused():
    lines = ByteRecords.of([b"a\n", b"b"], "text/plain")

    assert to_argument(lines, Kind.BODY) == b"a\nb"
    assert to_argument(lines, Kind.UNSTATED) == to_argument(lines, Kind.LIST) == [b"a\n", b"b"]
    with pytest.raises(
        TypeError, match=r"asks for pandas.DataFrame, but the records are bytes \(text/plain\), without columns"
    ):
        to_argument(lines, Kind.DATAFRAME)
    with pytest.raises(TypeError, match=r"asks for list\[bytes\], but the records are a table of a, b"):
        to_argument(pa.table({"a": [1], "b": [2]}), Kind.LIST)


def test_tables_and_dicts_are_given_as_they_are():
    table = pa.table({"a": [1, None]})

    assert to_argument(table, Kind.TABLE) is table
    assert to_argument(table, Kind.DICTS) == [{"a": 1}, {"a": None}]


def test_pandas_is_not_imported_before_it_is_asked_for():
    code = """if True:
        import sys, pyarrow as pa
        from batchpipe.batch import ByteRecords
        from batchpipe.convert import *
        one = InputSchema(pa.schema([("a", pa.int64())]), frozenset(), ("a",))
        parsed = csv_to_table(ByteRecords.of([b"1", b"x"]), one), jsonl_to_table(ByteRecords.of([b"{}"]), one)
        answers = [from_answer(cast_table(each.table, one.schema)) for each in parsed]
        wanted(dict[str, int] if "pandas" in sys.modules else bytes), index_was_reordered(answers[0], 1)
    """

    subprocess.run([sys.executable, "-c", code], check=True)


# Answers


class Frame(pd.DataFrame):
    """A library's own DataFrame."""


@pytest.mark.parametrize(("answer", "rows"), [
    (pd.DataFrame({"a": [1, 2], "b": ["x", None]}), [{"a": 1, "b": "x"}, {"a": 2, "b": None}]),
    (Frame({"a": [1]}), [{"a": 1}]),
    (pd.DataFrame({"a": pd.Categorical(["x", "y"])}), [{"a": "x"}, {"a": "y"}]),
    (pd.DataFrame({0: [1.5, float("nan")]}), [{"0": 1.5}, {"0": None}]),
    (pd.Series([1, 2], name="p"), [{"p": 1}, {"p": 2}]),
    (pd.Series([0.5]), [{"prediction": 0.5}]),
    (pa.table({"a": pa.array(["x"], pa.large_string())}), [{"a": "x"}]),
    (pa.record_batch({"a": [1]}), [{"a": 1}]),
    (pa.array([1]), [{"prediction": 1}]),
    (pa.chunked_array([[1], [2]]), [{"prediction": 1}, {"prediction": 2}]),
    ({"a": np.array([1]), "b": ["x"]}, [{"a": 1, "b": "x"}]),
    (np.array([0.5, 1]), [{"prediction": 0.5}, {"prediction": 1.0}]),
    (np.eye(2, dtype=np.int8), [{"prediction": [1, 0]}, {"prediction": [0, 1]}]),
    (np.arange(8).reshape(1, 2, 4), [{"prediction": [[0, 1, 2, 3], [4, 5, 6, 7]]}]),
    (np.array([(1, 0.5)], [("a", "i4"), ("b", "f4")]), [{"a": 1, "b": 0.5}]),
    ({"a": np.ma.masked_array([1, 2], [False, True])}, [{"a": 1}, {"a": None}]),
    ([{"a": 1}, {"b": "x"}], [{"a": 1, "b": None}, {"a": None, "b": "x"}]),
    ([1, None], [{"prediction": 1}, {"prediction": None}]),
    (["x", "y"], [{"prediction": "x"}, {"prediction": "y"}]),
    ([np.float32(0.5)], [{"prediction": 0.5}]),
    ([], []),
    (pd.DataFrame(), []),
])  # fmt: skip
def test_an_answer_with_columns_is_a_plain_table(answer, rows):
    table = from_answer(answer)

    assert isinstance(table, pa.Table)
    assert table.to_pylist() == rows
    assert not table.schema.metadata
    assert not any("large" in str(field.type) or "dictionary" in str(field.type) for field in table.schema)


def test_a_list_of_bytes_stays_bytes():
    records = from_answer([b"a", bytearray(b"b")])

    assert isinstance(records, ByteRecords)
    assert records.to_list() == [b"a", b"b"]


@pytest.mark.parametrize(("answer", "error", "says"), [
    (None, TypeError, "returned None; expected a pandas DataFrame or Series, a pyarrow Table"),
    ("text", TypeError, "returned a str; expected"),
    (b"body", TypeError, "returned a bytes; expected"),
    (1.5, TypeError, "returned a float; expected"),
    ((one for one in [1]), TypeError, "returned a generator; expected"),
    (np.float64(1), TypeError, "returned a numpy.float64; expected"),
    (np.array(1), TypeError, "returned a numpy.ndarray without a dimension; expected one value a record"),
    ({"a": 1}, TypeError, "returned a dict in which 'a' is an int; expected an array or list"),
    ({"a": "xy"}, TypeError, "returned a dict in which 'a' is a str; expected an array or list"),
    ({"a": [1], "b": [1, 2]}, ValueError, "returned a dict whose columns differ in length: 'a' 1, 'b' 2"),
    ([1, "x"], ValueError, "returned column 'prediction' with values that no one type can hold: "),
    ([b"a", "x"], TypeError, "returned a list whose item 0 is a bytes, and others are not"),
    ([1, {"a": 1}], TypeError, "returned a list whose item 1 is a dict, and others are not"),
    ([object()], ValueError, "returned column 'prediction' with values that no one type can hold: Could not convert"),
    ([{"a": 1}, None], TypeError, "returned a list whose item 1 is None, and others are dicts"),
    ([{}, {}], ValueError, "returned 2 records without a single column"),
    (pd.DataFrame(index=[1, 2]), ValueError, "returned 2 records without a single column"),
    (pd.DataFrame({"a": [1, "x"]}), ValueError, "returned column 'a' with values that no one type can hold: "),
    (pd.DataFrame([[1, 2]], columns=["a", "a"]), ValueError, "returned a DataFrame with column 'a' twice"),
    (pa.table([pa.array([1])] * 2, names=["a", "a"]), ValueError, "returned a table with column 'a' twice"),
])  # fmt: skip
def test_nonsense_is_told_precisely(answer, error, says):
    with pytest.raises(error) as caught:
        from_answer(answer)

    assert str(caught.value).startswith(says)


@pytest.mark.parametrize(("change", "is_reordered"), [
    (lambda frame: frame, False), (lambda frame: frame.iloc[::-1], True), (lambda frame: frame.sort_values("a"), True),
    (lambda frame: frame["a"].sort_values(), True), (lambda frame: frame.iloc[[0, 2]], False),
    (lambda frame: frame.iloc[[2, 0]], True), (lambda frame: frame.set_index("a"), False),
    (lambda frame: frame.sort_values("a").reset_index(drop=True), False),
    (lambda frame: frame.set_index(pd.Index(list("cab"))), False),
    (lambda frame: frame.set_index(pd.Index([1, 0, 0])), False), (lambda frame: frame.to_numpy(), False),
])  # fmt: skip
def test_an_index_in_another_order_is_noticed(change, is_reordered):
    frame = pd.DataFrame({"a": [30, 10, 20]})

    assert index_was_reordered(change(frame), 3) is is_reordered


# Casts

OUT = schema_of(a=pa.int64(), b=pa.string(), f=pa.float32())


def test_a_cast_loses_nothing_and_orders_columns():
    table = pa.table({"f": [0.5, None], "b": pa.array(["x", None], pa.large_string()), "a": [1.0, 2.0]})

    assert cast_table(table, OUT).schema.equals(OUT, check_metadata=True)
    assert cast_table(table, OUT).to_pylist() == [{"a": 1, "b": "x", "f": 0.5}, {"a": 2, "b": None, "f": None}]
    assert cast_table(pa.table({"a": pa.nulls(1), "b": pa.nulls(1), "f": pa.nulls(1)}), OUT).num_rows == 1


@pytest.mark.parametrize(("column", "values", "index", "says"), [
    ("a", [1.0, 2.5, 3.5], 1, "'2.5' (double) in column 'a' does not fit its type int64"),
    ("a", ["1"], 0, "'1' (string) in column 'a' does not fit its type int64"),
    ("a", [None, True], 1, "'True' (bool) in column 'a' does not fit its type int64"),
    ("b", [None, 7], 1, "'7' (int64) in column 'b' does not fit its type string"),
    ("f", [1, 2, 2**40 + 1], 2, "'1099511627777' (int64) in column 'f' does not fit its type float"),
    ("f", [[1.5]], 0, "'[1.5]' (list<item: double>) in column 'f' does not fit its type float"),
])  # fmt: skip
def test_a_misfit_names_column_record_value_and_setting(column, values, index, says):
    good: dict[str, list[Any]] = {"a": [1], "b": ["x"], "f": [1.5]}
    table = pa.table({**{name: [one] * len(values) for name, [one] in good.items()}, column: values})

    with pytest.raises(CastError) as caught:
        cast_table(table, OUT)
    assert str(caught.value) == f"{says}: state one that holds all answers (output.columns.{column})"
    assert (caught.value.column, caught.value.index) == (column, index)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(-5, 5) | st.just(0.5), min_size=1, max_size=40), st.integers(1, 9))
def test_the_first_misfit_is_found_in_any_chunks(values, size):
    column = pa.chunked_array([pa.array(values[i : i + size], pa.float64()) for i in range(0, len(values), size)])
    first = next((place for place, value in enumerate(values) if value == 0.5), None)
    try:
        cast_table(pa.table([column], names=["a"]), schema_of(a=pa.int64()))
        found = None
    except CastError as error:
        found = error.index
    assert found == first


def test_missing_and_unknown_columns_are_named():
    good = pa.table({"a": [1], "b": ["x"], "f": [1.5]})
    with pytest.raises(
        CastError, match=r"the answer lacks column 'b' of the output \(output.columns\); it has 'a', 'f'"
    ):
        cast_table(good.drop_columns(["b"]), OUT)
    with pytest.raises(
        CastError, match=r"the answer has column 'c', which the output does not have \(output.columns\)"
    ):
        cast_table(good.append_column("c", [[1]]), OUT)


def test_a_null_where_the_schema_allows_none_is_named():
    strict = pa.schema([pa.field("a", pa.int64(), nullable=False)])
    with pytest.raises(CastError, match="a null in column 'a', which the output does not allow") as caught:
        cast_table(pa.table({"a": [1, None]}), strict)

    assert caught.value.index == 1


def test_the_output_schema_is_the_first_answers_or_as_stated():
    found = pa.table({"a": [1], "b": ["x"], "n": pa.nulls(1)}).schema

    assert output_schema(found.remove(2), None) == found.remove(2)
    assert output_schema(found, {"n": "bool", "b": None, "a": "float64"}) == schema_of(
        n=pa.bool_(), b=pa.string(), a=pa.float64()
    )
    with pytest.raises(
        CastError, match=r"column 'n' has no value in the first answers, .* state it \(output.columns.n: float64"
    ):
        output_schema(found, None)
    with pytest.raises(CastError, match="the answer lacks column 'z'"):
        output_schema(found, {"a": None, "b": None, "n": "bool", "z": "bool"})
