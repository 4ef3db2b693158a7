"""Cutting: whatever the bytes and the size of ranges, every record is in exactly one range, in order, unchanged."""

import csv
import io
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from batchpipe.errors import InputError
from batchpipe.formats import FORMATS, ProvisionalInputError, RangeReader, jsonl, lines
from batchpipe.formats import csv as csv_format
from batchpipe.job import InputSpec
from batchpipe.split import WHOLE, InputObject, Range
from tests.formats_kit import bytes_in, input_spec, range_of

FIELDS = st.text(alphabet='ab,"\n\r \u00e9', max_size=6)
ROWS = st.lists(st.lists(FIELDS, min_size=1, max_size=3), max_size=12)
BOM = b"\xef\xbb\xbf"


OPEN = {"csv": csv_format.open_range, "jsonl": jsonl.open_range, "lines": lines.open_range}


def read(data: bytes, range_: Range, spec: InputSpec, block_bytes: int = 1 << 20) -> tuple[list[bytes], RangeReader]:
    reader = OPEN[spec.format](io.BytesIO(data), range_, 0, spec, None, block_bytes=block_bytes)
    found: list[bytes] = []
    for batch in reader:
        records = bytes_in([batch])
        assert list(batch.origins.ordinals) == list(range(len(found), len(found) + len(batch)))
        assert all(data[at:].startswith(record) for at, record in zip(batch.origins.offsets, records, strict=True))
        found += records
    assert reader.records == len(found)
    return found, reader


def cuts_of(data: bytes, split_bytes: int, spec: InputSpec) -> list[Range]:
    found = InputObject(0, "x.csv", len(data), "")
    cuts = list(FORMATS[spec.format].iter_cuts(lambda: io.BytesIO(data), found, split_bytes, spec))
    assert [start for start, _ in cuts[1:]] == [stop for _, stop in cuts[:-1]]
    return [Range(found, start, stop) for start, stop in cuts]


def read_cut(data: bytes, split_bytes: int, spec: InputSpec, block_bytes: int = 1 << 20) -> list[bytes]:
    """As the driver does: read all ranges at a guess, then again as exact where the one before proves it wrong."""
    records: list[bytes] = []
    expected = 0
    for range_ in cuts_of(data, split_bytes, spec):
        try:
            found, reader = read(data, range_, spec, block_bytes)
            is_wrong = range_.start > 0 and reader.first != expected
        except ProvisionalInputError:
            is_wrong = True
        if is_wrong:
            assert FORMATS[spec.format].needs_proof(spec)
            found, reader = read(data, Range(range_.object, expected, range_.stop, exact=True), spec, block_bytes)
        records += found
        expected = reader.next_start
    return records


def csv_bytes(rows: list[list[str]], line_end: str, *, final: bool) -> bytes:
    """Not by the csv module, which in Python 3.11 leaves a carriage return unquoted where lines end with a newline."""
    data = "".join(",".join(map(quoted, row)) + line_end for row in rows).encode()
    return data if final else data.removesuffix(line_end.encode())


def quoted(field: str) -> str:
    is_plain = field and not set(field) & set(',"\r\n')
    return field if is_plain else f'"{field.replace(chr(34), chr(34) * 2)}"'


def parsed(records: list[bytes]) -> list[list[str]]:
    return [row for record in records for row in csv.reader(io.StringIO(record.decode(), newline=""))]


@settings(max_examples=300, deadline=None)
@given(ROWS, st.sampled_from(["\n", "\r\n"]), st.booleans(), st.booleans(), st.integers(1, 60), st.integers(1, 40))
def test_csv_records_are_those_of_the_csv_module_whatever_the_cut(rows, line_end, final, bom, split_bytes, block):
    data = BOM * bom + csv_bytes(rows, line_end, final=final)

    records = read_cut(data, split_bytes, input_spec(header=False), block)

    assert b"".join(records) == data.removeprefix(BOM)
    assert parsed(records) == rows


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=80) | st.text('{}[]"a1,:\n\r ').map(str.encode), st.integers(1, 30), st.integers(1, 40))
@example(BOM + b"a\nb", 1, 1)
@example(BOM, 1, 1)
@pytest.mark.parametrize("format_", ["lines", "jsonl"])
def test_every_line_is_in_one_range_in_order_unchanged(format_, data, split_bytes, block):
    records = read_cut(data, split_bytes, input_spec(format_), block)

    lines = [line for line in re.split(rb"(?<=\n)", data.removeprefix(BOM)) if line]
    assert records == [line for line in lines if format_ == "lines" or line not in (b"\n", b"\r\n", b"\r")]


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60), st.integers(1, 30), st.integers(1, 40))
def test_csv_cut_at_every_newline_needs_no_proof(data, split_bytes, block):
    records = read_cut(data, split_bytes, input_spec(newlines_in_values=False, header=False), block)

    lines = [line for line in re.split(rb"(?<=\n)", data.removeprefix(BOM)) if line]
    assert records == [line for line in lines if line not in (b"\n", b"\r\n", b"\r")]


@settings(max_examples=300, deadline=None)
@given(st.text('a,"\n\r', max_size=40).map(str.encode), st.integers(1, 20), st.integers(1, 40))
def test_malformed_csv_fails_alike_whatever_the_cut(data, split_bytes, block):
    def outcome(split_bytes: int, block: int) -> object:
        try:
            return read_cut(data, split_bytes, input_spec(header=False), block)
        except InputError as error:
            return type(error), error.where, error.message

    assert outcome(split_bytes, block) == outcome(1000, 1 << 20)


