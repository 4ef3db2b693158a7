"""The only door to fsspec: find, read and write objects by URI, pieces that appear when published, and locks.

`open_store` chooses the kind by the URI's protocol; everything else is the `Store` protocol.
"""

import json
import os
import threading
from collections.abc import Mapping
from typing import Any

from batchpipe.storage.address import is_data, join, protocol, relative, resolve
from batchpipe.storage.durable import is_scrap
from batchpipe.storage.local import LocalStore
from batchpipe.storage.pending import Pending, PendingWriter
from batchpipe.storage.store import (
    Found,
    Lock,
    ObjectExistsError,
    ObjectFile,
    ObjectMissingError,
    PendingLostError,
    StaleError,
    Store,
)

__all__ = [
    "Found",
    "Lock",
    "ObjectExistsError",
    "ObjectFile",
    "ObjectMissingError",
    "Pending",
    "PendingLostError",
    "PendingWriter",
    "StaleError",
    "Store",
    "is_data",
    "is_scrap",
    "join",
    "open_store",
    "relative",
    "resolve",
]

_stores: dict[tuple[int, str, str], Store] = {}
_opening = threading.Lock()


def open_store(uri: str, options: Mapping[str, Any] | None = None) -> Store:
    """The store that a URI lives in. ``options`` is the job's ``storage_options``, by protocol.

    Cheap to call again: one store for each protocol and options in a process, shared by its threads.
    """
    kind = protocol(uri)
    chosen = dict((options or {}).get(kind) or {})
    key = (os.getpid(), kind, json.dumps(chosen, sort_keys=True, default=repr))
    with _opening:
        if key not in _stores:
            _stores[key] = _new_store(kind, chosen)
        return _stores[key]


def _new_store(kind: str, options: dict[str, Any]) -> Store:
    if kind == "file":
        return LocalStore()
    if kind == "s3":
        from batchpipe.storage.s3 import S3Store  # a second of imports that only S3 should cost

        return S3Store(options)
    from batchpipe.storage.generic import GenericStore

    return GenericStore(kind, options)
