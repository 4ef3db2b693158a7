"""Which text can be cut as bytes, and a stream of UTF-8 for what cannot."""

import codecs
import io
from typing import IO

from batchpipe.errors import InputError
from batchpipe.split import InputObject

_BLOCK_BYTES = 1 << 20
_TRANSPARENT = {"ascii", "utf-8", "euc_jp", "euc_kr", "gb2312"}
_TRANSPARENT_FAMILIES = ("iso8859", "cp125", "cp85", "cp86", "koi8", "mac", "kz1048", "ptcp154", "tis-620", "hp-roman8")


def is_cuttable(encoding: str) -> bool:
    """Whether no character but ASCII's own contains an ASCII byte, so that text can be cut and searched as bytes."""
    name = codecs.lookup(encoding).name
    return name in _TRANSPARENT or name.startswith(_TRANSPARENT_FAMILIES)


def record_encoding(encoding: str) -> str:
    """Return the encoding of records as they come from a reader: UTF-8 where the text could not be cut as it is."""
    return codecs.lookup(encoding).name if is_cuttable(encoding) else "utf-8"


class Transcoded(io.RawIOBase):
    """A stream in an encoding that cannot be cut as bytes (UTF-16, UTF-32), as UTF-8."""

    def __init__(self, file: IO[bytes], encoding: str, input_object: InputObject) -> None:
        self._file = file
        self._decoder = codecs.getincrementaldecoder(encoding)()
        self._encoding = encoding
        self._object = input_object
        self._waiting = b""

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # the stub's buffer type is private
        """Fill the buffer with UTF-8. Raises InputError where the bytes are not of the encoding."""
        while not self._waiting:
            data = self._file.read(_BLOCK_BYTES)
            try:
                self._waiting = self._decoder.decode(data, final=not data).encode()
            except UnicodeDecodeError as error:
                msg = f"cannot read {self._object.shown!r} as {self._encoding}: {error}"
                raise InputError(msg, where=self._object.shown, next="state its input.encoding") from error
            if not data:
                break
        size = min(len(buffer), len(self._waiting))
        buffer[:size] = self._waiting[:size]
        self._waiting = self._waiting[size:]
        return size
