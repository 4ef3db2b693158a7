"""Picked records: whichever are picked, they have the bytes, types and places that they have when all are read."""

import gzip
import io
from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchpipe.batch import MiniBatch, Records
from batchpipe.errors import InputError
from batchpipe.formats import FORMATS, InputSchema
from batchpipe.formats import lines as lines_format
from batchpipe.job import InputSpec
from batchpipe.picks import PickedRange
from batchpipe.split import WHOLE, InputObject, Picks, Range
from tests.formats_kit import input_spec

FIELDS = st.text(alphabet='ab,"\n\r \u00e9', max_size=6)
ROWS = st.lists(st.tuples(FIELDS, FIELDS), min_size=1, max_size=12)
MARK = b"\xef\xbb\xbf"

Placed = tuple[int, int, Any]
"""A record's place in its object, its first byte, and the record itself."""


def placed(batches: Sequence[MiniBatch]) -> list[Placed]:
    return [
        (int(ordinal), int(offset), record)
        for batch in batches
        for ordinal, offset, record in zip(
            batch.origins.ordinals, batch.origins.offsets, listed(batch.records), strict=True
        )
    ]


def listed(records: Records) -> list[Any]:
    return records.to_pylist() if isinstance(records, pa.Table) else records.to_list()


def read_all(data: bytes, found: InputObject, spec: InputSpec, schema: InputSchema | None) -> list[Placed]:
    whole = Range(found, 0, WHOLE)
    return placed(list(FORMATS[spec.format].open_range(io.BytesIO(data), whole, 0, spec, schema)))


def read_picked(
    data: bytes, found: InputObject, spec: InputSpec, schema: InputSchema | None, picks: Picks
) -> tuple[list[Placed], PickedRange]:
    range_ = Range(found, 0, WHOLE, picks=picks)
    reader = PickedRange(io.BytesIO(data), range_, 0, spec, schema, FORMATS[spec.format])
    return placed(list(reader)), reader


def picks_of(records: Sequence[Placed]) -> Picks:
    return Picks(array("q", [each[0] for each in records]), array("q", [each[1] for each in records]))


def check(data: bytes, uri: str, spec: InputSpec, draw: st.DataObject) -> None:
    found = InputObject(0, uri, len(data), "")
    schema = FORMATS[spec.format].infer_schema([(found, io.BytesIO(data))], spec)
    everything = read_all(data, found, spec, schema)
    is_wanted = draw.draw(st.lists(st.booleans(), min_size=len(everything), max_size=len(everything)))
    wanted = [record for record, yes in zip(everything, is_wanted, strict=True) if yes]
    if wanted:
        picked, reader = read_picked(data, found, spec, schema, picks_of(wanted))
        assert picked == wanted
        assert reader.records == len(wanted)


def quoted(field: str) -> str:
    is_plain = field and not set(field) & set(',"\r\n')
    return field if is_plain else '"' + field.replace('"', '""') + '"'


@pytest.fixture(autouse=True)
def apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few bytes apart is far enough to be read apart."""
    monkeypatch.setattr(lines_format, "PICKED_TOGETHER", 8)


@given(ROWS, st.booleans(), st.booleans(), st.sampled_from(["", "\n", "\r\n\n"]), st.booleans(), st.data())
def test_picked_rows_of_a_csv(rows: list[tuple[str, str]], header: bool, mark: bool, blank: str, packed: bool, draw):
    lines = [",".join(map(quoted, row)) + "\n" for row in ([("a", "b"), *rows] if header else rows)]
    data = MARK * mark + (blank + blank.join(lines)).encode()
    spec = input_spec("csv", header=header, types={} if not header else {"a": "string", "b": "string"})
    check(*((gzip.compress(data), "x.csv.gz") if packed else (data, "x.csv")), spec, draw)


@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=30), st.sampled_from(["utf-8", "utf-16"]), st.data())
def test_picked_lines_of_any_encoding(numbers: list[int], encoding: str, draw):
    data = "".join(f"line {n}\n" for n in numbers).encode(encoding)
    check(data, "x.txt", input_spec("lines", encoding=encoding), draw)


@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=30), st.data())
def test_picked_lines_of_json(numbers: list[int], draw):
    data = "\n".join(f'{{"n": {n}}}' for n in numbers).encode()
    check(data, "x.jsonl", input_spec("jsonl"), draw)


@settings(max_examples=25)  # writing a file takes 50 ms
@given(st.integers(1, 30), st.integers(1, 7), st.data())
def test_picked_rows_of_row_groups(count: int, rows: int, draw):
    file = io.BytesIO()
    pq.write_table(pa.table({"n": range(count), "text": [f"row {n}" for n in range(count)]}), file, row_group_size=rows)
    check(file.getvalue(), "x.parquet", input_spec("parquet"), draw)


def test_an_object_is_its_only_record():
    data, spec = b"whole", input_spec("object")
    found = InputObject(0, "x.bin", len(data), "")

    picked, _ = read_picked(data, found, spec, None, Picks(array("q", [0]), array("q", [0])))

    assert picked == [(0, 0, b"whole")]


def test_fields_in_another_order_are_reordered_as_in_the_first_run():
    first, other = InputObject(0, "a.csv", 8, ""), InputObject(1, "b.csv", 12, "")
    spec = input_spec("csv")
    schema = FORMATS["csv"].infer_schema([(first, io.BytesIO(b"n,m\n1,2\n"))], spec)

    picked, _ = read_picked(b"m,n\n3,4\n5,6\n", other, spec, schema, Picks(array("q", [1]), array("q", [8])))

    assert picked == [(1, 8, b"6,5\n")]


def test_what_lies_far_from_any_picked_record_is_not_read():
    data = b"".join(b"%09d\n" % n for n in range(1_000_000))
    found = InputObject(0, "x.txt", len(data), "")

    picks = Picks(array("q", [5, 900_000]), array("q", [50, 9_000_000]))
    picked, reader = read_picked(data, found, input_spec("lines"), None, picks)

    assert [record for _, _, record in picked] == [b"000000005\n", b"000900000\n"]
    assert reader.bytes_read < 200_000


def test_a_picked_record_keeps_no_more_than_itself_in_memory():
    data = b"".join(b"%09d\n" % n for n in range(100_000))
    found = InputObject(0, "x.txt", len(data), "")
    range_ = Range(found, 0, WHOLE, picks=Picks(array("q", [7]), array("q", [70])))

    (batch,) = PickedRange(io.BytesIO(data), range_, 0, input_spec("lines"), None, FORMATS["lines"])

    assert not isinstance(batch.records, pa.Table)
    assert len(batch.records.data) == 10
    assert np.array_equal(batch.origins.ordinals, [7])


def test_a_record_that_is_not_there_is_an_error():
    found = InputObject(0, "x.txt", 4, "")
    picks = Picks(array("q", [0, 1]), array("q", [0, 3]))

    with pytest.raises(InputError, match="1 of the 2 records to redrive are not found"):
        read_picked(b"a\nb\n", found, input_spec("lines"), None, picks)
