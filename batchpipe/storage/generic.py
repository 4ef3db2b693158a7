"""Any other store that fsspec knows (gs, az, sftp, memory ...), with weaker promises, as fsspec has no conditional put.

`create`, `replace` and `publish` look first and then write: of two writers in the same moment neither is told. A lock
lapses by the clocks of the hosts. An object is compared when it is opened and again after it was read.
"""

import io
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from typing import TYPE_CHECKING, Any, Self

import fsspec

from batchpipe.errors import BatchpipeError, JobError, OutputError
from batchpipe.redact import clean_uri
from batchpipe.split import WHOLE
from batchpipe.storage import owner as owners
from batchpipe.storage.address import Pattern, has_wildcard, is_data, join, resolve
from batchpipe.storage.explain import LISTING, READING, WRITING, Doing, changed, explained
from batchpipe.storage.listing import sorted_by_uri
from batchpipe.storage.pending import Pending, PendingWriter
from batchpipe.storage.store import (
    Found,
    ObjectExistsError,
    ObjectFile,
    ObjectMissingError,
    PendingLostError,
    StaleError,
    VersionedRaw,
)

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

BLOCK_BYTES = 4 << 20
VERSION_KEYS = (
    "ETag",
    "etag",
    "Content-MD5",
    "Digest",
    "generation",
    "mtime",
    "LastModified",
    "Last-Modified",
    "last_modified",
    "updated",
    "modified",
    "created",
)
"""Where the file systems of fsspec keep what changes with an object's content; the first one found is its version."""


@contextmanager
def _explained(doing: Doing, uri: str) -> Iterator[None]:
    """`explained`, also for what a file system raises that is no OSError: an HTTP status, an API's error."""
    with explained(doing, uri):
        try:
            yield
        except (OSError, BatchpipeError):
            raise
        except Exception as exc:
            why = f"{type(exc).__name__}: {clean_uri(str(exc))}"
            raise doing.failed(uri, why, "see that it can be reached, with these storage_options") from exc


