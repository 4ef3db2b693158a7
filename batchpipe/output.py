"""The driver's side of an output: who may write it, what of the run is there already, publish, discard.

Workers only ever write pending pieces; what is here alone makes them visible, and from the journaled commit on it
only rolls forward (G2).
"""

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Any

from batchpipe.errors import BatchpipeError, JobError, LockedError, OutputError
from batchpipe.job import Job
from batchpipe.journal import Journal, open_journal
from batchpipe.manifest import Input, Manifest, SplitResult
from batchpipe.mirror import Assembly
from batchpipe.orders import HIDDEN, Place
from batchpipe.plan import Fingerprint
from batchpipe.publication import PiecesLostError, is_committed, publish_committed, write_draft
from batchpipe.published import iter_parts, read_manifest, with_dataset
from batchpipe.redact import clean_uri
from batchpipe.runs import (
    PieceSpool,
    RunFolder,
    RunState,
    discard_each,
    discard_run,
    has_settled,
    iter_pending,
    key,
    key_of,
    start_of,
    sweep_run,
    unfinished_runs,
    without_type,
)
from batchpipe.split import InputObject
from batchpipe.storage import Lock, Pending, Store, join, open_store, relative

LOCK_POLL_S = 0.5
SWEEP_S = 30.0
"""How long the sweep of a killed run is waited for: who starts it again at once does not want to hear of it."""


class Output:
    """An output that this run holds the lock of. `manifest` is set where the run is finished already."""

    def __init__(self, job: Job, fingerprint: Fingerprint, folder: RunFolder, store: Store) -> None:
        self.job = job
        self.fingerprint = fingerprint
        self.folder = folder
        self.store = store
        self.manifest: Manifest | None = None
        self.replaced: Manifest | None = None
        self.lock: Lock
        self.journal: Journal
        self.pieces: PieceSpool
        self.assembled: dict[int, dict[str, Any]] = {}
        """Under mirror, by object: the one piece that its pieces were joined into."""
        self.schemas: dict[str, Any] = {}
        self.started = _now()
        self.is_resumed = False

    @property
    def part_prefix(self) -> str:
        """What names of parts begin with: the run is in it where an older run's parts lie beside."""
        return f"part-{self.folder.run_id}-" if self.job.output.if_exists == "replace" else "part-"

    def replay(self) -> Iterator[SplitResult]:
        """Settled splits of earlier starts whose pieces are still there; then what nobody journaled is discarded."""
        state = RunState.of(self.journal.replay())
        self.is_resumed, self.started = bool(state.started), state.started or self.started
        self.schemas, self.assembled = state.schemas, state.assembled
        present = {key(pending): pending for pending in iter_pending(self.store, self.folder)}
        there = {*present, *(found.uri for found in self.store.iter_folder(self.folder / "pieces"))}
        kept = set[str]()
        if not state.has_begun_to_publish:
            self.assembled = {each: one for each, one in self.assembled.items() if key_of(one["piece"]) in there}
        for entry in self.journal.replay():
            piece = entry.get("piece") or {}
            if entry["type"] != "split" or (piece and key_of(piece) in state.lost):
                continue
            if piece and not state.has_begun_to_publish and not {key_of(piece), piece["uri"]} & there:
                continue
            kept |= {key_of(piece)} if piece else set()
            result = SplitResult.from_json(without_type(entry))
            self.pieces.add(result)
            yield result
        if not state.has_begun_to_publish:
            kept |= {key_of(one["piece"]) for one in self.assembled.values()}
            discard_each(self.store, (pending for name, pending in present.items() if name not in kept))

    def begin(self) -> None:
        """Write down what this run is, so that a later start knows whether it is the same."""
        if not self.is_resumed:
            self.journal.append("start", started=self.started, fingerprint=self.fingerprint.document)
            self.journal.flush()

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

    def assemblies(self, inputs: Iterable[InputObject], place: Place) -> Iterator[Assembly]:
        """Under mirror, the objects whose pieces are still apart; the pieces are published where workers can read them.

        An object that was not cut has one piece, which goes to its place as it is.
        """
        objects = iter(inputs)
        for index, group in groupby(self.pieces, key=lambda each: int(each[1]["objects"][0])):
            lines = list(group)
            pieces = [Pending.from_json(line["piece"]) for _, line in lines]
            if index in self.assembled or not pieces[0].uri.startswith(join(self.folder.uri, "")):
                continue
            for piece in pieces:
                self.store.publish(piece)
            yield Assembly(
                object=index,
                uri=place.mirror_uri(next(found for found in objects if found.index == index)),
                splits=(lines[0][0], lines[-1][0]),
                written=sum(line["written"] for _, line in lines),
                pieces=tuple(piece.uri for piece in pieces),
            )

    def assembled_as(self, assembly: Assembly, piece: dict[str, Any]) -> None:
        """Journal that an object's pieces are one."""
        self.assembled[assembly.object] = {"splits": assembly.splits, "written": assembly.written, "piece": piece}
        self.journal.append("assembled", object=assembly.object, **self.assembled[assembly.object])

    def keep_quarantine(self, result: SplitResult) -> None:
        """Let a split's quarantined records be seen, in place of those of an earlier try."""
        if result.quarantine:
            pending = Pending.from_json(result.quarantine)
            earlier = self.store.stat(pending.uri).version if self.store.exists(pending.uri) else None
            self.store.publish(pending, replaces=earlier)

    def publish(self, manifest: Manifest, inputs: Iterable[Input]) -> Manifest:
        """Write down what publishing needs, commit, make every piece visible, then the manifest."""
        draft = manifest.model_copy(update={"finished": _now()})
        write_draft(self.store, self.folder, draft, self._pieces(), inputs)
        self.journal.append("commit")
        self.journal.flush()
        self.lock.renew()
        try:
            published = publish_committed(self.store, self.folder)
        except PiecesLostError as error:
            self.journal.append("lost", pieces=error.pieces)
            self.journal.flush()
            raise
        self.manifest = with_dataset(published, self.store, self.folder.root, self.job.output.storage_options)
        return self.manifest

    def sweep(self) -> None:
        """Discard the pending pieces that no flushed journal entry names: nothing could ever publish them."""
        if self.manifest is None:
            self.lock.renew()  # who has taken the run over judges its pieces from then on
            self.journal.flush()
            sweep_run(self.store, self.folder)

    def _pieces(self) -> Iterator[tuple[Pending, int, tuple[int, int]]]:
        """What becomes a part, in order: the piece of a split, or the one that an object's pieces were joined into."""
        for split, line in self.pieces:
            joined = self.assembled.get(line["objects"][0]) if line["objects"] else None
            if joined is None and line["piece"] is not None:
                yield Pending.from_json(line["piece"]), line["written"], (split, split)
            elif joined is not None and joined["splits"][0] == split:
                first, last = joined["splits"]
                yield Pending.from_json(joined["piece"]), joined["written"], (first, last)


