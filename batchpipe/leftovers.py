"""What runs hold on this host and in an output, and what a power cut left of it: `ps` lists, `clean` removes."""

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batchpipe.errors import BatchpipeError
from batchpipe.orders import HIDDEN
from batchpipe.processes import OWNER_FILE, SCRATCH_PREFIX, SWEEP_PREFIX
from batchpipe.publication import PiecesLostError, committed_pieces, drop_run, is_committed, roll_forward, sweep
from batchpipe.published import read_manifest
from batchpipe.runs import RunFolder, find_runs, iter_pending, layout_of, remove_strays
from batchpipe.stages.engine import EngineError, NoEngineError, find_engine
from batchpipe.stages.leftovers import find_started, remove_started
from batchpipe.storage import ObjectMissingError, Store, join
from batchpipe.storage.owner import from_bytes, is_dead

IN_USE, UNFINISHED, ORPHAN = "in use", "unfinished", "orphan"
ENGINE_KINDS = frozenset({"container", "network"})


@dataclass(frozen=True, slots=True)
class Leftover:
    """Something that a run holds, or left: what, where, of which run, since when.

    Its state is IN_USE by a process, UNFINISHED where a run may be resumed and no process is at it, or ORPHAN.
    """

    kind: str
    name: str
    run_id: str
    since: str
    state: str

    def __str__(self) -> str:
        return f"{self.kind:<10} {self.state:<10} {self.run_id or '-':<10} {self.since or '-':<24} {self.name}"


def find_on_host(note: Callable[[str], None]) -> list[Leftover]:
    """Containers, networks, scratch folders and unbegun sweeps of batchpipe on this host.

    `note` is told where an engine is there and does not answer, so that its containers cannot be looked at.
    """
    return [*_started(note), *_scratch_folders(), *_sweep_orders()]


def clean_host(note: Callable[[str], None]) -> list[Leftover]:
    """Remove what no living process owns; return it. `note` is told what is still there."""
    orphans = [found for found in find_on_host(note) if found.state == ORPHAN]
    if any(found.kind in ENGINE_KINDS for found in orphans):
        with suppress(EngineError):
            engine = find_engine()
            remove_started(engine, [each for each in find_started(engine) if each.is_orphan])
    for found in orphans:
        if found.kind == "scratch":
            shutil.rmtree(found.name, ignore_errors=True)
        elif found.kind == "order":
            Path(found.name).unlink(missing_ok=True)
    unseen: list[str] = []
    left = {found.name for found in find_on_host(unseen.append)} if orphans else set()
    kept = [found for found in orphans if found.name in left or (unseen and found.kind in ENGINE_KINDS)]
    for found in kept:
        note(f"not removed: {found}")
    return [found for found in orphans if found not in kept]


def find_in_output(store: Store, root: str) -> list[Leftover]:
    """Unfinished runs of an output and its pending pieces. A piece is an orphan where no such run may name it."""
    (unfinished, strayed), seen = find_runs(store, root), dict[str, Leftover]()
    holder = _holder(store, root) if unfinished else ""
    states = {run: IN_USE if run == holder else UNFINISHED for run in unfinished}
    runs = [Leftover("run", join(root, HIDDEN, run), run, "", state) for run, state in states.items()]
    for run in [*unfinished, *strayed] or [""]:
        folder = RunFolder(root, run)
        for pending in iter_pending(store, folder, layout_of(store, folder)):
            name = pending.uri or pending.staging
            piece = Leftover("piece", name, run, "", states.get(run, ORPHAN))
            seen.setdefault(pending.upload_id or pending.staging, piece)
    return [*runs, *seen.values()]


def _holder(store: Store, root: str) -> str:
    """The run whose process holds the output; empty where none does, whatever lock one that died has left."""
    uri = join(root, HIDDEN, "lock")
    try:
        owner = from_bytes(store.read(uri))
    except ObjectMissingError:
        return ""
    if is_dead(owner):
        return ""
    try:
        # Of a process that cannot be seen from here only the lock itself can tell. Who comes meanwhile waits for us.
        with store.lock(uri, {"run": "ps", "sweeps": True}):
            return ""
    except BatchpipeError:  # it is held, or only its holder may write here
        return str(owner.get("run", ""))


def clean_output(
    store: Store, root: str, *, drops_unfinished: bool, note: Callable[[str], None] = lambda _: None
) -> list[Leftover]:
    """Discard pending pieces that no journal names, or whole unfinished runs with `drops_unfinished`.

    One that has begun to publish is finished instead, of which `note` is told. Raises LockedError (75) while a run
    writes there.
    """
    with store.lock(join(root, HIDDEN, "lock"), {"run": "clean"}):
        before = find_in_output(store, root)
        published = read_manifest(store, root)
        unfinished, strayed = find_runs(store, root)
        remove_strays(store, root, strayed)
        for run in unfinished or [""]:
            folder = RunFolder(root, run)
            if drops_unfinished and run and not (published and published.run_id == run):
                _drop_or_finish(store, folder, note)
            else:
                sweep(store, folder)
        kept = {found.name for found in find_in_output(store, root)}
        if (finished := read_manifest(store, root)) and finished.run_id in unfinished:
            note(f"run {finished.run_id} had begun to publish, and is finished")
            kept |= {found.name for found in before if found.run_id == finished.run_id}
    return [found for found in before if found.name not in kept]


def _drop_or_finish(store: Store, folder: RunFolder, note: Callable[[str], None]) -> None:
    """Drop an unfinished run; one that has begun to publish only where pieces of it are gone."""
    if is_committed(store, folder):
        with suppress(PiecesLostError):
            roll_forward(store, folder)
            return
    if next(committed_pieces(store, folder), None):
        note(f"run {folder.run_id} had begun to publish, and pieces of it are gone: what it had published goes, too")
    drop_run(store, folder)


def _started(note: Callable[[str], None]) -> Iterator[Leftover]:
    try:
        started = find_started(find_engine())
    except NoEngineError:
        return
    except EngineError as error:
        note(f"containers were not looked at: {error}")
        return
    for each in started:
        state = ORPHAN if each.is_orphan else IN_USE
        yield Leftover(each.kind, f"{each.name} ({each.stage})", each.run_id, each.since, state)


def _scratch_folders() -> Iterator[Leftover]:
    for folder in sorted(Path(tempfile.gettempdir()).glob(f"{SCRATCH_PREFIX}*")):
        try:
            owner = from_bytes((folder / OWNER_FILE).read_bytes())
        except OSError:
            continue  # not ours, not readable, or removed just now
        yield _of_process("scratch", folder, owner)


def _sweep_orders() -> Iterator[Leftover]:
    """What a killed run's watcher would have begun a sweep with: the watcher was killed too."""
    for file in sorted(Path(tempfile.gettempdir()).glob(f"{SWEEP_PREFIX}*")):
        try:
            owner = dict(from_bytes(file.read_bytes()).get("owner") or {})
        except OSError:
            continue
        yield _of_process("order", file, owner)


def _of_process(kind: str, path: Path, owner: Mapping[str, Any]) -> Leftover:
    state = ORPHAN if is_dead(owner) else IN_USE
    return Leftover(kind, str(path), str(owner.get("run", "")), str(owner.get("since", "")), state)
