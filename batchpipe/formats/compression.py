"""Compressed streams: gzip and zstd in, gzip and zstd out. What they break with is told as ours at this door."""

import gzip
import io
import zlib
from typing import IO, Any, Protocol

import pyarrow as pa

from batchpipe.errors import InputError
from batchpipe.split import InputObject

_BLOCK_BYTES = 1 << 20
_BY_ENDING = {".gz": "gzip", ".zst": "zstd"}


class Sink(Protocol):
    """What a writer needs of the place it writes to."""

    def write(self, data: bytes | memoryview, /) -> object: ...


def compression_of(uri: str, stated: str) -> str:
    """Return ``none``, ``gzip`` or ``zstd``: as stated, or by the ending of the URI for ``auto``."""
    if stated != "auto":
        return stated
    return next((kind for ending, kind in _BY_ENDING.items() if uri.lower().endswith(ending)), "none")


def decompressed(file: IO[bytes], input_object: InputObject, compression: str) -> IO[bytes]:
    """Return a stream of the decompressed bytes, from the file's beginning; several members or frames are one stream.

    Reading it raises InputError where the data are truncated or corrupt. Closing it is not needed.
    """
    if compression == "none":
        return file
    file.seek(0)
    opened: Any = (
        gzip.GzipFile(fileobj=file, mode="rb")
        if compression == "gzip"
        else pa.CompressedInputStream(pa.PythonFile(Borrowed(file), mode="r"), "zstd")
    )
    return io.BufferedReader(_Decompressed(opened, input_object, compression), _BLOCK_BYTES)


class Borrowed(io.RawIOBase):
    """Somebody else's open file, lent to a library that closes what it reads from."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return whether the file can seek."""
        return self._file.seekable()

    def seek(self, offset: int, whence: int = 0, /) -> int:
        """Move in the file itself."""
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        """Return the place in the file itself."""
        return self._file.tell()

    def read(self, size: int = -1, /) -> bytes:
        """Read from the file itself."""
        return self._file.read(size)


class _Decompressed(io.RawIOBase):
    """Reads through to the decompressor and names the object when it fails."""

    def __init__(self, stream: Any, input_object: InputObject, compression: str) -> None:
        self._stream = stream
        self._object = input_object
        self._compression = compression
        self._position = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._stream.read(len(buffer))
        except (EOFError, zlib.error, gzip.BadGzipFile, pa.ArrowInvalid) as error:
            raise self._broken(error) from error
        except OSError as error:
            # Arrow's decompressors raise a bare OSError; storage's have an errno, or are InputErrors of ours.
            if error.errno is not None or isinstance(error, InputError):
                raise
            raise self._broken(error) from error
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def _broken(self, error: Exception) -> InputError:
        return InputError(
            f"cannot read {self._object.shown!r}: its {self._compression} data are truncated or corrupt: {error}",
            where=f"{self._object.shown}, after {self._position:,} decompressed bytes",
            next="write the object again; or state input.compression: none if it is not compressed",
        )


def compressing(sink: Sink, compression: str) -> IO[bytes]:
    """Return a file that compresses what is written to it; closing it ends the stream and leaves the sink open."""
    file: Any = writable(sink)
    if compression == "gzip":
        # No time and no name in the header: the same records give the same bytes.
        return gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0)  # type: ignore[return-value]  # it is one
    if compression == "zstd":
        return pa.CompressedOutputStream(pa.PythonFile(file, mode="w"), "zstd")  # type: ignore[return-value]  # it is one
    whole: IO[bytes] = file
    return whole


class _Writable(io.RawIOBase):
    """A sink that has only ``write`` as the file object that libraries ask for. Closing it leaves the sink open."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._position = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        whole = data if isinstance(data, bytes) else bytes(data)
        self._sink.write(whole)
        self._position += len(whole)
        return len(whole)

    def tell(self) -> int:
        return self._position


def writable(sink: Sink) -> IO[bytes]:
    """Return a file object over a sink that has only ``write``; closing it leaves the sink open."""
    return _Writable(sink)  # type: ignore[return-value]  # RawIOBase is an IO[bytes] in all but name
