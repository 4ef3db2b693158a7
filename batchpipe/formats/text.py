"""Reading the records of a text format in one range of an object, in bounded blocks: csv, jsonl and lines share it.

A record belongs to the range in which its first byte lies; reading runs past the range's stop to finish its last one.
"""

import codecs
from collections.abc import Callable, Iterator
from typing import IO, Protocol

import numpy as np

from batchpipe.batch import ByteRecords, Int64s, MiniBatch, Origins
from batchpipe.errors import InputError
from batchpipe.formats.quotes import BadQuoteError
from batchpipe.split import WHOLE, Range

BLOCK_BYTES = 1 << 20
"""What is read at a time, and so about what a block of records holds."""

TAIL_BYTES = 64 << 10
"""What is read at a time beyond the stop of a range, to finish its last record."""

_NEWLINE, _RETURN = 10, 13


class ProvisionalInputError(InputError):
    """Raised by a range that began at a guess (not exact, not first): read again as exact, it may be well."""


class Scanner(Protocol):
    """Finds the ends of records; see `QuoteScanner`."""

    inside: bool
    opened: int

    def ends(self, buffer: bytes, start: int, offset: int, field_start: int = 0) -> Int64s: ...
    def starts_inside(self, buffer: bytes) -> bool: ...


class NewlineScanner:
    """Every newline ends a record."""

    inside = False
    opened = -1

    def ends(self, buffer: bytes, start: int, offset: int, field_start: int = 0) -> Int64s:  # noqa: ARG002 - Scanner's shape
        """Return the positions after each newline in ``buffer[start:]``."""
        return np.flatnonzero(np.frombuffer(buffer, np.uint8)[start:] == _NEWLINE) + (start + 1)

    def starts_inside(self, buffer: bytes) -> bool:  # noqa: ARG002 - Scanner's shape
        """Return False: nothing can hide a newline."""
        return False


