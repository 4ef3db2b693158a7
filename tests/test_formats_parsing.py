"""Parsing: byte records to tables, every bad record found and told, whatever else is in the batch."""

import csv
import io
import json
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from batchpipe.batch import ByteRecords
from batchpipe.convert import CsvDialect, InputSchema, Parsed, csv_to_table, jsonl_to_table
from tests.formats_kit import schema_of

AB = schema_of(a=pa.int64(), b=pa.string())


def columns(schema: pa.Schema = AB, stated: str = "ab") -> InputSchema:
    return InputSchema(schema, frozenset(stated), tuple(schema.names), "x.csv")


def of_csv(*records: bytes, schema: pa.Schema = AB, stated: str = "ab", **dialect: Any) -> Parsed:
    return csv_to_table(ByteRecords.of(records), columns(schema, stated), CsvDialect(**dialect))


def of_json(*records: bytes, schema: pa.Schema = AB, stated: str = "ab", encoding: str = "utf-8") -> Parsed:
    return jsonl_to_table(ByteRecords.of(records), columns(schema, stated), encoding)


def reasons(parsed: Parsed) -> dict[int, str]:
    return {bad.index: bad.reason for bad in parsed.failures}


def test_csv_rows_become_a_table_of_the_schema():
    parsed = of_csv(b"1,x\n", b',"y\n""z"\r\n', b"3,")

    assert parsed.table.schema == AB
    assert parsed.table.to_pylist() == [{"a": 1, "b": "x"}, {"a": None, "b": 'y\n"z'}, {"a": 3, "b": None}]
    assert list(parsed.kept) == [0, 1, 2]


def test_no_records_keep_the_schema():
    assert of_csv().table.schema == of_json().table.schema == AB
    assert of_csv(b"1\n").table.schema == of_json(b"[]\n").table.schema == AB


@pytest.mark.parametrize(("record", "reason"), [
    (b"1\n", "has 1 field, the header has 2"),
    (b"1,2,3\n", "has 3 fields, the header has 2"),
    (b"1\xff\n", "has 1 field, the header has 2"),
    (b"x,2\n", "'x' in column 'a' is not int64"),
    (b'"' + b"y" * 99 + b'",2\n', f"'{'y' * 60}...' in column 'a' is not int64"),
    (b"1,\xff\n", "is not utf-8 in column 'b' (input.encoding)"),
    (b"1\r2,3\n", "holds a carriage return outside quotes (lines end with a newline)"),
    (b'1,"2\n', "has a quote that is never closed"),
])  # fmt: skip
def test_a_bad_csv_record_fails_alone_and_says_why(record, reason):
    parsed = of_csv(b"1,x\n", record, b"3,z\n")

    assert reasons(parsed) == {1: reason}
    assert parsed.table.column("a").to_pylist() == [1, 3]
    assert list(parsed.kept) == [0, 2]


@pytest.mark.parametrize(("record", "reason"), [
    (b'{"a": 1\n', "is not JSON: Expecting ',' delimiter: line 2 column 1 (char 8)"),
    (b"null\n", "is not a JSON object: 'null'"),
    (b"[1]\n", "is not a JSON object: '[1]'"),
    (b'{"a": 1} {"a": 2}\n', "is not JSON: Extra data: line 1 column 10 (char 9)"),
    (b'{"a": 1}null\n', "is not JSON: Extra data: line 1 column 9 (char 8)"),
    (b'{"a": 1.5}\n', "'1.5' in column 'a' is not int64"),
    (b'{"b": {"c": 1}}\n', """'{"c": 1}' in column 'b' is not string"""),
    (b'{"b": "\xff"}\n', "is not utf-8: invalid start byte (input.encoding)"),
    (b'{"a": 1, "a": 2}\n', "is JSON that cannot be read: a key given twice, or half of a surrogate pair"),
    (b'{"c": ' + b"[" * 100_000 + b"\n", "is not JSON: maximum recursion depth exceeded"),
])  # fmt: skip
def test_a_bad_json_line_fails_alone_and_says_why(record, reason):
    parsed = of_json(b'{"a": 1}\n', record, b'{"a": 3}')

    assert list(reasons(parsed)) == [1]
    assert reasons(parsed)[1].startswith(reason)
    assert parsed.table.column("a").to_pylist() == [1, 3]


def test_a_misfit_says_whether_its_type_was_a_guess_and_which_type_fits():
    schema = schema_of(a=pa.int64(), b=pa.null())

    (guess,), (stated,) = (of_csv(b"1.5,\n", schema=schema, stated=names).failures for names in ("", "a"))
    assert (guess.column, guess.value, guess.is_guess, guess.fitting) == ("a", "1.5", True, "float64")
    assert not stated.is_guess
    assert [of_csv(row, schema=schema).failures[0].fitting for row in (b",7\n", b",x\n", b"x,\n")] == [
        "int64",
        "string",
        "string",
    ]


def test_json_keys_are_free_in_order_may_be_missing_and_others_are_passed_over():
    parsed = of_json(b'{"b": "x", "a": 1, "c": {"d": []}}\n', b" {} \r\n", b'{"a": null}')

    assert parsed.table.to_pylist() == [{"a": 1, "b": "x"}, {"a": None, "b": None}, {"a": None, "b": None}]


