"""The worker's side of an output: one pending piece for each split."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from batchpipe.batch import ByteRecords, Origins, Records, slice_records
from batchpipe.convert import cast_table
from batchpipe.formats import TextWriter, Writer, open_writer
from batchpipe.job import Job
from batchpipe.orders import Place
from batchpipe.split import Split
from batchpipe.stages.tables import can_be_table, to_table
from batchpipe.storage import PendingWriter, open_store


class Piece:
    """The pending output of one split. Opened by `open_piece`, which discards it unless it is finished."""

    def __init__(
        self, place: Place, split: Split, schema: pa.Schema | None, sink: PendingWriter, *, keeps_empty: bool
    ) -> None:
        self._job = place.job
        self._split = split
        self._schema = schema
        self._sink = sink
        self._placeholder = placeholder_line(place.job)
        self._placeholders = 0
        # Under mirror the pieces of an object are joined: only the first of them begins with a header.
        begins_file = place.job.output.layout == "parts" or split.ranges[0].is_first
        # Of the formats only two can say their columns without a record.
        tells_columns = schema is not None and place.job.output.format in ("parquet", "csv")
        # A redrive adds to answers that are there already, maybe none.
        is_mirrored = place.job.output.layout == "mirror" and not split.is_picked
        self._is_kept = is_mirrored or (keeps_empty and split.index == 0 and tells_columns)
        # Without known columns nothing was answered so far, and most likely there is nothing to write.
        is_known = schema is not None or place.job.output.format == "raw"
        self._open = partial(open_writer, place.job.output, sink, schema, header=begins_file)
        self._writer: Writer | None = self._open() if is_known else None

    @property
    def written(self) -> int:
        """Records written so far."""
        return self._writer.records if self._writer else 0

    def write(self, records: Records | None, origins: Origins, failed: Origins) -> None:
        """Write answers in order, and the job's placeholder in the place of each record that failed.

        `origins` are those of the records that are answered.
        """
        answers = None if records is None else self._fitted(records, origins)
        if self._placeholder is None or not len(failed):
            if answers is not None:
                self._opened().write(answers)
            return
        both = Origins.concat([origins, failed])
        order = both.order()
        is_failed = order >= len(origins)
        bounds = [0, *(np.flatnonzero(np.diff(is_failed)) + 1), len(order)]
        for start, stop in pairwise(bounds):
            if is_failed[start]:
                self._fill(stop - start)
            elif answers is not None:
                first = int(order[start])  # answers are in order already
                self._opened().write(slice_records(answers, first, first + stop - start))

    def finish(self) -> dict[str, Any] | None:
        """Bring the piece to safety, still invisible. None, and nothing is left, where a part would hold no record."""
        if self._writer:
            self._writer.close()
        if not self.written and not self._placeholders and not self._is_kept:
            return None
        return self._sink.finish().to_json()

    def _fitted(self, records: Records, origins: Origins) -> Records:
        records = as_columns(records, self._job)
        if self._job.stages[-1].count == "none" and isinstance(records, ByteRecords):
            # An answer that is not counted stands whole for the first of the records it answers.
            records = records.take(np.flatnonzero(records.ends > records.starts))
        if isinstance(records, pa.Table):
            if self._job.output.add_source:
                records = add_source(records, origins, self._split)
            if self._schema is not None:
                records = cast_table(records, self._schema)
        return records

    def _fill(self, count: int) -> None:
        writer = self._opened()
        assert isinstance(writer, TextWriter), "job files state a placeholder for csv and raw alone"
        assert self._placeholder is not None
        writer.write_lines(self._placeholder, count)
        self._placeholders += count

    def _opened(self) -> Writer:
        if self._writer is None:
            self._writer = self._open()
        return self._writer


@contextmanager
def open_piece(place: Place, split: Split, schema: pa.Schema | None, *, keeps_empty: bool = False) -> Iterator[Piece]:
    """Open the pending piece of a split. Raises OutputError if it cannot be written.

    `keeps_empty`: the dataset has no record, so that the part of its first split stands for the columns.
    """
    output = place.job.output
    store = open_store(output.uri, output.storage_options)
    with store.open_pending(place.piece_uri(split), staging=place.staging, attempt=place.attempt) as sink:
        yield Piece(place, split, schema, sink, keeps_empty=keeps_empty)


def placeholder_line(job: Job) -> bytes | None:
    """What stands in the output for a record that failed; None for nothing."""
    if job.on_error.placeholder is None:
        return None
    is_line = job.output.format == "csv" or job.output.assemble_with == "line"
    return job.on_error.placeholder.encode() + (b"\n" if is_line else b"")


def as_columns(records: Records, job: Job) -> Records:
    """Answers as a table where the output has columns and text answers can be read as such."""
    if job.output.format != "raw" and isinstance(records, ByteRecords) and can_be_table(records):
        return to_table(records)
    return records


def add_source(table: pa.Table, origins: Origins, split: Split) -> pa.Table:
    """Add where each record came from: `_object`, its URI, and `_record`, its place in the object from 0."""
    uris = pa.array([found.object.uri for found in split.ranges], pa.string())
    objects = uris.take(origins.ranges)
    return table.append_column("_object", objects).append_column("_record", pa.array(origins.ordinals))
