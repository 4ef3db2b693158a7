"""The worker's side of an output: one pending piece for each split, and the file of its quarantined records."""

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from batchpipe.batch import ByteRecords, MiniBatch, Origins, Records
from batchpipe.convert import cast_table
from batchpipe.formats import Writer, open_writer
from batchpipe.job import Job
from batchpipe.manifest import Failure
from batchpipe.orders import Place
from batchpipe.split import Split
from batchpipe.stages.tables import can_be_table, to_table
from batchpipe.storage import PendingWriter, open_store

MAX_FAILURES_IN_RESULT = 5
MAX_PAYLOAD_CHARACTERS = 1_048_576


class Piece:
    """The pending output of one split. Opened by `open_piece`, which discards it unless it is finished."""

    def __init__(
        self, place: Place, split: Split, schema: pa.Schema | None, sink: PendingWriter, *, keeps_empty: bool
    ) -> None:
        self._job = place.job
        self._split = split
        self._schema = schema
        self._sink = sink
        # Under mirror the pieces of an object are joined: only the first of them begins with a header.
        begins_file = place.job.output.layout == "parts" or split.ranges[0].is_first
        # Of the formats only two can say their columns without a record.
        tells_columns = schema is not None and place.job.output.format in ("parquet", "csv")
        self._is_kept = place.job.output.layout == "mirror" or (keeps_empty and split.index == 0 and tells_columns)
        # Without known columns nothing was answered so far, and most likely there is nothing to write.
        is_known = schema is not None or place.job.output.format == "raw"
        self._open = partial(open_writer, place.job.output, sink, schema, header=begins_file)
        self._writer: Writer | None = self._open() if is_known else None

    @property
    def written(self) -> int:
        """Records written so far."""
        return self._writer.records if self._writer else 0

    def write(self, records: Records, origins: Origins) -> None:
        """Write answers in order; `origins` are those of the records they answer."""
        records = as_columns(records, self._job)
        if self._job.stages[-1].count == "none" and isinstance(records, ByteRecords):
            # An answer that is not counted stands whole for the first of the records it answers.
            records = records.take(np.flatnonzero(records.ends > records.starts))
        if isinstance(records, pa.Table):
            if self._job.output.add_source:
                records = add_source(records, origins, self._split)
            if self._schema is not None:
                records = cast_table(records, self._schema)
        if self._writer is None:
            self._writer = self._open()
        self._writer.write(records)

    def finish(self) -> dict[str, Any] | None:
        """Bring the piece to safety, still invisible. None, and nothing is left, where a part would hold no record."""
        if self._writer:
            self._writer.close()
        if not self.written and not self._is_kept:
            return None
        return self._sink.finish().to_json()


@contextmanager
def open_piece(place: Place, split: Split, schema: pa.Schema | None, *, keeps_empty: bool = False) -> Iterator[Piece]:
    """Open the pending piece of a split. Raises OutputError if it cannot be written.

    `keeps_empty`: the dataset has no record, so that the part of its first split stands for the columns.
    """
    output = place.job.output
    store = open_store(output.uri, output.storage_options)
    with store.open_pending(place.piece_uri(split), staging=place.staging, attempt=place.attempt) as sink:
        yield Piece(place, split, schema, sink, keeps_empty=keeps_empty)


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


class Quarantine:
    """The failed records of one split, each a JSON line with where it came from and why."""

    def __init__(self, place: Place, split: Split) -> None:
        self._place = place
        self._split = split
        self._lines: list[bytes] = []
        self._sink: PendingWriter | None = None
        self.count = 0
        self.first: list[Failure] = []

    def add(self, failure: Failure, batch: MiniBatch, index: int) -> None:
        """Keep a failed record, and the record itself as it was read."""
        self.count += 1
        if len(self.first) < MAX_FAILURES_IN_RESULT:
            self.first.append(failure)
        payload = record_text(batch, index)
        self._open().write(json.dumps(asdict(replace(failure, payload=payload))).encode() + b"\n")

    def finish(self) -> dict[str, Any] | None:
        """Bring the file to safety, still invisible; None where no record failed."""
        return self._sink.finish().to_json() if self._sink else None

    def discard(self) -> None:
        """Remove what was written and not finished."""
        if self._sink:
            self._sink.__exit__(None, None, None)

    def _open(self) -> PendingWriter:
        if self._sink is None:
            output, place = self._place.job.output, self._place
            store = open_store(output.uri, output.storage_options)
            uri = place.quarantine_uri(self._split)
            self._sink = store.open_pending(uri, staging=place.staging, attempt=place.attempt).__enter__()
        return self._sink


@contextmanager
def open_quarantine(place: Place, split: Split) -> Iterator[Quarantine]:
    """Open a split's quarantine, which makes no file before the first failed record."""
    quarantine = Quarantine(place, split)
    try:
        yield quarantine
    finally:
        quarantine.discard()


def record_text(batch: MiniBatch, index: int) -> str:
    """A record as text: a table's row as JSON, bytes as they are, or `base64:...` where they are no UTF-8."""
    one = batch.slice(index, index + 1).records
    if isinstance(one, pa.Table):
        return json.dumps(one.to_pylist()[0], default=str)[:MAX_PAYLOAD_CHARACTERS]
    data = bytes(one[0][:MAX_PAYLOAD_CHARACTERS])
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "base64:" + base64.b64encode(data).decode()
