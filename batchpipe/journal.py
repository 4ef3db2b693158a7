"""The journal of a run: what has settled, appended in small segments and replayed by the next start.

Segments are ``<epoch>-<number>.jsonl``, each created only if absent. Every start of a run is an epoch of its own and
first writes down how far it accepts the earlier ones, so a late writer of an older epoch is never believed (G2).
"""

import json
import re
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import islice
from typing import Any

from batchpipe.errors import OutputError
from batchpipe.storage import ObjectMissingError, Store, join

_SEGMENT = re.compile(r"(\d{6,})-(\d{8,})\.jsonl")
FLUSH_S = 1.0
FLUSH_ENTRIES = 500
READERS = 16
"""Segments that are read at the same time: an hour's run has thousands, and a store answers each in 30 ms or so."""

Entry = dict[str, Any]


class Journal:
    """The open journal of one run. Entries are plain JSON objects with a ``type``."""

    def __init__(self, store: Store, folder: str, epoch: int, accepted: Mapping[int, int]) -> None:
        self.epoch = epoch
        self._store = store
        self._folder = folder
        self._accepted = dict(accepted)
        self._number = 0
        self._waiting: list[Entry] = []
        self._flushed = time.monotonic()

    def append(self, type_: str, /, **values: object) -> None:
        """Add an entry; it is durable after the next flush, which comes by itself within about a second of work."""
        self._waiting.append({"type": type_, **values})
        if len(self._waiting) >= FLUSH_ENTRIES:
            self.flush()
        self.flush_if_due()

    def flush_if_due(self) -> None:
        """Flush what has waited for about a second: to be called now and then, also while nothing settles."""
        if time.monotonic() - self._flushed >= FLUSH_S:
            self.flush()

    def flush(self) -> None:
        """Make every appended entry durable. Raises OutputError if another start has taken the run over."""
        self._flushed = time.monotonic()
        if not self._waiting:
            return
        data = "".join(json.dumps(entry, separators=(",", ":")) + "\n" for entry in self._waiting)
        name = _segment(self.epoch, self._number)
        try:
            self._store.create(join(self._folder, name), data.encode())
        except FileExistsError as error:
            msg = f"the lock was lost: another start of this run has written {name} of its journal"
            raise OutputError(msg, where=self._folder, next="batchpipe show OUTPUT tells which run holds it") from error
        self._number += 1
        self._waiting = []

    def replay(self) -> Iterator[Entry]:
        """Entries of the earlier epochs that this one accepted, oldest first."""
        return _entries(self._store, self._folder, self._accepted)


def read_journal(store: Store, folder: str) -> Iterator[Entry]:
    """Entries that count, oldest first, without beginning an epoch. None where there is no journal."""
    return _entries(store, folder, _accepted(store, folder))


def open_journal(store: Store, folder: str) -> Journal:
    """Begin a new epoch of the journal in `folder`, whether or not there were earlier ones.

    Raises OutputError if another start begins the same epoch at this moment.
    """
    accepted = _accepted(store, folder)
    journal = Journal(store, folder, max(accepted, default=0) + 1, accepted)
    journal.append("epoch", accepts={str(epoch): number for epoch, number in accepted.items()})
    journal.flush()
    return journal


def _accepted(store: Store, folder: str) -> dict[int, int]:
    """The last segment of each epoch that counts: all of the newest, of the older ones what the newest accepted."""
    last: dict[int, int] = {}
    begun: set[int] = set()
    # A kill may leave a file that was about to become a segment: it has another name, and never counts.
    named = (_SEGMENT.fullmatch(found.uri.rpartition("/")[2]) for found in store.iter_folder(folder))
    for epoch, number in (map(int, match.groups()) for match in named if match):
        last[epoch] = max(last.get(epoch, -1), number)
        begun |= {epoch} if number == 0 else set()
    if not begun:  # what a late writer put where the journal has been removed is none
        return {}
    newest = max(begun)
    first = json.loads(store.read(join(folder, _segment(newest, 0))).splitlines()[0])
    return {**{int(epoch): number for epoch, number in first["accepts"].items()}, newest: last[newest]}


def _entries(store: Store, folder: str, accepted: Mapping[int, int]) -> Iterator[Entry]:
    names = (_segment(epoch, number) for epoch, last in sorted(accepted.items()) for number in range(last + 1))
    with ThreadPoolExecutor(READERS, thread_name_prefix="journal") as threads:
        while some := [join(folder, name) for name in islice(names, READERS)]:
            for data in threads.map(partial(_read, store), some):
                yield from map(json.loads, data.splitlines())


def _read(store: Store, segment: str) -> bytes:
    """A segment's lines; none where it is gone, for a kill came while the whole journal was being removed."""
    with suppress(ObjectMissingError):
        return store.read(segment)
    return b""


def _segment(epoch: int, number: int) -> str:
    return f"{epoch:06d}-{number:08d}.jsonl"
