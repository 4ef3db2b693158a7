"""The driver's side of an output: who may write it, what of the run is there already, publish, discard.

Workers only ever write pending pieces; what is here alone makes them visible, and from the journaled commit on it
only rolls forward (G2).
"""

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

from batchpipe.errors import BatchpipeError, JobError, LockedError, OutputError
from batchpipe.job import Job
from batchpipe.journal import Journal, open_journal
from batchpipe.manifest import Input, LongTable, Manifest, Part, SplitResult
from batchpipe.mirror import Assembly
from batchpipe.orders import HIDDEN, Place
from batchpipe.plan import Fingerprint
from batchpipe.published import iter_parts, read_manifest, with_dataset
from batchpipe.redact import clean_uri
from batchpipe.runs import (
    PieceSpool,
    RunFolder,
    discard_all_but,
    discard_each,
    discard_run,
    iter_pending,
    key,
    key_of,
    start_of,
    sweep_run,
    unfinished_runs,
    without_type,
)
from batchpipe.split import InputObject
from batchpipe.storage import Lock, ObjectExistsError, Pending, PendingLostError, Store, join, open_store, relative

PUBLISHERS = 16
LOCK_POLL_S = 0.5
SWEEP_S = 30.0
"""How long the sweep of a killed run is waited for: who starts it again at once does not want to hear of it."""
Row = TypeVar("Row", Part, Input)


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
        self.is_committed = False
        self.is_resumed = False

    @property
    def part_prefix(self) -> str:
        """What names of parts begin with: the run is in it where an older run's parts lie beside."""
        return f"part-{self.folder.run_id}-" if self.job.output.if_exists == "replace" else "part-"

    def replay(self) -> list[SplitResult]:
        """Settled splits of earlier starts whose pieces are still there; what nobody journaled is discarded."""
        present = {key(pending): pending for pending in iter_pending(self.store, self.folder)}
        settled, has_begun = list[SplitResult](), False
        for entry in self.journal.replay():
            match entry["type"]:
                case "start":
                    self.started, self.is_resumed = entry["started"], True
                case "schema":
                    self.schemas = entry
                case "commit":
                    self.is_committed = has_begun = True
                case "lost":
                    self.is_committed = False
                    settled = [each for each in settled if not each.piece or key_of(each.piece) not in entry["pieces"]]
                    self.assembled = {
                        each: one for each, one in self.assembled.items() if key_of(one["piece"]) not in entry["pieces"]
                    }
                case "split":
                    settled.append(SplitResult.from_json(without_type(entry)))
                case "assembled":
                    self.assembled[entry["object"]] = entry
        if not has_begun:
            apart = {found.uri for found in self.store.iter_folder(self.folder / "pieces")}
            settled = [
                result
                for result in settled
                if not result.piece or key_of(result.piece) in present or result.piece["uri"] in apart
            ]
            self.assembled = {each: one for each, one in self.assembled.items() if key_of(one["piece"]) in present}
            pieces = [result.piece for result in settled if result.piece]
            discard_all_but(self.store, present, [*pieces, *(one["piece"] for one in self.assembled.values())])
        for result in settled:
            self.pieces.add(result)
        return settled

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

    def publish(self, manifest: Manifest, input_rows: Iterator[Input]) -> Manifest:
        """Make every piece visible, then the manifest. Once begun, a later start finishes it."""
        if not self.is_committed:
            self.journal.append("commit", at=_now())
        self.journal.flush()
        self.lock.renew()
        replaces = self._versions_to_replace()
        lost: list[str] = []
        with ThreadPoolExecutor(PUBLISHERS, thread_name_prefix="publish") as threads:
            parts = list(threads.map(lambda line: self._publish_one(line, replaces, lost), self._lines()))
        if lost:
            raise self._lost(lost)
        table = self._write_table("parts.jsonl", (part for part in parts if part), lambda part: part.bytes)
        listed = self._write_table("inputs.jsonl", input_rows, lambda row: row.bytes)
        manifest = manifest.model_copy(update={"parts": table, "inputs": listed, "finished": _now()})
        self.store.put(self.folder.manifest, manifest.model_dump_json(indent=2).encode() + b"\n")
        discard_each(self.store, iter_pending(self.store, self.folder))  # what workers wrote that were lost
        self._remove_replaced(manifest)
        self._remove_journal()
        self.manifest = with_dataset(manifest, self.store, self.folder.root, self.job.output.storage_options)
        return self.manifest

    def sweep(self) -> None:
        """Discard the pending pieces that no flushed journal entry names: nothing could ever publish them."""
        if self.manifest is None:
            self.lock.renew()  # who has taken the run over judges its pieces from then on
            self.journal.flush()
            sweep_run(self.store, self.folder)

    def _lines(self) -> Iterator[dict[str, Any]]:
        """What becomes a part, in order: the piece of a split, or the one that an object's pieces were joined into."""
        for split, line in self.pieces:
            joined = self.assembled.get(line["objects"][0]) if line["objects"] else None
            if joined is None:
                yield {**line, "splits": (split, split)}
            elif joined["splits"][0] == split:
                yield joined

    def _publish_one(self, line: dict[str, Any], replaces: dict[str, str], lost: list[str]) -> Part | None:
        if line["piece"] is None:
            return None
        pending = Pending.from_json(line["piece"])
        name = relative(pending.uri, self.folder.root)
        try:
            self.store.publish(pending, replaces=replaces.get(pending.uri))
        except PendingLostError:
            lost.append(key(pending))
            return None
        except ObjectExistsError as error:
            raise OutputError(
                f"cannot publish {name!r}: the output holds an object of that name, which this run did not make",
                where=clean_uri(self.folder.root),
                next="move it away and run the same command again: it finishes what it has begun to publish",
            ) from error
        return Part(uri=name, records=line["written"], bytes=pending.size, sha256=pending.sha256, splits=line["splits"])

    def _lost(self, pieces: list[str]) -> OutputError:
        """Take pieces back that are gone: the next start makes them anew, and then publishes the rest."""
        self.journal.append("lost", pieces=pieces)
        return OutputError(
            f"somebody removed {len(pieces):,} of the pending pieces before they were published",
            where=clean_uri(self.folder.root),
            next="run the same command again: it makes them anew and keeps the rest; see the bucket's lifecycle rules",
        )

    def _versions_to_replace(self) -> dict[str, str]:
        """Under mirror and replace: the objects of the old manifest that are overwritten in place, at their version."""
        if self.replaced is None or self.job.output.layout != "mirror":
            return {}
        uris = [join(self.folder.root, part.uri) for part in iter_parts(self.store, self.folder.root, self.replaced)]
        return {uri: self.store.stat(uri).version for uri in uris if self.store.exists(uri)}

    def _write_table(self, name: str, rows: Iterable[Row], size: Callable[[Row], int]) -> LongTable:
        lines, total = [], 0
        for row in rows:
            lines.append(row.model_dump_json())
            total += size(row)
        data = "".join(line + "\n" for line in lines).encode()
        self.store.put(self.folder / name, data)
        uri = f"{HIDDEN}/{self.folder.run_id}/{name}"
        return LongTable(uri=uri, rows=len(lines), bytes=total, sha256=hashlib.sha256(data).hexdigest())

    def _remove_replaced(self, manifest: Manifest) -> None:
        if self.replaced is None:
            return
        kept = {part.uri for part in iter_parts(self.store, self.folder.root, manifest)}
        old = [part.uri for part in iter_parts(self.store, self.folder.root, self.replaced) if part.uri not in kept]
        self.store.delete(join(self.folder.root, uri) for uri in old)
        if self.replaced.run_id != manifest.run_id:
            self.store.remove_folder(join(self.folder.root, HIDDEN, self.replaced.run_id))

    def _remove_journal(self) -> None:
        folders = [self.folder / name for name in ("journal", "pending", "pieces")]
        with ThreadPoolExecutor(len(folders), thread_name_prefix="remove") as threads:
            list(threads.map(self.store.remove_folder, folders))


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
        finished = read_manifest(store, root, job.output.storage_options)
        if finished and finished.run_id == run_id:
            _same_or_raise(output, finished)
            output.manifest = finished
            yield output
            return
        unfinished = unfinished_runs(store, root)
        if restart:
            for run in unfinished:
                discard_run(store, RunFolder(root, run))
            unfinished = []
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
                with suppress(
                    BatchpipeError
                ):  # the first error is the one to tell; what stays is swept by the next start
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
