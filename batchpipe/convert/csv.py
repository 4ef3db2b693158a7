"""CSV records to Arrow tables, by one call of Arrow's parser where all is well. Pure: no I/O.

What Arrow's parser would let pass silently is told from its count of rows: a carriage return that ends a row,
an unclosed quote that swallows the next.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
from numpy.typing import NDArray

from batchpipe.batch import ByteRecords
from batchpipe.convert.parsed import BadRecord, Parsed, UnparsedError, fitting_type, parse_halving, shown
from batchpipe.convert.schema import InputSchema
from batchpipe.job import InputSpec

_NEWLINE, _RETURN = 10, 13


@dataclass(frozen=True)
class CsvDialect:
    """How CSV records are written; the fields are the job file's keys."""

    delimiter: str = ","
    quote: str = '"'
    null_values: tuple[str, ...] = ("",)
    encoding: str = "utf-8"

    @classmethod
    def of(cls, spec: InputSpec, encoding: str) -> "CsvDialect":
        """Return the dialect an input block states; ``encoding`` is that of the records, which may have been transcoded."""
        return cls(spec.delimiter, spec.quote, spec.null_values, encoding)


def csv_to_table(records: ByteRecords, columns: InputSchema, dialect: CsvDialect = CsvDialect()) -> Parsed:
    """Parse CSV records (no header among them) into a table of the schema.

    A row with a wrong number of fields fails; so does one with a value that does not fit its column's type, whose
    failure says whether that type was a guess.
    """
    parser = _CsvParser(columns, dialect)
    return parse_halving(records, parser.attempt, parser.explain)


def infer_csv(records: ByteRecords, names: tuple[str, ...], wanted: list[str], dialect: CsvDialect) -> list[pa.Field]:
    """Return the wanted columns with the types that Arrow's parser infers from these records.

    Rows with a wrong number of fields are passed over; a column that holds bytes that are not text is a string here,
    so that its records fail when they are read.
    """
    if not len(records) or not wanted:
        return [pa.field(name, pa.null()) for name in wanted]
    parse = pacsv.ParseOptions(invalid_row_handler=lambda _: "skip")
    found = _read(records, names, dialect, _convert_options(dialect, {}, include=wanted), parse).schema
    return [
        pa.field(name, pa.string() if pa.types.is_binary(kind) else kind)
        for name, kind in zip(found.names, found.types, strict=True)
    ]


@dataclass
class _CsvParser:
    columns: InputSchema
    dialect: CsvDialect

    def attempt(self, records: ByteRecords) -> tuple[pa.Table, dict[int, str]]:
        """Parse at once; ragged rows are passed over and named."""
        if not len(records):
            return self.columns.schema.empty_table(), {}
        body = records.body()
        if len(records) > 1 and _has_lone_return(body):
            raise UnparsedError
        ragged: dict[int, str] = {}

        def note(row: pacsv.InvalidRow) -> str:
            ragged[row.number - 1] = self._ragged_reason(row.actual_columns)
            return "skip"

        schema = self.columns.schema
        types = dict(zip(schema.names, schema.types, strict=True))
        convert = _convert_options(self.dialect, types, include=schema.names)
        parse = pacsv.ParseOptions(invalid_row_handler=note)
        try:
            table = _read(records, self.columns.columns, self.dialect, convert, parse)
        except (pa.ArrowInvalid, UnicodeDecodeError) as error:
            raise UnparsedError from error
        if table.num_rows + len(ragged) != len(records) or self._ends_open(records):
            raise UnparsedError
        return table, ragged

    def explain(self, record: ByteRecords) -> BadRecord:
        """Say why a record that stands alone cannot be parsed."""
        if self._ends_open(record):
            return BadRecord(0, "has a quote that is never closed")
        text = {name: pa.binary() for name in self.columns.columns}
        rows: list[int] = []
        parse = pacsv.ParseOptions(invalid_row_handler=lambda row: rows.append(row.actual_columns) or "skip")
        try:
            raw = _read(record, self.columns.columns, self.dialect, _convert_options(self.dialect, text), parse)
        except UnicodeDecodeError as error:
            return BadRecord(0, f"is not {self.dialect.encoding}: {error.reason} (input.encoding)")
        except pa.ArrowInvalid as error:
            return BadRecord(0, f"cannot be parsed: {error}")
        if raw.num_rows + len(rows) != 1:
            return BadRecord(0, "holds a carriage return outside quotes (lines end with a newline)")
        if rows:
            return BadRecord(0, self._ragged_reason(rows[0]))
        return self._misfit(record, raw)

    def _misfit(self, record: ByteRecords, raw: pa.Table) -> BadRecord:
        for found in self.columns.schema:
            convert = _convert_options(self.dialect, {found.name: found.type}, include=[found.name])
            try:
                _read(record, self.columns.columns, self.dialect, convert, pacsv.ParseOptions())
            except pa.ArrowInvalid:
                value = raw.column(found.name)[0].as_py() or b""
                return self._misfit_of(found, value)
        return BadRecord(0, "cannot be parsed")

    def _misfit_of(self, found: pa.Field, value: bytes) -> BadRecord:
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
    records: ByteRecords,
    names: tuple[str, ...],
    dialect: CsvDialect,
    convert: pacsv.ConvertOptions,
    parse: pacsv.ParseOptions,
) -> pa.Table:
    body = records.body()
    parse.delimiter = dialect.delimiter
    parse.quote_char = dialect.quote or False
    read = pacsv.ReadOptions(
        use_threads=False, block_size=max(len(body), 1), column_names=list(names), encoding=dialect.encoding
    )
    return pacsv.read_csv(pa.py_buffer(body), read_options=read, parse_options=parse, convert_options=convert)


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
    view: NDArray[np.uint8] = np.frombuffer(body, np.uint8)
    returns = np.flatnonzero(view == _RETURN)
    if not len(returns):
        return False
    followers = view[np.minimum(returns + 1, len(view) - 1)]
    return bool((followers != _NEWLINE).any())
