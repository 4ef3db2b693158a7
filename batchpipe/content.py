"""Records to a request's body and an answer's body to records, by content type. Pure: no I/O.

text/csv, application/json, application/jsonlines and Arrow streams hold many records; a body of any other type is
one record. Bytes that already are of the wanted type are joined, never parsed.
"""

import codecs
import json
import re
from collections import Counter
from datetime import date, time
from email.message import Message
from email.utils import collapse_rfc2231_value
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv

from batchpipe.batch import ByteRecords, Int64s, Records
from batchpipe.specs.stage import is_utf8

CSV = "text/csv"
JSON = "application/json"
JSON_LINES = "application/jsonlines"
ARROW = "application/vnd.apache.arrow.stream"
TABULAR = frozenset({CSV, JSON, JSON_LINES, ARROW})
BYTES = frozenset({"application/octet-stream", "binary/octet-stream"})
UNTYPED = BYTES | {"text/plain"}
"""What `lines` and `object` are until a stage's content type names them."""

_OTHER_NAMES = {
    "application/jsonl": JSON_LINES,
    "application/json-lines": JSON_LINES,
    "application/x-jsonlines": JSON_LINES,
    "application/x-ndjson": JSON_LINES,
    "application/ndjson": JSON_LINES,
    "application/csv": CSV,
}
_NEWLINE, _QUOTE = 10, 34
_BLANKS = np.frombuffer(b" \t\r\n", np.uint8)

Body: TypeAlias = bytes | memoryview


class ContentError(ValueError):
    """A body is not what its content type says, or records cannot be written as the content type wanted."""


@lru_cache(maxsize=256)
def parse_content_type(content_type: str) -> tuple[str, dict[str, str]]:
    """Return the media type, lower case and by its usual name, and the parameters."""
    message = Message()
    message["content-type"] = content_type
    media_type = message.get_content_type() if content_type.strip() else ""
    stated = (message.get_params() or [])[1:]
    parameters = {name.lower(): collapse_rfc2231_value(value) for name, value in stated}
    return _OTHER_NAMES.get(media_type, media_type), parameters


def has_header(content_type: str) -> bool:
    """Whether this type says that its rows come behind a header: ``text/csv; header=present`` (RFC 4180)."""
    return parse_content_type(content_type)[1].get("header") == "present"


def named(content_type: str) -> str:
    """This type, and that its rows come behind a header."""
    return f"{content_type}; header=present"


def in_utf8(content_type: str) -> str:
    """What a body is that was asked for as this type: in UTF-8, whichever charset that was to be."""
    media_type, parameters = parse_content_type(content_type)
    if is_utf8(parameters.get("charset", "utf-8")):
        return content_type
    others = (f"; {name}={value}" for name, value in parameters.items() if name != "charset")
    return f"{media_type}{''.join(others)}; charset=utf-8"


def holds_many(content_type: str) -> bool:
    """Whether a body of this type holds any number of records; any other is one record."""
    return parse_content_type(content_type)[0] in TABULAR


def encode(records: Records, content_type: str, *, header: bool = False, request_key: str = "") -> Body:
    """Return the body of one request that holds all records. Raises ContentError.

    ``header`` puts column names before the rows of a table sent as CSV, or before CSV records, which must know theirs;
    ``request_key`` wraps JSON: ``{"instances": [...]}``. A type that is not `holds_many` takes exactly one record.
    """
    media_type, _ = parse_content_type(content_type)
    if isinstance(records, pa.Table):
        return _encode_table(records, media_type, header=header, request_key=request_key)
    _fits_or_raise(records, media_type, header=header)
    if media_type not in TABULAR:
        if len(records) != 1:
            raise ContentError(f"a body of {media_type} is one record, not {len(records):,}")
        return records.body()
    if media_type == JSON:
        return _wrap(b",".join([bytes(records[i]).strip() for i in range(len(records))]), request_key)
    if media_type == ARROW:
        return records.body()
    if media_type == JSON_LINES and records.content_type != JSON_LINES and _is_json(records.content_type):
        records = _on_lines(records)
    return b"".join([records.header, _lines(records)]) if header else _lines(records)


def decode(body: bytes, content_type: str, *, answer_key: str = "") -> Records:
    """Return the records of one body, as text wherever they are text. Raises ContentError.

    JSON is an array (under ``answer_key``, if stated) of one document a record; a blank JSON line is no record.
    """
    media_type, parameters = parse_content_type(content_type)
    if media_type == ARROW:
        return _decode_arrow(body)
    body = _to_utf8(body, parameters.get("charset", "utf-8"), media_type)
    if media_type == JSON:
        return _decode_json(body, answer_key)
    if media_type == JSON_LINES:
        return _cut(body, _line_ends(body), JSON_LINES, skip_blank=True)
    if media_type == CSV:
        return _cut(body, _csv_ends(body), CSV)
    return ByteRecords.of([body], media_type or "application/octet-stream")


