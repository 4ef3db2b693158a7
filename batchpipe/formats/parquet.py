"""Parquet: ranges of row groups, read page by page so that memory does not depend on a row group's size."""

from bisect import bisect_left
from collections.abc import Iterator
from itertools import islice
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from batchpipe.batch import MiniBatch, Origins
from batchpipe.convert import Field, InputSchema, plain_schema
from batchpipe.errors import InputError
from batchpipe.formats.compression import Borrowed
from batchpipe.formats.lines import Opener
from batchpipe.formats.sampling import SAMPLE_TRIES, Samples
from batchpipe.job import InputSpec
from batchpipe.split import WHOLE, InputObject, Picks, Range

BATCH_BYTES = 4 << 20
"""What a table of records holds about, by the sizes in the footer ..."""

MAX_BATCH_ROWS = 65_536
"""... and at most this many rows."""

_PAGE_BYTES = 1 << 20


def iter_cuts(opener: Opener, found: InputObject, split_bytes: int, spec: InputSpec) -> Iterator[tuple[int, int]]:  # noqa: ARG001 - Format's shape
    """Group row groups into ranges of about ``split_bytes`` compressed. The footer is read only of larger objects."""
    if not found.size:
        return
    if found.size <= split_bytes:
        yield 0, WHOLE
        return
    with opener() as file:
        footer = _open(file, found).metadata
        start, size = 0, 0
        for place in range(footer.num_row_groups):
            group = footer.row_group(place)
            added = sum(group.column(i).total_compressed_size for i in range(group.num_columns))
            if place > start and size + added > split_bytes:
                yield start, place
                start, size = place, 0
            size += added
        yield start, max(footer.num_row_groups, 1)


def iter_picked(
    file: IO[bytes],
    found: InputObject,
    picks: Picks,
    spec: InputSpec,  # noqa: ARG001 - Format's shape
) -> Iterator[tuple[Range, int]]:
    """Only the row groups that hold a picked row."""
    footer = _open(file, found).metadata
    before = done = 0
    for place in range(footer.num_row_groups):
        behind = before + footer.row_group(place).num_rows
        so_far = bisect_left(picks.records, behind, done)
        if so_far > done:
            yield Range(found, place, place + 1), before
        before, done = behind, so_far


def infer_schema(samples: Samples, spec: InputSpec) -> InputSchema:
    """Return the schema of the dataset's first object, without metadata and dictionaries; ``input.columns`` picks.

    Raises InputError.
    """
    for found, file in ((found, file) for found, file in islice(samples, SAMPLE_TRIES) if found.size):
        schema = plain_schema(_open(file, found).schema_arrow)
        picked = pa.schema([_field(schema, name, found) for name in spec.columns or schema.names])
        return InputSchema(picked, frozenset(picked.names), tuple(picked.names), found.shown)
    names = spec.columns or ()
    return InputSchema(pa.schema([pa.field(name, pa.null()) for name in names]), frozenset(), tuple(names))


class ParquetRange:
    """The rows of a range's row groups as tables of bounded size; see `TextRange` for the attributes (row groups)."""

    def __init__(self, file: IO[bytes], range_: Range, number: int, schema: InputSchema) -> None:
        self.first = self.next_start = range_.start
        self.records = self.bytes_read = 0
        self._file = file
        self._range = range_
        self._number = number
        self._schema = schema

    def __iter__(self) -> Iterator[MiniBatch]:
        if not self._range.object.size:
            return
        counted = _Counted(self._file)
        opened = _open(counted, self._range.object)
        names = _check_columns(opened.schema_arrow, self._schema, self._range.object)
        stop = min(self._range.stop, opened.num_row_groups)
        for place in range(self._range.start, stop):
            try:
                for table in _tables(opened, place, names):
                    self.bytes_read = counted.count
                    yield self._batch(table)
            except (pa.ArrowException, OSError) as error:
                raise _broken(error, self._range.object) from error
        self.next_start = max(stop, self._range.start)

    def _batch(self, table: pa.Table) -> MiniBatch:
        origins = Origins.of_range(self._number, self.records, np.full(len(table), -1, np.int64))
        self.records += len(table)
        schema = self._schema.schema
        if table.schema.equals(schema):
            return MiniBatch(table.replace_schema_metadata(None), origins)
        try:
            return MiniBatch(table.select(schema.names).cast(schema), origins)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            found, other = self._range.object.shown, self._schema.header_of
            raise InputError(
                f"the columns of {found!r} do not fit those of {other!r}: {error}",
                where=f"{found}: {_described(table.schema)}; {other}: {_described(schema)}",
                next="give the objects the same columns and types, or read them by two jobs",
            ) from error