@contextmanager
def open_output(
    job: Job, run_id: str, fingerprint: Fingerprint, scratch: Path, *, restart: bool = False, wait_s: float = 0.0
) -> Iterator[Output]:
    """Hold the output for this run: lock it and find out what of the run is there.

    Raises LockedError (75) if another run holds it, OutputError (7) if it holds something already, and JobError (2)
    if an unfinished run of another id is there, or another job or input under this run id.
    """
    store, root = open_store(job.output.uri, job.output.storage_options), job.output.uri
    output = Output(job, fingerprint, RunFolder(root, run_id), store)
    with _lock(store, root, {"run": run_id, "job": job.name}, wait_s) as output.lock:
        unfinished = unfinished_runs(store, root)
        for run in [run for run in unfinished if is_committed(store, RunFolder(root, run))]:
            _roll_forward(output, run)
            unfinished.remove(run)
        finished = read_manifest(store, root, job.output.storage_options)
        if finished and finished.run_id == run_id:
            _same_or_raise(output, finished)
            output.manifest = finished
            yield output
            return
        # A run that settled nothing is no loss: whoever mends the job after its first error need not ask for it.
        for run in [
            run for run in unfinished if restart or (run != run_id and not has_settled(store, RunFolder(root, run)))
        ]:
            discard_run(store, RunFolder(root, run))
            unfinished.remove(run)
        _no_other_run_or_raise(output, unfinished)
        if run_id not in unfinished:
            _free_or_raise(output, finished)
        output.replaced = finished
        output.pieces = PieceSpool(scratch / "pieces.spool")
        output.journal = open_journal(store, output.folder / "journal")
        with closing(output.pieces):
            try:
                yield output
            except BaseException:
                # The first error is the one to tell; what stays is swept by the next start.
                with suppress(BatchpipeError):
                    output.sweep()
                raise


@contextmanager
def _lock(store: Store, root: str, owner: Mapping[str, str], wait_s: float) -> Iterator[Lock]:
    """Hold the output's lock, waiting for it if asked to, and for a sweep in any case. Raises LockedError (75)."""
    began = time.monotonic()
    while True:
        try:
            lock = store.lock(join(root, HIDDEN, "lock"), owner)
            break
        except LockedError as error:
            if time.monotonic() - began >= max(wait_s, SWEEP_S if error.passes_soon else 0.0):
                raise
            time.sleep(LOCK_POLL_S)
    with lock:
        yield lock


def _roll_forward(output: Output, run: str) -> None:
    """Finish a run that had begun to publish. Pieces that are gone only that run itself can make anew."""
    folder = RunFolder(output.folder.root, run)
    try:
        publish_committed(output.store, folder)
    except PiecesLostError as error:
        journal = open_journal(output.store, folder / "journal")
        journal.append("lost", pieces=error.pieces)
        journal.flush()
        raise


def _same_or_raise(output: Output, finished: Manifest) -> None:
    if finished.fingerprint != output.fingerprint.sha256:
        msg = f"run {finished.run_id} is finished, with another job file or other inputs"
        raise JobError(
            msg,
            where=clean_uri(output.folder.root),
            next="choose another --run-id, or leave it out: it then follows from both",
        )


def _no_other_run_or_raise(output: Output, unfinished: list[str]) -> None:
    for run in unfinished:
        theirs = start_of(output.store, RunFolder(output.folder.root, run))
        changes = output.fingerprint.differences(theirs) if theirs else []
        if run == output.folder.run_id and not changes:
            continue
        msg = f"the output holds the unfinished run {run} of another job or input" + "".join(
            f"\n  changed: {change}" for change in changes[:5]
        )
        raise JobError(
            msg,
            where=clean_uri(output.folder.root),
            next="undo the change to resume it, or add --restart to drop it and begin anew",
        )


def _free_or_raise(output: Output, finished: Manifest | None) -> None:
    """Refuse a folder that holds what this run did not make."""
    root, run_id = output.folder.root, output.folder.run_id
    if finished and output.job.output.if_exists == "error":
        msg = f"the output holds the finished run {finished.run_id} of {finished.finished}, and this is run {run_id}"
        raise OutputError(
            msg, where=clean_uri(root), next="choose another output.uri, or set output.if_exists: replace"
        )
    named = {part.uri for part in iter_parts(output.store, root, finished)} if finished else set()
    for found in output.store.find(root):
        if (name := relative(found.uri, root)) not in named:
            msg = f"the output folder holds {name!r}, which no manifest names"
            raise OutputError(msg, where=clean_uri(root), next="choose another output.uri, or move what is there")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
