"""Writing: a part's bytes are a function of its records, schema and job, whatever batches the records came in."""

import csv
import gzip
import io
import json
from collections.abc import Sequence
from datetime import date
from itertools import pairwise
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from batchpipe.batch import ByteRecords, Records
from batchpipe.convert import csv_to_table
from batchpipe.convert.schema import InputSchema
from batchpipe.errors import OutputError
from batchpipe.formats import open_writer, parquet_writer
from batchpipe.formats.parquet_writer import record_bytes
from tests.formats_kit import output_spec, schema_of

SCHEMA = schema_of(i=pa.int64(), f=pa.float64(), s=pa.string(), b=pa.bool_(), t=pa.timestamp("us"))
PAIR = pa.struct([pa.field("k", pa.int8()), pa.field("v", pa.string())])
NESTED = schema_of(
    l=pa.list_(pa.string()), x=pa.list_(pa.float32(), 2), o=PAIR, m=pa.map_(pa.string(), pa.int64()), n=pa.null()
)
ROW = st.fixed_dictionaries({
    "i": st.none() | st.integers(-9, 9),
    "f": st.none() | st.floats(width=16, allow_infinity=False),
    "s": st.none() | st.text('a,"\n\r\u00e9', max_size=4),
    "b": st.none() | st.booleans(),
    "t": st.none() | st.integers(0, 10**15),
})  # fmt: skip


class WriteOnly:
    """All that a writer may ask of a sink."""

    def __init__(self) -> None:
        self.data = bytearray()

    def write(self, data: bytes | memoryview, /) -> int:
        self.data += data
        return len(data)


def written(parts: Sequence[Records], schema: pa.Schema | None = SCHEMA, *, header: bool = True, **keys: Any) -> bytes:
    sink = WriteOnly()
    writer = open_writer(output_spec(**keys), sink, schema, header=header)
    for part in parts:
        writer.write(part)
    writer.close()
    assert writer.records == sum(map(len, parts))
    return bytes(sink.data)


def cut(table: pa.Table, at: list[int]) -> list[pa.Table]:
    bounds = [0, *sorted(place % (len(table) + 1) for place in at), len(table)]
    return [table.slice(start, stop - start) for start, stop in pairwise(bounds)]


@settings(max_examples=40, deadline=None)
@given(st.lists(ROW, max_size=30), st.lists(st.integers(0, 99), max_size=5))
@pytest.mark.parametrize(("format_", "codec"), [
    ("parquet", None), ("parquet", "zstd"), ("csv", None), ("csv", "gzip"), ("jsonl", None), ("jsonl", "zstd"),
])  # fmt: skip
def test_bytes_do_not_depend_on_the_batches(format_, codec, rows, at):
    table = pa.Table.from_pylist(rows, SCHEMA)
    with pytest.MonkeyPatch.context() as patch:  # so small that a few records cross the bounds
        patch.setattr(parquet_writer, "GROUP_ROWS", 7)
        patch.setattr(parquet_writer, "GROUP_BYTES", 150)

        whole = written([table], format=format_, compression=codec)
        parts = written(cut(table, at), format=format_, compression=codec)

    assert parts == whole


def test_pages_of_a_row_group_do_not_depend_on_the_batches():
    """Arrow ends a page at the end of a batch: a row group is made one before it is written."""
    table = pa.table({"s": [str(i * 7919) for i in range(100_000)]})

    assert written(cut(table, list(range(0, 100_000, 777))), table.schema) == written([table], table.schema)


def test_parquet_has_fixed_row_groups_and_no_pandas_metadata(monkeypatch):
    monkeypatch.setattr(parquet_writer, "GROUP_ROWS", 100)
    table = pa.table({"i": range(250)}).replace_schema_metadata({"pandas": "{}"})

    file = pq.ParquetFile(io.BytesIO(written(cut(table, [3, 50, 120]), table.schema)))

    assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [100, 100, 50]
    assert b"pandas" not in (file.schema_arrow.metadata or {})
    assert file.read().equals(table.replace_schema_metadata(None))


def test_a_row_group_is_bounded_in_bytes_too(monkeypatch):
    monkeypatch.setattr(parquet_writer, "GROUP_BYTES", 1000)
    table = pa.table({"s": ["x" * 300] * 7 + ["y" * 3000] + ["z"]})

    file = pq.ParquetFile(io.BytesIO(written(cut(table, [5]), table.schema)))

    assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [3, 3, 1, 1, 1]


VALUE = st.fixed_dictionaries({
    "l": st.none() | st.lists(st.none() | st.text(max_size=3), max_size=3),
    "x": st.none() | st.tuples(st.just(1.0), st.just(2.0)).map(list),
    "o": st.none() | st.fixed_dictionaries({"k": st.none() | st.integers(0, 9), "v": st.none() | st.text(max_size=3)}),
    "m": st.none() | st.dictionaries(st.text(max_size=2), st.integers(0, 9), max_size=2).map(lambda d: list(d.items())),
    "n": st.none(),
})  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(st.lists(VALUE, min_size=1, max_size=12), st.lists(st.integers(0, 99), max_size=3))
def test_the_size_of_a_record_is_its_own_in_any_slice(rows, at):
    table = pa.Table.from_pylist(rows, NESTED)
    alone = [int(record_bytes(pa.Table.from_pylist([row], NESTED))[0]) for row in rows]

    assert [int(size) for part in cut(table, at) for size in record_bytes(part)] == alone


