"""What runs keep in an output beside its parts: a folder each, pending pieces, an unfinished run's journal.

From here the driver, `clean` and the watcher's sweep know what a run that ended early left, and discard it.
"""

import json
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from batchpipe.journal import read_journal, revoke_journal
from batchpipe.manifest import SplitResult
from batchpipe.orders import HIDDEN
from batchpipe.spool import Spool
from batchpipe.storage import ObjectMissingError, Pending, Store, is_scrap, join, relative

OUR_NAMES = re.compile(rf"{HIDDEN}/.*|part-(.+-)?\d{{8}}\.\w+(\.\w+)?", re.DOTALL)
"""Paths that pieces go to, as `Place.piece_uri` and `quarantine_uri` make them; the parts of Spark look otherwise."""
MIRRORED_NAMES = re.compile(r".+\.out(\.\w+)?", re.DOTALL)
"""Those of `Place.mirror_uri`. Other programs write such names, too, so they are ours only under `layout: mirror`."""

PIECE_FOLDERS = frozenset({"pending", "pieces"})
"""What of a run's folder holds pieces: those that are pending, and those that are to be joined."""
DISCARDERS = 8
SHOWN = {"quarantine": "quarantine", "tracebacks": "logs/tracebacks"}
"""What of a split is seen before its run is published: its name in a journal entry, and its folder in the run's."""


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Where a run keeps what is its own, below the output's hidden folder."""

    root: str
    run_id: str

    @property
    def uri(self) -> str:
        """The run's folder."""
        return join(self.root, HIDDEN, self.run_id)

    def __truediv__(self, name: str) -> str:
        return join(self.uri, name)

    @property
    def manifest(self) -> str:
        """The current manifest: one fixed path for all runs."""
        return join(self.root, HIDDEN, "manifest.json")


def iter_pending(store: Store, folder: RunFolder, layout: str = "") -> Iterator[Pending]:
    """Pieces of this output that are written and not visible. Uploads of other programs there are left alone.

    `layout` is the output's; where nobody knows it, names of both layouts are taken for ours.
    """
    for pending in store.iter_pending(folder.root, staging=folder / "pending"):
        name = relative(pending.uri, folder.root) if pending.uri else ""
        if not name or OUR_NAMES.fullmatch(name) or (layout != "parts" and MIRRORED_NAMES.fullmatch(name)):
            yield pending


def sweep_run(store: Store, folder: RunFolder) -> None:
    """Discard every pending piece that the run's journal does not name, and scraps. Its lock must be held."""
    discard_scraps(store, folder)
    unnamed = {key(pending) for pending in iter_pending(store, folder, layout_of(store, folder))}
    for entry in read_journal(store, folder / "journal") if unnamed else ():
        if entry["type"] == "commit":
            return
        unnamed -= keys_of(entry)
    discard_named(store, folder, unnamed)


def discard_scraps(store: Store, folder: RunFolder) -> None:
    """Remove what a kill left of files that were being written. Its lock must be held."""
    store.delete([found.uri for found in store.iter_folder(join(folder.root, HIDDEN)) if is_scrap(found.uri)])


def discard_run(store: Store, folder: RunFolder) -> None:
    """Drop an unfinished run: its pending pieces, its quarantine, its journal.

    The journal first says that nothing of it counts: else a kill half-way would leave one that names what is gone.
    """
    layout = layout_of(store, folder)
    last = revoke_journal(store, folder / "journal")
    discard_each(store, iter_pending(store, folder, layout))
    store.delete(found.uri for found in store.iter_folder(folder.uri) if found.uri != last)
    store.remove_folder(folder.uri)


def discard_named(store: Store, folder: RunFolder, keys: Set[str]) -> None:
    """Discard the run's pending pieces of these keys. They are listed anew: a key is all that is kept of each."""
    if keys:
        discard_each(store, (pending for pending in iter_pending(store, folder) if key(pending) in keys))


def discard_each(store: Store, pieces: Iterable[Pending]) -> None:
    """Discard many pending pieces, some at the same time."""
    waiting = iter(pieces)
    with ThreadPoolExecutor(DISCARDERS, thread_name_prefix="discard") as threads:
        while some := list(islice(waiting, 100 * DISCARDERS)):
            list(threads.map(store.discard, some))


def without_type(entry: dict[str, Any]) -> dict[str, Any]:
    """A journal entry's own values."""
    return {key: value for key, value in entry.items() if key != "type"}


def find_runs(store: Store, root: str) -> tuple[list[str], list[str]]:
    """Ids of the unfinished runs, which have a journal until they are published, and of strayed ones.

    These have no journal and pieces all the same: a late writer left them.
    """
    folders: dict[str, set[str]] = {}
    for found in store.iter_folder(join(root, HIDDEN)):
        path = relative(found.uri, join(root, HIDDEN)).split("/")
        if len(path) > 2:
            folders.setdefault(path[0], set()).add(path[1])
    unfinished = sorted(run for run, names in folders.items() if "journal" in names)
    return unfinished, sorted(run for run in folders.keys() - set(unfinished) if folders[run] & PIECE_FOLDERS)


