"""The fields of CSV records as bytes: a header's names, and records with their fields in another order. Pure."""

import csv

import numpy as np
from numpy.typing import NDArray

from batchpipe.batch import ByteRecords, Int64s

_NEWLINE, _RETURN = 10, 13


def split_fields(record: bytes, encoding: str, delimiter: str, quote: str) -> tuple[str, ...]:
    """Return the texts of one record's fields. Raises UnicodeDecodeError and csv.Error."""
    text = record.decode(encoding).rstrip("\r\n")
    quoting = {"quotechar": quote} if quote else {"quoting": csv.QUOTE_NONE}
    csv.field_size_limit(max(csv.field_size_limit(), len(text) + 1))
    return tuple(next(csv.reader([text], delimiter=delimiter, **quoting), []))


def reorder_fields(records: ByteRecords, order: tuple[int, ...], delimiter: str, quote: str) -> ByteRecords:
    """Return the records with field ``order[i]`` at place i, byte for byte as it was.

    A record with another number of fields stays as it is: it will fail where it is parsed.
    """
    first, last = int(records.starts[0]), int(records.ends[-1])
    view = np.frombuffer(records.data[first:last], np.uint8)
    starts, ends = records.starts - first, records.ends - first
    delimiters = _outside(view, starts, delimiter, quote)
    low = np.searchsorted(delimiters, starts)
    is_regular = np.searchsorted(delimiters, ends) - low == len(order) - 1
    content = _content_ends(view, starts, ends)
    inner = delimiters[low[is_regular, None] + np.arange(len(order) - 1)]
    field_starts = np.column_stack([starts[is_regular], inner + 1])
    field_ends = np.column_stack([inner, content[is_regular]])
    # A record is put together from pieces: field, delimiter, field ... line end; one whole piece where irregular.
    piece_starts = np.zeros((len(records), 2 * len(order)), np.int64)
    piece_ends = np.zeros_like(piece_starts)
    piece_starts[is_regular, 0::2], piece_ends[is_regular, 0::2] = field_starts[:, order], field_ends[:, order]
    piece_starts[is_regular, 1:-1:2], piece_ends[is_regular, 1:-1:2] = inner, inner + 1
    piece_starts[is_regular, -1], piece_ends[is_regular, -1] = content[is_regular], ends[is_regular]
    piece_starts[~is_regular, 0], piece_ends[~is_regular, 0] = starts[~is_regular], ends[~is_regular]
    data = _gather(view, piece_starts.ravel(), piece_ends.ravel())
    new_ends = np.cumsum(ends - starts)
    return ByteRecords(memoryview(data.tobytes()), new_ends - (ends - starts), new_ends, records.content_type)


def _outside(view: NDArray[np.uint8], starts: Int64s, delimiter: str, quote: str) -> Int64s:
    """Return the positions of delimiters before which their record has an even number of quotes."""
    found = np.flatnonzero(view == ord(delimiter))
    if not quote:
        return found
    quotes = np.flatnonzero(view == ord(quote))
    owner = np.searchsorted(starts, found, side="right") - 1
    before = np.searchsorted(quotes, found) - np.searchsorted(quotes, starts)[owner]
    outside: Int64s = found[before % 2 == 0]
    return outside


def _content_ends(view: NDArray[np.uint8], starts: Int64s, ends: Int64s) -> Int64s:
    """Return where the records end without their line ends."""
    content = ends - (view[ends - 1] == _NEWLINE)
    has_return = (content > starts) & (content < ends) & (view[np.maximum(content - 1, 0)] == _RETURN)
    bare: Int64s = content - has_return
    return bare


def _gather(view: NDArray[np.uint8], starts: Int64s, ends: Int64s) -> NDArray[np.uint8]:
    lengths = ends - starts
    shift = starts - (np.cumsum(lengths) - lengths)
    return view[np.repeat(shift, lengths) + np.arange(int(lengths.sum()))]
