"""Which record and line of its object a quarantined record is: filled in when all splits have settled.

A split knows neither, for it does not know how many records lie before it. So a task for each object with failures
reads what is quarantined of it, counts its lines up to the last failure, and writes the files again. Done twice, it
gives the same files; a run without failed records has no such task.
"""

from array import array
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np

from batchpipe import gauge
from batchpipe.batch import Int64s
from batchpipe.errors import InputError
from batchpipe.formats.lines import open_text
from batchpipe.job import InputSpec
from batchpipe.manifest import Failure
from batchpipe.orders import Place
from batchpipe.quarantine import read_failures, to_line
from batchpipe.split import InputObject, find_object
from batchpipe.storage import ObjectExistsError, Store, open_store

COUNTED_BYTES = 1 << 30
"""How far into an object lines are counted: as much is read again in a few seconds."""
CHUNK_BYTES = 1 << 20

_Key: TypeAlias = tuple[str, str]
"""What a failure says of its object: the URI without secrets, and the version."""


@dataclass(frozen=True, slots=True)
class Numbering:
    """Objects with failed records, and the files that hold these. A description, sent to a worker."""

    objects: tuple[InputObject, ...]
    files: tuple[tuple[str, int | None], ...]
    """URI, and how many records of the object lie before the split; None where nobody knows."""

    def __str__(self) -> str:
        return f"the numbering of failed records of {self.objects[0].uri}"


def number_failures(numbering: Numbering, place: Place) -> int:
    """Fill in the record and line number of every failure in these files; returns how many there are.

    An input object that cannot be read any more costs the line numbers. Raises InputError or OutputError where a file
    of the quarantine cannot be read or written.
    """
    output = place.job.output
    store = open_store(output.uri, output.storage_options)
    offsets: defaultdict[_Key, array[int]] = defaultdict(lambda: array("q"))
    count = 0
    for uri, _ in numbering.files:
        for failure in read_failures(store, uri):
            gauge.show("moved", 1)
            offsets[failure.object, failure.version].append(failure.offset)
            count += 1
    lines = {}
    for one in numbering.objects:
        key = (one.shown, one.version)
        lines[key] = _Lines.of(one, np.unique(np.array(offsets[key], np.int64)), place.job.input)
    for uri, before in numbering.files:
        _write_again(store, uri, before, lines, place)
    return count


def object_of(failure: Failure, inputs: Iterable[InputObject]) -> InputObject | None:
    """The input object that a failed record is of: with its address in full, which a failure does not say."""
    return find_object(inputs, failure.object, failure.version)


def line_of(found: InputObject, offset: int, spec: InputSpec) -> int | None:
    """The line of its object on which a record begins, from 1: by reading the object up to there.

    None where lines say nothing (Parquet, whole objects), lie too far to count, or cannot be read any more.
    """
    return _Lines.of(found, np.array([offset], np.int64), spec).at(offset)


@dataclass(frozen=True, slots=True, eq=False)
class _Lines:
    """Line numbers of some offsets of an object, in order."""

    offsets: Int64s
    lines: Int64s

    @classmethod
    def of(cls, found: InputObject, offsets: Int64s, spec: InputSpec) -> "_Lines":
        """Read an object up to the last of these offsets, which are sorted; what is read is one chunk at a time."""
        offsets = offsets[(offsets >= 0) & (offsets < COUNTED_BYTES)]
        if len(offsets) and spec.format in ("csv", "jsonl", "lines"):
            with suppress(InputError):
                lines = np.array(array("q", _count(found, offsets, spec)), np.int64)
                return cls(offsets[: len(lines)], lines)
        return cls(offsets[:0], offsets[:0])

    def at(self, offset: int) -> int | None:
        """The line on which an offset lies, None where it was not counted."""
        place = int(np.searchsorted(self.offsets, offset))
        is_known = place < len(self.offsets) and self.offsets[place] == offset
        return int(self.lines[place]) if is_known else None


def _count(found: InputObject, offsets: Int64s, spec: InputSpec) -> Iterator[int]:
    store = open_store(found.uri, spec.storage_options)
    with store.open(found.uri, size=found.size, version=found.version) as file:
        text = open_text(file, found, spec)
        position, line, done = 0, 1, 0
        while done < len(offsets) and (chunk := text.read(CHUNK_BYTES)):
            ends = np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n"))
            inside = offsets[done : np.searchsorted(offsets, position + len(chunk))] - position
            yield from (line + np.searchsorted(ends, inside)).tolist()
            gauge.show("moved", len(chunk))
            position, line, done = position + len(chunk), line + len(ends), done + len(inside)


def _write_again(store: Store, uri: str, before: int | None, lines: Mapping[_Key, _Lines], place: Place) -> None:
    found = store.stat(uri)
    with store.open_pending(uri, staging=place.staging, attempt=place.attempt) as sink:
        for failure in read_failures(store, uri):
            gauge.show("moved", 1)
            known = lines.get((failure.object, failure.version))
            line = known.at(failure.offset) if known else None
            # An object's first range knows its records' places from the start.
            first = before if failure.range_start else 0
            record = failure.record if first is None else first + failure.ordinal
            sink.write(to_line(replace(failure, record=record, line=line)))
        pending = sink.finish()
    try:
        store.publish(pending, replaces=found.version)
    except ObjectExistsError:  # a worker that was taken for lost has written the same
        store.discard(pending)
