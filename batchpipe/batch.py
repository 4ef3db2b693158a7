"""Records on their way through the chain, and the cutting of them into mini-batches. Pure: no I/O.

Records are either an Arrow table or `ByteRecords` (slices of one buffer); `Origins` says where each came from,
which is what join, drop and isolation of failures rest on.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

Int64s: TypeAlias = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class ByteRecords:
    """Records as slices of one buffer: record i is ``data[starts[i]:ends[i]]``, its terminator included.

    ``content_type`` is the media type of each record, without parameters; ``header`` the line of column names that
    stands before them where a stage asks for it: no record, and not among the ``nbytes``.
    """

    data: memoryview
    starts: Int64s
    ends: Int64s
    content_type: str = "application/octet-stream"
    header: bytes = b""

    @classmethod
    def of(cls, records: Sequence[bytes], content_type: str = "application/octet-stream") -> "ByteRecords":
        """Lay the records end to end in one buffer."""
        if len(records) == 1:  # as most answers are where each record is a request of its own
            return cls(
                memoryview(records[0]), np.zeros(1, np.int64), np.array([len(records[0])], np.int64), content_type
            )
        ends = np.cumsum(np.fromiter(map(len, records), np.int64, len(records)), dtype=np.int64)
        starts = np.concatenate([np.zeros(1, np.int64), ends[:-1]]) if len(records) else ends
        return cls(memoryview(b"".join(records)), starts, ends, content_type)

    @classmethod
    def concat(cls, parts: Sequence["ByteRecords"]) -> "ByteRecords":
        """One after the other, in one buffer."""
        ends = np.cumsum(np.concatenate([part.ends - part.starts for part in parts]), dtype=np.int64)
        starts = np.concatenate([np.zeros(1, np.int64), ends[:-1]]) if len(ends) else ends
        first, data = parts[0], memoryview(b"".join(part.body() for part in parts))
        return cls(data, starts, ends, first.content_type, first.header)

    def __reduce__(self) -> tuple[object, ...]:
        packed = type(self).concat([self])  # a slice would take its whole buffer along
        return _unpickle, (bytes(packed.data), packed.starts, packed.ends, self.content_type, self.header)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, i: int) -> memoryview:
        return self.data[self.starts[i] : self.ends[i]]

    @property
    def nbytes(self) -> int:
        """Exact bytes of the records themselves."""
        return int((self.ends - self.starts).sum())

    @property
    def is_contiguous(self) -> bool:
        """Whether the records follow each other without a gap, so that they are one slice of the buffer."""
        return len(self) == 0 or bool((self.starts[1:] == self.ends[:-1]).all())

    def slice(self, start: int, stop: int) -> "ByteRecords":
        """Records start..stop-1, sharing the buffer."""
        return ByteRecords(self.data, self.starts[start:stop], self.ends[start:stop], self.content_type, self.header)

    def take(self, indices: Int64s) -> "ByteRecords":
        """The records at these places, sharing the buffer."""
        return ByteRecords(self.data, self.starts[indices], self.ends[indices], self.content_type, self.header)

    def body(self) -> memoryview:
        """All records as one run of bytes; a slice of the buffer where they are contiguous."""
        if len(self) <= 1:
            return self[0] if len(self) else memoryview(b"")
        if self.is_contiguous:
            return self.data[self.starts[0] : self.ends[-1]]
        return memoryview(b"".join(self[i] for i in range(len(self))))

    def to_list(self) -> list[bytes]:
        """Each record as bytes of its own."""
        return [bytes(self[i]) for i in range(len(self))]


def _unpickle(data: bytes, starts: Int64s, ends: Int64s, content_type: str, header: bytes) -> ByteRecords:
    return ByteRecords(memoryview(data), starts, ends, content_type, header)


Records: TypeAlias = ByteRecords | pa.Table


def slice_records(records: Records, start: int, stop: int) -> Records:
    """Records start..stop-1, without copying them."""
    end = stop - start if isinstance(records, pa.Table) else stop  # Arrow wants a length
    return records.slice(start, end)


def take_records(records: Records, indices: Int64s) -> Records:
    """The records at these places."""
    return records.take(indices)


def concat_records(parts: Sequence[Records]) -> Records:
    """Records of one kind, one after the other. Bytes are copied into one buffer, tables are chunked."""
    if len(parts) == 1:
        return parts[0]
    if isinstance(parts[0], pa.Table):
        return pa.concat_tables([part for part in parts if isinstance(part, pa.Table)], promote_options="permissive")
    return type(parts[0]).concat([part for part in parts if not isinstance(part, pa.Table)])


@dataclass(frozen=True, slots=True, eq=False)
class Origins:
    """Where records came from, one entry a record.

    ``ranges`` is the range within the split, ``ordinals`` the place among that range's records (from 0),
    ``offsets`` the first byte in the decompressed object, -1 where a format has none (Parquet).
    """

    ranges: NDArray[np.int32]
    ordinals: Int64s
    offsets: Int64s

    @classmethod
    def of_range(cls, number: int, first_ordinal: int, offsets: Int64s) -> "Origins":
        """Origins of consecutive records of one range, the first of which is its ``first_ordinal``-th."""
        count = len(offsets)
        ordinals = np.arange(first_ordinal, first_ordinal + count, dtype=np.int64)
        return cls(np.full(count, number, np.int32), ordinals, offsets)

    def __len__(self) -> int:
        return len(self.ranges)

    def slice(self, start: int, stop: int) -> "Origins":
        """Origins start..stop-1."""
        return Origins(self.ranges[start:stop], self.ordinals[start:stop], self.offsets[start:stop])

    def take(self, indices: Int64s) -> "Origins":
        """The origins at these places."""
        return Origins(self.ranges[indices], self.ordinals[indices], self.offsets[indices])

    def order(self) -> Int64s:
        """Places of the records in the order in which they were read."""
        return np.lexsort((self.ordinals, self.ranges))

    @classmethod
    def concat(cls, parts: Sequence["Origins"]) -> "Origins":
        """One after the other."""
        if len(parts) == 1:
            return parts[0]
        columns = [[getattr(part, name) for part in parts] for name in ("ranges", "ordinals", "offsets")]
        return cls(*(np.concatenate(column) for column in columns))


NO_ORIGINS = Origins.of_range(0, 0, np.empty(0, np.int64))


@dataclass(frozen=True, slots=True, eq=False)
class MiniBatch:
    """Records that go through the chain together, with their origins."""

    records: Records
    origins: Origins

    def __len__(self) -> int:
        return len(self.records)

    @property
    def nbytes(self) -> int:
        """Bytes of the records: exact for byte records, Arrow's buffers (sliced) for a table."""
        return int(self.records.nbytes)

    def slice(self, start: int, stop: int) -> "MiniBatch":
        """Records start..stop-1 with their origins."""
        return MiniBatch(slice_records(self.records, start, stop), self.origins.slice(start, stop))

    def take(self, indices: Int64s) -> "MiniBatch":
        """The records at these places with their origins."""
        return MiniBatch(take_records(self.records, indices), self.origins.take(indices))

    @classmethod
    def concat(cls, parts: Sequence["MiniBatch"]) -> "MiniBatch":
        """One after the other."""
        return cls(concat_records([p.records for p in parts]), Origins.concat([p.origins for p in parts]))


