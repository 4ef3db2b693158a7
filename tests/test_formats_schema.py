"""Columns of a dataset: stated types win, the rest are inferred once from a fixed sample, headers match by name."""

import io
import pickle
import re
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchpipe.batch import ByteRecords
from batchpipe.convert import InputSchema
from batchpipe.errors import InputError
from batchpipe.formats import FORMATS, csv, misfit_error
from batchpipe.formats.fields import reorder_fields
from batchpipe.formats.sampling import SAMPLE_BYTES
from batchpipe.split import InputObject
from tests.formats_kit import input_spec, range_of


def infer(*objects: bytes, format_: str = "csv", **keys: Any) -> InputSchema:
    schema = FORMATS[format_].infer_schema(samples(*objects), input_spec(format_, **keys))
    assert schema is not None
    assert pickle.loads(pickle.dumps(schema)) == schema
    return schema


def samples(*objects: bytes) -> Iterator[tuple[InputObject, io.BytesIO]]:
    for place, data in enumerate(objects):
        yield InputObject(place, f"{place}.csv", len(data), ""), io.BytesIO(data)


def types(schema: InputSchema) -> dict[str, str]:
    return {field.name: str(field.type) for field in schema.schema}


def rows(data: bytes, schema: InputSchema) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for batch in csv.open_range(io.BytesIO(data), range_of(data, "other.csv"), 0, input_spec(), schema):
        assert isinstance(batch.records, ByteRecords)
        found += csv.to_table(batch.records, schema, input_spec()).table.to_pylist()
    return found


def test_types_are_inferred_and_stated_ones_win():
    schema = infer(b"a,b,c,d\n1,2,x,\n3,4.5,y,\n", types={"a": "string"})

    assert types(schema) == {"a": "string", "b": "double", "c": "string", "d": "null"}
    assert (schema.stated, schema.columns, schema.header_of) == (frozenset("a"), ("a", "b", "c", "d"), "0.csv")


@pytest.mark.parametrize(("first", "second", "wide"), [
    ("1", "2.5", "double"), ("1", "x", "string"), ("", "1", "int64"), ("1", "", "int64"), ("true", "1", "string"),
    ("2013-01-01", "2013-01-01 10:00", "timestamp[s]"), ("2013-01-01 10:00", "2013-01-01 10:00:00.5", "timestamp[ns]"),
    ("2013-01-01 10:00", "2013-01-01T10:00Z", "string"), ("\u00e9", "x", "string"),
])  # fmt: skip
def test_types_are_widened_over_the_sampled_objects(first, second, wide):
    assert types(infer(f"b,a\n0,{first}\n".encode(), f"a,b\n{second},0\n".encode())) == {"b": "int64", "a": wide}


