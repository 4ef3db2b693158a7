"""Pieces that are written but not yet visible: what is known of one, and the writer that makes one."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any, Protocol, Self, TypeAlias

from batchpipe.errors import BatchpipeError

BytesLike: TypeAlias = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class Pending:
    """A finished piece that is not visible yet: enough to publish or discard it from any process.

    ``upload_id`` and ``etags`` (one a part) lead to it on S3, ``staging`` (a URI) everywhere else.
    """

    uri: str
    attempt: str
    size: int = 0
    sha256: str = ""
    upload_id: str = ""
    etags: tuple[str, ...] = ()
    staging: str = ""

    def to_json(self) -> dict[str, Any]:
        """As a plain dict for the journal."""
        return {**asdict(self), "etags": list(self.etags)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Back from `to_json`."""
        return cls(**{**data, "etags": tuple(data["etags"])})


class Sink(Protocol):
    """Where a `PendingWriter` puts its bytes: the part of it that differs from store to store."""

    def write(self, data: memoryview) -> None: ...

    def seal(self, size: int, sha256: str) -> Pending:
        """Bring everything to safety."""

    def drop(self) -> None:
        """Remove what was written."""


class PendingWriter:
    """Writes one piece, counting and hashing; a context manager that discards it unless it was finished.

    File-like enough for encoders. ``close()`` does nothing, so an encoder that closes its sink does no harm.
    """

    closed = False

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._sha256 = hashlib.sha256()
        self._size = 0
        self._pending: Pending | None = None
        self._is_discarded = False

    def write(self, data: BytesLike) -> int:
        view = memoryview(data).cast("B")
        self._sha256.update(view)
        self._sink.write(view)
        self._size += len(view)
        return len(view)

    def tell(self) -> int:
        return self._size

    def finish(self) -> Pending:
        """Write the rest and make it durable, still invisible. Twice gives the same answer."""
        if self._pending is None:
            self._pending = self._sink.seal(self._size, self._sha256.hexdigest())
        return self._pending

    def discard(self) -> None:
        """Remove what was written, finished or not; twice is fine."""
        if not self._is_discarded:
            self._is_discarded = True
            self._sink.drop()

    def writable(self) -> bool:
        return True

    def readable(self) -> bool:
        return False

    def seekable(self) -> bool:
        return False

    def flush(self) -> None:
        """Nothing: only `finish` promises anything."""

    def close(self) -> None:
        """Nothing: only `finish` and `discard` end a piece."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pending is not None:
            return
        try:
            self.discard()
        except BatchpipeError:
            # The first error is the one to tell; what stays behind is swept as an unjournaled piece.
            if error is None:
                raise
