"""Publishing: what a commit needs is written down first, so that whoever comes next can finish it.

A committed run is four files in its folder: the draft of its manifest, the long tables, and the list of its pieces.
From the journaled commit on `publish_committed` only rolls forward, without the job, its inputs or its workers (G2).
"""

import hashlib
import io
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

from batchpipe.errors import OutputError
from batchpipe.journal import read_journal
from batchpipe.manifest import Input, LongTable, Manifest, Part
from batchpipe.orders import HIDDEN
from batchpipe.published import iter_parts
from batchpipe.redact import clean_uri
from batchpipe.runs import RunFolder, discard_each, iter_pending, key
from batchpipe.storage import ObjectExistsError, ObjectMissingError, Pending, PendingLostError, Store, join, relative

PUBLISHERS = 16
AT_A_TIME = 1_000
DRAFT, PIECES, PARTS, INPUTS = "manifest.json", "pieces.jsonl", "parts.jsonl", "inputs.jsonl"


class PiecesLostError(OutputError):
    """Somebody removed pending pieces before they were published. `pieces` are their keys."""

    def __init__(self, pieces: list[str], where: str) -> None:
        super().__init__(
            f"somebody removed {len(pieces):,} of the pending pieces before they were published",
            where=where,
            next="run the same command again: it makes them anew and keeps the rest; see the bucket's lifecycle rules",
        )
        self.pieces = pieces


def write_draft(
    store: Store,
    folder: RunFolder,
    manifest: Manifest,
    pieces: Iterable[tuple[Pending, int, tuple[int, int]]],
    inputs: Iterable[Input],
) -> None:
    """Write down all that publishing will need: each piece with its records and splits, the inputs, the manifest."""
    listed, parts = bytearray(), bytearray()
    count = size = 0
    for pending, records, splits in pieces:
        name = relative(pending.uri, folder.root)
        part = Part(uri=name, records=records, bytes=pending.size, sha256=pending.sha256, splits=splits)
        listed += json.dumps(pending.to_json()).encode() + b"\n"
        parts += part.model_dump_json().encode() + b"\n"
        count, size = count + 1, size + pending.size
    store.put(folder / PIECES, bytes(listed))
    tables = {
        "parts": _put_table(store, folder, PARTS, bytes(parts), count, size),
        "inputs": _write_inputs(store, folder, inputs),
    }
    store.put(folder / DRAFT, manifest.model_copy(update=tables).model_dump_json(indent=2).encode() + b"\n")


def is_committed(store: Store, folder: RunFolder) -> bool:
    """Whether the run's journal says that publishing may begin."""
    committed = False
    for entry in read_journal(store, folder / "journal"):
        committed = entry["type"] == "commit" or (committed and entry["type"] != "lost")
    return committed


def publish_committed(store: Store, folder: RunFolder) -> Manifest:
    """Make every piece of a committed run visible, then its manifest; then remove what it replaces and its journal.

    Its lock must be held. Raises PiecesLostError where pieces are gone, OutputError where somebody else's object is in
    the way; either way the next call goes on from there.
    """
    manifest = Manifest.model_validate_json(store.read(folder / DRAFT))
    replaced = _replaced(store, folder, manifest)
    versions = _versions(store, folder, manifest, replaced)
    lost: list[str] = []

    def publish(line: bytes) -> None:
        pending = Pending.from_json(json.loads(line))
        try:
            store.publish(pending, replaces=versions.get(pending.uri))
        except PendingLostError:
            lost.append(key(pending))
        except ObjectExistsError as error:
            raise _in_the_way(pending, folder) from error

    lines = iter(io.BytesIO(store.read(folder / PIECES)))
    with ThreadPoolExecutor(PUBLISHERS, thread_name_prefix="publish") as threads:
        while some := list(islice(lines, AT_A_TIME)):
            list(threads.map(publish, some))
    if lost:
        raise PiecesLostError(lost, clean_uri(folder.root))
    store.put(folder.manifest, manifest.model_dump_json(indent=2).encode() + b"\n")
    discard_each(store, iter_pending(store, folder))  # what workers wrote that were lost
    _remove_replaced(store, folder, manifest, replaced)
    _remove_all(store, [folder / name for name in ("pending", "pieces", "journal")])
    store.delete([folder / DRAFT, folder / PIECES])
    return manifest


def _replaced(store: Store, folder: RunFolder, manifest: Manifest) -> list[Part]:
    """The parts of the run whose place this one takes; none where it is gone already."""
    if not manifest.replaces:
        return []
    try:
        data = store.read(join(folder.root, HIDDEN, manifest.replaces, PARTS))
    except ObjectMissingError:
        return []
    return [Part.model_validate_json(line) for line in data.splitlines()]


def _versions(store: Store, folder: RunFolder, manifest: Manifest, replaced: Iterable[Part]) -> Mapping[str, str]:
    """Under mirror: the old objects that are overwritten in place, at the version they have now."""
    if manifest.output_layout != "mirror":
        return {}
    uris = [join(folder.root, part.uri) for part in replaced]
    return {uri: store.stat(uri).version for uri in uris if store.exists(uri)}


def _remove_replaced(store: Store, folder: RunFolder, manifest: Manifest, replaced: Iterable[Part]) -> None:
    if not manifest.replaces:
        return
    kept = {part.uri for part in iter_parts(store, folder.root, manifest)}
    store.delete(join(folder.root, part.uri) for part in replaced if part.uri not in kept)
    store.remove_folder(join(folder.root, HIDDEN, manifest.replaces))


def _remove_all(store: Store, folders: list[str]) -> None:
    with ThreadPoolExecutor(len(folders), thread_name_prefix="remove") as threads:
        list(threads.map(store.remove_folder, folders[:-1]))
    # The journal goes last: as long as it is there, whoever comes knows that the rest may have to be removed.
    store.remove_folder(folders[-1])


def _in_the_way(pending: Pending, folder: RunFolder) -> OutputError:
    name = relative(pending.uri, folder.root)
    return OutputError(
        f"cannot publish {name!r}: the output holds an object of that name, which this run did not make",
        where=clean_uri(folder.root),
        next="move it away and run the same command again: it finishes what it has begun to publish",
    )


def _write_inputs(store: Store, folder: RunFolder, rows: Iterable[Input]) -> LongTable:
    lines, count, size = bytearray(), 0, 0
    for row in rows:
        lines += row.model_dump_json().encode() + b"\n"
        count, size = count + 1, size + row.bytes
    return _put_table(store, folder, INPUTS, bytes(lines), count, size)


def _put_table(store: Store, folder: RunFolder, name: str, data: bytes, rows: int, size: int) -> LongTable:
    store.put(folder / name, data)
    uri = f"{HIDDEN}/{folder.run_id}/{name}"
    return LongTable(uri=uri, rows=rows, bytes=size, sha256=hashlib.sha256(data).hexdigest())
