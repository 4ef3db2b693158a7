"""Bodies by content type: what is sent, what is read back, and how answers are counted (G8)."""

import contextlib
import csv
import io
import json
import re
from datetime import UTC, date, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchpipe.batch import ByteRecords, Records
from batchpipe.content import (
    ARROW,
    CSV,
    JSON,
    JSON_LINES,
    ContentError,
    can_be_sent,
    decode,
    decode_one,
    encode,
    encode_one,
    in_utf8,
    parse_content_type,
)
from batchpipe.stages.tables import to_table

TABLE = pa.table({"id": [1, 2], "name": ["a,b", None], "score": [0.5, float("nan")]})
FIELDS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r"), max_size=8)


def lines(*records: bytes, content_type: str = CSV) -> ByteRecords:
    return ByteRecords.of(records, content_type)


def read(body: bytes, content_type: str, *, answer_key: str = "") -> ByteRecords:
    records = decode(body, content_type, answer_key=answer_key)
    assert isinstance(records, ByteRecords)
    return records


def texts(records: Records) -> list[bytes]:
    assert isinstance(records, ByteRecords)
    return records.to_list()


@pytest.mark.parametrize("header", [True, False])
@pytest.mark.parametrize(("values", "rows"), [([1, None, 3], [b"1", b'""', b"3"]), (["a", None], [b'"a"', b'""'])])
def test_null_alone_on_its_line_is_a_field_and_no_blank_line(values: list[Any], rows: list[bytes], header: bool):
    body = bytes(encode(pa.table({"x": values}), CSV, header=header))

    assert body.splitlines() == [b'"x"'] * header + rows
    assert to_table(read(body.removeprefix(b'"x"\n'), CSV), ["x"]).column(0).to_pylist() == values


def test_blank_line_of_an_answer_of_one_column_is_an_empty_field():
    assert to_table(read(b"1\n\n3\n", CSV)).column(0).to_pylist() == [1, None, 3]


@given(st.data())
def test_damaged_arrow_stream_is_no_content_and_no_crash(data):
    body = bytearray(encode(TABLE, ARROW))
    for place in data.draw(st.lists(st.integers(0, len(body) - 1), max_size=3)):
        body[place] ^= data.draw(st.integers(1, 255))
    body = body[: data.draw(st.integers(0, len(body)))]
    with contextlib.suppress(ContentError):
        decode(bytes(body), ARROW)


def test_arrow_stream_with_a_column_twice_is_told():
    twice = pa.table([pa.array([1]), pa.array([2])], names=["x", "x"])
    with pytest.raises(ContentError, match="an Arrow stream with 2 columns 'x'"):
        decode(bytes(encode(twice, ARROW)), ARROW)


@pytest.mark.parametrize("blank", [b"\n", b"   \n", b"\t\r\n"])
def test_blank_json_line_is_no_record_whatever_blanks_it_holds(blank: bytes):
    assert texts(decode(b'{"a":1}\n' + blank + b' {"a":2}\n', JSON_LINES)) == [b'{"a":1}\n', b' {"a":2}\n']


def test_charset_that_makes_no_sense_is_told():
    with pytest.raises(ContentError, match="not text in charset"):
        decode(b"1", "text/csv; charset*=utf-8''%00")


@pytest.mark.parametrize(
    ("asked", "answered"),
    [
        ("application/json; charset=utf-16", "application/json; charset=utf-8"),
        ("text/csv; header=present; charset=latin-1", "text/csv; header=present; charset=utf-8"),
        ("text/csv; charset=UTF-8", "text/csv; charset=UTF-8"),
    ],
)
def test_type_asked_for_in_another_charset_is_answered_in_utf_8(asked: str, answered: str):
    assert in_utf8(asked) == answered


def test_csv_lines_are_sent_as_they_lie_without_a_copy():
    records = lines(b"1,2\n", b"3,4\n")

    body = encode(records, "text/csv")

    assert isinstance(body, memoryview)
    assert body.obj is records.data.obj
    assert bytes(body) == b"1,2\n3,4\n"


def test_last_line_of_one_object_does_not_run_into_the_first_of_the_next():
    assert bytes(encode(lines(b"1,2", b"3,4\r\n", b"5,6"), CSV)) == b"1,2\n3,4\n5,6\n"


def test_one_line_without_a_newline_stays_as_it_is():
    assert bytes(encode(lines(b"1,2"), CSV)) == b"1,2"


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        (CSV, b'1,"a,b",0.5\n2,,nan\n'),
        (JSON_LINES, b'{"id":1,"name":"a,b","score":0.5}\n{"id":2,"name":null,"score":null}\n'),
        (JSON, b'[{"id":1,"name":"a,b","score":0.5},{"id":2,"name":null,"score":null}]'),
    ],
)
def test_table_is_sent_as_its_content_type(content_type: str, body: bytes):
    assert bytes(encode(TABLE, content_type)) == body


def test_table_comes_back_from_arrow_as_it_was():
    table = decode(bytes(encode(TABLE, ARROW)), ARROW)

    assert isinstance(table, pa.Table)
    assert table.select(["id", "name"]).equals(TABLE.select(["id", "name"]))


