"""Files: listed in order, read at their mtime, written whole and durable, published by a rename that does not replace.

Everything that is made visible is first written beside or in the staging folder, fsynced, then linked or renamed.
"""

import errno
import hashlib
import io
import os
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from batchpipe.split import WHOLE
from batchpipe.storage.address import Pattern, has_wildcard, is_data, resolve
from batchpipe.storage.durable import link, make_folder, place, rename, sync, write_beside
from batchpipe.storage.explain import LISTING, READING, WRITING, changed, explained
from batchpipe.storage.flock import FileLock, locked_folder
from batchpipe.storage.listing import walk_files
from batchpipe.storage.pending import Pending, PendingWriter
from batchpipe.storage.store import (
    Found,
    ObjectExistsError,
    ObjectFile,
    PendingLostError,
    StaleError,
    VersionedRaw,
)

BUFFER_BYTES = 1 << 20


class LocalStore:
    """Files of this machine, or of one that is mounted here. URIs are absolute paths."""

    def find(self, uri: str) -> Iterator[Found]:
        path = resolve(uri)
        with explained(LISTING, path):
            if has_wildcard(path):
                pattern = Pattern.of(path)
                folder = Path(pattern.folder)
                names = (
                    walk_files(folder, lambda name: is_data(name) and pattern.may_enter(name))
                    if folder.is_dir()
                    else ()
                )
                yield from (_found(folder / name) for name in names if is_data(name) and pattern.matches(name))
            elif Path(path).is_dir():
                yield from (_found(Path(path, name)) for name in walk_files(Path(path), is_data) if is_data(name))
            elif os.path.lexists(path):
                yield _found(Path(path))

    def iter_folder(self, folder: str) -> Iterator[Found]:
        path = resolve(folder)
        with explained(LISTING, path):
            if Path(path).is_dir():
                files = (Path(path, name) for name in walk_files(Path(path), lambda _: True))
                yield from (found for file in files if (found := _found_if_there(file)))

    def stat(self, uri: str) -> Found:
        path = Path(resolve(uri))
        with explained(READING, str(path)):
            return _found(path)

    def exists(self, uri: str) -> bool:
        path = Path(resolve(uri))
        with explained(READING, str(path)):
            return path.is_file()

    def open(self, uri: str, *, size: int, version: str, stop: int = WHOLE) -> ObjectFile:  # noqa: ARG002 - the system reads ahead itself
        path = resolve(uri)
        with explained(READING, path):
            return ObjectFile.checked(_VersionedFile(path, size, version), BUFFER_BYTES)

    def read(self, uri: str) -> bytes:
        return self.read_with_version(uri)[0]

    def read_with_version(self, uri: str) -> tuple[bytes, str]:
        path = resolve(uri)
        with explained(READING, path), Path(path).open("rb") as file:
            return file.read(), str(os.fstat(file.fileno()).st_mtime_ns)

    def create(self, uri: str, data: bytes) -> str:
        path = Path(resolve(uri))
        with explained(WRITING, str(path)):
            temporary = write_beside(path, data)
            try:
                return link(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)

    def replace(self, uri: str, data: bytes, version: str) -> str:
        """Compares and renames under a lock on the folder, so of two that replace the same version one is refused."""
        path = Path(resolve(uri))
        with explained(WRITING, str(path)), locked_folder(path.parent):
            if not path.exists() or str(path.stat().st_mtime_ns) != version:
                raise StaleError(f"cannot replace {str(path)!r}: it was changed by somebody else")
            temporary = write_beside(path, data)
            # Two writes within one tick of the clock would share their mtime, and then the version tells nothing.
            newer = max(temporary.stat().st_mtime_ns, int(version) + 1)
            os.utime(temporary, ns=(newer, newer))
            return rename(temporary, path)

    def put(self, uri: str, data: bytes) -> str:
        path = Path(resolve(uri))
        with explained(WRITING, str(path)):
            return rename(write_beside(path, data), path)

    def delete(self, uris: Iterable[str]) -> None:
        for uri in uris:
            path = Path(resolve(uri))
            with explained(WRITING, str(path)):
                path.unlink(missing_ok=True)

    def remove_folder(self, folder: str) -> None:
        path = Path(resolve(folder))
        with explained(WRITING, str(path)):
            try:
                shutil.rmtree(path)
            except FileNotFoundError:
                # Somebody else removes it too, or it never was: begin again with what is left of it.
                if path.exists():
                    shutil.rmtree(path, ignore_errors=True)

    def open_pending(self, uri: str, *, staging: str, attempt: str) -> PendingWriter:
        return PendingWriter(_StagingFile(resolve(uri), Path(resolve(staging)), attempt))

    def publish(self, pending: Pending, *, replaces: str | None = None) -> str:
        """By a hard link, which never replaces; a file that holds the very bytes of the piece counts as published."""
        staged, path = Path(pending.staging), Path(resolve(pending.uri))
        with explained(WRITING, str(path)):
            if not self.holds(pending):
                if not staged.exists():
                    if path.exists() and str(path.stat().st_mtime_ns) != replaces:
                        raise ObjectExistsError(f"cannot publish {str(path)!r}: another file is there")
                    raise PendingLostError(
                        f"cannot publish {str(path)!r}: its pending piece {pending.staging!r} is gone"
                    )
                make_folder(path.parent)
                place(staged, path, replaces)
            staged.unlink(missing_ok=True)
            return str(path.stat().st_mtime_ns)

    def holds(self, pending: Pending) -> bool:
        """Byte by byte: so a publish that a kill cut short is recognized."""
        path = Path(resolve(pending.uri))
        with explained(WRITING, str(path)):
            if not path.is_file() or path.stat().st_size != pending.size:
                return False
            with path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest() == pending.sha256

    def discard(self, pending: Pending) -> None:
        with explained(WRITING, pending.staging):
            Path(pending.staging).unlink(missing_ok=True)

    def iter_pending(self, folder: str, *, staging: str) -> Iterator[Pending]:  # noqa: ARG002 - part of Store
        for found in self.iter_folder(staging):
            attempt = Path(found.uri).name.rpartition("-")[0]
            yield Pending(uri="", attempt=attempt, size=found.size, staging=found.uri)

    def lock(self, uri: str, owner: Mapping[str, Any], *, ttl_s: float = 30) -> FileLock:  # noqa: ARG002 - part of Store
        """A flock: the system itself lets go of it when its holder dies, so ``ttl_s`` plays no part."""
        path = Path(resolve(uri))
        with explained(WRITING, str(path)):
            return FileLock(path, owner)

    def supports_conditional_put(self, folder: str) -> bool:  # noqa: ARG002 - part of Store
        return True


