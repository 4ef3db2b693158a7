"""The formats by name: how an object is cut, what columns it has, how it is read, and how answers are written.

Formats work on open binary files; who opens them, and at which version, is `storage`'s and the caller's.
A new format is a new file here and an entry in `FORMATS` or `WRITERS`.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Protocol

import pyarrow as pa

from batchpipe.batch import ByteRecords, MiniBatch
from batchpipe.convert import BadRecord, InputSchema, Parsed
from batchpipe.errors import InputError
from batchpipe.formats import csv, jsonl, lines, parquet
from batchpipe.formats import object as object_
from batchpipe.formats.compression import Sink
from batchpipe.formats.lines import Opener
from batchpipe.formats.parquet_writer import open_parquet
from batchpipe.formats.sampling import Samples
from batchpipe.formats.text import ProvisionalInputError
from batchpipe.formats.writers import TextWriter, Writer, open_csv, open_jsonl, open_raw
from batchpipe.job import InputSpec, OutputSpec
from batchpipe.split import InputObject, Picks, Range

__all__ = [
    "FORMATS",
    "WRITERS",
    "Format",
    "InputSchema",
    "ProvisionalInputError",
    "RangeReader",
    "TextWriter",
    "Writer",
    "misfit_error",
    "open_writer",
]


class RangeReader(Protocol):
    """The records of one range: iterate it once for mini-batches of bounded size, in order.

    After the last: ``first`` is where the first record that begins at or after the range's start begins,
    ``next_start`` where the first at or after its stop does, or the object's end (bytes; row groups for Parquet).
    ``records`` and ``bytes_read`` (of the decompressed object) grow on the way.
    """

    first: int
    next_start: int
    records: int
    bytes_read: int

    def __iter__(self) -> Iterator[MiniBatch]: ...


@dataclass(frozen=True)
class Format:
    """What a run needs of an input format.

    ``iter_cuts(opener, object, split_bytes, spec)`` yields (start, stop) that cover the object in order, nothing for an
    empty one. ``infer_schema(samples, spec)`` looks at the first (object, open file) pairs of the dataset, as few as
    it needs. ``open_range(file, range, number, spec, schema)`` reads. ``to_table(records, schema, spec)`` parses what
    was read, None where records are tables already or bytes for good; ``to_header(schema, spec)`` is the line of
    column names in front of records as they are read. ``iter_picked(file, object, picks, spec)`` yields ranges that
    together hold the picked records, each with the number of records before it, as few and as short as it can.
    All raise InputError.
    """

    iter_cuts: Callable[[Opener, InputObject, int, InputSpec], Iterator[tuple[int, int]]]
    open_range: Callable[[IO[bytes], Range, int, InputSpec, InputSchema | None], RangeReader]
    infer_schema: Callable[[Samples, InputSpec], InputSchema | None] = lines.infer_schema
    to_table: Callable[[ByteRecords, InputSchema, InputSpec], Parsed] | None = None
    needs_proof: Callable[[InputSpec], bool] = lambda _: False
    """Whether ranges inside an object begin at guesses, so that ``first`` must be compared with the ``next_start``
    of the range before, and a range that guessed wrong (or raised ProvisionalInputError) read again as exact."""
    to_header: Callable[[InputSchema, InputSpec], bytes] | None = None
    iter_picked: Callable[[IO[bytes], InputObject, Picks, InputSpec], Iterator[tuple[Range, int]]] = lines.iter_picked


FORMATS: Mapping[str, Format] = {
    "csv": Format(lines.iter_cuts, csv.open_range, csv.infer_schema, csv.to_table, csv.needs_proof, csv.to_header),
    "jsonl": Format(lines.iter_cuts, jsonl.open_range, jsonl.infer_schema, jsonl.to_table),
    "parquet": Format(parquet.iter_cuts, parquet.open_range, parquet.infer_schema, iter_picked=parquet.iter_picked),
    "lines": Format(lines.iter_cuts, lines.open_range),
    "object": Format(object_.iter_cuts, object_.open_range, iter_picked=object_.iter_picked),
}


WRITERS: Mapping[str, Callable[[OutputSpec, Sink, pa.Schema | None, bool], Writer]] = {
    "parquet": open_parquet,
    "csv": open_csv,
    "jsonl": open_jsonl,
    "raw": open_raw,
}


def open_writer(spec: OutputSpec, sink: Sink, schema: pa.Schema | None, *, header: bool = True) -> Writer:
    """Return a writer of the output's format; the sink needs only ``write`` and stays open.

    ``schema`` is that of the answers, None where they are bytes; ``header`` says whether a CSV part begins with names.
    Raises OutputError where the format cannot hold the schema.
    """
    return WRITERS[spec.format](spec, sink, schema, header)


def misfit_error(bad: BadRecord, uri: str, offset: int) -> InputError:
    """Return the error for a value that does not fit a type that was inferred (``bad.is_guess``): it ends the run."""
    return InputError(
        f"{bad.reason}, the type inferred for it from the first records",
        where=f"{uri}, byte {offset:,}",
        next=f"state the column's type: input.types.{bad.column}: {bad.fitting}",
    )
