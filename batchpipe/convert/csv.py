"""CSV records to Arrow tables, by one call of Arrow's parser where all is well. Pure: no I/O.

What Arrow's parser would let pass silently is told from its count of rows: a carriage return that ends a row,
an unclosed quote that swallows the next.
"""

import re
from dataclasses import dataclass
from typing import IO, Literal

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv

from batchpipe.batch import ByteRecords
from batchpipe.convert.parsed import BadRecord, Parsed, UnparsedError, fitting_type, parse_halving, shown
from batchpipe.convert.schema import Field, InputSchema
from batchpipe.job import InputSpec

_LONE_RETURN = re.compile(rb"\r(?!\n)")


@dataclass(frozen=True)
class CsvDialect:
    """How CSV records are written; the fields are the job file's keys."""

    delimiter: str = ","
    quote: str = '"'
    null_values: tuple[str, ...] = ("",)
    encoding: str = "utf-8"

    @classmethod
    def of(cls, spec: InputSpec, encoding: str) -> "CsvDialect":
        """Return the dialect that an input block states, for records in ``encoding`` (which may be another)."""
        return cls(spec.delimiter, spec.quote, spec.null_values, encoding)


def csv_to_table(records: ByteRecords, columns: InputSchema, dialect: CsvDialect = CsvDialect()) -> Parsed:
    """Parse CSV records (no header among them) into a table of the schema.

    A row with a wrong number of fields fails; so does one with a value that does not fit its column's type, whose
    failure says whether that type was a guess.
    """
    parser = _CsvParser(columns, dialect)
    return parse_halving(records, parser.attempt, parser.explain)


def infer_csv(records: ByteRecords, names: tuple[str, ...], wanted: list[str], dialect: CsvDialect) -> list[Field]:
    """Return the wanted columns with the types that Arrow's parser infers from these records.

    Rows with a wrong number of fields are passed over, and what is not text counts as text: it fails when it is read.
    Raises UnicodeDecodeError where the records are not of the dialect's encoding (but for UTF-8).
    """
    if not len(records) or not wanted:
        return [pa.field(name, pa.null()) for name in wanted]
    table, _ = _read(_as_text(records, dialect), names, dialect, _convert_options(dialect, {}, include=wanted))
    return list(table.schema)


def csv_can_hold(kind: pa.DataType) -> bool:
    """Whether CSV fields can be read as this type."""
    try:
        _read(ByteRecords.of([b"\n"]), ("x",), CsvDialect(), _convert_options(CsvDialect(), {"x": kind}))
    except pa.ArrowNotImplementedError:
        return False
    return True


@dataclass
class _CsvParser:
    columns: InputSchema
    dialect: CsvDialect

    def attempt(self, records: ByteRecords) -> tuple[pa.Table, dict[int, str]]:
        """Parse at once; ragged rows are passed over and named."""
        if not len(records):
            return self.columns.schema.empty_table(), {}
        if len(records) > 1 and _has_lone_return(records.body()):
            raise UnparsedError
        schema = self.columns.schema
        types = dict(zip(schema.names, schema.types, strict=True))
        convert = _convert_options(self.dialect, types, include=schema.names)
        try:
            table, ragged = _read(records, self.columns.columns, self.dialect, convert)
        except (pa.ArrowInvalid, UnicodeDecodeError) as error:
            raise UnparsedError from error
        if table.num_rows + len(ragged) != len(records) or self._ends_open(records):
            raise UnparsedError
        return table, {place: self._ragged_reason(count) for place, count in ragged.items()}

    def explain(self, record: ByteRecords) -> BadRecord:
        """Say why a record that stands alone cannot be parsed."""
        if self._ends_open(record):
            return BadRecord(0, "has a quote that is never closed")
        names = self.columns.columns
        as_bytes: dict[str, pa.DataType] = dict.fromkeys(names, pa.binary())
        try:
            raw, ragged = _read(
                _as_text(record, self.dialect), names, self.dialect, _convert_options(self.dialect, as_bytes)
            )
        except UnicodeDecodeError as error:
            return BadRecord(0, f"is not {self.dialect.encoding}: {error.reason} (input.encoding)")
        except pa.ArrowInvalid as error:
            return BadRecord(0, f"cannot be parsed: {error}")
        if raw.num_rows + len(ragged) != 1:
            return BadRecord(0, "holds a carriage return outside quotes (lines end with a newline)")
        if ragged:
            return BadRecord(0, self._ragged_reason(ragged[0]))
        return self._misfit(record)

    def _misfit(self, record: ByteRecords) -> BadRecord:
        for found in self.columns.schema:
            kinds: list[dict[str, pa.DataType]] = [{found.name: found.type}, {found.name: pa.binary()}]
            options, as_bytes = (_convert_options(self.dialect, kind, include=[found.name]) for kind in kinds)
            try:
                _read(record, self.columns.columns, self.dialect, options)
            except pa.ArrowInvalid:
                raw, _ = _read(record, self.columns.columns, self.dialect, as_bytes)
                return self._misfit_of(found, raw.column(0)[0].as_py() or b"")
        return BadRecord(0, "cannot be parsed")

    def _misfit_of(self, found: Field, value: bytes) -> BadRecord:
        try:
            text = value.decode()
        except UnicodeDecodeError:
            return BadRecord(0, f"is not {self.dialect.encoding} in column {found.name!r} (input.encoding)")
        guessed = found.name not in self.columns.stated
        fitting = fitting_type(text, found.type)
        return BadRecord(
            0, f"{shown(text)} in column {found.name!r} is not {found.type}", found.name, text, guessed, fitting
        )

    def _ragged_reason(self, count: int) -> str:
        fields = f"has {count:,} field{'s' * (count != 1)}"
        return f"{fields}, the header has {len(self.columns.columns):,}"

    def _ends_open(self, records: ByteRecords) -> bool:
        """Whether the last record ends inside quotes, which Arrow's parser takes for the end of the value."""
        last = bytes(records[len(records) - 1])
        quote, delimiter = self.dialect.quote.encode(), self.dialect.delimiter.encode()
        at = 0
        while quote and last.find(quote, at) >= 0:
            if last[at : at + 1] == quote:
                at = last.find(quote, at + 1)
                while at >= 0 and last[at + 1 : at + 2] == quote:
                    at = last.find(quote, at + 2)
                if at < 0:
                    return True
            at = last.find(delimiter, at)
            if at < 0:
                return False
            at += 1
        return False


