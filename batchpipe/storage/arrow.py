"""A store as Arrow's datasets see it, for readers of a finished output."""

from collections.abc import Mapping
from typing import Any

import fsspec
import pyarrow.fs as pafs

from batchpipe.storage.address import protocol


def arrow_system(uri: str, options: Mapping[str, Any] | None = None) -> pafs.FileSystem:
    """The file system a URI lives in. ``options`` is the job's ``storage_options``, by protocol."""
    kind = protocol(uri)
    if kind == "file":
        return pafs.LocalFileSystem()
    handler: Any = pafs.FSSpecHandler  # the stubs take it for abstract
    return pafs.PyFileSystem(handler(fsspec.filesystem(kind, **((options or {}).get(kind) or {}))))


def arrow_path(uri: str) -> str:
    """A URI as its file system's path."""
    return uri if protocol(uri) == "file" else uri.partition("://")[2]
