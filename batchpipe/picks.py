"""Reading only some records of an object, for a redrive, through the very code that reads all of them.

So a picked record has the bytes, types and place that it had in the first run, wherever in a range it lies.
"""

from collections.abc import Iterator
from typing import IO

import numpy as np

from batchpipe.batch import ByteRecords, Int64s, MiniBatch, Origins
from batchpipe.errors import InputError
from batchpipe.formats import Format, InputSchema
from batchpipe.job import InputSpec
from batchpipe.split import Range


class PickedRange:
    """The picked records of an object; see `RangeReader` for the attributes. Ordinals are places in the object."""

    def __init__(
        self, file: IO[bytes], range_: Range, number: int, spec: InputSpec, schema: InputSchema | None, form: Format
    ) -> None:
        assert range_.picks is not None
        self.first = self.next_start = 0
        self.records = self.bytes_read = 0
        self._file = file
        self._object = range_.object
        self._picks = range_.picks
        self._number = number
        self._spec = spec
        self._schema = schema
        self._format = form
        self._ordinals = np.frombuffer(self._picks.records, np.int64)
        # An offset tells a record wherever reading begins; what has none is told by its place in the object.
        self._has_offsets = self._picks.offsets[0] >= 0
        self._wanted = np.frombuffer(self._picks.offsets, np.int64) if self._has_offsets else self._ordinals

    def __iter__(self) -> Iterator[MiniBatch]:
        for part, before in self._format.iter_picked(self._file, self._object, self._picks, self._spec):
            yield from self._picked_in(part, before)
        if self.records != len(self._wanted):
            missing = len(self._wanted) - self.records
            msg = f"{missing:,} of the {len(self._wanted):,} records to redrive are not found in {self._object.shown!r}"
            raise InputError(msg, where=self._object.shown, next="this is a defect of batchpipe")

    def _picked_in(self, part: Range, before: int) -> Iterator[MiniBatch]:
        reader = self._format.open_range(self._file, part, self._number, self._spec, self._schema)
        read = self.bytes_read
        for block in reader:
            self.bytes_read = read + reader.bytes_read
            keys = block.origins.offsets if self._has_offsets else block.origins.ordinals + before
            places = np.flatnonzero(np.isin(keys, self._wanted, assume_unique=True))
            if len(places):
                yield self._pick(block, places, np.searchsorted(self._wanted, keys[places]))
            if keys[-1] >= self._wanted[-1]:
                return

    def _pick(self, block: MiniBatch, places: Int64s, which: Int64s) -> MiniBatch:
        self.records += len(places)
        picked = block.take(places)
        numbers = np.full(len(places), self._number, np.int32)
        origins = Origins(numbers, self._ordinals[which], picked.origins.offsets)
        if isinstance(picked.records, ByteRecords):
            # Records of their own: a slice would keep the block that it is of, of which little else is wanted.
            return MiniBatch(ByteRecords.concat([picked.records]), origins)
        return MiniBatch(picked.records, origins)
