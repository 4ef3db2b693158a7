"""What a run reads, as small descriptions: input objects, ranges of them, splits. Pure data, sent to workers."""

from array import array
from collections.abc import Iterable
from dataclasses import dataclass, replace

from batchpipe.redact import clean_listed

SPLITS_AT_A_TIME = 2
"""Splits a worker runs side by side: reading and writing of one overlap with computing of the other."""


@dataclass(frozen=True, slots=True)
class InputObject:
    """One file or S3 object of the dataset, at the version that was listed.

    ``index`` is its place in the sorted listing, ``size`` is in bytes, ``version`` is the ETag on S3 and the
    modification time in nanoseconds on a local disk. ``name`` is its path below the folder that was listed.
    """

    index: int
    uri: str
    size: int
    version: str
    name: str = ""

    @property
    def shown(self) -> str:
        """Its URI as it may be printed and written down, without what is secret in it."""
        return clean_listed(self.uri)


@dataclass(frozen=True, slots=True)
class Picks:
    """The only records of an object that are read, in order: which ones, from 0, and their first bytes (-1: none)."""

    records: "array[int]"
    offsets: "array[int]"

    def __len__(self) -> int:
        return len(self.records)


@dataclass(frozen=True, slots=True)
class Range:
    """A contiguous piece of one object: the records that *begin* in [start, stop).

    The unit is bytes for text formats and row groups for Parquet; a whole object that need not be cut is
    ``(0, WHOLE)``. ``exact`` says that a record begins precisely at ``start``, proved by the split before.
    With ``picks`` (a redrive) it stands for the whole object, of which these records are read alone.
    """

    object: InputObject
    start: int
    stop: int
    exact: bool = False
    picks: Picks | None = None

    @property
    def is_whole(self) -> bool:
        """Whether the range is the whole object."""
        return self.start == 0 and self.stop == WHOLE

    @property
    def is_first(self) -> bool:
        """Whether the object begins here (its header and byte order mark belong to this range)."""
        return self.start == 0

    def __str__(self) -> str:
        return self.object.shown if self.stop == WHOLE else f"{self.object.shown}[{self.start}:{self.stop}]"


WHOLE = 2**63 - 1
"""The stop of a range that reads its object to the end."""


def find_object(inputs: Iterable[InputObject], shown: str, version: str) -> InputObject | None:
    """The object that was written down under this name, at this version: with its address in full."""
    return next((one for one in inputs if (one.shown, one.version) == (shown, version)), None)


def pick(found: InputObject, records: Iterable[int], offsets: Iterable[int]) -> Range:
    """Some records of an object alone, in order, by their numbers and first bytes; -1 is unknown."""
    return Range(found, 0, WHOLE, picks=Picks(array("q", records), array("q", offsets)))


@dataclass(frozen=True, slots=True)
class Split:
    """The unit of planning, commit, retry and resume: one range of an object, or several small whole objects."""

    index: int
    ranges: tuple[Range, ...]
    isolated: bool = False
    """Whether its callables run in child processes: it lost its worker, and one of its records may be why."""
    allowed_failures: int | None = None
    """How many of its records may fail before it stops itself: what was left when it was handed out; None: all."""

    @property
    def is_picked(self) -> bool:
        """Whether it is of a redrive: of its objects only some records are read."""
        return bool(self.ranges) and self.ranges[0].picks is not None

    def __str__(self) -> str:
        first = str(self.ranges[0]) if self.ranges else "nothing"
        more = f" and {len(self.ranges) - 1:,} more objects" if len(self.ranges) > 1 else ""
        return f"split {self.index} ({first}{more})"


def isolated(splits: Iterable[Split]) -> tuple[Split, ...]:
    """The same splits, to be run with callables in child processes."""
    return tuple(replace(split, isolated=True) for split in splits)