@pytest.mark.parametrize(("kind", "text"), [
    (pa.date32(), "2013-01-02"), (pa.time32("s"), "10:11:12"), (pa.time64("us"), "10:11:12.000013"),
    (pa.timestamp("us"), "2013-01-02T10:11:12"), (pa.timestamp("us", "UTC"), "2013-01-02T10:11:12Z"),
    (pa.decimal128(9, 2), "1.50"), (pa.float64(), 2.5), (pa.bool_(), True), (pa.list_(pa.int64()), [1, 2]),
    (pa.struct([("x", pa.string())]), {"x": "y"}), (pa.float16(), 1.5),
])  # fmt: skip
def test_json_values_are_read_as_their_stated_type(kind, text):
    parsed = of_json(json.dumps({"a": text}).encode(), b'{"a": null}', schema=pa.schema([("a", kind)]))

    assert not parsed.failures
    assert parsed.table.column("a").type == kind
    value = parsed.table.column("a")[0].as_py()
    assert value == text or str(value) == str(text) or value.isoformat().replace("+00:00", "Z") == text


def test_text_in_another_encoding_is_decoded_where_it_is_parsed():
    latin = "1,\u00e9\n".encode("latin-1")

    assert of_csv(latin, encoding="latin-1").table.to_pylist() == [{"a": 1, "b": "\u00e9"}]
    assert of_json('{"b": "\u00e9"}'.encode("latin-1"), encoding="latin-1").table.column("b").to_pylist() == ["\u00e9"]
    assert reasons(of_csv(b"1,x\n", latin, encoding="ascii")) == {
        1: "is not ascii: ordinal not in range(128) (input.encoding)"
    }


def test_nulls_are_the_texts_stated_quoted_or_not():
    parsed = of_csv(b'NA,"NA"\n', b"1,\n", null_values=("NA",))

    assert parsed.table.to_pylist() == [{"a": None, "b": None}, {"a": 1, "b": ""}]


def test_another_delimiter_and_no_quote():
    parsed = of_csv(b'1;"x\n', b'2;y"\n', delimiter=";", quote="")

    assert parsed.table.column("b").to_pylist() == ['"x', 'y"']


def test_picked_columns_are_read_in_the_order_picked():
    wide = InputSchema(pa.schema([("c", pa.int64()), ("a", pa.int64())]), frozenset(), ("a", "b", "c"))

    assert csv_to_table(ByteRecords.of([b"1,x,3\n"]), wide).table.to_pylist() == [{"c": 3, "a": 1}]


CSV_RECORD = st.sampled_from(
    [b"1,x\n", b"2,y\r\n", b',"a\nb"\n', b"3\n", b"4,5,6\n", b"z,1\n", b'7,"\r"\n', b"8\r9,1\n"]
)


@settings(max_examples=150, deadline=None)
@given(st.lists(CSV_RECORD, max_size=30))
@example([b"8\r9,1\n", b"\r\r\n"])
def test_csv_records_parse_together_as_they_do_alone(records):
    together, alone = of_csv(*records), [of_csv(record) for record in records]

    assert [bad.index for bad in together.failures] == [i for i, one in enumerate(alone) if one.failures]
    assert [bad.reason for bad in together.failures] == [bad.reason for one in alone for bad in one.failures]
    assert together.table.to_pylist() == [row for one in alone for row in one.table.to_pylist()]
    assert sorted([*together.kept, *reasons(together)]) == list(range(len(records)))


LINE = st.text('{}[]":,a1 nul\\', max_size=12).map(lambda text: text.encode() + b"\n")
JSON_RECORD = LINE | st.sampled_from(
    [b'{"a":1}\n', b' {"a":2,"b":"x"} \n', b"null\n", b"{}{}\n", b"{}null{}\n", b'{"a":"x"}\n']
)


@settings(max_examples=300, deadline=None)
@given(st.lists(JSON_RECORD.filter(bytes.strip), max_size=20))
def test_json_lines_parse_together_as_they_do_alone(records):
    together, alone = of_json(*records), [of_json(record) for record in records]

    assert [bad.reason for bad in together.failures] == [bad.reason for one in alone for bad in one.failures]
    assert together.table.to_pylist() == [row for one in alone for row in one.table.to_pylist()]
    assert len(together.kept) + len(together.failures) == len(records)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(-9, 9) | st.none(), st.text('ab,"\n\r \u00e9', min_size=1)), max_size=20))
def test_csv_parses_as_the_csv_module_does(rows):
    text = io.StringIO(newline="")
    csv.writer(text, quoting=csv.QUOTE_ALL).writerows(rows)
    body = text.getvalue().encode()
    starts = np.array([0, *(len(_csv(rows[: i + 1])) for i in range(len(rows)))], np.int64)

    parsed = csv_to_table(ByteRecords(memoryview(body), starts[:-1], starts[1:]), columns())

    assert not parsed.failures
    assert [(row["a"], row["b"]) for row in parsed.table.to_pylist()] == rows


def _csv(rows: list[tuple[int | None, str]]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, quoting=csv.QUOTE_ALL).writerows(rows)
    return text.getvalue().encode()
