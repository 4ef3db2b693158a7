"""Objects: a whole object is one record, as it lies there."""

from collections.abc import Iterator
from typing import IO

import numpy as np

from batchpipe.batch import ByteRecords, MiniBatch, Origins
from batchpipe.errors import InputError
from batchpipe.formats.compression import decompressed
from batchpipe.formats.lines import Opener
from batchpipe.job import InputSpec
from batchpipe.split import WHOLE, InputObject, Picks, Range

_BLOCK_BYTES = 1 << 20


def iter_cuts(opener: Opener, found: InputObject, split_bytes: int, spec: InputSpec) -> Iterator[tuple[int, int]]:  # noqa: ARG001 - Format's shape
    """Never cut an object. An empty one has no range, and so no record."""
    if found.size:
        yield 0, WHOLE


def iter_picked(file: object, found: InputObject, picks: Picks, spec: InputSpec) -> Iterator[tuple[Range, int]]:  # noqa: ARG001 - Format's shape
    """Read the object: it is the record."""
    yield Range(found, 0, WHOLE), 0


class WholeObject:
    """One object as one record; see `TextRange` for the attributes. It is unpacked only where compression is stated."""

    def __init__(self, file: IO[bytes], range_: Range, number: int, spec: InputSpec) -> None:
        self.first = self.next_start = 0
        self.records = self.bytes_read = 0
        self._file = file
        self._range = range_
        self._number = number
        self._spec = spec

    def __iter__(self) -> Iterator[MiniBatch]:
        # By its ending alone a .gz is not unpacked: it may be just what the model takes.
        stated = self._spec.compression if self._spec.compression != "auto" else "none"
        self._file.seek(0)
        stream = decompressed(self._file, self._range.object, stated)
        parts = []
        while part := stream.read(_BLOCK_BYTES):
            parts.append(part)
            self.bytes_read += len(part)
            if self.bytes_read > self._spec.max_record_bytes:
                raise self._too_long()
        if not parts:
            return
        self.records, self.next_start = 1, self.bytes_read
        yield MiniBatch(ByteRecords.of([b"".join(parts)]), Origins.of_range(self._number, 0, np.zeros(1, np.int64)))

    def _too_long(self) -> InputError:
        uri = self._range.object.shown
        return InputError(
            f"{uri!r} is longer than input.max_record_mb allows for one record ({self._spec.max_record_mb:g} MB)",
            where=f"{uri}, byte 0",
            next="raise input.max_record_mb",
        )


def open_range(file: IO[bytes], range_: Range, number: int, spec: InputSpec, schema: object = None) -> WholeObject:  # noqa: ARG001 - Format's shape
    """Read an object as one record."""
    return WholeObject(file, range_, number, spec)
