"""URIs, the wildcards in them, and which names are data. Pure: no I/O."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Self

from batchpipe.errors import InputError
from batchpipe.redact import clean_uri


def protocol(uri: str) -> str:
    """``file`` for a path, otherwise what stands before ``://``; ``s3a`` is ``s3``."""
    found = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)(?:://|::)", uri)
    name = found[1].lower() if found else "file"
    return {"s3a": "s3", "local": "file"}.get(name, name)


def resolve(uri: str) -> str:
    """The one spelling that storage uses: an absolute path for local files, no slash at the end, ``s3://`` for ``s3a://``."""
    if protocol(uri) == "file":
        return str(Path(re.sub(r"^\w+://", "", uri)).expanduser().absolute())
    if protocol(uri) == "s3":
        uri = "s3://" + uri.partition("://")[2]
    return uri if uri.endswith("://") else uri.rstrip("/")


def join(uri: str, *parts: str) -> str:
    """The URI of something below a folder."""
    return "/".join([uri.rstrip("/"), *parts]) if not uri.endswith("://") else uri + "/".join(parts)


def relative(uri: str, folder: str) -> str:
    """The path of an object below a folder; ValueError if it is not below it."""
    start = join(resolve(folder), "")
    if not resolve(uri).startswith(start):
        raise ValueError(f"{clean_uri(uri)!r} is not below {clean_uri(folder)!r}")
    return resolve(uri)[len(start) :]


def is_data(path: str) -> bool:
    """Whether no component of a relative path begins with ``_`` or ``.``."""
    return not any(part.startswith(("_", ".")) for part in path.split("/"))


def has_wildcard(uri: str) -> bool:
    """Whether a URI is a glob."""
    return bool(re.search(r"[*?\[]", uri))


@dataclass(frozen=True, slots=True)
class Pattern:
    """A glob: the last folder without wildcards, and the components below it that have them.

    ``*`` and ``?`` stay within a component, ``[a-z]`` and ``[!a-z]`` are one character, ``**`` stands alone
    between slashes for any number of folders, and ``[*]`` is how a wildcard is meant literally.
    """

    folder: str
    components: tuple[str, ...]

    @classmethod
    def of(cls, uri: str) -> Self:
        """Split a URI that has wildcards; InputError where ``**`` does not stand alone."""
        scheme, _, path = uri.rpartition("://")
        parts = path.split("/")
        first = next(i for i, part in enumerate(parts) if has_wildcard(part))
        for part in parts[first:]:
            if "**" in part and part != "**":
                raise InputError(
                    f"cannot read {clean_uri(uri)!r}: '**' must stand alone between slashes",
                    next=f"write {part.replace('**', '*')!r} for one level, or '**/{part.replace('**', '*')}' for all",
                )
        folder = "/".join(parts[:first])
        return cls(f"{scheme}://{folder}" if scheme else folder or "/", tuple(parts[first:]))

    @property
    def literal_start(self) -> str:
        """What every match below the folder begins with: lets a store list less."""
        return re.split(r"[*?\[]", self.components[0])[0]

    @property
    def is_one_level(self) -> bool:
        """Whether all matches lie directly in the folder."""
        return len(self.components) == 1 and self.components[0] != "**"

    def matches(self, path: str) -> bool:
        """Whether a path relative to the folder matches as a whole."""
        return _matches(path.split("/"), self.components)

    def may_enter(self, path: str) -> bool:
        """Whether a match may lie in this folder, relative to the pattern's: lets a local walk do less."""
        names = path.split("/")
        until = self.components.index("**") if "**" in self.components else len(self.components)
        if until == len(self.components) and len(names) >= until:
            return False
        return all(map(fnmatchcase, names, self.components[:until]))


def _matches(names: Sequence[str], components: Sequence[str]) -> bool:
    """``a/**/b`` also matches ``a/b``; a last ``**`` is everything below."""
    if not components or not names:
        return not components and not names
    if components[0] == "**":
        return len(components) == 1 or any(_matches(names[i:], components[1:]) for i in range(len(names)))
    return fnmatchcase(names[0], components[0]) and _matches(names[1:], components[1:])