def test_the_sample_is_the_first_megabyte_of_three_objects_with_records():
    long = b"a,b\n" + b"1,1\n" * (SAMPLE_BYTES // 4) + b"x,x\n"

    assert types(infer(long, b"a,b\n", b"", b"a,b\n1,2.5\n", b"a,b\n1,2\n", b"a,b\nx,x\n")) == {
        "a": "int64",
        "b": "double",
    }


def test_a_record_longer_than_the_sample_is_looked_at_whole():
    assert types(infer(b"a,b\n1," + b"x" * 2 * SAMPLE_BYTES + b"\n")) == {"a": "int64", "b": "string"}


def test_names_without_a_header():
    assert types(infer(b"1,x\n", header=False)) == {"f0": "int64", "f1": "string"}
    assert types(infer(b"1,x\n", header=["a", "b"])) == {"a": "int64", "b": "string"}


def test_rows_that_will_fail_do_not_spoil_the_types():
    assert types(infer(b"a,b\n1,2\n3\n4,5,6\n7,8\n")) == {"a": "int64", "b": "int64"}
    assert types(infer(b"a,b\n1,x\n2\xff\n3,\xff\n")) == {"a": "int64", "b": "string"}


def test_nothing_to_look_at_is_no_columns_or_those_stated():
    assert types(infer()) == types(infer(b"", b"\n\n")) == {}
    assert types(infer(b"a,b\n")) == {"a": "null", "b": "null"}
    assert types(infer(header=["a", "b"], types={"a": "bool"})) == {"a": "bool", "b": "null"}


def test_picked_columns_are_the_schema_and_the_records_keep_all_fields():
    schema = infer(b"a,b,c\n1,2,3\n", columns=["c", "a"])

    assert (schema.schema.names, schema.columns, schema.is_whole) == (["c", "a"], ("a", "b", "c"), False)


@pytest.mark.parametrize(
    "keys", [{"columns": ["a", "x"]}, {"types": {"x": "string"}}, {"header": ["a"], "types": {"x": "bool"}}]
)
def test_an_unknown_column_is_named_with_those_there_are(keys):
    key = "columns" if "columns" in keys else "types"
    with pytest.raises(InputError, match=f"input.{key} names 'x', which is not a column of") as caught:
        infer(b"a,b\n1,2\n", **keys)

    assert caught.value.where.partition(": ")[2] in ("a, b", "a")


def test_a_type_that_csv_cannot_hold_is_refused_before_anything_is_read():
    with pytest.raises(InputError, match=re.escape("csv cannot be read as float16 (input.types.a)")):
        infer(b"a\n1\n", types={"a": "float16"})


def test_another_order_of_columns_is_read_by_name():
    schema = infer(b"a,b,c\n1,x,2\n")

    assert rows(b'c,a,b\n2,1,"x,\n"\r\n9\n4,3,y', schema) == [{"a": 1, "b": "x,\n", "c": 2}, {"a": 3, "b": "y", "c": 4}]


@pytest.mark.parametrize(("header", "says"), [
    (b"a", "the header of 'other.csv' lacks 'b', compared with '0.csv'"),
    (b"a,b,c", "the header of 'other.csv' has 'c' more, compared with '0.csv'"),
    (b"a,B", "the header of 'other.csv' lacks 'b' and has 'B' more, compared with '0.csv'"),
])  # fmt: skip
def test_other_columns_name_both_headers(header, says):
    with pytest.raises(InputError, match=re.escape(says)) as caught:
        rows(header + b"\n1,2\n", infer(b"a,b\n1,x\n"))

    assert caught.value.where == f"other.csv: {header.decode().replace(',', ', ')}; 0.csv: a, b"
    with pytest.raises(InputError, match=r"the header of '1\.csv' "):
        infer(b"a,b\n1,x\n", header + b"\n1,2\n")


def test_a_column_named_twice_is_refused():
    with pytest.raises(InputError, match=r"the header of '0.csv' names column 'a' twice"):
        infer(b"a,b,a\n")


def test_a_header_in_another_encoding():
    schema = infer("\u00e9,b\n1,2\n".encode("latin-1"), encoding="latin-1")

    assert types(schema) == {"\u00e9": "int64", "b": "int64"}
    with pytest.raises(InputError, match=r"cannot read the first record of '0.csv'"):
        infer("\u00e9,b\n1,2\n".encode("latin-1"))


def test_a_header_may_be_quoted_with_newlines_and_end_in_crlf():
    assert types(infer(b'\xef\xbb\xbf"a\nb","c""d"\r\n1,2\r\n')) == {"a\nb": "int64", 'c"d': "int64"}


def test_json_keys_come_from_the_sample_and_those_stated():
    schema = infer(
        b'{"a": 1, "b": {"x": [1]}}\n{"a": 1.5}\nnull\n{\n',
        b'{"b": {"y": "z"}, "c": null}',
        format_="jsonl",
        types={"d": "bool"},
    )

    assert types(schema) == {"a": "double", "b": "struct<x: list<item: int64>, y: string>", "c": "null", "d": "bool"}
    assert (schema.stated, schema.is_whole) == (frozenset("d"), True)


def test_json_values_of_different_kinds_must_be_stated():
    for objects in ([b'{"a": 1}\n{"a": "x"}\n'], [b'{"a": 1}\n', b'{"a": "x"}\n']):
        with pytest.raises(InputError, match=r"a key holds values of different kinds, .*: a: ") as caught:
            infer(*objects, format_="jsonl")
        assert caught.value.next.endswith("input.types.a: string")
        assert types(infer(*objects, format_="jsonl", types={"a": "int64"})) == {"a": "int64"}
        assert types(infer(*objects, format_="jsonl", columns=["b"], types={"b": "bool"})) == {"b": "bool"}


@pytest.mark.parametrize("depth", [600, 200_000])
def test_a_json_line_of_any_depth_is_survived(depth):
    """Arrow's inference would overflow its stack, and take the process along."""
    deep = b'{"b":' + b'{"b":' * depth + b"1" + b"}" * depth + b"}"

    assert types(infer(deep + b'\n{"a": 1}\n', format_="jsonl")) == {"a": "int64"}


def test_json_that_is_not_json_lines_is_told():
    with pytest.raises(InputError, match=r"none of the first records of '0.csv' is a JSON object with a key"):
        infer(b'[\n  {"a":\n 1}\n]\n', format_="jsonl")


def test_objects_without_a_header_may_have_ragged_first_records():
    assert types(infer(b"1,2\n", b"1\n2,3\n", header=False)) == {"f0": "int64", "f1": "int64"}


def test_a_json_column_that_no_record_has_must_be_given_a_type():
    with pytest.raises(InputError, match=r"input.columns names 'z', which the first records do not have") as caught:
        infer(b'{"a": 1}\n', format_="jsonl", columns=["z"])

    assert "input.types.z: string" in caught.value.next


def test_a_wrong_guess_names_column_value_object_offset_and_setting():
    schema = infer(b"a\n1\n")
    (bad,) = csv.to_table(ByteRecords.of([b"1.5\n"]), schema, input_spec()).failures

    error = misfit_error(bad, "s3://b/x.csv", 1234)

    assert str(error) == (
        "'1.5' in column 'a' is not int64, the type inferred for it from the first records\n"
        "  where: s3://b/x.csv, byte 1,234\n  next:  state the column's type: input.types.a: float64"
    )


FIELD = st.sampled_from([b"", b"1", b"xy", b'"a,b"', b'"\n"', b'""', b'"c""d"'])


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.lists(FIELD, min_size=3, max_size=3), min_size=1, max_size=8), st.permutations([0, 1, 2]), st.booleans()
)
def test_fields_are_reordered_byte_for_byte(rows, order, final):
    ends = [b"\n", b"\r\n"] * 4
    records = [b",".join(row) + end for row, end in zip(rows, ends, strict=False)]
    wanted = [b",".join(row[i] for i in order) + end for row, end in zip(rows, ends, strict=False)]
    if not final:
        records[-1], wanted[-1] = records[-1].rstrip(b"\r\n"), wanted[-1].rstrip(b"\r\n")

    assert reorder_fields(ByteRecords.of(records), tuple(order), ",", '"').to_list() == wanted


def test_a_record_with_other_fields_is_not_reordered():
    records = ByteRecords.of([b"1,2\n", b"3\n", b"4,5,6\n"])

    assert reorder_fields(records, (1, 0), ",", '"').to_list() == [b"2,1\n", b"3\n", b"4,5,6\n"]