def test_header_stands_before_a_tables_rows_if_asked_for():
    assert bytes(encode(TABLE.slice(0, 1), CSV, header=True)) == b'"id","name","score"\n1,"a,b",0.5\n'


def test_json_is_wrapped_under_the_request_key():
    records = lines(b'{"a":1}\n', b'{"a":2}', content_type=JSON_LINES)

    assert bytes(encode(records, JSON, request_key="instances")) == b'{"instances":[{"a":1},{"a":2}]}'


def test_moments_are_iso_8601_in_json():
    table = pa.table({"day": [date(2013, 1, 2)], "at": [datetime(2013, 1, 2, 3, tzinfo=UTC)]})

    assert json.loads(bytes(encode(table, JSON_LINES))) == {"day": "2013-01-02", "at": "2013-01-02T03:00:00+00:00"}


def test_infinity_is_refused_in_json():
    with pytest.raises(ContentError, match="cannot be sent as application/json: Out of range float"):
        encode(pa.table({"x": [float("inf")]}), JSON)


def test_table_is_refused_as_a_type_that_holds_no_records():
    with pytest.raises(ContentError, match="a table cannot be sent as image/png; it can as application/json"):
        encode(TABLE, "image/png")


def test_csv_is_refused_as_json_since_it_would_have_to_be_parsed():
    with pytest.raises(ContentError, match="text/csv cannot be sent as application/json without being parsed"):
        encode(lines(b"1\n"), JSON)


@pytest.mark.parametrize(
    ("have", "wanted"),
    [
        (CSV, "image/png"),
        (CSV, "application/x-recordio-protobuf"),
        (JSON, "application/pdf"),
        (JSON_LINES, CSV),
        ("image/png", CSV),
        ("text/html", JSON),
        ("application/vnd.model+json", CSV),
        ("application/json-seq", JSON_LINES),
    ],
)
def test_what_is_of_another_type_is_refused_as_one_record_too(have: str, wanted: str):
    record = lines(b"1", content_type=have)

    assert not can_be_sent(record, wanted)
    with pytest.raises(ContentError, match=f"{re.escape(have)} cannot be sent as {wanted} without being parsed"):
        encode(record, wanted)


@pytest.mark.parametrize(
    ("have", "wanted"),
    [
        (CSV, "text/plain"),
        (CSV, "text/libsvm"),
        ("image/png", "application/octet-stream"),
        ("application/octet-stream", "image/png"),
        ("binary/octet-stream", "image/jpeg"),
        ("image/jpeg", "application/x-image"),
        ("audio/x-wav", "audio/wav"),
        ("text/html", "application/x-image"),
        ("application/x-protobuf", "application/x-recordio-protobuf"),
        (JSON_LINES, "application/vnd.model+json"),
        (JSON_LINES, "application/x-amz-json-1.1"),
        (JSON, "text/json"),
        ("application/vnd.model+json", "application/vnd.model+json; version=1"),
    ],
)
def test_one_record_goes_as_what_is_stated_where_it_may_be_that(have: str, wanted: str):
    record = lines(b"1", content_type=have)

    assert can_be_sent(record, wanted)
    assert bytes(encode(record, wanted)) == b"1"


@pytest.mark.parametrize("have", [CSV, "application/octet-stream"])
def test_document_of_several_lines_brings_its_own_header(have: str):
    document = lines(b"a,b\n1,2\n", content_type=have)

    assert can_be_sent(document, CSV, header=True)
    assert can_be_sent(lines(b"a,b\n"), CSV, header=True) is False
    assert can_be_sent(lines(b"a,b\n", content_type="application/octet-stream"), CSV, header=True)
    assert bytes(encode_one(document, "text/csv; header=present", header=True)) == b"a,b\n1,2\n"


def test_header_that_csv_records_do_not_know_is_refused():
    assert not can_be_sent(lines(b"1,2\n"), CSV, header=True)
    with pytest.raises(ContentError, match="a header is wanted, and the records come without one"):
        encode(lines(b"1,2\n"), CSV, header=True)


@pytest.mark.parametrize("content_type", [JSON, "application/vnd.model+json"])
def test_json_that_was_printed_to_be_read_becomes_one_line_and_changes_in_nothing_else(content_type: str):
    printed = lines(b'{\n"a":\r\n0.12345678901234567890, "a": 1e400, "b": "\\n"}', b"[1]", content_type=content_type)

    assert bytes(encode(printed, JSON_LINES)) == b'{ "a":  0.12345678901234567890, "a": 1e400, "b": "\\n"}\n[1]\n'


@pytest.mark.parametrize("document", [b'{"a": "x\ny"}', b'{"a": 1}\n{"a": 2}', b"{\n" + b'"'])
def test_what_is_no_json_document_is_not_made_one_by_putting_it_on_a_line(document: bytes):
    with pytest.raises(ContentError, match="not JSON, so that it cannot be put on one line"):
        encode(lines(document, content_type=JSON), JSON_LINES)


def test_several_objects_are_refused_as_one_body():
    with pytest.raises(ContentError, match="a body of image/jpeg is one record, not 2"):
        encode(lines(b"x", b"y", content_type="application/octet-stream"), "image/jpeg")


