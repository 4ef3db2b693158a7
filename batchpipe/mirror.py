"""`layout: mirror` of an object that was cut: a worker joins its pieces, in order, into the one that is published."""

from dataclasses import dataclass
from typing import Any

from batchpipe import gauge
from batchpipe.orders import Place
from batchpipe.storage import open_store

CHUNK_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Assembly:
    """The pieces of one input object, in order, and where they go as one. A description, sent to a worker."""

    object: int
    """The object's place in the listing."""
    uri: str
    splits: tuple[int, int]
    """First and last split that the pieces are of."""
    written: int
    quarantined: int
    pieces: tuple[str, ...]
    """URIs below the run's hidden folder: published there, so that any worker can read them."""

    def __str__(self) -> str:
        return f"the joining of {len(self.pieces):,} pieces into {self.uri}"


def assemble(assembly: Assembly, place: Place) -> dict[str, Any]:
    """Join pieces into one, pending like every other. Raises InputError or OutputError; memory is one chunk."""
    store = open_store(assembly.uri, place.job.output.storage_options)
    with store.open_pending(assembly.uri, staging=place.staging, attempt=place.attempt) as sink:
        for uri in assembly.pieces:
            found = store.stat(uri)
            with store.open(uri, size=found.size, version=found.version) as file:
                while chunk := file.read(CHUNK_BYTES):
                    sink.write(chunk)
                    gauge.show("moved", len(chunk))
        return sink.finish().to_json()