class GenericStore:
    """One file system of fsspec."""

    def __init__(self, kind: str, options: dict[str, Any]) -> None:
        try:
            self._filesystem = fsspec.filesystem(kind, use_listings_cache=False, **options)
        except (ImportError, TypeError, ValueError) as exc:
            raise JobError(
                f"cannot open a store for '{kind}://': {exc}",
                next=f"check the URI and storage_options.{kind}, or install what it needs",
            ) from exc

    def find(self, uri: str) -> Iterator[Found]:
        place = resolve(uri)
        if has_wildcard(place):
            pattern = Pattern.of(place)
            listing = self._list(pattern.folder)
            yield from sorted_by_uri(found for name, found in listing if is_data(name) and pattern.matches(name))
        elif self.exists(place):
            yield self.stat(place)
        else:
            with suppress(ObjectMissingError):  # a web server has no folders, and says so
                yield from sorted_by_uri(found for name, found in self._list(place) if is_data(name))

    def iter_folder(self, folder: str) -> Iterator[Found]:
        return sorted_by_uri(found for _, found in self._list(resolve(folder)))

    def stat(self, uri: str) -> Found:
        with _explained(READING, uri):
            info = self._filesystem.info(self._path(uri))
            if info["type"] == "directory":
                raise IsADirectoryError(21, "it is a folder")
            return _found(resolve(uri), info)

    def exists(self, uri: str) -> bool:
        with _explained(READING, uri):
            try:
                return bool(self._filesystem.info(self._path(uri))["type"] == "file")
            except FileNotFoundError as exc:
                # A web server that cannot be reached, or fails, is called that, too: its own error stands behind.
                cause = exc.__cause__
                if cause is None or isinstance(cause, FileNotFoundError) or getattr(cause, "status", 0) in (404, 410):
                    return False
                raise cause from None

    def open(self, uri: str, *, size: int, version: str, stop: int = WHOLE) -> ObjectFile:  # noqa: ARG002 - part of Store
        with _explained(READING, uri):
            raw = _GenericFile(self, uri, Found(resolve(uri), size, version))
            return ObjectFile.checked(raw, io.DEFAULT_BUFFER_SIZE)

    def open_path(self, uri: str, mode: str) -> Any:
        """The open file of fsspec."""
        return self._filesystem.open(self._path(uri), mode, block_size=BLOCK_BYTES)

    def read(self, uri: str) -> bytes:
        return self.read_with_version(uri)[0]

    def read_with_version(self, uri: str) -> tuple[bytes, str]:
        with _explained(READING, uri):
            before = self.stat(uri)
            return bytes(self._filesystem.cat_file(self._path(uri))), before.version

    def create(self, uri: str, data: bytes) -> str:
        if self.exists(uri):
            raise ObjectExistsError(f"cannot create {clean_uri(uri)!r}: it exists already")
        return self.put(uri, data)

    def replace(self, uri: str, data: bytes, version: str) -> str:
        if not self.exists(uri) or self.stat(uri).version != version:
            raise StaleError(f"cannot replace {clean_uri(uri)!r}: it was changed by somebody else")
        return self.put(uri, data)

    def put(self, uri: str, data: bytes) -> str:
        with _explained(WRITING, uri):
            self._make_parent(uri)
            self._filesystem.pipe_file(self._path(uri), data)
        return self.stat(uri).version

    def delete(self, uris: Iterable[str]) -> None:
        for uri in uris:
            with _explained(WRITING, uri):
                if self._filesystem.exists(self._path(uri)):
                    self._filesystem.rm_file(self._path(uri))

    def remove_folder(self, folder: str) -> None:
        with _explained(WRITING, folder):
            if self._filesystem.exists(self._path(folder)):
                self._filesystem.rm(self._path(folder), recursive=True)

    def open_pending(self, uri: str, *, staging: str, attempt: str) -> PendingWriter:
        return PendingWriter(
            _StagingObject(self, resolve(uri), join(staging, f"{attempt}-{secrets.token_hex(4)}"), attempt)
        )

    def publish(self, pending: Pending, *, replaces: str | None = None) -> str:
        """By the file system's own move, after looking whether the place is free."""
        there = self.stat(pending.uri) if self.exists(pending.uri) else None
        if not self.exists(pending.staging):
            if there is None or there.version == replaces:
                raise PendingLostError(f"cannot publish {clean_uri(pending.uri)!r}: its pending piece is gone")
            if there.size != pending.size:
                raise ObjectExistsError(f"cannot publish {clean_uri(pending.uri)!r}: another object is there")
            return there.version  # moved before, by a publish that a kill cut short
        if there is not None and there.version != replaces:
            raise ObjectExistsError(f"cannot publish {clean_uri(pending.uri)!r}: another object is there")
        with _explained(WRITING, pending.uri):
            self._make_parent(pending.uri)
            self._filesystem.mv(self._path(pending.staging), self._path(pending.uri))
        return self.stat(pending.uri).version

    def holds(self, pending: Pending) -> bool:
        """As far as can be told where objects carry no attempt: it was moved away, to where as many bytes are."""
        is_there = not self.exists(pending.staging) and self.exists(pending.uri)
        return is_there and self.stat(pending.uri).size == pending.size

    def discard(self, pending: Pending) -> None:
        self.delete([pending.staging])

    def iter_pending(self, folder: str, *, staging: str) -> Iterator[Pending]:  # noqa: ARG002 - part of Store
        for found in self.iter_folder(staging):
            attempt = found.uri.rpartition("/")[2].rpartition("-")[0]
            yield Pending(uri="", attempt=attempt, size=found.size, staging=found.uri)

    def lock(self, uri: str, owner: Mapping[str, Any], *, ttl_s: float = 30) -> "GenericLock":
        return GenericLock(self, uri, owner, ttl_s)

    def supports_conditional_put(self, folder: str) -> bool:  # noqa: ARG002 - part of Store
        return False

    def _path(self, uri: str) -> str:
        return str(self._filesystem._strip_protocol(uri))

    def _make_parent(self, uri: str) -> None:
        self._filesystem.makedirs(self._filesystem._parent(self._path(uri)), exist_ok=True)

    def _list(self, folder: str) -> Iterator[tuple[str, Found]]:
        root = self._path(folder).rstrip("/")
        with _explained(LISTING, folder):
            listing = self._filesystem.find(root, detail=True)
            for path, info in listing.items():
                name = path[len(root) :].lstrip("/")
                yield name, _found(join(folder, name), info)


