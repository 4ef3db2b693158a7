"""Text that arrived over HTTP as tables, for whoever wants columns: the callable after it, or the output.

Types are those of the very records at hand. Where they must be the same in every batch, Arrow is the content type.
"""

import csv
import json
from collections.abc import Sequence
from dataclasses import replace

import pyarrow as pa

from batchpipe import convert
from batchpipe.batch import ByteRecords, Records
from batchpipe.content import CSV, JSON, JSON_LINES, ContentError

_PREDICTION = "prediction"


def can_be_table(records: Records) -> bool:
    """Whether `to_table` makes sense: the records are a table or text with columns."""
    return isinstance(records, pa.Table) or records.content_type in (CSV, JSON, JSON_LINES)


def knows_columns(records: ByteRecords) -> bool:
    """Whether the records tell the names of their columns: CSV that came behind a header, JSON objects."""
    if records.content_type == CSV:
        return bool(records.header)
    return records.content_type in (JSON, JSON_LINES) and bytes(records[0]).lstrip().startswith(b"{")


def to_table(records: ByteRecords, names: Sequence[str] = ()) -> pa.Table:
    """Parse records into a table. Raises ContentError, which names the first that cannot be parsed.

    CSV without a header or ``names`` has the column ``prediction``, or ``prediction_0`` and so on; so has JSON that is
    no objects.
    """
    if not can_be_table(records):
        raise ContentError(f"{records.content_type} has no columns")
    names = names or (_fields(records.header) if records.header else ())
    if not len(records):
        return pa.table({name: pa.nulls(0) for name in names or (_PREDICTION,)})
    parsed = _parse_csv(records, tuple(names)) if records.content_type == CSV else _parse_json(records)
    if isinstance(parsed, pa.Table):
        return parsed
    for bad in parsed.failures:
        raise ContentError(f"record {bad.index + 1:,} {bad.reason}")
    return parsed.table


def behind_header(records: Records) -> ByteRecords:
    """CSV records that know the first of them as their header. Raises ContentError."""
    assert isinstance(records, ByteRecords), "CSV is decoded to text"
    if not len(records):
        raise ContentError("no header in an empty body")
    header = bytes(records[0]).rstrip(b"\r\n") + b"\n"
    _fields(header)
    return replace(records.slice(1, len(records)), header=header)


def _parse_csv(records: ByteRecords, names: tuple[str, ...]) -> convert.Parsed:
    count = len(_fields(bytes(records[0])))
    names = names or ((_PREDICTION,) if count == 1 else tuple(f"{_PREDICTION}_{i}" for i in range(count)))
    dialect = convert.CsvDialect()
    try:
        fields = convert.infer_csv(records, names, list(names), dialect)
    except pa.ArrowException as exc:
        raise ContentError(f"CSV records cannot be read: {exc}") from exc
    return convert.csv_to_table(records, convert.InputSchema(pa.schema(fields), frozenset(), names), dialect)


def _parse_json(records: ByteRecords) -> convert.Parsed | pa.Table:
    if not bytes(records[0]).lstrip().startswith(b"{"):
        try:
            answer = convert.from_answer([json.loads(record) for record in records.to_list()])
        except (TypeError, ValueError, RecursionError) as exc:
            raise ContentError(f"JSON records are not of one type: {exc}") from exc
        assert isinstance(answer, pa.Table)
        return answer
    try:
        fields = convert.infer_jsonl(records)
    except convert.NoCommonTypeError as exc:
        raise ContentError(f"JSON records hold values of different kinds: {exc}") from exc
    if not fields:  # a table without columns does not tell how many records it has
        raise ContentError(f"record 1 {_why_without_columns(bytes(records[0]))}")
    schema = pa.schema(fields)
    return convert.jsonl_to_table(records, convert.InputSchema(schema, frozenset(), tuple(schema.names)))


def _why_without_columns(record: bytes) -> str:
    try:
        return "is JSON that cannot be read" if json.loads(record) else "is an object without a key"
    except (ValueError, RecursionError) as error:
        return f"is not JSON: {error}"


def _fields(line: bytes) -> tuple[str, ...]:
    try:
        return tuple(next(csv.reader([line.decode().rstrip("\r\n")], strict=True)) or ("",))
    except (csv.Error, UnicodeDecodeError, StopIteration) as exc:
        raise ContentError(f"the first CSV record cannot be read: {exc}") from exc
