"""Records that stay in the process of a `child`: DataFrames that its callables hand each other, as they are.

What such a frame holds need not be picklable, as it need not be in a worker. The worker has a stand-in of which it can
take rows, and the records that the frame was made of, so that it can be made again where it died with its process.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count

import numpy as np
from numpy.typing import NDArray

from batchpipe.batch import Int64s, Records
from batchpipe.convert.frames import FrameRecords

JOINED = -1
"""Stands for a stage where a frame is several others, one after the other."""

_numbers = count()


@dataclass(frozen=True, slots=True)
class Rows:
    """What goes between the processes: row ``places[i]`` of the frame that is kept as ``numbers[i]``."""

    numbers: Int64s
    places: Int64s

    def of(self, kept: Mapping[int, FrameRecords]) -> FrameRecords:
        """These rows. Those of one frame follow each other, since records are never moved past each other."""
        numbers = dict.fromkeys(self.numbers.tolist())
        parts = [kept[number].take(self.places[self.numbers == number]) for number in numbers]
        return FrameRecords.concat(parts) if len(parts) > 1 else parts[0]


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Made:
    """A frame that a child keeps as ``number`` for as long as the worker has this."""

    stage: int
    """The place among the stages of the process of the one that made it; JOINED."""
    sent: "Records | KeptRecords"
    """What it was made of."""
    kept: NDArray[np.bool_] | None = None
    """Which of those have a row in it; None: all of them."""
    number: int = field(default_factory=_numbers.__next__)


@dataclass(frozen=True, slots=True, eq=False)
class KeptRecords:
    """The worker's stand-in: for each record the frame that it is in, and its row there."""

    made: NDArray[np.object_]
    places: Int64s

    @classmethod
    def of(cls, made: Made, count: int) -> "KeptRecords":
        """All rows of one frame."""
        return cls(np.full(count, made, object), np.arange(count, dtype=np.int64))

    @classmethod
    def concat(cls, parts: Sequence["KeptRecords"]) -> "KeptRecords":
        """One after the other, in a frame of their own, as in a worker: its columns have the types that all share."""
        made, places = (np.concatenate([getattr(part, name) for part in parts]) for name in ("made", "places"))
        return cls.of(Made(JOINED, cls(made, places)), len(places))

    def __len__(self) -> int:
        return len(self.places)

    def slice(self, start: int, stop: int) -> "KeptRecords":
        """Records start..stop-1."""
        return KeptRecords(self.made[start:stop], self.places[start:stop])

    def take(self, indices: Int64s) -> "KeptRecords":
        """The records at these places; the frames that they are in stay whole."""
        return KeptRecords(self.made[indices], self.places[indices])

    def rows(self) -> Rows:
        """What the process is told of these records."""
        return Rows(np.fromiter((made.number for made in self.made), np.int64, len(self)), self.places)
