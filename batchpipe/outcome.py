"""What became of records that were sent to a stage: answers, failures, drops, and how many more may fail. Pure."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias, TypeVar

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

_Answered: TypeAlias = tuple[int, Records, int]
"""Where a part begins, its answers, and how many they are."""
_Kind = TypeVar("_Kind")

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
        if not shifted:
            return cls(None, NONE)
        if len(shifted) == 1 and shifted[0][0] == 0:
            return shifted[0][1]
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
    """Which parts, by where they begin, were answered as another type than most records of their mini-batch.

    That is text with columns of another content type or header, where other bytes, as images, may be of several; and
    tables whose columns cannot stand beside those of the others.
    """
    answered = [(first, one.records, len(one.places)) for first, one in parts if one.records is not None]
    return {**_other_texts(answered), **_other_tables(answered)}


def _other_texts(answered: Iterable[_Answered]) -> dict[int, InvocationFailed]:
    texts = [(first, _kind(records), count) for first, records, count in answered if isinstance(records, ByteRecords)]
    kinds = {kind for _, kind, _ in texts}
    if len(kinds) < 2 or not {media_type for media_type, _ in kinds} & TABULAR:
        return {}
    usual, _ = _most_common((kind, count) for _, kind, count in texts)
    return {first: _unusual(kind, usual) for first, kind, _ in texts if kind != usual}


def _other_tables(answered: Iterable[_Answered]) -> dict[int, InvocationFailed]:
    """Where most records agree. Else nobody can say which are odd, and the stage does not answer alike."""
    tables = [(first, records.schema, count) for first, records, count in answered if isinstance(records, pa.Table)]
    if len({schema for _, schema, _ in tables}) < 2:
        return {}
    usual, share = _most_common((schema, count) for _, schema, count in tables)
    if share <= 0.5:
        return {}
    odd = ((first, _misfit(schema, usual)) for first, schema, _ in tables if schema != usual)
    return {first: InvocationFailed("WrongAnswer", why, Remedy.ISOLATE) for first, why in odd if why}


def _most_common(counted: Iterable[tuple[_Kind, int]]) -> tuple[_Kind, float]:
    """What most records are, and which share of all."""
    counts = Counter[_Kind]()
    for kind, count in counted:
        counts[kind] += count
    [(usual, most)] = counts.most_common(1)
    return usual, most / max(counts.total(), 1)


def _misfit(schema: pa.Schema, usual: pa.Schema) -> str:
    """Why a table cannot stand beside the usual ones; empty where it can."""
    for column in schema:
        place = usual.get_field_index(column.name)
        other = usual.field(place).type if place >= 0 else column.type
        if not _fit(column.type, other):
            return f"answered column {column.name!r} as {column.type}; most of its mini-batch as {other}"
    return ""


def _fit(kind: pa.DataType, other: pa.DataType) -> bool:
    try:
        pa.unify_schemas([pa.schema([("", kind)]), pa.schema([("", other)])], promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return False
    return True


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


def new_stats() -> Stats:
    """An empty account of what each stage does."""
    return defaultdict(StageStats)