def iter_batches(blocks: Iterable[MiniBatch], max_records: int | None, max_bytes: int) -> Iterator[MiniBatch]:
    """Cut a stream of blocks into mini-batches of at most ``max_records`` and ``max_bytes``, greedily, in O(n).

    A record larger than ``max_bytes`` goes alone. The cut of byte records is a function of the records only;
    that of tables also of the blocks they come in, which are a function of the split.
    """
    waiting: list[MiniBatch] = []
    records = size = 0
    for block in blocks:
        for part in _fit(block, max_records, max_bytes, records, size):
            if waiting and (size + part.nbytes > max_bytes or (max_records and records + len(part) > max_records)):
                yield MiniBatch.concat(waiting)
                waiting, records, size = [], 0, 0
            waiting.append(part)
            records, size = records + len(part), size + part.nbytes
    if waiting:
        yield MiniBatch.concat(waiting)


def _fit(block: MiniBatch, max_records: int | None, max_bytes: int, records: int, size: int) -> Iterator[MiniBatch]:
    """Parts of a block, the first of which may fill up a mini-batch that holds ``records`` and ``size`` already."""
    if isinstance(block.records, ByteRecords):
        yield from _fit_bytes(block, max_records, max_bytes, records, size)
    else:
        start = 0
        if max_records and records and len(block):
            start = min(max_records - records, len(block))
            yield from _halve(block.slice(0, start), max_bytes) if start else ()
        step = max_records or max(len(block), 1)
        for first in range(start, len(block), step):
            yield from _halve(block.slice(first, min(first + step, len(block))), max_bytes)


def _fit_bytes(
    block: MiniBatch, max_records: int | None, max_bytes: int, records: int, size: int
) -> Iterator[MiniBatch]:
    assert isinstance(block.records, ByteRecords)
    filled = np.cumsum(block.records.ends - block.records.starts)
    start = 0
    while start < len(block):
        used = int(filled[start - 1]) if start else 0
        stop = int(np.searchsorted(filled, used + max_bytes - size, side="right"))
        if max_records:
            stop = min(stop, start + max_records - records)
        if stop <= start and records == 0:
            stop = start + 1
        if stop > start:
            yield block.slice(start, stop)
        start, records, size = max(stop, start), 0, 0


def _halve(block: MiniBatch, max_bytes: int) -> Iterator[MiniBatch]:
    if block.nbytes <= max_bytes or len(block) <= 1:
        yield block
    else:
        middle = len(block) // 2
        yield from _halve(block.slice(0, middle), max_bytes)
        yield from _halve(block.slice(middle, len(block)), max_bytes)
