"""Errors of the operating system as one clear line with what to check: the texts that every kind of store shares."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from batchpipe.errors import BatchpipeError, InputError, OutputError
from batchpipe.redact import clean_uri
from batchpipe.storage.store import ObjectMissingError


@dataclass(frozen=True, slots=True)
class Doing:
    """What was being tried, which decides the error's class and so the exit code."""

    verb: str
    error: type[BatchpipeError]

    def failed(self, uri: str, why: str, check: str = "") -> BatchpipeError:
        """The error for a failure at this URI, with what to check."""
        return self.error(f"cannot {self.verb} {clean_uri(uri)!r}: {why}", next=check)


READING = Doing("read", InputError)
LISTING = Doing("list", InputError)
WRITING = Doing("write", OutputError)
MAKING = Doing("make the folder", OutputError)

_REASONS = {
    errno.ENOSPC: ("no space left on the device", "free some space there, then run the same command again: it resumes"),
    errno.EDQUOT: ("the disk quota is used up", "free some space there, then run the same command again: it resumes"),
    errno.EACCES: ("permission denied", "check its owner and mode: ls -ld {there}"),
    errno.EPERM: ("operation not permitted", "check its owner, mode and attributes: ls -ld {there}"),
    errno.EROFS: ("the file system is read-only", "choose another place, or mount it writable"),
    errno.EISDIR: ("it is a folder", "name an object in it"),
    errno.ENOTDIR: ("a part of its path is a file, not a folder", "check the path: ls -ld {there}"),
    errno.EEXIST: ("a file is where a folder should be", "check the path: ls -ld {there}"),
    errno.ENAMETOOLONG: ("its name is too long", "choose a shorter one"),
    errno.ELOOP: ("its symbolic links go in a circle", "check the path: ls -ld {uri}"),
    errno.EMFILE: ("too many open files", "raise the limit: ulimit -n 4096"),
    errno.ENOLCK: ("the file system knows no locks", "choose an output on a file system with flock"),
}


def missing(doing: Doing, uri: str) -> ObjectMissingError:
    """The error for an object that is not there."""
    return ObjectMissingError(f"cannot {doing.verb} {clean_uri(uri)!r}: there is nothing", next="check the name")


def changed(uri: str) -> BatchpipeError:
    """The error for an object that is not at the version that was listed."""
    check = "wait until nobody writes it, then run it again with --restart"
    return READING.failed(uri, "it changed since it was listed", check)


def removed(uri: str) -> BatchpipeError:
    """The error for a file that lost its folder while it was written: whoever writes has made that folder before."""
    check = "see that no other run writes here, then run the same command again: it resumes"
    return WRITING.failed(uri, "its folder was removed meanwhile", check)


@contextmanager
def explained(doing: Doing, uri: str) -> Iterator[None]:
    """Turn what the operating system says into `doing`'s error; our own errors pass."""
    try:
        yield
    except BatchpipeError:
        raise
    except FileNotFoundError as exc:
        raise (removed(uri) if doing is WRITING else missing(doing, uri)) from exc
    except OSError as exc:
        why, check = _REASONS.get(exc.errno or 0, (exc.strerror or str(exc) or type(exc).__name__, ""))
        where = clean_uri(uri)
        raise doing.failed(uri, why, check.format(uri=where, there=_nearest(where))) from exc


def _nearest(path: str) -> str:
    """The path, or of the folders above it the first that is there: whose mode refuses what is to be made."""
    above = [] if "://" in path else (path, *map(str, Path(path).parents))
    return next(filter(os.path.exists, above), path)
