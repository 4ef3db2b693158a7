"""JSON Lines records to Arrow tables, by one call of Arrow's parser where all is well. Pure: no I/O.

Arrow's parser reads a stream of values, not lines, and a bare ``null`` crashes it: so every line is first seen to
begin with { and end with }. Between such lines no value can go on, and a second one on a line shows in the count.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json as pajson

from batchpipe.batch import ByteRecords
from batchpipe.convert.parsed import BadRecord, Parsed, UnparsedError, fitting_type, parse_halving, shown
from batchpipe.convert.schema import Column, Field, InputSchema, NoCommonTypeError, plain_schema

_NEWLINE, _RETURN, _SPACE, _TAB = 10, 13, 32, 9
_OPEN, _CLOSE = 123, 125

MAX_DEPTH = 500
"""Nesting that is looked at when types are inferred; Arrow's inference overflows its stack far above."""


def jsonl_to_table(records: ByteRecords, columns: InputSchema, encoding: str = "utf-8") -> Parsed:
    """Parse JSON lines into a table of the schema.

    A key that is missing is null, the order of keys is free, and keys that the schema does not have are passed over,
    nested ones too: the columns of a dataset are those stated and those seen in the sample. A line that is not one
    JSON object fails; so does one with a value that does not fit its column's type, whose failure says whether that
    type was a guess.
    """
    parser = _JsonlParser(columns, encoding)
    return parse_halving(records, parser.attempt, parser.explain)


def infer_jsonl(
    records: ByteRecords, encoding: str = "utf-8", wanted: Callable[[str], bool] = lambda _: True
) -> list[Field]:
    """Return the wanted ones of the columns that these records have. Lines that cannot be parsed are passed over.

    Raises NoCommonTypeError where a key holds values of different kinds.
    """
    lines = [line for record in records.to_list() if (line := _as_object(record, encoding, wanted))]
    try:
        return _infer(lines)
    except pa.ArrowInvalid:
        lines = [line for line in lines if _is_readable(line)]
    try:
        return _infer(lines)
    except pa.ArrowInvalid as error:
        raise NoCommonTypeError(_kinds(str(error))) from error


def jsonl_can_hold(kind: pa.DataType) -> bool:
    """Whether JSON values can be read as this type."""
    try:
        _read(b'{"x":null}', pa.schema([("x", _json_type(kind))]))
    except pa.ArrowInvalid:
        return False
    return True


def _infer(lines: list[bytes]) -> list[Field]:
    return list(plain_schema(_read(b"\n".join(lines), None).schema)) if lines else []


def _is_readable(line: bytes) -> bool:
    try:
        _read(line, None)
    except pa.ArrowInvalid:
        return False
    return True


@dataclass
class _JsonlParser:
    columns: InputSchema
    encoding: str

    def __post_init__(self) -> None:
        self._read_as = pa.schema([pa.field(field.name, _json_type(field.type)) for field in self.columns.schema])

    def attempt(self, records: ByteRecords) -> tuple[pa.Table, dict[int, str]]:
        """Parse at once. No record is passed over."""
        if not len(records):
            return self.columns.schema.empty_table(), {}
        if not _are_braced(records):
            raise UnparsedError
        try:
            table = _read(_as_utf8(records.body(), self.encoding), self._read_as)
            if table.num_rows != len(records):
                raise UnparsedError
            table.validate(full=True)  # the parser takes bytes that are not UTF-8 for text
            return self._cast(table), {}
        except (pa.ArrowInvalid, UnicodeDecodeError) as error:
            raise UnparsedError from error

    def explain(self, record: ByteRecords) -> BadRecord:
        """Say why a line that stands alone cannot be parsed."""
        try:
            row = json.loads(bytes(record[0]).decode(self.encoding))
        except UnicodeDecodeError as error:
            return BadRecord(0, f"is not {self.encoding}: {error.reason} (input.encoding)")
        except (ValueError, RecursionError) as error:
            return BadRecord(0, f"is not JSON: {error}")
        if not isinstance(row, dict):
            return BadRecord(0, f"is not a JSON object: {shown(json.dumps(row))}")
        for field in self.columns.schema:
            if field.name in row and not self._holds(field, row[field.name]):
                value = row[field.name] if isinstance(row[field.name], str) else json.dumps(row[field.name])
                guessed = field.name not in self.columns.stated
                reason = f"{shown(value)} in column {field.name!r} is not {field.type}"
                return BadRecord(0, reason, field.name, value, guessed, fitting_type(value, field.type))
        return BadRecord(0, "is JSON that cannot be read: a key given twice, or half of a surrogate pair")

    def _holds(self, field: Field, value: Any) -> bool:
        one = InputSchema(pa.schema([field]), frozenset(), (field.name,))
        try:
            _JsonlParser(one, "utf-8").attempt(ByteRecords.of([json.dumps({field.name: value}).encode()]))
        except UnparsedError:
            return False
        return True

    def _cast(self, table: pa.Table) -> pa.Table:
        columns = [
            column if column.type == field.type else _cast_text(column, field.type)
            for column, field in zip(table.columns, self.columns.schema, strict=True)
        ]
        return pa.table(columns, schema=self.columns.schema)


