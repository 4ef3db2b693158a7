"""Unpack an archive that nobody vouches for: regular files below one folder, and never too many or too much.

No link is ever made: one that names a file of the archive becomes that file again, any other is refused.
"""

import gzip
import lzma
import os
import shutil
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path, PurePosixPath
from typing import IO, NoReturn, Protocol, cast

MAX_FILES = 100_000
MIN_BYTES = 1 << 30
MAX_RATIO = 100
"""An archive may unpack to a GiB whatever its size, and to a hundred times its size: a bomb does to thousands."""
MAX_HEADER_BYTES = 1 << 20
"""Of what stands in front of a tar's file, its name and attributes: tarfile reads them into memory."""
MAX_NAME = 4096
"""Characters of a path, as Linux allows; more would only be an error's text of a megabyte."""
_CHUNK = 1 << 20


class UnpackError(Exception):
    """The archive is broken, or holds what must not be unpacked."""


_BROKEN = (
    *(tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, lzma.LZMAError, EOFError),
    *(ValueError, LookupError, ArithmeticError, struct.error),  # of what the modules take for numbers and names
    *(RuntimeError, NotImplementedError),  # zipfile, of a password and of a compression it does not know
)


class _Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


def unpack(archive: IO[bytes], size: int, folder: Path) -> None:
    """Unpack a tar, tar.gz or zip, told by its content, into a new folder. Raises UnpackError and OSError.

    Of what the archive says of a file only whether it is executable is kept.
    """
    folder.mkdir(parents=True)
    sink = _Sink(folder, max(MIN_BYTES, MAX_RATIO * size))
    start = archive.read(512)
    archive.seek(0)
    try:
        if start[:2] == b"PK":
            _unpack_zip(archive, sink)
        elif start[:2] == b"\x1f\x8b" or start[257:262] == b"ustar":
            _unpack_tar(archive, sink, is_gzip=start[:2] == b"\x1f\x8b")
        else:
            raise UnpackError("it is neither a tar.gz nor a zip")
    except _BROKEN as exc:
        raise UnpackError(f"it is broken: {exc}") from exc
    sink.settle_links()


def _unpack_tar(archive: IO[bytes], sink: "_Sink", *, is_gzip: bool) -> None:
    # tarfile's own way of reading gzip as a stream does not compare the checksum.
    with gzip.GzipFile(fileobj=archive) if is_gzip else nullcontext(archive) as plain:
        headers = _Headers(plain)
        with tarfile.open(fileobj=cast("IO[bytes]", headers), mode="r|") as tar:
            while member := headers.next_of(tar):
                _add_member(member, tar, sink)
        while data := plain.read(_CHUNK):  # to the checksum at the end
            sink.count_bytes(len(data))


class _Headers:
    """A tar as tarfile reads it: whole names and attributes at once, so that these must be bounded here."""

    def __init__(self, file: "_Readable") -> None:
        self._file = file
        self._room: int | None = MAX_HEADER_BYTES  # a tar is opened by reading its first member
        """What may still be read before the next file begins; None while a file is read."""

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        if self._room is not None:
            self._room -= len(data)
            if self._room < 0:
                self._refuse()
        return data

    def next_of(self, tar: tarfile.TarFile) -> tarfile.TarInfo | None:
        """The next member; the one before is forgotten."""
        self._room = MAX_HEADER_BYTES
        vars(tar)["members"] = []  # each holds its attributes
        member = tar.next()
        self._room = None
        if sum(len(str(value)) for value in tar.pax_headers.values()) > MAX_HEADER_BYTES:  # they add up
            self._refuse()
        return member

    def _refuse(self) -> NoReturn:
        raise UnpackError(f"it holds names or attributes of more than {MAX_HEADER_BYTES:,} bytes")


def _add_member(member: tarfile.TarInfo, tar: tarfile.TarFile, sink: "_Sink") -> None:
    if member.isdir():
        sink.add_folder(member.name)
    elif member.isreg():
        content = tar.extractfile(member)
        assert content
        sink.add_file(member.name, content, executable=bool(member.mode & 0o100))
    elif member.issym():
        sink.add_link(member.name, str(PurePosixPath(member.name).parent / member.linkname))
    elif member.islnk():
        sink.add_link(member.name, member.linkname)
    else:
        raise UnpackError(f"it holds a device or pipe: {member.name!r}")


def _unpack_zip(archive: IO[bytes], sink: "_Sink") -> None:
    with zipfile.ZipFile(archive) as packed:
        for member in packed.infolist():
            mode = member.external_attr >> 16
            if member.is_dir():
                sink.add_folder(member.filename)
                continue
            with packed.open(member) as content:
                if stat.S_ISLNK(mode):
                    target = content.read(4096).decode()
                    sink.add_link(member.filename, str(PurePosixPath(member.filename).parent / target))
                else:
                    sink.add_file(member.filename, content, executable=bool(mode & 0o100))


class _Sink:
    """The folder that is filled, and what was put into it."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder = folder
        self._room = max_bytes
        self._max_bytes = max_bytes
        self._count = 0
        self._links: dict[PurePosixPath, PurePosixPath] = {}

    def add_folder(self, name: str) -> None:
        self._add()
        (self._folder / inside(name)).mkdir(parents=True, exist_ok=True)

    def add_file(self, name: str, content: _Readable, *, executable: bool) -> None:
        self._add()
        path = self._folder / inside(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)  # an archive that was appended to holds a file twice: the last one stands
        with path.open("xb") as file:
            while data := content.read(_CHUNK):
                self.count_bytes(len(data))
                file.write(data)
        path.chmod(0o555 if executable else 0o444)

    def add_link(self, name: str, target: str) -> None:
        self._add()
        self._links[inside(name)] = inside(os.path.normpath(target), link=name)

    def settle_links(self) -> None:
        """Make every link the file it names; done at the end, since a link may come before its file."""
        for name, target in self._links.items():
            source = self._folder / self._final(target)
            if not source.is_file():
                raise UnpackError(f"it holds a link to something that is no file in it: {str(name)!r}")
            self.count_bytes(source.stat().st_size)
            path = self._folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            shutil.copy(source, path)

    def count_bytes(self, count: int) -> None:
        self._room -= count
        if self._room < 0:
            raise UnpackError(f"it unpacks to more than {self._max_bytes:,} bytes")

    def _final(self, target: PurePosixPath) -> PurePosixPath:
        for _ in range(40):
            if target not in self._links:
                return target
            target = self._links[target]
        raise UnpackError(f"it holds links in a circle: {str(target)!r}")

    def _add(self) -> None:
        self._count += 1
        if self._count > MAX_FILES:
            raise UnpackError(f"it holds more than {MAX_FILES:,} files")


def inside(name: str, *, link: str = "") -> PurePosixPath:
    """Return the name as a path that stays below its folder. Raises UnpackError."""
    if len(name) > MAX_NAME:
        raise UnpackError(f"it holds a path of {len(name):,} characters: {name[:60]!r} ...")
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name:
        what = f"a link out of its folder: {link!r}" if link else f"a path out of its folder: {name!r}"
        raise UnpackError(f"it holds {what}")
    return path


def iter_files(folder: Path) -> Iterator[Path]:
    """Every file below a folder, sorted, relative to it."""
    yield from sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
