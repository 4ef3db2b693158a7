"""The driver's side of an output that its run has claimed: what of the run is there already, publish, discard.

Workers only ever write pending pieces; what is here alone makes them visible, and from the journaled commit on it
only rolls forward (G2).
"""

from collections.abc import Iterable, Iterator, Mapping, Set
from datetime import UTC, datetime
from heapq import merge
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from batchpipe.errors import OutputError
from batchpipe.fingerprint import Fingerprint
from batchpipe.job import Job
from batchpipe.manifest import Input, Kept, Manifest, Part, SplitResult
from batchpipe.mirror import Assembly
from batchpipe.numbering import Numbering
from batchpipe.orders import Place, quarantine_name
from batchpipe.publication import (
    PiecesLostError,
    note_lost,
    publish_committed,
    write_draft,
)
from batchpipe.published import iter_parts, with_dataset, write_description
from batchpipe.redact import clean_uri
from batchpipe.runs import (
    SHOWN,
    PieceSpool,
    RunFolder,
    RunState,
    discard_named,
    failed_of,
    iter_pending,
    key,
    key_of,
    keys_of,
    remove_unsettled,
    sweep_run,
    without_type,
)
from batchpipe.split import InputObject
from batchpipe.storage import Lock, ObjectExistsError, Pending, PendingLostError, Store, join, relative

if TYPE_CHECKING:
    from batchpipe.held import HeldResults
    from batchpipe.journal import Journal


