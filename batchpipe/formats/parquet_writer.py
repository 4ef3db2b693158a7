"""Parquet parts whose bytes are a function of their records: row groups are cut by the records, never by batches."""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from batchpipe.batch import Int64s, Records
from batchpipe.convert import CastError, cast_table, plain_schema
from batchpipe.errors import OutputError
from batchpipe.formats.compression import Sink, writable
from batchpipe.job import OutputSpec

GROUP_ROWS = 131_072
"""Rows of a row group ..."""

GROUP_BYTES = 32 << 20
"""... unless its values, counted record by record, would be larger than this."""


class ParquetWriter:
    """Collects records until a row group is full, combines them and writes them. See `Writer`."""

    def __init__(self, spec: OutputSpec, sink: Sink, schema: pa.Schema) -> None:
        self.records = 0
        self._schema = plain_schema(schema)
        self._waiting: list[pa.Table] = []
        self._rows = self._bytes = 0
        try:
            self._writer = pq.ParquetWriter(writable(sink), self._schema, compression=spec.codec)
        except pa.ArrowNotImplementedError as error:
            msg = f"output.format parquet cannot hold the answers: {error}"
            raise OutputError(msg, next="answer other columns, or state output.format: jsonl") from error

    def write(self, records: Records) -> None:
        """Take more records; at most a row group of them waits in memory."""
        if not isinstance(records, pa.Table):
            raise OutputError(
                f"output.format parquet cannot hold answers of {records.content_type}",
                next="answer a table, or state output.format: raw or jsonl",
            )
        try:
            table = cast_table(records, self._schema)
        except CastError as error:
            raise OutputError(str(error)) from error
        filled = np.cumsum(record_bytes(table))
        self.records += len(table)
        start = 0
        while start < len(table):
            used = int(filled[start - 1]) if start else 0
            room = int(np.searchsorted(filled, used + GROUP_BYTES - self._bytes, side="right"))
            stop = min(room, start + GROUP_ROWS - self._rows)
            if stop <= start and not self._rows:
                stop = start + 1
            if stop > start:
                self._waiting.append(table.slice(start, stop - start))
                self._rows += stop - start
                self._bytes += int(filled[stop - 1]) - used
                start = stop
            if start < len(table) or self._rows == GROUP_ROWS:
                self._flush()

    def close(self) -> None:
        """Write the last row group and the footer."""
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        if self._rows:
            self._writer.write_table(pa.concat_tables(self._waiting).combine_chunks(), row_group_size=GROUP_ROWS)
        self._waiting, self._rows, self._bytes = [], 0, 0


def open_parquet(spec: OutputSpec, sink: Sink, schema: pa.Schema | None, header: bool) -> ParquetWriter:  # noqa: ARG001 - open_writer's shape
    """Write Parquet without pandas metadata. Raises OutputError where the answers have no columns."""
    if schema is None:
        raise OutputError(
            "output.format parquet needs columns, and the last stage answers bytes",
            next="answer a table, or state output.format: raw",
        )
    return ParquetWriter(spec, sink, schema)


def record_bytes(table: pa.Table) -> Int64s:
    """Return the bytes of each record's values: a function of the record alone, whatever buffers it shares."""
    total = np.zeros(len(table), np.int64)
    for column in table.columns:
        parts = [_value_bytes(chunk) for chunk in column.chunks]
        total += np.concatenate(parts) if parts else 0
    return total


def _value_bytes(array: Any) -> Int64s:
    kind: pa.DataType = array.type
    sizes: Int64s
    if isinstance(kind, pa.StructType):
        sizes = np.ones(len(array), np.int64)
        for place in range(kind.num_fields):
            sizes = sizes + _value_bytes(array.field(place))
    elif isinstance(kind, pa.FixedSizeListType):
        inner = _value_bytes(array.values.slice(array.offset * kind.list_size, len(array) * kind.list_size))
        sizes = inner.reshape(len(array), kind.list_size).sum(axis=1) + 1
    elif isinstance(kind, pa.ListType | pa.MapType):
        values = [array.keys, array.items] if isinstance(kind, pa.MapType) else [array.values]
        filled = np.cumsum(
            np.concatenate([np.zeros(1, np.int64), sum(map(_value_bytes, values), np.zeros(1, np.int64))])
        )
        offsets = np.asarray(array.offsets, np.int64)
        sizes = filled[offsets[1:]] - filled[offsets[:-1]] + 4
    elif pa.types.is_string(kind) or pa.types.is_binary(kind):
        bounds = np.frombuffer(array.buffers()[1] or bytes(4), np.int32)[array.offset : array.offset + len(array) + 1]
        sizes = np.diff(bounds).astype(np.int64) + 4
    else:
        width = 1 if pa.types.is_null(kind) else -(-kind.bit_width // 8)
        sizes = np.full(len(array), width, np.int64)
    return sizes
