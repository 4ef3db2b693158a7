"""What every kind of store can do, and the nouns it speaks in. The kinds are beside this module."""

import io
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self

from batchpipe.errors import InputError, OutputError
from batchpipe.split import WHOLE
from batchpipe.storage.pending import Pending, PendingWriter


class ObjectMissingError(InputError, FileNotFoundError):
    """There is nothing at this URI."""


class ObjectExistsError(OutputError, FileExistsError):
    """Somebody else's object lies where one was to be made."""


class StaleError(OutputError):
    """The object is no longer at the version that was to be replaced."""


class PendingLostError(OutputError):
    """A pending piece is gone and was never published: its split must run again."""


@dataclass(frozen=True, slots=True)
class Found:
    """One object as it was listed: ``size`` in bytes; ``version`` an ETag without quotes, or mtime in nanoseconds."""

    uri: str
    size: int
    version: str


class VersionedRaw(io.RawIOBase):
    """Unbuffered bytes of one object at one version. The kinds of store derive from it."""

    def check_unchanged(self) -> None:
        """Raise InputError when the object changed since it was listed; nothing where every read is conditional."""

    def prefetch(self) -> None:
        """Begin to fetch the first bytes in the background; nothing where they do not have to be waited for."""


class ObjectFile(io.BufferedReader):
    """A seekable object opened for reading at the version that was listed.

    Leaving a ``with`` block without an error calls `check_unchanged`; who does not use ``with`` calls it after reading.
    """

    def __init__(self, raw: VersionedRaw, buffer_size: int) -> None:
        super().__init__(raw, buffer_size)
        self._versioned = raw

    @classmethod
    def checked(cls, raw: VersionedRaw, buffer_size: int) -> Self:
        """Open it if it is still what was listed, else close it and raise."""
        try:
            raw.check_unchanged()
        except BaseException:
            raw.close()
            raise
        return cls(raw, buffer_size)

    def check_unchanged(self) -> None:
        """Raise InputError (exit 3) when the object is not what was listed any more."""
        self._versioned.check_unchanged()

    def prefetch(self) -> None:
        """Begin to fetch the first bytes in the background: for who opens some objects ahead of the one it reads."""
        self._versioned.prefetch()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._versioned:
            if error is None:
                self.check_unchanged()


class Lock(Protocol):
    """Says that one run writes here. Held until released; a context manager that releases."""

    def renew(self) -> None:
        """Prove that it is still ours, else OutputError (exit 7): call it before anything is published."""

    def release(self) -> None:
        """Give it back. Only ever removes our own lock; twice is fine."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Store(Protocol):
    """One kind of storage. Safe to use from several threads; opened anew in each process, never sent.

    Errors of the libraries below never come through: reading raises InputError (3), writing OutputError (7).
    """

    def find(self, uri: str) -> Iterator[Found]:
        """The data at a URI, sorted by URI: a glob, one object, or a whole folder; nothing where there is nothing.

        Names that begin with ``_`` or ``.`` below the folder (of a glob: below its last folder without wildcards)
        are not data. A folder is never a string prefix.
        """

    def iter_folder(self, folder: str) -> Iterator[Found]:
        """Every object below a folder, hidden ones too, sorted by URI. The name is taken literally, never as a glob."""

    def stat(self, uri: str) -> Found:
        """Size and version of one object; ObjectMissingError where there is none."""

    def exists(self, uri: str) -> bool:
        """Whether there is an object (not a folder) at this URI."""

    def open(self, uri: str, *, size: int, version: str, stop: int = WHOLE) -> ObjectFile:
        """Open one object at the version that was listed; another version is an InputError (exit 3).

        Readahead does not cross ``stop`` (a byte offset): what lies behind is read only when asked for.
        """

    def read(self, uri: str) -> bytes:
        """A small object's bytes; ObjectMissingError where there is none."""

    def read_with_version(self, uri: str) -> tuple[bytes, str]:
        """A small object's bytes and version; ObjectMissingError where there is none."""

    def create(self, uri: str, data: bytes) -> str:
        """Make an object where there is none, whole or not at all; its version. Else ObjectExistsError."""

    def replace(self, uri: str, data: bytes, version: str) -> str:
        """Overwrite an object that is still at this version; the new version. Else StaleError."""

    def put(self, uri: str, data: bytes) -> str:
        """Write an object whatever is there, whole or not at all; its version."""

    def delete(self, uris: Iterable[str]) -> None:
        """Remove objects; a missing one is fine."""

    def remove_folder(self, folder: str) -> None:
        """Remove every object below a folder, and the folder; a missing one is fine."""

    def open_pending(self, uri: str, *, staging: str, attempt: str) -> PendingWriter:
        """Write a piece that stays invisible at ``uri`` until it is published; ``staging`` is a folder for it."""

    def publish(self, pending: Pending, *, replaces: str | None = None) -> str:
        """Make a finished piece visible, and return its version. Published before by the same attempt: done.

        Another's object there is an ObjectExistsError, unless it is at the version that ``replaces`` names.
        PendingLostError: the piece is gone.
        """

    def holds(self, pending: Pending) -> bool:
        """Whether this very piece is visible: it was published, and nobody has put anything else in its place."""

    def discard(self, pending: Pending) -> None:
        """Remove a piece that was not published; twice is fine."""

    def iter_pending(self, folder: str, *, staging: str) -> Iterator[Pending]:
        """Pieces for this output that are neither published nor discarded, as a killed run leaves them.

        What listing cannot tell is empty: S3 does not name the attempt, other stores not the final URI.
        """

    def lock(self, uri: str, owner: Mapping[str, Any], *, ttl_s: float = 30) -> Lock:
        """Take this lock or raise LockedError (exit 75); ``owner`` (the run id) is told to who comes later."""

    def supports_conditional_put(self, folder: str) -> bool:
        """Whether the store refuses to overwrite when told to: tried with a small object in this folder."""