def test_untyped_records_take_the_name_that_the_stage_gives_them():
    assert bytes(encode(lines(b"1,2\n", b"3,4\n", content_type="text/plain"), CSV)) == b"1,2\n3,4\n"


@pytest.mark.parametrize("content_type", [JSON, "application/json; charset=utf-8"])
def test_one_json_record_is_sent_bare(content_type: str):
    assert bytes(encode_one(lines(b'{"a":1}\n', content_type=JSON_LINES), content_type)) == b'{"a":1}'


def test_answer_to_one_record_is_one_record_whatever_it_holds():
    assert texts(decode_one(b"[1,\n2]", JSON)) == [b"[1,\n2]"]
    assert texts(decode_one(b"", CSV)) == [b""]


@given(st.lists(st.lists(FIELDS, min_size=2, max_size=3), max_size=6), st.sampled_from(["\n", "\r\n"]))
def test_G8_csv_answers_are_counted_as_rfc_4180_records(rows: list[list[str]], terminator: str):
    text = io.StringIO()
    csv.writer(text, lineterminator=terminator).writerows(rows)
    body = text.getvalue().encode()

    records = decode(body, CSV)

    assert len(records) == len(rows)
    assert b"".join(texts(records)) == body


@pytest.mark.parametrize("body", [b"1\n\n3\n", b"1\n\n3"])
def test_G8_blank_csv_line_is_an_answer_of_one_empty_field(body: bytes):
    assert len(decode(body, CSV)) == 3


def test_G8_blank_json_lines_are_no_answers():
    assert texts(decode(b'{"a":1}\n\n{"a":2}\r\n\r\n', JSON_LINES)) == [b'{"a":1}\n', b'{"a":2}\r\n']


def test_G8_json_answers_are_the_elements_under_the_answer_key():
    body = '{"predictions": [{"p": 0.1}, [1, "ü"], null]}'.encode()

    assert texts(decode(body, JSON, answer_key="predictions")) == [b'{"p":0.1}\n', '[1,"ü"]\n'.encode(), b"null\n"]


@pytest.mark.parametrize(
    ("body", "content_type", "answer_key", "text"),
    [
        (b"{", JSON, "", "not JSON: Expecting"),
        (b'{"predictions": []}', JSON, "", "not a JSON array of one answer a record at the top"),
        (b'{"a": 1, "b": 2}', JSON, "predictions", "no key 'predictions' .* the answer is an object of a, b"),
        (b"[1]", JSON, "predictions", "no key 'predictions' .* the answer is no object"),
        (b'{"predictions": 1}', JSON, "predictions", "not a JSON array .* under 'predictions'"),
        (b"[" * 100_000, JSON, "", "not JSON: maximum recursion depth exceeded"),
        (rb'["\ud800"]', JSON, "", "not text: surrogates not allowed in an answer"),
        (b"nonsense", ARROW, "", "not an Arrow stream: "),
        (b"\xff", "text/csv; charset=ascii-7", "", "not text in charset 'ascii-7'"),
        (b"\x81", "text/csv; charset=cp1252", "", "not text in charset 'cp1252'"),
    ],
)
def test_answer_that_cannot_be_read_says_why(body: bytes, content_type: str, answer_key: str, text: str):
    with pytest.raises(ContentError, match=text):
        decode(body, content_type, answer_key=answer_key)


def test_charset_of_an_answer_becomes_utf_8_and_its_type_has_no_parameters():
    records = read("é\n".encode("latin-1"), "Text/CSV; charset=ISO-8859-1")

    assert (texts(records), records.content_type) == (["é\n".encode()], CSV)


@pytest.mark.parametrize(
    ("text", "media_type", "parameters"),
    [
        ("text/csv; charset=utf-8", CSV, {"charset": "utf-8"}),
        ('TEXT/CSV;header="present"', CSV, {"header": "present"}),
        ("application/x-ndjson", JSON_LINES, {}),
        ("text/csv; charset*=utf-8''latin-1", CSV, {"charset": "latin-1"}),
        ("", "", {}),
    ],
)
def test_content_type_is_known_by_its_usual_name(text: str, media_type: str, parameters: dict[str, str]):
    assert parse_content_type(text) == (media_type, parameters)


def test_large_csv_answer_is_cut_in_one_sweep():
    body = b'"a\nb",1\n' * 200_000

    records = read(body, CSV)

    assert np.array_equal(records.ends, np.arange(1, 200_001) * 8)


@pytest.mark.parametrize(
    ("record", "why"),
    [
        (b"{}", "is an object without a key"),
        (b'{"n": "\xff"}', "is not JSON: 'utf-8' codec can't decode byte 0xff"),
        (b'{"n": 1, "n": 2}', "is JSON that cannot be read"),
    ],
)
def test_a_record_that_alone_has_no_column_is_no_table_of_none(record: bytes, why: str):
    with pytest.raises(ContentError, match=f"^record 1 {re.escape(why)}"):
        to_table(ByteRecords.of([record + b"\n"], JSON_LINES))
