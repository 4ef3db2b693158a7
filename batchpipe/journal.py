"""The journal of a run: what has settled, appended in small segments and replayed by the next start.

Every start of a run is an epoch of its own, begun with ``<epoch>-00000000.jsonl``, which is created only if absent: in
it stand its token, and how far it accepts the earlier epochs. What it appends are ``<epoch>-<number>-<token>.jsonl``.
So a late writer is never believed (G2): not of an older epoch, and not of one whose number was given again because the
journal was dropped meanwhile.
"""

import json
import re
import secrets
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

from batchpipe.errors import OutputError
from batchpipe.storage import ObjectMissingError, Store, join

_SEGMENT = re.compile(r"(\d{6,})-(\d{8,})(?:-(\w+))?\.jsonl")
FLUSH_S = 1.0
FLUSH_ENTRIES = 500
READERS = 16
"""Segments that are read at the same time: an hour's run has thousands, and a store answers each in 30 ms or so."""

Entry = dict[str, Any]


class _Accepted(NamedTuple):
    """How far an epoch counts: to this number of a segment, of those that carry this token."""

    last: int
    token: str


class Journal:
    """The open journal of one run. Entries are plain JSON objects with a ``type``."""

    def __init__(self, store: Store, folder: str, epoch: int, accepted: Mapping[int, _Accepted]) -> None:
        self.epoch = epoch
        self.token = secrets.token_hex(4)
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
        name = _segment(self.epoch, self._number, self.token)
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
    return _begin_epoch(store, folder, accepts=True)


def revoke_journal(store: Store, folder: str) -> str:
    """Begin an epoch that accepts nothing; the URI of its only segment, which must be the last of all to be removed.

    Until it is, nothing of the journal counts, whatever else of it is removed first and whatever a late writer adds.
    """
    journal = _begin_epoch(store, folder, accepts=False)
    return join(folder, _segment(journal.epoch, 0, ""))


def _begin_epoch(store: Store, folder: str, *, accepts: bool) -> Journal:
    before = _accepted(store, folder)
    accepted = before if accepts else {}
    journal = Journal(store, folder, max(before, default=0) + 1, accepted)
    journal.append("epoch", token=journal.token, accepts=accepted)
    journal.flush()
    return journal


def _accepted(store: Store, folder: str) -> dict[int, _Accepted]:
    """What of each epoch counts: all of the newest, of the older ones what the newest accepted."""
    last: dict[tuple[int, str], int] = {}
    begun: set[int] = set()
    # A kill may leave a file that was about to become a segment: it has another name, and never counts.
    named = (_SEGMENT.fullmatch(found.uri.rpartition("/")[2]) for found in store.iter_folder(folder))
    for epoch, number, token in (match.groups() for match in named if match):
        if token:
            last[int(epoch), token] = max(last.get((int(epoch), token), 0), int(number))
        else:
            begun.add(int(epoch))
    if not begun:  # what a late writer put where the journal has been removed is none
        return {}
    newest = max(begun)
    first = json.loads(store.read(join(folder, _segment(newest, 0, ""))).splitlines()[0])
    older = {int(epoch): _Accepted(*accepted) for epoch, accepted in first["accepts"].items()}
    return {**older, newest: _Accepted(last.get((newest, first["token"]), 0), first["token"])}


def _entries(store: Store, folder: str, accepted: Mapping[int, _Accepted]) -> Iterator[Entry]:
    names = (
        _segment(epoch, number, token)
        for epoch, (last, token) in sorted(accepted.items())
        for number in range(last + 1)
    )
    with ThreadPoolExecutor(READERS, thread_name_prefix="journal") as threads:
        while some := [join(folder, name) for name in islice(names, READERS)]:
            for data in threads.map(partial(_read, store), some):
                yield from map(json.loads, data.splitlines())


def _read(store: Store, segment: str) -> bytes:
    """A segment's lines; none where it is gone, for a kill came while the whole journal was being removed."""
    with suppress(ObjectMissingError):
        return store.read(segment)
    return b""


def _segment(epoch: int, number: int, token: str) -> str:
    """The first one's name has no token: of two starts that begin the same epoch only one can create it."""
    return f"{epoch:06d}-{number:08d}-{token}.jsonl" if number else f"{epoch:06d}-{number:08d}.jsonl"
