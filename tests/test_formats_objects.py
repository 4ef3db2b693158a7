"""Objects as they lie there: compressed, in other encodings, whole, Parquet; and broken in each of these ways."""

import gzip
import io
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from batchpipe.batch import MiniBatch
from batchpipe.convert import InputSchema
from batchpipe.errors import InputError
from batchpipe.formats import FORMATS
from batchpipe.formats import parquet as parquet_format
from batchpipe.split import WHOLE, InputObject
from tests.formats_kit import bytes_in, input_spec, range_of, rows_in


def read(data: bytes, name: str = "x", format_: str = "lines", **keys: Any) -> list[bytes]:
    file = io.BytesIO(data)
    reader = FORMATS[format_].open_range(file, range_of(data, name), 0, input_spec(format_, **keys), None)
    records = bytes_in(reader)
    assert reader.records == len(records)
    assert not file.closed, "the caller closes what it opened"
    return records


PACK: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "zst": zstandard.ZstdCompressor(write_checksum=True).compress,
}


@pytest.mark.parametrize("ending", PACK)
def test_members_and_frames_are_one_stream(ending):
    data = PACK[ending](b"a\nb") + PACK[ending](b"") + PACK[ending](b"c\n")

    assert read(data, f"x.{ending.upper()}") == [b"a\n", b"bc\n"]


@pytest.mark.parametrize(("name", "stated"), [("gz", "gzip"), ("zst", "zstd")])
def test_compression_is_as_stated_before_the_ending(name, stated):
    packed = PACK[name](b"a\nb\n")

    assert read(packed, "x.txt", compression=stated) == [b"a\n", b"b\n"]
    assert b"".join(read(packed, f"x.{name}", compression="none")) == packed


@pytest.mark.parametrize("ending", PACK)
@pytest.mark.parametrize("damage", [
    lambda data: data[:-1], lambda data: data[: len(data) // 2], lambda data: data[:3], lambda _: b"plain text",
    lambda data: data + b"garbage", lambda data: data[:-6] + b"\0" + data[-5:],
])  # fmt: skip
def test_truncated_or_corrupt_data_name_the_object(ending, damage):
    data = damage(PACK[ending](bytes(range(256)) * 50))

    with pytest.raises(
        InputError, match=f"cannot read 'x.{ending}': its (gzip|zstd) data are truncated or corrupt: "
    ) as caught:
        read(data, f"x.{ending}")
    assert caught.value.where.startswith(f"x.{ending}, after ")


def test_zeros_that_pad_a_gzip_are_passed_over():
    assert read(gzip.compress(b"a\n") + bytes(512), "x.gz") == [b"a\n"]


@pytest.mark.parametrize("ending", ["gz", "zst", "txt"])
def test_an_error_of_the_file_itself_stays_what_it_is(ending):
    class Vanishing(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            raise FileNotFoundError(2, "gone", "x")

    with pytest.raises(FileNotFoundError, match="gone"):
        list(FORMATS["lines"].open_range(Vanishing(), range_of(b"abc", f"x.{ending}"), 0, input_spec("lines"), None))


@pytest.mark.parametrize("encoding", ["shift_jis", "gb18030", "iso2022_jp"])
def test_text_that_cannot_be_cut_as_bytes_is_read_as_utf8(encoding):
    text = "\u8868,\u80fd\n\u30bd|x\n"
    spec = input_spec("lines", encoding=encoding)
    found = InputObject(0, "x", 99, "")

    assert read(text.encode(encoding), encoding=encoding) == [line.encode() for line in text.splitlines(keepends=True)]
    assert list(FORMATS["lines"].iter_cuts(io.BytesIO, found, 10, spec)) == [(0, WHOLE)]


def test_bytes_that_are_not_of_a_stated_encoding_name_it():
    with pytest.raises(InputError, match=r"cannot read 'x' as shift_jis: .* illegal multibyte sequence"):
        read(b"a\n\x81\xff", encoding="shift_jis")


def test_an_object_is_one_record_as_it_lies_there():
    packed = gzip.compress(b"ab")

    assert read(b"\xef\xbb\xbfa\n\nb", format_="object") == [b"\xef\xbb\xbfa\n\nb"]
    assert read(packed, "x.gz", "object") == [packed]
    assert read(packed, "x", "object", compression="gzip") == [b"ab"]
    assert read(b"", format_="object") == []


def test_an_object_over_the_limit_names_it_and_the_setting():
    with pytest.raises(InputError, match=r"'x' is longer than input.max_record_mb allows for one record \(1 MB\)"):
        read(bytes(1_048_577), format_="object", max_record_mb=1)


# Parquet


def parquet(table: pa.Table, group_rows: int = 10, *, use_dictionary: bool = True) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, row_group_size=group_rows, use_dictionary=use_dictionary)
    return sink.getvalue()


def infer(*objects: bytes, **keys: Any) -> InputSchema:
    samples = ((InputObject(i, f"{i}.parquet", len(data), ""), io.BytesIO(data)) for i, data in enumerate(objects))
    schema = FORMATS["parquet"].infer_schema(samples, input_spec("parquet", **keys))
    assert schema is not None
    return schema


def read_parquet(data: bytes, schema: InputSchema, start: int = 0, stop: int = WHOLE) -> list[MiniBatch]:
    range_ = range_of(data, "x.parquet", start, stop)
    reader = FORMATS["parquet"].open_range(io.BytesIO(data), range_, 0, input_spec("parquet"), schema)
    batches = list(reader)
    assert (reader.first, reader.records) == (start, sum(map(len, batches)))
    tables = [batch.records for batch in batches if isinstance(batch.records, pa.Table)]
    assert all(table.schema.equals(schema.schema, check_metadata=True) for table in tables)
    return batches


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(), max_size=60), st.integers(1, 20), st.integers(1, 2_000))
def test_every_row_is_in_one_range_in_order(values, group_rows, split_bytes):
    rows = [{"a": str(value)} for value in values]
    data = parquet(pa.Table.from_pylist(rows, pa.schema([("a", pa.string())])), group_rows)
    found = InputObject(0, "x.parquet", len(data), "")
    cuts = list(FORMATS["parquet"].iter_cuts(lambda: io.BytesIO(data), found, split_bytes, input_spec("parquet")))

    batches = [batch for start, stop in cuts for batch in read_parquet(data, infer(data), start, stop)]

    assert rows_in(batches) == rows
    assert [start for start, _ in cuts[1:]] == [stop for _, stop in cuts[:-1]]