class TextRange:
    """The records of one range as an iterable of mini-batches of about `BLOCK_BYTES`; iterate it once.

    After the last block: ``first``, the offset of the first record that begins at or after the range's start;
    ``next_start``, the offset of the first that begins at or after its stop (the object's end if there is none);
    ``records``. ``bytes_read`` and ``records`` grow on the way. Offsets are in the decompressed object.
    A ``file`` that cannot seek is read from where it is, which must be its beginning; the caller closes it.
    ``rewrite`` is given the records as they are and returns as many of them.
    """

    def __init__(  # noqa: PLR0913 - what differs between the text formats, by name
        self,
        file: IO[bytes],
        range_: Range,
        number: int = 0,
        *,
        scanner: Scanner | None = None,
        max_record_bytes: int = 64 << 20,
        skip_blank: bool = False,
        skip_first: bool = False,
        content_type: str = "text/plain",
        rewrite: Callable[[ByteRecords], ByteRecords] | None = None,
        block_bytes: int = BLOCK_BYTES,
    ) -> None:
        self.first = self.next_start = range_.start
        self.records = self.bytes_read = 0
        self._file = file
        self._range = range_
        self._number = number
        self._scanner = scanner or NewlineScanner()
        self._max_record_bytes = max_record_bytes
        self._skip_blank = skip_blank
        self._skip_first = skip_first and range_.is_first
        self._content_type = content_type
        self._rewrite = rewrite
        self._block_bytes = block_bytes

    @property
    def is_proven(self) -> bool:
        """Whether the range begins where a record is known to begin, or where any newline ends one."""
        return self._range.exact or self._range.is_first or isinstance(self._scanner, NewlineScanner)

    def __iter__(self) -> Iterator[MiniBatch]:
        if self._range.start >= self._range.stop:
            return
        for buffer, bounds, offset in self._blocks():
            batch = self._batch(buffer, bounds, offset)
            if len(batch):
                yield batch

    def _blocks(self) -> Iterator[tuple[bytes, Int64s, int]]:
        """Yield buffers with the bounds of the records of this range in them, and the buffer's offset."""
        is_guess = not (self._range.exact or self._range.is_first)
        # From the byte before a guessed start: if that ends a record, the first one begins right at the start.
        offset = self._range.start - is_guess
        if self._file.seekable():
            self._file.seek(offset)
        buffer, scanned, is_start = b"", 0, True
        found_first = not is_guess
        while True:
            chunk = self._read(offset + scanned, scanned)
            buffer = buffer + chunk if buffer else chunk
            if is_guess and is_start:
                self._scanner.inside = self._scanner.starts_inside(buffer)
            is_start = False
            ends = self._ends(buffer, scanned, offset, at_end=not chunk)
            if not found_first:
                self.first = offset + int(ends[0]) if len(ends) else offset + len(buffer)
                found_first = bool(len(ends)) or not chunk
                bounds = ends
            else:
                bounds = np.concatenate([np.zeros(1, np.int64), ends])
            if len(bounds):
                bounds, is_done = self._own(bounds, offset)
                yield buffer, bounds, offset
                if is_done:
                    return
                offset, buffer = offset + int(bounds[-1]), buffer[bounds[-1] :]
            if not chunk:
                self.next_start = offset + len(buffer)
                return
            scanned = len(buffer)
            if scanned > self._max_record_bytes:
                raise self._too_long(offset)

    def _own(self, bounds: Int64s, offset: int) -> tuple[Int64s, bool]:
        """Keep the bounds of records that begin before the stop; whether the first that does not is known."""
        stop = self._range.stop
        mine = int(np.searchsorted(bounds, stop - offset)) if stop != WHOLE else len(bounds)
        if mine == len(bounds):
            return bounds, False
        # Bounds at or past the stop begin records of the next range; the first of them ends our last record.
        self.next_start = offset + int(bounds[mine])
        return bounds[: mine + 1], True

    def _read(self, position: int, waiting: int) -> bytes:
        size = min(self._block_bytes, self._range.stop - position) if position < self._range.stop else TAIL_BYTES
        # A record that goes on and on is read in pieces that double, so that joining them stays O(n).
        size = max(min(size, self._block_bytes), waiting, 4)
        parts = []
        while size > 0 and (part := self._file.read(size)):
            parts.append(part)
            size -= len(part)
            self.bytes_read += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _ends(self, buffer: bytes, scanned: int, offset: int, *, at_end: bool) -> Int64s:
        try:
            ends = self._scanner.ends(buffer, scanned, offset, _mark_length(buffer) if offset == 0 else 0)
        except BadQuoteError as bad:
            raise self._error(
                f"malformed csv in {self._range.object.shown!r}: {bad.reason}",
                bad.offset,
                "mend the quotes; or state input.newlines_in_values: false if no value holds a newline",
            ) from None
        if at_end and self._scanner.inside:
            raise self._error(
                f"malformed csv in {self._range.object.shown!r}: a quote opened a value that is never closed",
                self._scanner.opened if self._scanner.opened >= 0 else offset,
                "mend the quotes; or state input.newlines_in_values: false if no value holds a newline",
            )
        last = int(ends[-1]) if len(ends) else 0
        if at_end and len(buffer) > last:
            ends = np.append(ends, len(buffer))
        return ends

    def _batch(self, buffer: bytes, bounds: Int64s, offset: int) -> MiniBatch:
        starts, ends = bounds[:-1], bounds[1:]
        lengths = ends - starts
        if len(lengths) and int(lengths.max()) > self._max_record_bytes:
            raise self._too_long(offset + int(starts[np.argmax(lengths)]))
        if offset == 0 and self._range.is_first and len(starts) and (mark := _mark_length(buffer)):
            starts = starts.copy()
            starts[0] += mark
            lengths = ends - starts
        if self._skip_blank and len(lengths) and int(lengths.min()) <= 2:
            starts, ends = _without_blank(buffer, starts, ends)
        elif len(lengths) and lengths[0] == 0:
            starts, ends = starts[1:], ends[1:]  # an object that holds a byte order mark and nothing else
        if self._skip_first and len(starts):
            self._skip_first = False
            starts, ends = starts[1:], ends[1:]
        origins = Origins.of_range(self._number, self.records, starts + offset)
        self.records += len(starts)
        records = ByteRecords(memoryview(buffer), starts, ends, self._content_type)
        return MiniBatch(self._rewrite(records) if self._rewrite and len(records) else records, origins)

    def _too_long(self, offset: int) -> InputError:
        limit = self._max_record_bytes / (1 << 20)
        opened = " (a quote opens a value there that is not closed)" if self._scanner.inside else ""
        found = self._range.object.shown
        return self._error(
            f"a record of {found!r} is longer than input.max_record_mb allows ({limit:g} MB){opened}",
            offset,
            "look at the object there; or raise input.max_record_mb",
        )

    def _error(self, message: str, offset: int, next_: str) -> InputError:
        kind = InputError if self.is_proven else ProvisionalInputError
        return kind(message, where=f"{self._range.object.shown}, byte {offset:,}", next=next_)


def _mark_length(buffer: bytes) -> int:
    return len(codecs.BOM_UTF8) if buffer.startswith(codecs.BOM_UTF8) else 0


def _without_blank(buffer: bytes, starts: Int64s, ends: Int64s) -> tuple[Int64s, Int64s]:
    """Leave out records that are empty but for their line end."""
    view = np.frombuffer(buffer, np.uint8)
    lengths = ends - starts
    first = view[np.minimum(starts, len(view) - 1)]
    is_blank = (lengths == 0) | ((lengths == 1) & ((first == _NEWLINE) | (first == _RETURN)))
    is_blank |= (lengths == 2) & (first == _RETURN) & (view[ends - 1] == _NEWLINE)
    return starts[~is_blank], ends[~is_blank]
