"""Publishing: what a commit needs is written down first, so that whoever comes next can finish it.

A committed run is four files in its folder: the draft of its manifest, the long tables, and the list of its pieces.
From the journaled commit on `publish_committed` only rolls forward, without the job, its inputs or its workers (G2).
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

from batchpipe.errors import OutputError
from batchpipe.journal import Journal, open_journal, read_journal
from batchpipe.manifest import Input, Manifest, Part
from batchpipe.orders import HIDDEN
from batchpipe.published import iter_parts, iter_parts_left, read_manifest
from batchpipe.redact import clean_uri
from batchpipe.runs import (
    RunFolder,
    discard_each,
    discard_run,
    discard_scraps,
    iter_pending,
    key,
    sweep_run,
    unfinished_runs,
)
from batchpipe.storage import (
    Lock,
    ObjectExistsError,
    ObjectMissingError,
    Pending,
    PendingLostError,
    StaleError,
    Store,
    join,
    relative,
)
from batchpipe.tables import iter_table, open_table

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


class OvertakenError(OutputError):
    """Another run has been published meanwhile: this one lost the lock before it committed, and is stale."""


def write_draft(
    store: Store,
    folder: RunFolder,
    manifest: Manifest,
    pieces: Iterable[tuple[Pending, Part]],
    inputs: Iterable[Input],
    published: Iterable[Part] = (),
) -> None:
    """Write down all that publishing will need: each piece with the part it becomes, the inputs, the manifest.

    `published` are the parts that are there and stay.
    """
    with open_table(store, folder, PIECES) as listed, open_table(store, folder, PARTS) as parts:
        for part in published:
            parts.add(part.model_dump_json(), part.bytes)
        for pending, part in pieces:
            listed.add(json.dumps(pending.to_json()), pending.size)
            parts.add(part.model_dump_json(), pending.size)
        listed.finish(store, folder.root)
        tables = {"parts": parts.finish(store, folder.root)}
    with open_table(store, folder, INPUTS) as rows:
        for row in inputs:
            rows.add(row.model_dump_json(), row.bytes)
        tables["inputs"] = rows.finish(store, folder.root)
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
    the way; either way the next call goes on from there. OvertakenError: nothing can come of this run any more.
    """
    manifest = Manifest.model_validate_json(store.read(folder / DRAFT))
    version = _version_replaced(store, folder, manifest)
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

    lines = iter_table(store, folder / PIECES)
    with ThreadPoolExecutor(PUBLISHERS, thread_name_prefix="publish") as threads:
        while some := list(islice(lines, AT_A_TIME)):
            list(threads.map(publish, some))
    if lost:
        raise PiecesLostError(lost, clean_uri(folder.root))
    _put_manifest(store, folder, manifest, version)
    finish_published(store, folder, manifest)
    return manifest


def roll_forward(store: Store, folder: RunFolder) -> None:
    """Finish a run that had begun to publish. Pieces that are gone only that run itself can make anew: it is told to.

    A late writer's that committed after others had gone on is dropped. Its lock must be held.
    """
    try:
        publish_committed(store, folder)
    except OvertakenError:
        discard_run(store, folder)
    except PiecesLostError as error:
        note_lost(open_journal(store, folder / "journal"), error.pieces)
        raise


def note_lost(journal: Journal, pieces: list[str]) -> None:
    """Journal that these pieces are gone, by their keys: the next start makes them anew, whatever was committed."""
    journal.append("lost", pieces=pieces)
    journal.flush()


def drop_run(store: Store, folder: RunFolder) -> None:
    """Drop an unfinished run, with what of it was published: no manifest names that. Its lock must be held."""
    # An object may be as it was before its replacement.
    parts = iter_parts_left(store, folder.root, read_manifest(store, folder.root))
    named = {(join(folder.root, part.uri), part.sha256) for part in parts}
    pieces = (piece for piece in committed_pieces(store, folder) if (piece.uri, piece.sha256) not in named)
    store.delete(piece.uri for piece in pieces if store.holds(piece))
    discard_run(store, folder)


def committed_pieces(store: Store, folder: RunFolder) -> Iterator[Pending]:
    """What an unfinished run has begun to publish; nothing where it has not."""
    if any(entry["type"] == "commit" for entry in read_journal(store, folder / "journal")):
        yield from (Pending.from_json(json.loads(line)) for line in iter_table(store, folder / PIECES))


def _version_replaced(store: Store, folder: RunFolder, manifest: Manifest) -> str:
    """The version of the manifest that this one takes the place of, be it its own; empty where there is none."""
    try:
        data, version = store.read_with_version(folder.manifest)
    except ObjectMissingError:
        return ""
    there = Manifest.model_validate_json(data).run_id
    if there not in (manifest.run_id, manifest.replaces):
        raise _overtaken(folder, f"run {there}")
    return version