@settings(max_examples=100, deadline=None)
@given(ROWS.filter(bool), st.integers(1, 60))
def test_the_header_is_no_record_of_any_range(rows, split_bytes):
    data = csv_bytes(rows, "\n", final=True)

    assert parsed(read_cut(data, split_bytes, input_spec())) == rows[1:]


def test_every_range_of_quoted_data_is_right_at_once():
    """The first quotes of a range prove its state: nothing has to be read again."""
    data = csv_bytes([['he said "no"', "two\nlines\n", "x,y"]] * 500, "\n", final=True)
    expected = 0
    for range_ in cuts_of(data, 777, input_spec(header=False)):
        _, reader = read(data, range_, input_spec(header=False))
        assert range_.start == 0 or reader.first == expected
        expected = reader.next_start


def test_a_range_that_begins_in_quotes_without_a_sign_of_it_is_read_again():
    data = b'1,"' + b"a\n" * 40 + b'"\n2,b\n'

    assert read_cut(data, 20, input_spec(header=False), 8) == [data[:-4], b"2,b\n"]


def test_only_the_first_bytes_of_a_range_may_change_its_guess():
    """Here the block after them begins at a record, and has a quote that would be well inside a value."""
    data = b"aaa\n" * 3 + b'x",\n'

    with pytest.raises(ProvisionalInputError, match="a quote inside an unquoted field"):
        read(data, range_of(data, start=5), input_spec(header=False), block_bytes=8)


def test_an_exact_range_that_begins_past_its_stop_is_empty():
    found, reader = read(b"a\n" * 9, Range(InputObject(0, "x", 18, ""), 8, 6, exact=True), input_spec("lines"))

    assert (found, reader.first, reader.next_start) == ([], 8, 8)


@pytest.mark.parametrize(("data", "where", "says"), [
    (b'a,b"c\n', "x.csv, byte 3", "a quote inside an unquoted field"),
    (b'a,"b"c\n', "x.csv, byte 4", "text after a closing quote (the value opened at byte 2)"),
    (b'a,"b"\rc\n', "x.csv, byte 4", "text after a closing quote"),
    (b'1\na,"b\nc\n', "x.csv, byte 4", "a quote opened a value that is never closed"),
])  # fmt: skip
def test_malformed_quotes_name_object_offset_and_setting(data, where, says):
    with pytest.raises(InputError, match=re.escape(says)) as caught:
        read(data, range_of(data, "x.csv"), input_spec(header=False))

    assert caught.value.where == where
    assert "input.newlines_in_values: false" in caught.value.next


@pytest.mark.parametrize("format_", ["csv", "jsonl", "lines"])
def test_a_record_over_the_limit_names_object_offset_and_setting(format_):
    data = b"ab\n" + b"x" * 5_000_000 + b"\nc\n"
    with pytest.raises(InputError, match=r"longer than input.max_record_mb allows \(1.5 MB\)") as caught:
        read(data, range_of(data, "x.csv"), input_spec(format_, max_record_mb=1.5))

    assert caught.value.where == "x.csv, byte 3"


@pytest.mark.parametrize(("found", "format_", "keys", "cuts"), [
    (InputObject(0, "x.csv.gz", 99, ""), "csv", {}, [(0, WHOLE)]),
    (InputObject(0, "x.csv", 99, ""), "csv", {"compression": "zstd"}, [(0, WHOLE)]),
    (InputObject(0, "x", 99, ""), "object", {}, [(0, WHOLE)]),
    (InputObject(0, "x", 10, ""), "lines", {}, [(0, WHOLE)]),
    (InputObject(0, "x", 0, ""), "lines", {}, []),
    (InputObject(0, "x", 0, ""), "object", {}, []),
    (InputObject(0, "x", 0, ""), "parquet", {}, []),
    (InputObject(0, "x", 25, ""), "lines", {}, [(0, 8), (8, 16), (16, 25)]),
])  # fmt: skip
def test_what_is_cut_and_what_is_not(found, format_, keys, cuts):
    assert list(FORMATS[format_].iter_cuts(pytest.fail, found, 10, input_spec(format_, **keys))) == cuts


def test_a_record_over_the_limit_is_not_read_to_its_end():
    data = b'"' + b"x" * 30_000_000
    reader = csv_format.open_range(io.BytesIO(data), range_of(data), 0, input_spec(max_record_mb=2), None)

    with pytest.raises(InputError, match=r"\(a quote opens a value there that is not closed\)"):
        list(reader)
    assert reader.bytes_read < 5_000_000


def test_a_long_record_is_read_in_pieces_that_double():
    """Joining what was read so far at every block would take O(n^2)."""
    data = b"x" * 30_000_000 + b"\n"
    sizes: list[int] = []

    class Counted(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            sizes.append(size or 0)
            return super().read(size)

    list(lines.open_range(Counted(data), range_of(data, stop=10), 0, input_spec("lines")))

    assert len(sizes) < 20


def test_reading_stops_soon_after_the_stop():
    data = b"abcdefgh\n" * 1_000_000
    _, reader = read(data, range_of(data, start=900, stop=1800), input_spec("lines"))

    assert reader.records == 100
    assert reader.bytes_read < 100_000
