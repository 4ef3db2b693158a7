"""Files that appear whole or not at all, survive a power cut, and do not overwrite what they were not told to."""

import errno
import os
import secrets
import shutil
from pathlib import Path

from batchpipe.storage.explain import MAKING, explained
from batchpipe.storage.store import ObjectExistsError

TEMPORARY = ".batchpipe-tmp"
"""Ends the hidden names of files that a kill may leave beside the one that was being written."""

NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS)


def place(staged: Path, path: Path, replaces: str | None) -> None:
    """Make a staged file visible under its name; from another device it is copied beside its place first."""
    source = staged
    try:
        try:
            _link_or_replace(source, path, replaces)
        except OSError as exc:
            if exc.errno != errno.EXDEV:
                raise
            source = _temporary_beside(path)
            shutil.copyfile(staged, source)
            sync(source)
            _link_or_replace(source, path, replaces)
    finally:
        if source != staged:
            source.unlink(missing_ok=True)


def _link_or_replace(source: Path, path: Path, replaces: str | None) -> None:
    if replaces is not None and path.exists():
        if str(path.stat().st_mtime_ns) != replaces:
            raise ObjectExistsError(f"cannot publish {str(path)!r}: another file is there by now")
        rename(source, path)
    else:
        link(source, path)


def is_scrap(uri: str) -> bool:
    """Whether an object is one that a kill left beside the one that was being written: nobody will ever name it."""
    return uri.endswith(TEMPORARY)


def link(source: Path, path: Path) -> str:
    """Give a file its name unless that is taken. Returns its version; the source keeps its name too.

    Where the file system has no hard links (FAT, some network and FUSE mounts) it looks first and then renames: there
    two writers at the same moment could both believe that they were first, and the run's lock is what keeps them apart.
    """
    try:
        os.link(source, path)
    except FileExistsError as exc:
        raise ObjectExistsError(f"cannot create {str(path)!r}: it exists already") from exc
    except OSError as exc:
        if exc.errno not in NO_HARD_LINKS:
            raise
        if path.exists():
            raise ObjectExistsError(f"cannot create {str(path)!r}: it exists already") from exc
        return rename(source, path)
    sync(path.parent)
    return str(path.stat().st_mtime_ns)


def rename(source: Path, path: Path) -> str:
    """Give a file its name, whatever had it, and return its version."""
    source.replace(path)
    sync(path.parent)
    return str(path.stat().st_mtime_ns)


def _temporary_beside(path: Path) -> Path:
    return path.parent / f".{path.name[:100]}.{secrets.token_hex(4)}{TEMPORARY}"


def write_beside(path: Path, data: bytes) -> Path:
    """Write a durable temporary file beside the path it is meant for."""
    make_folder(path.parent)
    temporary = _temporary_beside(path)
    try:
        temporary.write_bytes(data)
        sync(temporary)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, durably. One that somebody removes meanwhile, empty, is made again."""
    while not folder.is_dir():
        make_folder(folder.parent)
        with explained(MAKING, str(folder)):
            try:
                folder.mkdir(exist_ok=True)
                sync(folder.parent)
            except FileNotFoundError as exc:
                if folder.parent.is_dir():  # as in /proc
                    raise MAKING.failed(
                        str(folder), "its file system takes no folder there", "choose another place"
                    ) from exc


def sync(path: Path) -> None:
    """Make a file's content, or a folder's names, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as exc:
        # Some network file systems cannot sync a folder and say so; there is nothing more to be had from them.
        if exc.errno not in (errno.EINVAL, errno.ENOTSUP) or path.is_file():
            raise
    finally:
        os.close(descriptor)
