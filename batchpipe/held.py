"""Results of splits that are done and cannot settle yet, as the range before them is still at work.

There may be as many as a slow range has others behind it, so they lie in a file: a few bytes of each are in memory.
"""

import json
from collections.abc import Iterator, MutableMapping
from pathlib import Path

from batchpipe.manifest import SplitFailed, SplitResult


class HeldResults(MutableMapping[int, SplitResult | SplitFailed]):
    """What splits ended with, by their numbers. Results are in the file; errors, of which there are few, are not."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w+b")
        self._places: dict[int, int | SplitFailed] = {}

    def __setitem__(self, split: int, outcome: SplitResult | SplitFailed) -> None:
        if isinstance(outcome, SplitFailed):
            self._places[split] = outcome
            return
        self._places[split] = self._file.seek(0, 2)
        self._file.write(json.dumps(outcome.to_json()).encode() + b"\n")

    def __getitem__(self, split: int) -> SplitResult | SplitFailed:
        place = self._places[split]
        if isinstance(place, SplitFailed):
            return place
        self._file.seek(place)
        return SplitResult.from_json(json.loads(self._file.readline()))

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
        self._file.close()