def open_range(
    file: IO[bytes],
    range_: Range,
    number: int,
    spec: InputSpec,  # noqa: ARG001 - Format's shape
    schema: InputSchema | None,
) -> ParquetRange:
    """Read the rows of a range."""
    assert schema is not None
    return ParquetRange(file, range_, number, schema)


class _Counted(Borrowed):
    """A borrowed file that counts what is read of it."""

    count = 0

    def read(self, size: int = -1, /) -> bytes:
        """Read, and count."""
        data = super().read(size)
        self.count += len(data)
        return data


def _open(file: IO[bytes] | Borrowed, found: InputObject) -> pq.ParquetFile:
    lent = file if isinstance(file, Borrowed) else Borrowed(file)
    try:
        return pq.ParquetFile(pa.PythonFile(lent, mode="r"), pre_buffer=False, buffer_size=_PAGE_BYTES)
    except (pa.ArrowException, OSError) as error:
        raise _broken(error, found) from error


def _broken(error: Exception, found: InputObject) -> Exception:
    # An error of the file itself is storage's to tell; Arrow's own have no errno.
    if isinstance(error, InputError) or getattr(error, "errno", None) is not None:
        return error
    return InputError(
        f"cannot read {found.shown!r} as Parquet: {str(error).strip() or type(error).__name__}",
        where=f"{found.shown}, {found.size:,} bytes",
        next="the object is truncated, corrupt or of another format: write it again, or leave it out of input.uri",
    )


def _tables(opened: pq.ParquetFile, place: int, names: list[str]) -> Iterator[pa.Table]:
    """Read one row group. The size of a batch is a function of the footer, so that every run cuts alike."""
    group = opened.metadata.row_group(place)
    chunks = [group.column(i) for i in range(group.num_columns)]
    size = sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema.split(".")[0] in names)
    rows = min(max(BATCH_BYTES * group.num_rows // max(size, 1), 1), MAX_BATCH_ROWS)
    for batch in opened.iter_batches(rows, row_groups=[place], columns=names, use_threads=False):
        yield pa.Table.from_batches([batch])


def _check_columns(schema: pa.Schema, wanted: InputSchema, found: InputObject) -> list[str]:
    missing = [name for name in wanted.schema.names if name not in schema.names]
    if missing:
        raise InputError(
            f"{found.shown!r} lacks the column {missing[0]!r}, compared with {wanted.header_of!r}",
            where=f"{found.shown}: {_described(schema)}; {wanted.header_of}: {_described(wanted.schema)}",
            next="give the objects the same columns, or read them by two jobs",
        )
    return list(wanted.schema.names)


def _field(schema: pa.Schema, name: str, found: InputObject) -> Field:
    if name not in schema.names:
        raise InputError(
            f"input.columns names {name!r}, which is not a column of {found.shown!r}",
            where=f"{found.shown}: {_described(schema)}",
            next="name one of these columns in input.columns",
        )
    return schema.field(name)


def _described(schema: pa.Schema) -> str:
    shown = [f"{field.name} {field.type}" for field in schema][:20]
    return ", ".join(shown) + (" ..." if len(schema) > 20 else "")