def _put_manifest(store: Store, folder: RunFolder, manifest: Manifest, version: str) -> None:
    """Switch to this manifest, unless somebody has put another meanwhile. That may be this one: then it is done."""
    data = manifest.model_dump_json(indent=2).encode() + b"\n"
    try:
        if version:
            store.replace(folder.manifest, data, version)
        else:
            store.create(folder.manifest, data)
    except (ObjectExistsError, StaleError) as error:
        there = read_manifest(store, folder.root)
        if there is None or there.run_id != manifest.run_id:
            raise _overtaken(folder, "another run") from error


def _overtaken(folder: RunFolder, other: str) -> OvertakenError:
    return OvertakenError(
        f"the lock was lost: {other} has been published while this start of run {folder.run_id} stood still",
        where=clean_uri(folder.root),
        next="batchpipe show OUTPUT tells what the output holds now",
    )


def finish_published(store: Store, folder: RunFolder, manifest: Manifest) -> None:
    """Remove what a published run takes the place of, and what it needs no more. Its lock must be held.

    Also after a kill, when half of the journal may be gone, and where a late writer has begun the journal again.
    """
    if unfinished_runs(store, folder.root) in ([], [folder.run_id]):  # else the pieces may be the other's
        discard_each(store, iter_pending(store, folder, manifest.output_layout))  # what workers wrote that were lost
    _remove_replaced(store, folder, manifest, _replaced(store, folder, manifest))
    store.delete([folder / DRAFT, folder / PIECES])
    discard_scraps(store, folder)
    # The journal goes last: as long as it is there, whoever comes knows that the rest may have to be removed.
    _remove_all(store, [folder / "pending", folder / "pieces"])
    store.remove_folder(folder / "journal")


def sweep(store: Store, folder: RunFolder) -> None:
    """Discard what a run left that has ended, however it ended. The output's lock must be held."""
    published = read_manifest(store, folder.root)
    if published and published.run_id == folder.run_id:
        finish_published(store, folder, published)
    else:
        sweep_run(store, folder)


def unpublish(store: Store, root: str, manifest: Manifest, lock: Lock) -> None:
    """Remove a published run with its parts.

    The manifest goes last: until then, whoever comes knows which run is not whole, and can go on from there. A run that
    is made anew has the same names: so the lock is asked for before anything is removed, again and again.
    """
    folder = RunFolder(root, manifest.run_id)
    parts = iter_parts_left(store, root, manifest)
    while some := [join(root, part.uri) for part in islice(parts, AT_A_TIME)]:
        lock.renew()
        store.delete(some)
    lock.renew()
    store.remove_folder(folder.uri)
    lock.renew()
    store.delete([folder.manifest])


def _replaced(store: Store, folder: RunFolder, manifest: Manifest) -> Iterator[Part]:
    """The parts of the run whose place this one takes; none where it is gone already."""
    if not manifest.replaces:
        return iter(())
    table = join(folder.root, HIDDEN, manifest.replaces, PARTS)
    return map(Part.model_validate_json, iter_table(store, table)) if store.exists(table) else iter(())


def _versions(store: Store, folder: RunFolder, manifest: Manifest, replaced: Iterable[Part]) -> Mapping[str, str]:
    """Under mirror: the old objects that are overwritten in place, at the version they have now."""
    if manifest.output_layout != "mirror" or manifest.is_redriven:
        return {}
    uris = (join(folder.root, part.uri) for part in replaced)
    return {uri: store.stat(uri).version for uri in uris if store.exists(uri)}


def _remove_replaced(store: Store, folder: RunFolder, manifest: Manifest, replaced: Iterable[Part]) -> None:
    if not manifest.replaces:
        return
    kept = {part.uri for part in iter_parts(store, folder.root, manifest)}
    store.delete(join(folder.root, part.uri) for part in replaced if part.uri not in kept)
    store.remove_folder(join(folder.root, HIDDEN, manifest.replaces))


def _remove_all(store: Store, folders: list[str]) -> None:
    with ThreadPoolExecutor(len(folders), thread_name_prefix="remove") as threads:
        list(threads.map(store.remove_folder, folders))


def _in_the_way(pending: Pending, folder: RunFolder) -> OutputError:
    name = relative(pending.uri, folder.root)
    return OutputError(
        f"cannot publish {name!r}: the output holds an object of that name, which this run did not make",
        where=clean_uri(folder.root),
        next="move it away and run the same command again: it finishes what it has begun to publish",
    )