def unfinished_runs(store: Store, root: str) -> list[str]:
    """Ids of runs that have a journal: it is there until the run is published."""
    return find_runs(store, root)[0]


def remove_strays(store: Store, root: str, strayed: Iterable[str]) -> None:
    """Remove the pieces of strayed runs. Uploads are no run's, and stay: another run's journal may name them."""
    for run in strayed:
        folder = RunFolder(root, run)
        for name in PIECE_FOLDERS:
            store.remove_folder(folder / name)
        if next(store.iter_folder(folder.uri), None) is None:  # on a local disk the folder itself would stay
            store.remove_folder(folder.uri)


def has_settled(store: Store, folder: RunFolder) -> bool:
    """Whether any split of an unfinished run has settled, or is done and held back."""
    return any(entry["type"] in ("split", "held") for entry in read_journal(store, folder / "journal"))


def start_of(store: Store, folder: RunFolder) -> dict[str, Any] | None:
    """What an unfinished run wrote down as it began: its fingerprint, and how it was cut. None where it did not."""
    return next((entry for entry in read_journal(store, folder / "journal") if entry["type"] == "start"), None)


def layout_of(store: Store, folder: RunFolder) -> str:
    """The layout that an unfinished run writes its output in, else that of the finished one; empty where none tells."""
    if layout := (start_of(store, folder) or {}).get("layout", ""):
        return str(layout)
    with suppress(ObjectMissingError):
        return str(json.loads(store.read(folder.manifest)).get("output_layout", ""))
    return ""


@dataclass(slots=True)
class RunState:
    """What a run's journal says beside its settled splits."""

    started: str = ""
    schemas: dict[str, Any] = field(default_factory=dict)
    has_begun_to_publish: bool = False
    lost: set[str] = field(default_factory=set)
    """Keys of pieces that were gone when they should have been published."""
    assembled: dict[int, dict[str, Any]] = field(default_factory=dict)
    """Under mirror, by object: the one piece that its pieces were joined into."""

    @classmethod
    def of(cls, entries: Iterable[dict[str, Any]]) -> "RunState":
        """Read a journal for everything but its splits."""
        state = cls()
        for entry in entries:
            match entry["type"]:
                case "start":
                    state.started = entry["started"]
                case "schema":
                    state.schemas = entry
                case "commit":
                    state.has_begun_to_publish = True
                case "lost":
                    state.lost |= set(entry["pieces"])
                case "assembled":
                    state.assembled[entry["object"]] = entry
        state.assembled = {each: one for each, one in state.assembled.items() if key_of(one["piece"]) not in state.lost}
        return state


class PieceSpool:
    """The pieces of settled splits, kept in a file: a run of any number of splits costs eight bytes of memory each."""

    def __init__(self, path: Path) -> None:
        self._spool = Spool(path)
        self._places = array("q")

    def add(self, result: SplitResult) -> None:
        """Remember what a settled split wrote."""
        missing = result.split + 1 - len(self._places)
        self._places.extend([-1] * max(missing, 0))
        objects = [part.object for part in result.ranges]
        accounts = result.accounts
        counts = {"written": accounts.written, "quarantined": accounts.quarantined}
        line = {"piece": result.piece, **counts, "objects": objects}
        if result.failures:
            line["failed"] = failed_of(result)
        self._places[result.split] = self._spool.add(line)

    def __contains__(self, split: int) -> bool:
        return split < len(self._places) and self._places[split] >= 0

    def __iter__(self) -> Iterator[tuple[int, dict[str, Any]]]:
        for split, place in enumerate(self._places):
            if place >= 0:
                yield split, self._spool.read(place)

    def close(self) -> None:
        """Close the file."""
        self._spool.close()


def failed_of(result: SplitResult) -> dict[str, Any]:
    """Of which objects a split's failed records are, and how many records of the object lie before the split."""
    objects = [part.object for part in result.ranges if part.accounts.quarantined]
    first, before = result.failures[0], None
    if first.record is not None and first.range_start == result.ranges[0].start:
        before = first.record - first.ordinal
    return {"objects": objects, "before": before}


def remove_unsettled(store: Store, folder: RunFolder, stays: Callable[[str, int], bool]) -> None:
    """Remove what an earlier start let be seen of splits that must run again: their records may not fail then.

    Which ``stays`` is asked for by its name in SHOWN and its split.
    """
    for name, place in SHOWN.items():
        files = list(store.iter_folder(folder / place))
        numbers = [re.search(r"split-(\d+)\.\w+$", found.uri) for found in files]
        store.delete(
            found.uri
            for found, number in zip(files, numbers, strict=True)
            if number and not stays(name, int(number[1]))
        )


def key(pending: Pending) -> str:
    """What tells pending pieces apart: the upload on S3, the staging file elsewhere."""
    return pending.upload_id or pending.staging


def key_of(piece: dict[str, Any]) -> str:
    """The key of a piece as it was journaled."""
    return key(Pending.from_json(piece))


def keys_of(entry: Mapping[str, Any]) -> set[str]:
    """The keys of all pieces that a journal entry names, be they pending still or published, as quarantine is."""
    return {key_of(piece) for name in ("piece", *SHOWN) if (piece := entry.get(name))}