def encode_one(record: Records, content_type: str, *, header: bool = False, request_key: str = "") -> Body:
    """Return the body of one request that is one record, for stages that take one at a time: bare JSON, one line."""
    media_type, _ = parse_content_type(content_type)
    if media_type != JSON or request_key:
        return encode(record, content_type, header=header, request_key=request_key)
    return bytes(encode(record, JSON))[1:-1]  # an array of one


def decode_one(body: bytes, content_type: str, *, answer_key: str = "") -> Records:
    """Return the answer to one record, whatever it holds, as one record. Raises ContentError."""
    media_type, parameters = parse_content_type(content_type)
    if media_type == ARROW or (media_type == JSON and answer_key):
        return decode(body, content_type, answer_key=answer_key)
    body = _to_utf8(body, parameters.get("charset", "utf-8"), media_type)
    return ByteRecords.of([body], media_type or "application/octet-stream")


def is_sent_as_it_lies(records: Records, content_type: str) -> bool:
    """Whether encoding these only finds them in their buffer: no byte is converted, and seldom one copied."""
    return isinstance(records, ByteRecords) and (len(records) == 1 or parse_content_type(content_type)[0] != JSON)


def can_be_sent(records: Records, content_type: str, *, header: bool = False) -> bool:
    """Whether records of this kind can be sent as this type at all; a single one may hold what cannot (an infinity)."""
    media_type, _ = parse_content_type(content_type)
    if isinstance(records, pa.Table):
        is_flat = not any(pa.types.is_nested(column.type) for column in records.schema)
        return media_type in TABULAR and (is_flat or media_type != CSV)
    try:
        _fits_or_raise(records, media_type, header=header)
    except ContentError:
        return False
    return True


def _fits_or_raise(records: ByteRecords, wanted: str, *, header: bool) -> None:
    have = records.content_type
    if not _fits(have, wanted):
        raise ContentError(f"{have} cannot be sent as {wanted} without being parsed")
    if header and wanted == CSV and not records.header and not _is_document(records):
        raise ContentError("a header is wanted, and the records come without one")


def _fits(have: str, wanted: str) -> bool:
    """Whether a body of the one type may be called the other: where neither is a table, whoever states it knows."""
    if have == wanted or have in UNTYPED or wanted in UNTYPED or (_is_json(have) and _is_json(wanted)):
        return True
    return wanted not in TABULAR and (have not in TABULAR or wanted.startswith("text/"))


def _is_json(media_type: str) -> bool:
    """Also ``application/vnd.acme+json``, ``application/x-amz-json-1.1``; a sequence (RFC 7464) is no document."""
    return media_type == JSON_LINES or bool(re.search(r"\bjson\b(?!-seq)", media_type))


def _is_document(records: ByteRecords) -> bool:
    """Whether this is one record that is a whole CSV file, which brings its own header: an object, or several lines."""
    return len(records) == 1 and (records.content_type in BYTES or len(_csv_ends(bytes(records[0]))) > 1)


def _on_lines(records: ByteRecords) -> ByteRecords:
    """JSON documents on one line each, as they nearly always are: no string in them can hold a line's end as it is."""
    documents = [bytes(records[i]).strip() for i in range(len(records))]
    if not any(b"\n" in document or b"\r" in document for document in documents):
        return records
    flat = bytes.maketrans(b"\r\n", b"  ")
    return ByteRecords.of([_checked(document).translate(flat) + b"\n" for document in documents], JSON)


def _checked(document: bytes) -> bytes:
    try:
        json.loads(document)
    except (ValueError, RecursionError) as exc:
        raise ContentError(f"not JSON, so that it cannot be put on one line: {exc}") from exc
    return document


def _wrap(documents: bytes, request_key: str) -> bytes:
    array = b"[" + documents + b"]"
    return b"{%s:%s}" % (json.dumps(request_key).encode(), array) if request_key else array


def _lines(records: ByteRecords) -> Body:
    """The records as lines; only where one in the middle lacks its newline (the end of an object) are they copied."""
    if len(records) == 1:
        return records[0]
    if len(records) > 1:
        data = np.frombuffer(records.data, np.uint8)
        ends = records.ends[:-1]
        empty = ends == records.starts[:-1]
        if empty.any() or (data[ends - 1] != _NEWLINE).any():
            return b"".join([bytes(records[i]).rstrip(b"\r\n") + b"\n" for i in range(len(records))])
    return records.body()


def _encode_table(table: pa.Table, media_type: str, *, header: bool, request_key: str) -> Body:
    try:
        if media_type == ARROW:
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(table)
            return memoryview(sink.getvalue())
        if media_type == CSV:
            return _to_csv(table, header=header)
        if media_type == JSON:
            return _wrap(b",".join(_json_rows(table)), request_key)
        if media_type == JSON_LINES:
            return b"".join([row + b"\n" for row in _json_rows(table)])
    except (pa.ArrowException, ValueError) as exc:
        raise ContentError(f"a table cannot be sent as {media_type}: {exc}") from exc
    raise ContentError(f"a table cannot be sent as {media_type}; it can as {', '.join(sorted(TABULAR))}")


