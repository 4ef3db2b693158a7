"""Reading ranges of an S3 object at the version that was listed, with a readahead that a sequential reader earns."""

from typing import TYPE_CHECKING

from batchpipe.storage.explain import READING, changed
from batchpipe.storage.s3_client import S3Client
from batchpipe.storage.store import ObjectMissingError, StaleError, VersionedRaw

if TYPE_CHECKING:
    from concurrent.futures import Future

    from _typeshed import WriteableBuffer

FIRST_BYTES = 256 << 10
MOST_BYTES = 4 << 20
"""A range asked for at once. It doubles from the first to the most while reading goes on where it stopped; the next
one is then fetched in the background, so an open object holds at most two of them."""


class S3RangeReader(VersionedRaw):
    """An object as a seekable raw file. Each range is asked for with If-Match: another version is an InputError."""

    def __init__(self, client: S3Client, uri: str, size: int, version: str, stop: int) -> None:
        super().__init__()
        self._client, self._uri, self._size, self._version, self._stop = client, uri, size, version, stop
        self._position = 0
        self._block, self._block_start = b"", 0
        self._block_bytes = FIRST_BYTES
        self._is_proved = False
        self._next: tuple[int, Future[bytes]] | None = None

    def check_unchanged(self) -> None:
        """Each range was asked for at its version; an object of which nothing was read is looked at."""
        if not self._is_proved:
            there = self._client.call(READING, "head_object", self._uri)
            if there["ETag"].strip('"') != self._version:
                raise changed(self._uri)

    def prefetch(self) -> None:
        if self._size and not self._block and not self._next:
            self._next = (0, self._fetch(0, 0, is_sequential=False))

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = 0) -> int:
        self._position = max(0, offset + (0, self._position, self._size)[whence])
        return self._position

    def readinto(self, buffer: "WriteableBuffer") -> int:
        target = memoryview(buffer).cast("B")
        wanted = min(len(target), self._size - self._position)
        if wanted <= 0:
            return 0
        if not self._block_start <= self._position < self._block_start + len(self._block):
            self._load(wanted)
        begin = self._position - self._block_start
        piece = memoryview(self._block)[begin : begin + wanted]
        target[: len(piece)] = piece
        self._position += len(piece)
        return len(piece)

    def close(self) -> None:
        self._drop_next()
        self._block = b""
        super().close()

    def _load(self, wanted: int) -> None:
        """Bring the block at the position: the one begun in the background, or a new one."""
        is_sequential = self._block != b"" and self._position == self._block_start + len(self._block)
        self._block_bytes = min(self._block_bytes * 2, MOST_BYTES) if is_sequential else FIRST_BYTES
        if self._next and self._next[0] == self._position:
            block = self._client.wait(self._next[1])
            self._next = None
        else:
            self._drop_next()
            block = self._client.wait(self._fetch(self._position, wanted, is_sequential))
        self._block, self._block_start = block, self._position
        if is_sequential and self._position + len(block) < min(self._stop, self._size):
            self._next = (self._position + len(block), self._fetch(self._position + len(block), 0, is_sequential))

    def _fetch(self, start: int, wanted: int, is_sequential: bool) -> "Future[bytes]":
        """A random read gets what it asks for; a sequential one a growing block, not across the reader's stop."""
        ahead = min(self._block_bytes, max(self._stop - start, 0))
        length = max(min(wanted, MOST_BYTES), ahead if is_sequential or start == 0 else 0)
        return self._client.start(self._read_range(start, min(start + length, self._size)))

    async def _read_range(self, start: int, stop: int) -> bytes:
        try:
            data, answer = await self._client.read_async(
                self._uri, Range=f"bytes={start}-{stop - 1}", IfMatch=f'"{self._version}"'
            )
        except (StaleError, ObjectMissingError) as exc:
            raise changed(self._uri) from exc
        if answer["ETag"].strip('"') != self._version or len(data) != stop - start:
            raise changed(self._uri)
        self._is_proved = True
        return data

    def _drop_next(self) -> None:
        if self._next:
            self._next[1].cancel()
            self._next = None
