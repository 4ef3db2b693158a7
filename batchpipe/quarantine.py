"""Where a worker keeps the records of a split that failed for good, each with where it came from and why.

One JSON line a record, and beside it the tracebacks of user code, each kind once. Both are pending, as a piece is,
until the driver has settled the split; which record and line each is, is filled in later (`numbering`).
"""

import base64
import codecs
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeAlias

import pyarrow as pa

from batchpipe.batch import MiniBatch
from batchpipe.manifest import Failure
from batchpipe.orders import Place, traceback_name
from batchpipe.split import WHOLE, Split
from batchpipe.storage import PendingWriter, Store, open_store

MAX_FAILURES_IN_RESULT = 5
MAX_PAYLOAD_CHARACTERS = 1_048_576
BASE64 = "base64:"
MAX_TRACEBACKS = 20
MAX_TRACEBACK_CHARACTERS = 16_000

_Kind: TypeAlias = tuple[str, str, str]
"""Stage, reason and location: what makes two failures the same to whoever mends the code."""


@dataclass(slots=True)
class _Traceback:
    """The first failure of its kind, and how many there were."""

    first: Failure
    text: str
    count: int = 0


class Quarantine:
    """The failed records of one split. Opened by `open_quarantine`, which discards what is not finished."""

    def __init__(self, place: Place, split: Split, release: ExitStack) -> None:
        self.count = 0
        self.first: list[Failure] = []
        self._place = place
        self._split = split
        self._release = release
        self._lines: PendingWriter | None = None
        self._tracebacks: dict[_Kind, _Traceback] = {}

    def add(self, failure: Failure, batch: MiniBatch, index: int, traceback: str = "") -> None:
        """Keep a failed record, the record itself as it was read, and the traceback of the user's code, if any."""
        self.count += 1
        if traceback and self._keep(failure, traceback):
            failure = replace(failure, traceback=traceback_name(self._split.index))
        if len(self.first) < MAX_FAILURES_IN_RESULT or failure.stage not in {each.stage for each in self.first}:
            self.first.append(failure)
        if self._lines is None:
            self._lines = self._open(self._place.quarantine_uri(self._split))
        self._lines.write(to_line(replace(failure, payload=record_text(batch, index))))

    def finish(self) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        """Bring both files to safety, still invisible: records and tracebacks; None for one that has nothing in it."""
        tracebacks = None
        if self._tracebacks:
            sink = self._open(self._place.traceback_uri(self._split))
            for kind in self._tracebacks.values():
                sink.write(_described(kind).encode())
            tracebacks = sink.finish().to_json()
        return self._lines.finish().to_json() if self._lines else None, tracebacks

    def _keep(self, failure: Failure, traceback: str) -> bool:
        kind = (failure.stage, failure.reason, failure.location)
        if kind not in self._tracebacks:
            if len(self._tracebacks) >= MAX_TRACEBACKS:
                return False
            # The end tells what happened and where.
            self._tracebacks[kind] = _Traceback(failure, traceback[-MAX_TRACEBACK_CHARACTERS:])
        self._tracebacks[kind].count += 1
        return True

    def _open(self, uri: str) -> PendingWriter:
        output, place = self._place.job.output, self._place
        store = open_store(output.uri, output.storage_options)
        return self._release.enter_context(store.open_pending(uri, staging=place.staging, attempt=place.attempt))


@contextmanager
def open_quarantine(place: Place, split: Split) -> Iterator[Quarantine]:
    """Open a split's quarantine, which makes no file before the first failed record."""
    with ExitStack() as release:
        yield Quarantine(place, split, release)


def read_failures(store: Store, uri: str) -> Iterator[Failure]:
    """The failed records of one file, as they stand there."""
    found = store.stat(uri)
    with store.open(uri, size=found.size, version=found.version, stop=WHOLE) as file:
        for line in file:
            yield Failure(**json.loads(line))


def to_line(failure: Failure) -> bytes:
    """A failed record as a line of its split's quarantine."""
    return json.dumps(asdict(failure)).encode() + b"\n"


def record_text(batch: MiniBatch, index: int) -> str:
    """A record as text: a table's row as JSON, bytes as they are, or `base64:...` where they are no UTF-8."""
    one = batch.slice(index, index + 1).records
    if isinstance(one, pa.Table):
        return json.dumps(one.to_pylist()[0], default=str)[:MAX_PAYLOAD_CHARACTERS]
    data = bytes(one[0][: 4 * MAX_PAYLOAD_CHARACTERS])  # no character takes more
    try:
        text, _ = codecs.utf_8_decode(data, "strict", len(data) == len(one[0]))
        return text[:MAX_PAYLOAD_CHARACTERS]
    except UnicodeDecodeError:
        return BASE64 + base64.b64encode(data[: (MAX_PAYLOAD_CHARACTERS - len(BASE64)) // 4 * 3]).decode()


def _described(kind: _Traceback) -> str:
    first = kind.first
    offset = f", byte {first.offset:,}" if first.offset >= 0 else ""
    count = "1 record" if kind.count == 1 else f"{kind.count:,} records, of which this is the first"
    return f"stage {first.stage!r}, {first.object}{offset}: {count}\n{kind.text.rstrip()}\n\n"
