"""JSON documents in a file, each found again by its place: what may be many is not held in memory."""

import json
from pathlib import Path
from typing import Any


class Spool:
    """A new file of documents, one a line."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w+b")

    def add(self, document: Any) -> int:
        """Write a document behind the others; its place, by which it is read."""
        place = self._file.seek(0, 2)
        self._file.write(json.dumps(document).encode() + b"\n")
        return place

    def read(self, place: int) -> Any:
        """The document at a place."""
        self._file.seek(place)
        return json.loads(self._file.readline())

    def close(self) -> None:
        """Close the file."""
        self._file.close()
