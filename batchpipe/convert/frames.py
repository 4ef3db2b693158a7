"""A DataFrame on its way from one callable to the next, without the detour through Arrow. Pure.

Between two callables that both speak pandas the detour would cost as much as the stages of a light model do.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from batchpipe.batch import Int64s

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, slots=True, eq=False)
class FrameRecords:
    """Records as the rows of a DataFrame, whose index counts from 0. Never leaves the callables it passes between."""

    frame: "pd.DataFrame"

    @classmethod
    def of(cls, frame: "pd.DataFrame") -> "FrameRecords":
        """Take a DataFrame as records, with an index of its own."""
        import pandas as pd

        return cls(frame.set_axis(pd.RangeIndex(len(frame)), axis=0))

    @classmethod
    def concat(cls, parts: Sequence["FrameRecords"]) -> "FrameRecords":
        """One after the other."""
        import pandas as pd

        return cls(pd.concat([part.frame for part in parts], ignore_index=True))

    def __len__(self) -> int:
        return len(self.frame)

    @property
    def nbytes(self) -> int:
        """Bytes of the columns."""
        return int(self.frame.memory_usage(index=False).sum())

    def slice(self, start: int, stop: int) -> "FrameRecords":
        """Records start..stop-1."""
        return FrameRecords.of(self.frame.iloc[start:stop])

    def take(self, indices: Int64s) -> "FrameRecords":
        """The records at these places."""
        return FrameRecords.of(self.frame.iloc[indices])
