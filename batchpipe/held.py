"""Results of splits that are done and cannot settle yet, as the range before them is still at work.

There may be as many as a slow range has others behind it, so they lie in a file: a few bytes of each are in memory.
"""

from collections.abc import Iterator, MutableMapping
from pathlib import Path

from batchpipe.manifest import SplitFailed, SplitResult
from batchpipe.spool import Spool


class HeldResults(MutableMapping[int, SplitResult | SplitFailed]):
    """What splits ended with, by their numbers. Results are in the file; errors, of which there are few, are not."""

    def __init__(self, path: Path) -> None:
        self._spool = Spool(path)
        self._places: dict[int, int | SplitFailed] = {}

    def __setitem__(self, split: int, outcome: SplitResult | SplitFailed) -> None:
        self._places[split] = outcome if isinstance(outcome, SplitFailed) else self._spool.add(outcome.to_json())

    def __getitem__(self, split: int) -> SplitResult | SplitFailed:
        place = self._places[split]
        return place if isinstance(place, SplitFailed) else SplitResult.from_json(self._spool.read(place))

    def __delitem__(self, split: int) -> None:
        del self._places[split]

    def __contains__(self, split: object) -> bool:
        return split in self._places

    def __iter__(self) -> Iterator[int]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def close(self) -> None:
        """Close the file."""
        self._spool.close()
