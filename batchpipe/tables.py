"""The long tables of a run, which stand beside its manifest: JSON lines that are written and read one at a time.

A run of a million parts has a million lines, and they never stand in memory together.
"""

import secrets
from collections.abc import Iterator
from contextlib import contextmanager

from batchpipe.manifest import LongTable
from batchpipe.runs import RunFolder
from batchpipe.storage import Store, relative
from batchpipe.storage.pending import PendingWriter


class TableWriter:
    """Writes one table, counting its lines and the bytes of data that they stand for."""

    def __init__(self, writer: PendingWriter) -> None:
        self._writer = writer
        self._rows = self._bytes = 0

    def add(self, line: str, size: int) -> None:
        """Add a line; ``size`` is the bytes of what it describes."""
        self._writer.write(line.encode() + b"\n")
        self._rows, self._bytes = self._rows + 1, self._bytes + size

    def finish(self, store: Store, root: str) -> LongTable:
        """Make the table visible, in place of one that an earlier start wrote."""
        pending = self._writer.finish()
        earlier = store.stat(pending.uri).version if store.exists(pending.uri) else None
        store.publish(pending, replaces=earlier)
        uri = relative(pending.uri, root)
        return LongTable(uri=uri, rows=self._rows, bytes=self._bytes, sha256=pending.sha256)


@contextmanager
def open_table(store: Store, folder: RunFolder, name: str) -> Iterator[TableWriter]:
    """Write the table of this name; it is discarded unless it is finished."""
    attempt = f"table-{secrets.token_hex(4)}"
    with store.open_pending(folder / name, staging=folder / "pending", attempt=attempt) as writer:
        yield TableWriter(writer)


def iter_table(store: Store, uri: str) -> Iterator[bytes]:
    """The lines of a table. Raises ObjectMissingError where there is none."""
    found = store.stat(uri)
    with store.open(uri, size=found.size, version=found.version) as file:
        yield from file
