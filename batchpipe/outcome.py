"""What became of records that were sent to a stage: answers, failures, drops, and how many more may fail. Pure."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np
import pyarrow as pa

from batchpipe import content
from batchpipe.batch import ByteRecords, Int64s, Records, concat_records
from batchpipe.content import JSON, JSON_LINES, TABULAR
from batchpipe.manifest import StageStats
from batchpipe.stages import Answer, InvocationFailed, Remedy

Stats: TypeAlias = dict[str, StageStats]
Part: TypeAlias = "tuple[int, Outcome]"
"""What became of a slice of the records, behind the place that it begins at."""

NONE: Int64s = np.empty(0, np.int64)
OF_SEVERAL_TYPES = "application/octet-stream"


@dataclass(frozen=True, slots=True)
class FailedRecord:
    """A record that failed for good: its place among those sent, the stage, why, and after how many attempts."""

    place: int
    stage: str
    why: InvocationFailed
    attempts: int


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """What became of the records sent: answers with the places they belong to, failures, and places dropped."""

    records: Records | None
    places: Int64s
    failed: tuple[FailedRecord, ...] = ()
    dropped: Int64s = field(default_factory=lambda: NONE)

    @classmethod
    def of(cls, answer: Answer, sent: int, stage: str, stats: Stats) -> "Outcome":
        """What an answer to so many records says of them; the stage's account is told."""
        if answer.kept is None:
            stats[stage] += StageStats(answered=sent)
            return cls(answer.records, np.arange(sent, dtype=np.int64))
        places, dropped = np.flatnonzero(answer.kept), np.flatnonzero(~answer.kept)
        stats[stage] += StageStats(answered=len(places), dropped=len(dropped))
        return cls(answer.records, places.astype(np.int64), (), dropped.astype(np.int64))

    @classmethod
    def merge(cls, parts: Iterable[Part]) -> "Outcome":
        """Put outcomes of consecutive slices together.

        Raises TypeError where nothing can hold all answers: tables and bytes, or columns of other types.
        """
        shifted = list(parts)
        records = [outcome.records for _, outcome in shifted if outcome.records is not None and len(outcome.places)]
        if len({type(each) for each in records}) > 1:
            raise TypeError("some records as a table and others as bytes")
        try:
            together = concat_records(records) if records else None
        except pa.ArrowException as exc:
            raise TypeError(f"some records with other types than others: {exc}") from exc
        types = {_kind(each) for each in records}
        if isinstance(together, ByteRecords) and len(types) > 1:
            together = replace(together, content_type=OF_SEVERAL_TYPES)
        return cls(
            together,
            np.concatenate([outcome.places + first for first, outcome in shifted]),
            tuple(replace(failed, place=failed.place + first) for first, one in shifted for failed in one.failed),
            np.concatenate([outcome.dropped + first for first, outcome in shifted]),
        )

    def failing(self, stage: str, why: InvocationFailed) -> "Outcome":
        """The same, but that what was answered has failed."""
        failed = (FailedRecord(int(place), stage, why, 1) for place in self.places)
        in_order = sorted([*self.failed, *failed], key=lambda each: each.place)
        return Outcome(None, NONE, tuple(in_order), self.dropped)


def outvoted(parts: Sequence[Part]) -> dict[int, InvocationFailed]:
    """Which parts, by where they begin, were answered as another type than most records, where text has columns.

    Other bytes, as images, may be of several types.
    """
    types = {first: _kind(one.records) for first, one in parts if isinstance(one.records, ByteRecords)}
    kinds = set(types.values())
    if len(kinds) < 2 or not {media_type for media_type, _ in kinds} & TABULAR:
        return {}
    counts = Counter[tuple[str, bytes]]()
    for first, one in parts:
        if first in types:
            counts[types[first]] += len(one.places)
    [(usual, _)] = counts.most_common(1)
    return {first: _unusual(kind, usual) for first, kind in types.items() if kind != usual}


def _kind(records: Records) -> tuple[str, bytes]:
    """The type of records, and their header; JSON is JSON, as whichever it came: a record is a document."""
    if not isinstance(records, ByteRecords):
        return "", b""
    return JSON if records.content_type == JSON_LINES else records.content_type, records.header


def _unusual(kind: tuple[str, bytes], usual: tuple[str, bytes]) -> InvocationFailed:
    here, there = (content.named(media_type) if header else media_type for media_type, header in (kind, usual))
    what = f"{here} with other names" if here == there else here
    message = f"answered {what}; others of its mini-batch are answered as {there}"
    return InvocationFailed("WrongAnswer", message, Remedy.ISOLATE)


@dataclass(slots=True)
class FailureLimit:
    """How many more records of this split may fail before it stops itself; None is no limit."""

    allowed: int | None
    found: int = 0
    allowed_slow: int | None = None
    """How many of them may be such that took further attempts, or a server's life."""
    slow: int = 0

    @property
    def is_spent(self) -> bool:
        """Whether more records failed than are allowed, so that finding further ones is of no use."""
        limits = ((self.found, self.allowed), (self.slow, self.allowed_slow))
        return any(allowed is not None and found > allowed for found, allowed in limits)

    def add(self, why: InvocationFailed, count: int = 1) -> None:
        """Count records that a stage failed for."""
        self.found += count
        self.slow += count * (why.remedy in (Remedy.RETRY, Remedy.DIED))