class _GenericFile(VersionedRaw):
    """An fsspec file as a raw file that remembers what it was listed as."""

    def __init__(self, store: GenericStore, uri: str, listed: Found) -> None:
        super().__init__()
        self._store, self._listed = store, listed
        self._file = store.open_path(uri, "rb")

    def check_unchanged(self) -> None:
        now = self._store.stat(self._listed.uri)
        if now != self._listed:
            raise changed(self._listed.uri)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer") -> int:
        target = memoryview(buffer).cast("B")
        with _explained(READING, self._listed.uri):
            try:
                data = self._file.read(len(target))
            except (NotImplementedError, ValueError) as exc:  # fsspec's words for what a file system cannot do
                raise READING.failed(
                    self._listed.uri, str(exc), "copy it to a place that can be read in pieces"
                ) from exc
        target[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def close(self) -> None:
        self._file.close()
        super().close()


class _StagingObject:
    """Where a pending piece lies until it is moved."""

    def __init__(self, store: GenericStore, uri: str, staging: str, attempt: str) -> None:
        self._store, self._uri, self._staging, self._attempt = store, uri, staging, attempt
        with _explained(WRITING, staging):
            store._make_parent(staging)
            self._file = store.open_path(staging, "wb")

    def write(self, data: memoryview) -> None:
        with _explained(WRITING, self._staging):
            self._file.write(bytes(data))

    def seal(self, size: int, sha256: str) -> Pending:
        with _explained(WRITING, self._staging):
            self._file.close()
        return Pending(self._uri, self._attempt, size, sha256, staging=self._staging)

    def drop(self) -> None:
        with _explained(WRITING, self._staging):
            self._file.close()
        self._store.delete([self._staging])


class GenericLock:
    """An object that names its owner and when it was last renewed, by its host's clock."""

    def __init__(self, store: GenericStore, uri: str, owner: Mapping[str, Any], ttl_s: float) -> None:
        self._store, self._uri = store, uri
        self._owner = {**owners.this_process(owner), "token": secrets.token_hex(8)}
        holder = self._read()
        if holder and time.time() - holder.get("renewed", 0) <= ttl_s and not owners.is_dead(holder):
            raise owners.locked(
                uri, holder, f"try again when it has ended; if it is dead its lock lapses after {ttl_s:g} s"
            )
        self._write()

    def renew(self) -> None:
        if self._read().get("token") != self._owner["token"]:
            raise OutputError(
                f"the lock {clean_uri(self._uri)!r} was lost: another run has taken it, or it was removed",
                next="see that no other run writes here, then run the same command again: it resumes",
            )
        self._write()

    def release(self) -> None:
        if self._read().get("token") == self._owner["token"]:
            self._store.delete([self._uri])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()

    def _read(self) -> dict[str, Any]:
        return owners.from_bytes(self._store.read(self._uri)) if self._store.exists(self._uri) else {}

    def _write(self) -> None:
        self._store.put(self._uri, owners.to_bytes({**self._owner, "renewed": time.time()}))


def _found(uri: str, info: Mapping[str, Any]) -> Found:
    value = next((info[key] for key in VERSION_KEYS if info.get(key)), "")
    version = str(value.timestamp() if isinstance(value, datetime) else value).strip('"')
    return Found(uri, int(info.get("size") or 0), version)