class _VersionedFile(io.FileIO, VersionedRaw):
    """A file that remembers what it was listed as."""

    def __init__(self, path: str, size: int, version: str) -> None:
        super().__init__(path, "rb")
        self._listed = (size, version)

    def check_unchanged(self) -> None:
        now = os.fstat(self.fileno())
        if (now.st_size, str(now.st_mtime_ns)) != self._listed:
            raise changed(str(self.name))


class _StagingFile:
    """Where a pending piece lies until it is published: `<staging>/<attempt>-<random>`."""

    def __init__(self, uri: str, staging: Path, attempt: str) -> None:
        self._uri, self._attempt = uri, attempt
        self._path = staging / f"{attempt}-{secrets.token_hex(4)}"
        with explained(WRITING, str(self._path)):
            make_folder(staging)
            self._file = io.BufferedWriter(io.FileIO(self._path, "xb"), BUFFER_BYTES)

    def write(self, data: memoryview) -> None:
        with explained(WRITING, str(self._path)):
            self._file.write(data)

    def seal(self, size: int, sha256: str) -> Pending:
        with explained(WRITING, str(self._path)):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            sync(self._path.parent)
        return Pending(self._uri, self._attempt, size, sha256, staging=str(self._path))

    def drop(self) -> None:
        with explained(WRITING, str(self._path)):
            self._path.unlink(missing_ok=True)
            # Closing flushes what is buffered, which a full disk refuses; the descriptor goes all the same.
            self._file.raw.close()


def _found(path: Path) -> Found:
    if path.is_symlink() and not path.exists():
        raise READING.failed(str(path), "its symbolic link leads nowhere", f"see where to: ls -l {path}")
    state = path.stat()
    if stat.S_ISDIR(state.st_mode):
        raise IsADirectoryError(errno.EISDIR, "it is a folder")
    if not stat.S_ISREG(state.st_mode):
        raise READING.failed(str(path), "it is not a regular file", "copy it into one first: it is read more than once")
    return Found(str(path), state.st_size, str(state.st_mtime_ns))


def _found_if_there(path: Path) -> Found | None:
    """None where it was removed since its folder was read."""
    try:
        return _found(path)
    except FileNotFoundError:
        return None