def test_the_footer_of_an_object_that_is_not_cut_is_not_read():
    cuts = FORMATS["parquet"].iter_cuts(pytest.fail, InputObject(0, "x", 100, ""), 100, input_spec("parquet"))

    assert list(cuts) == [(0, WHOLE)]


def test_ordinals_run_over_the_row_groups_of_a_range_and_offsets_are_unknown():
    data = parquet(pa.table({"a": range(30)}))
    batches = read_parquet(data, infer(data), 1, 3)

    assert [int(at) for batch in batches for at in batch.origins.ordinals] == list(range(20))
    assert {int(at) for batch in batches for at in batch.origins.offsets} == {-1}


def test_columns_are_picked_and_types_are_plain():
    table = pa.table({"a": [1], "b": pa.array(["x"]).dictionary_encode(), "c": pa.array(["y"], pa.large_string())})
    data = parquet(table.replace_schema_metadata({"pandas": "{}"}))
    schema = infer(data, columns=["c", "b"])

    assert schema.schema.equals(pa.schema([("c", pa.string()), ("b", pa.string())]), check_metadata=True)
    assert rows_in(read_parquet(data, schema)) == [{"c": "y", "b": "x"}]


def test_rows_come_in_tables_of_bounded_size():
    data = parquet(
        pa.table({"a": [str(i) * 100_000 for i in range(10)] * 10, "b": range(100)}), 100, use_dictionary=False
    )

    assert max(batch.nbytes for batch in read_parquet(data, infer(data))) <= 1.2 * parquet_format.BATCH_BYTES
    assert len(read_parquet(data, infer(data, columns=["b"]))) == 1


def test_other_objects_are_cast_to_the_first_ones_columns_or_named():
    schema = infer(parquet(pa.table({"a": pa.array([1], pa.int64()), "b": ["x"]})))

    narrow = parquet(pa.table({"b": ["y"], "more": [0], "a": pa.array([2], pa.int8())}))
    assert rows_in(read_parquet(narrow, schema)) == [{"a": 2, "b": "y"}]
    with pytest.raises(InputError, match=r"'x.parquet' lacks the column 'b', compared with '0.parquet'"):
        read_parquet(parquet(pa.table({"a": [1]})), schema)
    with pytest.raises(InputError, match=r"the columns of 'x.parquet' do not fit those of '0.parquet'") as caught:
        read_parquet(parquet(pa.table({"a": ["x"], "b": ["y"]})), schema)
    assert caught.value.where == "x.parquet: a string, b string; 0.parquet: a int64, b string"


@pytest.mark.parametrize("damage", [lambda data: data[:-5], lambda data: data[: len(data) // 2], lambda _: b"text" * 9])
def test_truncated_parquet_names_the_object(damage):
    data = parquet(pa.table({"a": range(1000)}))

    with pytest.raises(InputError, match=r"cannot read 'x.parquet' as Parquet: "):
        read_parquet(damage(data), infer(data))
    with pytest.raises(InputError, match=r"cannot read '0.parquet' as Parquet: "):
        infer(damage(data))


def test_a_damaged_page_names_the_object():
    data = parquet(pa.table({"a": [str(i) for i in range(1000)]}), 1000, use_dictionary=False)

    with pytest.raises(InputError, match=r"cannot read 'x.parquet' as Parquet: "):
        read_parquet(data[:4] + b"\xff" * 400 + data[404:], infer(data))


def test_an_unknown_column_is_named_with_those_there_are():
    with pytest.raises(InputError, match=r"input.columns names 'z', which is not a column of '0.parquet'") as caught:
        infer(parquet(pa.table({"a": [1], "b": ["x"]})), columns=["z"])

    assert caught.value.where == "0.parquet: a int64, b string"


def test_empty_objects_have_no_records_and_do_not_say_the_columns():
    data = parquet(pa.table({"a": [1]}))

    assert read_parquet(b"", infer(b"", data)) == []
    assert infer().schema == pa.schema([])