def _read(body: bytes | memoryview, schema: pa.Schema | None) -> pa.Table:
    parse = pajson.ParseOptions(
        explicit_schema=schema, unexpected_field_behavior="infer" if schema is None else "ignore"
    )
    read = pajson.ReadOptions(use_threads=False, block_size=max(len(body), 1))
    file: Any = pa.BufferReader(pa.py_buffer(body))
    try:
        return pajson.read_json(file, read_options=read, parse_options=parse)
    except pa.ArrowNotImplementedError as error:
        raise pa.ArrowInvalid(str(error)) from error


def _json_type(kind: pa.DataType) -> pa.DataType:
    """Return the type that Arrow's JSON parser reads a column as before it is cast: its dates and times are numbers."""
    if pa.types.is_date(kind) or pa.types.is_time(kind) or pa.types.is_float16(kind):
        return pa.float32() if pa.types.is_float16(kind) else pa.string()
    return kind


def _cast_text(column: Column, kind: pa.DataType) -> Column:
    if isinstance(kind, pa.Time32Type | pa.Time64Type):
        # Arrow reads no times from text, but moments: on some day.
        join: Any = pc.binary_join_element_wise
        column = pc.cast(join(pa.scalar("1970-01-01"), column, "T"), pa.timestamp(kind.unit))
    return column.cast(kind)


def _as_utf8(body: memoryview, encoding: str) -> bytes | memoryview:
    return body if encoding == "utf-8" else bytes(body).decode(encoding).encode()


def _are_braced(records: ByteRecords) -> bool:
    """Whether every line begins with { and ends with }, but for white space."""
    view = np.frombuffer(records.data, np.uint8)
    last = records.ends - 1
    last = last - (view[last] == _NEWLINE)
    last = last - (view[np.maximum(last, 0)] == _RETURN)
    braced = (view[records.starts] == _OPEN) & (view[np.maximum(last, 0)] == _CLOSE)
    others = (bytes(records[int(place)]).strip() for place in np.flatnonzero(~braced))
    return all(line[:1] == b"{" and line[-1:] == b"}" for line in others)


def _as_object(record: bytes, encoding: str, wanted: Callable[[str], bool]) -> bytes | None:
    """Return the line as UTF-8, with the wanted keys, if it is one JSON object that Arrow's inference may be shown."""
    try:
        text = record.decode(encoding).strip()
        row = json.loads(text)
        if not isinstance(row, dict):
            return None
        if not all(map(wanted, row)):
            text = json.dumps({key: value for key, value in row.items() if wanted(key)})
    except (ValueError, RecursionError):
        return None
    line = text.encode()
    return line if _depth(line) <= MAX_DEPTH else None


def _depth(record: bytes) -> int:
    if record.count(b"{") + record.count(b"[") <= MAX_DEPTH:
        return 0
    brackets = np.frombuffer(re.sub(rb'"(?:[^"\\]|\\.)*"', b"", record), np.uint8)
    steps = np.isin(brackets, list(b"{[")).astype(np.int64) - np.isin(brackets, list(b"}]"))
    return int(np.cumsum(steps).max(initial=0))


def _kinds(message: str) -> str:
    found = re.search(r"Column\(/(.*?)\) changed from (\w+) to (\w+)", message)
    return f"{found[1]}: {found[2]} and {found[3]}" if found else message