class Output:
    """An output that this run holds the lock of. `manifest` is set where the run is finished already."""

    def __init__(self, job: Job, fingerprint: Fingerprint, folder: RunFolder, store: Store) -> None:
        self.job = job
        self.fingerprint = fingerprint
        self.folder = folder
        self.store = store
        self.manifest: Manifest | None = None
        self.replaced: Manifest | None = None
        self.redrives: Manifest | None = None
        """The run whose quarantined records these are: its parts stay."""
        self.lock: Lock
        self.journal: Journal
        self.pieces: PieceSpool
        self.held: HeldResults
        self.assembled: dict[int, dict[str, Any]] = {}
        """Under mirror, by object: the one piece that its pieces were joined into."""
        self.schemas: dict[str, Any] = {}
        self.begun: dict[str, Any] = {}
        """What an earlier start of this run wrote down as it began: see `begin`."""
        self.started = _now()

    @property
    def part_prefix(self) -> str:
        """What names of parts begin with: the run is in it where an older run's parts lie beside.

        Those of a redrive come after those of its run, for letters sort behind digits, and after those of earlier ones.
        """
        run = self.redrives.generations[0].run_id if self.redrives else self.folder.run_id
        prefix = f"part-{run}-" if self.job.output.if_exists == "replace" else "part-"
        return f"{prefix}redrive-{self.generation:03}-" if self.redrives else prefix

    @property
    def generation(self) -> int:
        """0 for a run, n for its n-th redrive."""
        return len(self.redrives.generations) if self.redrives else 0

    def replay(self) -> Iterator[tuple[SplitResult, Kept]]:
        """What earlier starts made of the run's splits; then what nobody journaled is discarded."""
        state = RunState.of(self.journal.replay())
        self.started = state.started or self.started
        self.schemas, self.assembled = state.schemas, state.assembled
        unnamed = {key(pending) for pending in iter_pending(self.store, self.folder, self.job.output.layout)}
        apart = {found.uri for found in self.store.iter_folder(self.folder / "pieces")}
        if not state.has_begun_to_publish:
            self.assembled = {each: one for each, one in self.assembled.items() if key_of(one["piece"]) in unnamed}
            unnamed -= {key_of(one["piece"]) for one in self.assembled.values()}
        held: dict[int, dict[str, Any]] = {}
        stays: set[tuple[str, int]] = set()
        for entry in self.journal.replay():
            if entry["type"] == "held":
                held[entry["split"]] = entry
            if entry["type"] != "split":
                continue
            held.pop(entry["split"], None)
            result, piece = SplitResult.from_json(without_type(entry)), entry["piece"]
            is_lost = piece and key_of(piece) in state.lost
            if piece and (not state.has_begun_to_publish or self._is_to_be_joined(result)):
                is_lost = is_lost or (key_of(piece) not in unnamed and piece["uri"] not in apart)
            if piece and not state.has_begun_to_publish:
                unnamed.discard(key_of(piece))
            if not is_lost:
                self.pieces.add(result)
            yield result, Kept.LOST if is_lost else Kept.SETTLED
        if not state.has_begun_to_publish:
            for split, entry in held.items():
                if (shown := self._shown_of(entry, unnamed)) is not None:
                    unnamed -= keys_of(entry)
                    stays |= {(name, split) for name in shown}
                    yield SplitResult.from_json(without_type(entry)), Kept.HELD
            discard_named(self.store, self.folder, unnamed)
        if self.begun:
            remove_unsettled(
                self.store, self.folder, lambda name, split: split in self.pieces or (name, split) in stays
            )

    def _is_to_be_joined(self, result: SplitResult) -> bool:
        """Whether the split's piece is one of several that are not one object yet, or not any more."""
        return bool(
            result.piece and self._is_apart(result.piece["uri"]) and result.ranges[0].object not in self.assembled
        )

    def _is_apart(self, uri: str) -> bool:
        return uri.startswith(join(self.folder.uri, ""))

    def _shown_of(self, held: Mapping[str, Any], pending: Set[str]) -> list[str] | None:
        """What of a held split was shown just before a kill, by its names in SHOWN; None where a piece is gone."""
        if held["piece"] and key_of(held["piece"]) not in pending:
            return None
        shown = [name for name in SHOWN if held[name] and key_of(held[name]) not in pending]
        try:
            for name in shown:
                self.store.publish(Pending.from_json(held[name]))  # done already, or not to be done any more
        except (ObjectExistsError, PendingLostError):
            return None
        return shown

    def begin(self, splits: int, split_bytes: int | None) -> None:
        """Write down what this run is, so that a later start knows whether it is the same, and cuts its input alike.

        How it is cut follows also from keys that may change for a resume, as how many requests are in flight.
        Raises OutputError where an earlier start had another number of splits: their numbers would mean other records.
        """
        if not self.begun:
            facts = {"layout": self.job.output.layout, "splits": splits, "split_bytes": split_bytes}
            self.journal.append("start", started=self.started, fingerprint=self.fingerprint.document, **facts)
            self.journal.flush()
        elif (before := self.begun.get("splits", 0)) != splits:
            raise OutputError(
                f"the unfinished run was cut into {before or 'other'} splits, and would be cut into {splits} now",
                where=clean_uri(self.folder.root),
                next="resume it with the batchpipe that began it; or add --restart to drop it and begin anew",
            )

    def set_schemas(self, schemas: dict[str, Any]) -> None:
        """Fix the schemas that the first mini-batch proved, for this start and every later one."""
        self.schemas = schemas
        self.journal.append("schema", **schemas)
        self.journal.flush()

    def settle(self, result: SplitResult) -> None:
        """Journal a settled split, and let its quarantined records be seen."""
        self.keep_quarantine(result)
        self.pieces.add(result)
        self.journal.append("split", **result.to_json())

    def hold(self, result: SplitResult) -> None:
        """Journal a split that is done and has not settled: its pieces stay, for the next start if need be."""
        self.journal.append("held", **result.to_json())

    def assemblies(self, inputs: Iterable[InputObject], place: Place) -> Iterator[Assembly]:
        """Under mirror, the objects whose pieces are still apart; the pieces are published where workers can read them.

        An object that was not cut has one piece, which goes to its place as it is.
        """
        objects = iter(inputs)
        for index, group in groupby(self.pieces, key=lambda each: int(each[1]["objects"][0])):
            lines = list(group)
            pieces = [Pending.from_json(line["piece"]) for _, line in lines if line["piece"]]
            if not pieces or index in self.assembled or not self._is_apart(pieces[0].uri):
                continue
            self._show(pieces)
            yield Assembly(
                object=index,
                uri=place.mirror_uri(next(found for found in objects if found.index == index)),
                splits=(lines[0][0], lines[-1][0]),
                written=sum(line["written"] for _, line in lines),
                quarantined=sum(line["quarantined"] for _, line in lines),
                pieces=tuple(piece.uri for piece in pieces),
            )

    def _show(self, pieces: Iterable[Pending]) -> None:
        """Publish pieces where workers can read them. Raises PiecesLostError, after which they are made anew."""
        lost: list[str] = []
        for piece in pieces:
            try:
                self.store.publish(piece)
            except PendingLostError:
                lost.append(key(piece))
        if lost:
            note_lost(self.journal, lost)
            raise PiecesLostError(lost, clean_uri(self.folder.root))

    def assembled_as(self, assembly: Assembly, piece: dict[str, Any]) -> None:
        """Journal that an object's pieces are one."""
        counts = {"written": assembly.written, "quarantined": assembly.quarantined}
        self.assembled[assembly.object] = {"splits": assembly.splits, **counts, "piece": piece}
        self.journal.append("assembled", object=assembly.object, **self.assembled[assembly.object])

    def keep_quarantine(self, result: SplitResult) -> None:
        """Let a split's quarantined records and their tracebacks be seen, in place of those of an earlier try."""
        for piece in filter(None, (result.quarantine, result.tracebacks)):
            pending = Pending.from_json(piece)
            earlier = self.store.stat(pending.uri).version if self.store.exists(pending.uri) else None
            # Whoever took the lock after we looked puts another version there, which refuses ours.
            self.lock.renew()
            self.store.publish(pending, replaces=earlier)

    def numberings(self, inputs: Iterable[InputObject], stopped: SplitResult | None) -> Iterator[Numbering]:
        """The visible quarantine by the objects that its records are of; `stopped` is a split that has not settled."""
        settled = ((split, line["failed"]) for split, line in self.pieces if "failed" in line)
        extra = [(stopped.split, failed_of(stopped))] if stopped else []
        objects = iter(inputs)
        for wanted, group in groupby(merge(settled, extra, key=itemgetter(0)), key=lambda each: each[1]["objects"]):
            files = ((self.folder / quarantine_name(split), failed["before"]) for split, failed in group)
            yield Numbering(tuple(_pick(objects, wanted)), tuple(files))

    def publish(self, manifest: Manifest, inputs: Iterable[Input]) -> Manifest:
        """Write down what publishing needs, commit, make every piece visible, then the manifest."""
        self.lock.renew()  # who has lost it has nothing to commit
        draft = manifest.model_copy(update={"finished": _now()})
        document, schemas = self.fingerprint.document, without_type(self.schemas)
        write_description(self.store, self.folder.root, self.folder.run_id, document, schemas)
        there = iter_parts(self.store, self.folder.root, self.redrives) if self.redrives else ()
        write_draft(self.store, self.folder, draft, self._pieces(), inputs, there)
        self.journal.append("commit")
        self.journal.flush()
        self.lock.renew()
        try:
            published = publish_committed(self.store, self.folder)
        except PiecesLostError as error:
            note_lost(self.journal, error.pieces)
            raise
        self.manifest = with_dataset(published, self.store, self.folder.root, self.job.output.storage_options)
        return self.manifest

    def sweep(self) -> None:
        """Discard the pending pieces that no flushed journal entry names: nothing could ever publish them."""
        if self.manifest is None:
            self.lock.renew()  # who has taken the run over judges its pieces from then on
            self.journal.flush()
            sweep_run(self.store, self.folder)

    def _pieces(self) -> Iterator[tuple[Pending, Part]]:
        """What becomes a part, in order: the piece of a split, or the one that an object's pieces were joined into."""
        for split, line in self.pieces:
            joined = self.assembled.get(line["objects"][0]) if line["objects"] else None
            if joined is None and line["piece"] is not None:
                yield self._part(line, (split, split))
            elif joined is not None and joined["splits"][0] == split:
                first, last = joined["splits"]
                yield self._part(joined, (first, last))

    def _part(self, line: Mapping[str, Any], splits: tuple[int, int]) -> tuple[Pending, Part]:
        pending = Pending.from_json(line["piece"])
        has_placeholders = self.job.on_error.placeholder is not None
        return pending, Part(
            uri=relative(pending.uri, self.folder.root),
            records=line["written"],
            placeholders=line["quarantined"] if has_placeholders else 0,
            bytes=pending.size,
            sha256=pending.sha256,
            splits=splits,
            generation=self.generation,
        )


def _pick(objects: Iterator[InputObject], wanted: list[int]) -> Iterator[InputObject]:
    """The objects at these places of the listing, in order; no further than to the last of them."""
    for place in wanted:
        yield next(one for one in objects if one.index == place)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
