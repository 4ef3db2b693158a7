"""Listings in the order of their URIs, whatever order a store lists in and however long they are."""

import os
import pickle
from collections.abc import Callable, Iterable, Iterator
from heapq import merge
from itertools import islice
from operator import attrgetter
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

from batchpipe.storage.store import Found

RUN_LENGTH = 50_000
"""Objects sorted in memory at a time, some 15 MB; a longer listing waits on disk."""


def sorted_by_uri(listing: Iterable[Found], run_length: int = RUN_LENGTH) -> Iterator[Found]:
    """Sort a listing of any length in bounded memory. Most stores list so already, not all."""
    pages = iter(listing)
    runs: list[Iterator[Found]] = []
    while run := sorted(islice(pages, run_length), key=attrgetter("uri")):
        runs.append(iter(run) if len(run) < run_length else _spooled(run))
    return merge(*runs, key=attrgetter("uri"))


def _spooled(run: list[Found]) -> Iterator[Found]:
    file: IO[bytes] = TemporaryFile()  # noqa: SIM115 - nameless: gone with its last reader
    for found in run:
        pickle.dump(found, file, pickle.HIGHEST_PROTOCOL)
    file.seek(0)
    return _unspooled(file, len(run))


def _unspooled(file: IO[bytes], count: int) -> Iterator[Found]:
    with file:
        for _ in range(count):
            yield pickle.load(file)


def walk_files(
    folder: Path, may_enter: Callable[[str], bool], below: str = "", above: tuple[tuple[int, int], ...] = ()
) -> Iterator[str]:
    """Paths of the files below a folder, relative to it, sorted as strings. Links are followed, but not in circles."""
    try:
        status = folder.stat()
        here = (status.st_dev, status.st_ino)
        if here in above:
            return
        with os.scandir(folder) as entries:
            # A folder sorts where the paths in it do, which is by its name and a slash.
            names = sorted(f"{entry.name}/" if entry.is_dir() else entry.name for entry in entries if _is_listed(entry))
    except FileNotFoundError:
        if not below:
            raise
        return  # removed since the folder around it was read
    for name in names:
        if not name.endswith("/"):
            yield below + name
        elif may_enter(below + name[:-1]):
            yield from walk_files(folder / name, may_enter, below + name, (*above, here))


def _is_listed(entry: os.DirEntry[str]) -> bool:
    """Not a socket, pipe or device. A link that leads nowhere is listed, so that its reader is told."""
    return entry.is_dir() or entry.is_file() or entry.is_symlink()
