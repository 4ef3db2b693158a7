"""What a run reads, as small descriptions: input objects, ranges of them, splits. Pure data, sent to workers."""

from dataclasses import dataclass


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


@dataclass(frozen=True, slots=True)
class Range:
    """A contiguous piece of one object: the records that *begin* in [start, stop).

    The unit is bytes for text formats and row groups for Parquet; a whole object that need not be cut is
    ``(0, WHOLE)``. ``exact`` says that a record begins precisely at ``start``, proved by the split before.
    """

    object: InputObject
    start: int
    stop: int
    exact: bool = False

    @property
    def is_whole(self) -> bool:
        """Whether the range is the whole object."""
        return self.start == 0 and self.stop == WHOLE

    @property
    def is_first(self) -> bool:
        """Whether the object begins here (its header and byte order mark belong to this range)."""
        return self.start == 0

    def __str__(self) -> str:
        return self.object.uri if self.stop == WHOLE else f"{self.object.uri}[{self.start}:{self.stop}]"


WHOLE = 2**63 - 1
"""The stop of a range that reads its object to the end."""


@dataclass(frozen=True, slots=True)
class Split:
    """The unit of planning, commit, retry and resume: one range of an object, or several small whole objects."""

    index: int
    ranges: tuple[Range, ...]

    def __str__(self) -> str:
        first = str(self.ranges[0]) if self.ranges else "nothing"
        more = f" and {len(self.ranges) - 1:,} more objects" if len(self.ranges) > 1 else ""
        return f"split {self.index} ({first}{more})"