def _read(
    records: ByteRecords, names: tuple[str, ...], dialect: CsvDialect, convert: pacsv.ConvertOptions
) -> tuple[pa.Table, dict[int, int]]:
    """Return the rows with as many fields as names, and how many fields the others have, by their place."""
    body = pa.py_buffer(records.body())
    # Every record is a row here, a blank one, too: an empty field, of one.
    parse = pacsv.ParseOptions(delimiter=dialect.delimiter, quote_char=dialect.quote or False, ignore_empty_lines=False)
    read = pacsv.ReadOptions(
        use_threads=False, block_size=max(body.size, 1), column_names=list(names), encoding=dialect.encoding
    )
    try:
        return pacsv.read_csv(_file(body), read, parse, convert), {}
    except pa.ArrowInvalid:
        # Arrow shows a ragged row to the handler as text, and prints an error of its own where it is not UTF-8.
        if not _is_text(records, dialect):
            raise
    ragged: dict[int, int] = {}

    def note(row: pacsv.InvalidRow) -> Literal["skip"]:
        ragged[(row.number or 0) - 1] = row.actual_columns
        return "skip"

    parse.invalid_row_handler = note
    return pacsv.read_csv(_file(body), read, parse, convert), ragged


def _file(body: pa.Buffer) -> IO[bytes]:
    return pa.BufferReader(body)  # type: ignore[return-value]  # the stubs do not know that Arrow reads its own files


def _is_text(records: ByteRecords, dialect: CsvDialect) -> bool:
    return dialect.encoding != "utf-8" or bytes(records.body()).decode("utf-8", "replace").encode() == records.body()


def _as_text(records: ByteRecords, dialect: CsvDialect) -> ByteRecords:
    """Return UTF-8 records with a mark for every byte that is not of it; others as they are."""
    if _is_text(records, dialect):
        return records
    return ByteRecords.of([record.decode("utf-8", "replace").encode() for record in records.to_list()])


def _convert_options(
    dialect: CsvDialect, types: dict[str, pa.DataType], include: list[str] | None = None
) -> pacsv.ConvertOptions:
    return pacsv.ConvertOptions(
        column_types=types,
        include_columns=include,
        null_values=list(dialect.null_values),
        strings_can_be_null=True,
    )


def _has_lone_return(body: memoryview) -> bool:
    """Whether a carriage return stands alone, which Arrow's parser takes for a line end where it is outside quotes."""
    # Most bodies hold none at all, and comparing every byte is the fastest way to know.
    has_any = bool((np.frombuffer(body, np.uint8) == ord("\r")).any())
    return has_any and _LONE_RETURN.search(body) is not None
