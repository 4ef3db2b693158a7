"""Where records of CSV end, found without parsing: at the newlines that are outside quotes.

Whether a byte is outside quotes is the parity of the quotes before it (a doubled quote changes it twice), which is
how whole blocks are scanned at once. A quote that is neither the first byte of a field nor followed by a delimiter,
a line end or another quote is a contradiction: it proves that the data are broken, or that the state assumed at the
start of a range is wrong (after Ge et al., "Speculative Distributed CSV Data Parsing", SIGMOD 2019).
"""

import numpy as np
from numpy.typing import NDArray

from batchpipe.batch import Int64s

_NEWLINE, _RETURN = 10, 13


class BadQuoteError(Exception):
    """A quote where RFC 4180 has none: its offset in the object, and what is wrong with it."""

    def __init__(self, offset: int, reason: str) -> None:
        super().__init__(offset, reason)
        self.offset = offset
        self.reason = reason


class QuoteScanner:
    """Finds the ends of records in consecutive buffers, with the state of quotes carried along.

    ``inside`` says whether the next byte to come is inside quotes, ``opened`` is the offset in the object of the
    last quote that opened a value.
    """

    def __init__(self, delimiter: str, quote: str) -> None:
        self.inside = False
        self.opened = -1
        self._quote = quote.encode()
        self._before = np.zeros(256, np.bool_)
        self._before[[ord(delimiter), _NEWLINE, ord(quote)]] = True
        self._after = self._before.copy()
        self._after[_RETURN] = True
        self._unsure: Int64s = np.empty(0, np.int64)

    def ends(self, buffer: bytes, start: int, offset: int, field_start: int = 0) -> Int64s:
        """Return where records end in ``buffer[start:]``: positions just after a newline outside quotes.

        ``buffer[:start]`` was scanned before and begins the record that is still open; ``offset`` is the place of
        ``buffer[0]`` in the object; a field begins at ``field_start`` though no delimiter says so.
        Raises BadQuoteError.
        """
        view = np.frombuffer(buffer, np.uint8)
        if buffer.find(self._quote, start) < 0 and not len(self._unsure):
            return np.empty(0, np.int64) if self.inside else _positions(view, start, _NEWLINE) + 1
        quotes = _positions(view, start, self._quote[0])
        newlines = _positions(view, start, _NEWLINE)
        opening, closing = _sides(quotes, self.inside)
        closing = np.concatenate([self._unsure + start, closing])
        bad = self._first_bad(view, opening, closing, field_start)
        if bad >= 0:
            raise self._error(bad, opening, closing, offset)
        self._unsure = _unsure(view, closing) - len(view)
        outside = (np.searchsorted(quotes, newlines) + self.inside) % 2 == 0
        self.opened = int(opening[-1]) + offset if len(opening) else self.opened
        self.inside = bool((len(quotes) + self.inside) % 2)
        ends: Int64s = newlines[outside] + 1
        return ends

    def starts_inside(self, buffer: bytes) -> bool:
        """Whether the buffer proves that its first byte is inside quotes: outside is contradicted."""
        view = np.frombuffer(buffer, np.uint8)
        sides = _sides(_positions(view, 0, self._quote[0]), inside=False)
        return self._first_bad(view, *sides, field_start=0) >= 0

    def _first_bad(self, view: NDArray[np.uint8], opening: Int64s, closing: Int64s, field_start: int) -> int:
        """Return the position of the first quote that contradicts the state, -1 if there is none."""
        # The byte before position 0 is not known: there the quote itself stands in, which is allowed.
        late = opening[~self._before[view[np.maximum(opening - 1, 0)]] & (opening != field_start)]
        sure = closing[closing < len(view) - 1]
        follower = view[sure + 1]
        early = sure[~self._after[follower]]
        returns = sure[(follower == _RETURN) & (sure < len(view) - 2)]
        lone = returns[view[returns + 2] != _NEWLINE]
        return min((int(found[0]) for found in (late, early, lone) if len(found)), default=-1)

    def _error(self, bad: int, opening: Int64s, closing: Int64s, offset: int) -> BadQuoteError:
        if bad not in closing:
            return BadQuoteError(bad + offset, "a quote inside an unquoted field")
        before = opening[opening < bad]
        opened = int(before[-1]) + offset if len(before) else self.opened
        since = f" (the value opened at byte {opened:,})" if opened >= 0 else ""
        return BadQuoteError(bad + offset, f"text after a closing quote{since}")


def _sides(quotes: Int64s, inside: bool) -> tuple[Int64s, Int64s]:
    """Quotes that open a value and quotes that close one."""
    return quotes[int(inside) :: 2], quotes[1 - int(inside) :: 2]


def _unsure(view: NDArray[np.uint8], closing: Int64s) -> Int64s:
    """Closing quotes whose followers are not in the buffer yet: the last byte, or before a last carriage return."""
    last = closing[closing >= len(view) - 2]
    unsure: Int64s = last[(last == len(view) - 1) | (view[np.minimum(last + 1, len(view) - 1)] == _RETURN)]
    return unsure


def _positions(view: NDArray[np.uint8], start: int, byte: int) -> Int64s:
    return np.flatnonzero(view[start:] == byte) + start