def _to_csv(table: pa.Table, *, header: bool) -> Body:
    """A null alone on its line would be a blank line, which is no record to a reader: it becomes "", quoted."""
    may_be_blank = table.num_columns == 1 and table.column(0).null_count > 0
    if may_be_blank and table.schema.types[0] in (pa.string(), pa.large_string()):
        filled = table.column(0).cast(pa.large_string()).fill_null(pa.scalar(""))
        table, may_be_blank = pa.table([filled], names=table.schema.names), False
    sink = pa.BufferOutputStream()
    pacsv.write_csv(table, sink, pacsv.WriteOptions(include_header=header, quoting_style="needed"))
    body = sink.getvalue()
    return re.sub(rb"^\n", b'""\n', body, flags=re.MULTILINE) if may_be_blank else memoryview(body)


def _json_rows(table: pa.Table) -> list[bytes]:
    """One JSON object a row. NaN, which JSON lacks, is null as in pandas; an infinity is refused (ValueError)."""
    for place, column in enumerate(table.schema):
        if pa.types.is_floating(column.type):
            values = table.column(place)
            missing = pc.is_nan(values)
            if pc.any(missing).as_py():
                table = table.set_column(place, column, pc.if_else(missing, pa.scalar(None, column.type), values))
    return [_JSON.encode(row).encode() for row in table.to_pylist()]


def _plain(value: Any) -> object:
    """What JSON has no type for: moments as ISO 8601, numbers of any size and bytes as text."""
    if isinstance(value, date | time):
        return value.isoformat()
    if isinstance(value, bytes):
        return value.decode()
    return str(value)


_JSON = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=_plain)


def _decode_arrow(body: bytes) -> pa.Table:
    try:
        with pa.ipc.open_stream(body) as reader:
            table = reader.read_all()
        table.validate(full=True)  # what is damaged may read well, and break whoever looks at its values
    except (pa.ArrowException, OSError) as exc:  # a stream that ends too early is an OSError
        raise ContentError(f"not an Arrow stream: {exc}") from exc
    for name, count in Counter(table.schema.names).items():
        if count > 1:
            raise ContentError(f"an Arrow stream with {count} columns {name!r}")
    return table


def _decode_json(body: bytes, answer_key: str) -> ByteRecords:
    try:
        document = json.loads(body)
    except (ValueError, RecursionError) as exc:
        raise ContentError(f"not JSON: {exc}") from exc
    if answer_key:
        if not isinstance(document, dict) or answer_key not in document:
            found = f"an object of {', '.join(document) or 'no keys'}" if isinstance(document, dict) else "no object"
            raise ContentError(f"no key {answer_key!r} (answer_key): the answer is {found}")
        document = document[answer_key]
    if not isinstance(document, list):
        place = f"under {answer_key!r}" if answer_key else "at the top (is answer_key missing?)"
        raise ContentError(f"not a JSON array of one answer a record {place}")
    try:
        lines = [json.dumps(one, ensure_ascii=False, separators=(",", ":")).encode() + b"\n" for one in document]
    except UnicodeEncodeError as exc:
        raise ContentError(f"not text: {exc.reason} in an answer") from exc
    return ByteRecords.of(lines, JSON)


def _to_utf8(body: bytes, charset: str, media_type: str) -> bytes:
    is_text = media_type in TABULAR or media_type.startswith("text/")
    if is_text and not is_utf8(charset):
        try:
            body = body.decode(charset).encode()
        except (LookupError, ValueError) as exc:
            raise ContentError(f"not text in charset {charset!r}: {exc}") from exc
    return body.removeprefix(codecs.BOM_UTF8) if media_type in TABULAR else body


def _line_ends(body: bytes) -> Int64s:
    if body.find(b"\n") in (-1, len(body) - 1):  # one line, as single-record stages answer ten thousand times a second
        return np.array([len(body)] if body else [], np.int64)
    return np.flatnonzero(np.frombuffer(body, np.uint8) == _NEWLINE) + 1


def _csv_ends(body: bytes) -> Int64s:
    """Ends of CSV records: newlines with an even number of quotes before them (RFC 4180)."""
    if b'"' not in body:
        return _line_ends(body)
    data = np.frombuffer(body, np.uint8)
    newlines = np.flatnonzero(data == _NEWLINE)
    quotes_before = np.searchsorted(np.flatnonzero(data == _QUOTE), newlines)
    ends: Int64s = newlines[quotes_before % 2 == 0] + 1
    return ends


def _cut(body: bytes, ends: Int64s, media_type: str, *, skip_blank: bool = False) -> ByteRecords:
    if len(body) and (not len(ends) or ends[-1] != len(body)):
        ends = np.append(ends, len(body))
    starts = np.concatenate([np.zeros(1, np.int64), ends[:-1]]) if len(ends) > 1 else np.zeros(len(ends), np.int64)
    records = ByteRecords(memoryview(body), starts, ends, media_type)
    if skip_blank and len(records):
        # A blank line begins with a blank; few others do, and only these are looked at one by one.
        maybe = np.flatnonzero(np.isin(np.frombuffer(body, np.uint8)[starts], _BLANKS))
        blank = [i for i in maybe.tolist() if not bytes(records[i]).strip()]
        if blank:
            return records.take(np.delete(np.arange(len(records)), blank))
    return records
