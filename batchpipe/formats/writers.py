"""What every writer is to a caller, and the writers of text: csv, jsonl and raw.

The bytes of a part are a function of its records, schema and job, never of the batches that records came in.
"""

from collections.abc import Callable
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from batchpipe.batch import ByteRecords, Records
from batchpipe.content import CSV, JSON, JSON_LINES, ContentError, encode
from batchpipe.errors import OutputError
from batchpipe.formats.compression import Sink, compressing
from batchpipe.job import OutputSpec

_NEWLINE = 10
_LINES_AT_ONCE = 1_000


class Writer(Protocol):
    """Writes records to a sink that it does not own.

    ``write`` raises OutputError where records do not fit the format. ``close`` ends the format, not the sink;
    what was not closed is no part.
    """

    records: int

    def write(self, records: Records) -> None: ...
    def close(self) -> None: ...


class TextWriter:
    """Writes what ``encode`` makes of each table, or text records of ``types`` as they are, through a compressor."""

    def __init__(
        self, spec: OutputSpec, sink: Sink, types: tuple[str, ...], to_bytes: Callable[[pa.Table], bytes]
    ) -> None:
        self.records = 0
        self._name = spec.format
        self._types = types
        self._to_bytes = to_bytes
        self._sink = compressing(sink, spec.codec)

    def write_lines(self, line: bytes, count: int = 1) -> None:
        """Write a line that is no record, and counts as none: a header, or what stands for records that failed."""
        for first in range(0, count, _LINES_AT_ONCE):
            self._sink.write(line * min(_LINES_AT_ONCE, count - first))

    def write(self, records: Records) -> None:
        """Write more records."""
        if not len(records):
            return
        if isinstance(records, pa.Table):
            self._sink.write(self._to_bytes(records))
        elif records.content_type in self._types or not self._types:
            self._sink.write(as_lines(records) if self._types else records.body())
        else:
            raise OutputError(
                f"output.format {self._name} cannot hold answers of {records.content_type}",
                next="answer a table, or state output.format: raw",
            )
        self.records += len(records)

    def close(self) -> None:
        """End the compressed stream."""
        self._sink.close()


def open_csv(spec: OutputSpec, sink: Sink, schema: pa.Schema | None, header: bool) -> TextWriter:
    """Write RFC 4180 with quoted strings, an empty field for null; ``header`` puts the names of ``schema`` first."""
    for field in schema or ():
        if pa.types.is_nested(field.type):
            raise OutputError(
                f"output.format csv cannot hold column {field.name!r}, which is {field.type}",
                next="state output.format: jsonl or parquet, or answer plain columns",
            )
    writer = TextWriter(spec, sink, (CSV,), lambda table: _encode(table, CSV))
    if header and schema is not None:
        writer.write_lines(bytes(encode(schema.empty_table(), CSV, header=True)))
    return writer


def open_jsonl(spec: OutputSpec, sink: Sink, schema: pa.Schema | None, header: bool) -> TextWriter:  # noqa: ARG001 - open_writer's shape
    """Write one JSON object a line; NaN, which JSON lacks, as null."""

    def to_bytes(table: pa.Table) -> bytes:
        for name in table.column_names:
            if pa.types.is_floating(table.schema.field(name).type) and pc.any(pc.is_inf(table.column(name))).as_py():
                raise OutputError(
                    f"column {name!r} holds inf, which JSON has no number for",
                    next="replace it in a stage, or state output.format: parquet or csv",
                )
        return _encode(table, JSON_LINES)

    return TextWriter(spec, sink, (JSON_LINES, JSON), to_bytes)


def open_raw(spec: OutputSpec, sink: Sink, schema: pa.Schema | None, header: bool) -> TextWriter:  # noqa: ARG001 - open_writer's shape
    """Write answers as they are; ``assemble_with: line`` adds a newline where one lacks it.

    A table is written if it has one column of text or bytes, which are the answers.
    """
    adds_newline = spec.assemble_with == "line"

    def to_bytes(table: pa.Table) -> bytes:
        if table.num_columns != 1 or not _is_text(table.schema.types[0]):
            raise OutputError(
                f"output.format raw takes bytes, and the last stage answers a table of {', '.join(table.schema.names)}",
                next="state output.format: parquet, csv or jsonl, or answer list[bytes]",
            )
        return b"".join(_as_bytes(value, adds_newline) for value in table.column(0).to_pylist())

    return _RawWriter(spec, sink, to_bytes, adds_newline=adds_newline)


class _RawWriter(TextWriter):
    def __init__(
        self, spec: OutputSpec, sink: Sink, to_bytes: Callable[[pa.Table], bytes], *, adds_newline: bool
    ) -> None:
        super().__init__(spec, sink, (), to_bytes)
        self._adds_newline = adds_newline

    def write(self, records: Records) -> None:
        if isinstance(records, ByteRecords) and self._adds_newline and len(records):
            self._sink.write(as_lines(records))
            self.records += len(records)
        else:
            super().write(records)


def as_lines(records: ByteRecords) -> bytes | memoryview:
    """Return the records end to end, with a newline added where one lacks it."""
    view = np.frombuffer(records.data, np.uint8)
    empty = records.ends == records.starts
    if not empty.any() and bool((view[records.ends - 1] == _NEWLINE).all()):
        return records.body()
    return b"".join(_as_bytes(record, adds_newline=True) for record in records.to_list())


def _as_bytes(value: str | bytes | None, adds_newline: bool) -> bytes:
    data = value.encode() if isinstance(value, str) else value or b""
    return data + b"\n" if adds_newline and not data.endswith(b"\n") else data


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_binary(kind) or pa.types.is_large_string(kind)


def _encode(table: pa.Table, content_type: str) -> bytes:
    try:
        return bytes(encode(table, content_type))
    except ContentError as error:
        msg = f"the answers cannot be written as {content_type}: {error}"
        raise OutputError(msg, next="state output.format: parquet, or answer other columns") from error
