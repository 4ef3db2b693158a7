"""Lines: every line is a record, its terminator included, whatever it holds. And the opening of any text object."""

import io
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import IO, Any

from batchpipe.formats.compression import compression_of, decompressed
from batchpipe.formats.encodings import Transcoded, is_cuttable
from batchpipe.formats.text import BLOCK_BYTES, TextRange
from batchpipe.job import InputSpec
from batchpipe.split import WHOLE, InputObject, Picks, Range

PICKED_TOGETHER = 1 << 20
"""Picked records that lie no farther apart are read in one go: to skip less than that saves nothing."""

Opener = Callable[[], Any]
"""Opens the object; what it returns is a context manager that gives the open file."""


def iter_cuts(opener: Opener, found: InputObject, split_bytes: int, spec: InputSpec) -> Iterator[tuple[int, int]]:  # noqa: ARG001 - Format's shape
    """Cut a text object into byte ranges of about ``split_bytes``; what is compressed stays whole."""
    if not found.size:
        return
    if found.size <= split_bytes or not is_seekable_text(found, spec):
        yield 0, WHOLE
        return
    count = -(-found.size // split_bytes)
    bounds = (found.size * place // count for place in range(count + 1))
    yield from pairwise(bounds)


def iter_picked(file: object, found: InputObject, picks: Picks, spec: InputSpec) -> Iterator[tuple[Range, int]]:  # noqa: ARG001 - Format's shape
    """Begin at a picked record, and end with one, wherever the object can be read from the middle."""
    if not is_seekable_text(found, spec):
        yield Range(found, 0, WHOLE), 0
        return
    begin = last = picks.offsets[0]
    for offset in picks.offsets[1:]:
        if offset - last > PICKED_TOGETHER:
            yield Range(found, begin, last + 1, exact=True), 0
            begin = offset
        last = offset
    yield Range(found, begin, last + 1, exact=True), 0


def is_seekable_text(found: InputObject, spec: InputSpec) -> bool:
    """Whether records can be read from the middle of the object: it is not compressed, and newlines are bytes."""
    return compression_of(found.uri, spec.compression) == "none" and is_cuttable(spec.encoding)


def open_text(file: IO[bytes], found: InputObject, spec: InputSpec) -> IO[bytes]:
    """Return the object's text, decompressed and in an encoding that can be cut."""
    text = decompressed(file, found, compression_of(found.uri, spec.compression))
    if is_cuttable(spec.encoding):
        return text
    return io.BufferedReader(Transcoded(text, spec.encoding, found), BLOCK_BYTES)


def open_range(
    file: IO[bytes],
    range_: Range,
    number: int,
    spec: InputSpec,
    schema: object = None,  # noqa: ARG001 - Format's shape
    block_bytes: int = BLOCK_BYTES,
) -> TextRange:
    """Read the lines of a range."""
    text = open_text(file, range_.object, spec)
    return TextRange(text, range_, number, max_record_bytes=spec.max_record_bytes, block_bytes=block_bytes)


def infer_schema(samples: object, spec: InputSpec) -> None:  # noqa: ARG001 - Format's shape
    """Return None: lines have no columns."""
    return