@settings(max_examples=100, deadline=None)
@given(st.lists(ROW, max_size=20))
def test_csv_is_read_back_as_it_was_written(rows):
    table = pa.Table.from_pylist(rows, SCHEMA).drop_columns(["f", "t"])
    data = written([table], table.schema, format="csv").decode()

    read = list(csv.reader(io.StringIO(data, newline="")))

    assert read[0] == ["i", "s", "b"]
    assert [row[1] for row in read[1:]] == [row["s"] or "" for row in rows]
    assert [row[0] for row in read[1:]] == ["" if row["i"] is None else str(row["i"]) for row in rows]


@pytest.mark.parametrize("values", [[None, "x", None, ""], [1, None, 2]])
def test_a_null_alone_on_its_line_is_no_blank_line(values):
    """A reader passes blank lines over, and would count a record less."""
    table = pa.table({"a": values})
    lines = written([table], table.schema, format="csv", header=False).splitlines(keepends=True)
    parsed = csv_to_table(ByteRecords.of(lines), InputSchema(table.schema, frozenset(), ("a",)))

    assert [row["a"] for row in parsed.table.to_pylist()] == [value or None for value in values]


def test_jsonl_has_null_for_nan_and_text_for_what_json_lacks():
    table = pa.table({"f": [float("nan"), 0.1], "d": [date(2013, 1, 2), None], "o": [{"k": ["\u00e9"]}, None]})

    assert written([table], table.schema, format="jsonl").decode().splitlines() == [
        '{"f":null,"d":"2013-01-02","o":{"k":["\u00e9"]}}', '{"f":0.1,"d":null,"o":null}',
    ]  # fmt: skip


def test_text_answers_are_written_as_they_are_where_they_are_of_the_format():
    lines = ByteRecords.of([b'{"a": 1}', b'{"a": 2}\n'], "application/jsonlines")

    assert [json.loads(line) for line in written([lines], None, format="jsonl").splitlines()] == [{"a": 1}, {"a": 2}]
    assert written([ByteRecords.of([b"1,2", b"3,4"], "text/csv")], None, format="csv") == b"1,2\n3,4\n"
    with pytest.raises(OutputError, match=r"output.format csv cannot hold answers of application/jsonlines"):
        written([lines], None, format="csv")


def test_raw_adds_a_newline_only_where_an_answer_lacks_one():
    answers = ByteRecords.of([b"a", b"b\n", b"", b"\xff"])

    assert written([answers], None, format="raw") == b"a\nb\n\n\xff\n"
    assert written([answers], None, format="raw", assemble_with="none") == b"ab\n\xff"
    assert written([pa.table({"x": ["a", None]})], None, format="raw") == b"a\n\n"


def test_raw_refuses_a_table_of_columns():
    with pytest.raises(OutputError, match=r"output.format raw takes bytes, and the last stage answers a table of i, f"):
        written([pa.table({"i": [1], "f": [1.5]})], None, format="raw")


def test_csv_refuses_nested_columns_before_anything_is_written():
    with pytest.raises(OutputError, match=r"output.format csv cannot hold column 'l', which is list<.*string>"):
        written([], NESTED, format="csv")


def test_parquet_refuses_bytes():
    with pytest.raises(OutputError, match=r"output.format parquet needs columns, and the last stage answers bytes"):
        written([], None, format="parquet")
    with pytest.raises(OutputError, match=r"output.format parquet cannot hold answers of text/csv"):
        written([ByteRecords.of([b"1"], "text/csv")], format="parquet")


def test_parquet_refuses_columns_that_it_lacks_or_that_do_not_fit():
    with pytest.raises(OutputError, match=r"output.format parquet cannot hold the answers: .*struct"):
        written([], schema_of(o=pa.struct([])))
    with pytest.raises(OutputError, match=r"'x' .string. in column 'i' does not fit its type int64"):
        written([pa.table({"i": ["x"]})], schema_of(i=pa.int64()))


def test_jsonl_refuses_what_json_cannot_say():
    with pytest.raises(OutputError, match="column 'f' holds inf, which JSON has no number for"):
        written([pa.table({"f": [1.0, float("inf")]})], None, format="jsonl")
    with pytest.raises(OutputError, match="the answers cannot be written as application/jsonlines: "):
        written([pa.table({"b": [b"\xff"]})], None, format="jsonl")


@pytest.mark.parametrize(("codec", "unpack"), [
    ("gzip", gzip.decompress), ("zstd", lambda data: zstandard.ZstdDecompressor().decompressobj().decompress(data)),
])  # fmt: skip
def test_text_is_compressed_as_stated_with_no_time_in_it(codec, unpack):
    answers = [ByteRecords.of([b"%d" % i for i in range(400_000)])]
    data = written(answers, None, format="raw", compression=codec)

    assert unpack(data) == written(answers, None, format="raw")
    assert codec != "gzip" or data[3:8] == bytes(5)


def test_a_part_without_records_has_its_schema():
    assert pq.read_schema(io.BytesIO(written([]))).equals(SCHEMA)
    assert written([], format="csv") == b'"i","f","s","b","t"\n'
    assert (
        written([], format="csv", header=False) == written([], format="jsonl") == written([], None, format="raw") == b""
    )
