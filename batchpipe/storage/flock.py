"""The lock of a local or NFS folder: a flock, which the system lets go of when its holder dies, however it dies."""

import fcntl
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import takewhile
from pathlib import Path
from typing import Any, Self

from batchpipe.errors import LockedError, OutputError
from batchpipe.storage import owner as owners
from batchpipe.storage.durable import make_folder

REPLACES_WITHIN_S = 10.0
"""How long another process is waited for that replaces a file in a folder. That takes it no longer than a sync."""
POLL_S = 0.02


class FileLock:
    """Holds a flock on a file that names its owner. The descriptor is close-on-exec: children do not inherit it.

    The folder of the lock, and those above it that were made for it, go with it where nothing else came into them.
    """

    def __init__(self, path: Path, owner: Mapping[str, Any]) -> None:
        self._path = path
        self._folders = [path.parent, *takewhile(lambda folder: not folder.exists(), path.parent.parents)]
        self._descriptor: int | None = _locked_descriptor(path)
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, owners.to_bytes(owners.this_process(owner)), 0)

    def renew(self) -> None:
        if self._descriptor is None or not _is_at(self._descriptor, self._path):
            raise OutputError(
                f"the lock {str(self._path)!r} was lost: somebody removed its file",
                next="see that no other run writes here, then run the same command again: it resumes",
            )

    def release(self) -> None:
        if self._descriptor is not None:
            # Removed while it is still held, so that nobody can lock a file that is about to go.
            if _is_at(self._descriptor, self._path):
                self._path.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = None
            with suppress(OSError):  # not empty, or somebody else has removed it
                for folder in self._folders:
                    folder.rmdir()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()


def _locked_descriptor(path: Path) -> int:
    while True:
        make_folder(path.parent)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except FileNotFoundError:
            if path.parent.is_dir():
                raise
            continue  # its last holder removed the folder between our making and our opening
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(descriptor, path):
                return descriptor
        except BlockingIOError as exc:
            holder = owners.from_bytes(os.pread(descriptor, 1 << 16, 0))
            os.close(descriptor)
            raise owners.locked(
                str(path), holder, "try again when it has ended; run and redrive wait for it: --wait 600"
            ) from exc
        except OSError:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its holder removed it between our opening and our locking


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    ours = os.fstat(descriptor)
    return (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino)


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Hold off whoever else replaces a file there. NFS locks no folder: there the run's lock alone keeps them apart.

    Raises LockedError (75) where another process has stopped in the midst of it: should it ever go on, it must find
    the file that it has compared.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            _lock_within(descriptor, REPLACES_WITHIN_S, folder)
        yield
    finally:
        os.close(descriptor)


def _lock_within(descriptor: int, seconds: float, folder: Path) -> None:
    began = time.monotonic()
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() - began >= seconds:
                raise LockedError(
                    f"another process has held this folder for {seconds:g} s, as if it had stopped while it published",
                    where=str(folder),
                    next=f"end it (fuser -v {folder} tells which one), then run the same command again: it resumes",
                ) from None
            time.sleep(POLL_S)
