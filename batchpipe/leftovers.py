"""What runs hold on this host and in an output, and what a power cut left of it: `ps` lists, `clean` removes."""

import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from batchpipe.orders import HIDDEN
from batchpipe.processes import OWNER_FILE, SCRATCH_PREFIX, SWEEP_PREFIX
from batchpipe.publication import sweep
from batchpipe.published import read_manifest
from batchpipe.runs import RunFolder, discard_run, find_runs, iter_pending, remove_strays
from batchpipe.stages.engine import EngineError, find_engine
from batchpipe.stages.leftovers import find_started, remove_started
from batchpipe.storage import Store, join
from batchpipe.storage.owner import from_bytes, is_dead


@dataclass(frozen=True, slots=True)
class Leftover:
    """Something that a run holds, or left: what, where, of which run, since when, and whether nobody owns it."""

    kind: str
    name: str
    run_id: str
    since: str
    is_orphan: bool

    def __str__(self) -> str:
        state = "orphan" if self.is_orphan else "in use"
        return f"{self.kind:<10} {state:<7} {self.run_id or '-':<10} {self.since or '-':<24} {self.name}"


def find_on_host() -> list[Leftover]:
    """Containers, networks, scratch folders and unbegun sweeps of batchpipe on this host. No engine: no containers."""
    return [*_started(), *_scratch_folders(), *_sweep_orders()]


def clean_host() -> list[Leftover]:
    """Remove what no living process owns; return it."""
    orphans = [found for found in find_on_host() if found.is_orphan]
    try:
        engine = find_engine()
        remove_started(engine, [each for each in find_started(engine) if each.is_orphan])
    except EngineError:
        pass  # without an engine there is nothing of it to remove
    for found in orphans:
        if found.kind == "scratch":
            shutil.rmtree(found.name, ignore_errors=True)
        elif found.kind == "order":
            Path(found.name).unlink(missing_ok=True)
    return orphans


def find_in_output(store: Store, root: str) -> list[Leftover]:
    """Unfinished runs of an output and its pending pieces. A piece is an orphan where no such run may name it."""
    (unfinished, strayed), seen = find_runs(store, root), dict[str, Leftover]()
    runs = [Leftover("run", join(root, HIDDEN, run), run, "", is_orphan=False) for run in unfinished]
    for run in [*unfinished, *strayed] or [""]:
        for pending in iter_pending(store, RunFolder(root, run)):
            name = pending.uri or pending.staging
            piece = Leftover("piece", name, run, "", is_orphan=run not in unfinished)
            seen.setdefault(pending.upload_id or pending.staging, piece)
    return [*runs, *seen.values()]


def clean_output(store: Store, root: str, *, drops_unfinished: bool) -> list[Leftover]:
    """Discard pending pieces that no journal names, or whole unfinished runs with `drops_unfinished`.

    Raises LockedError (75) while a run writes there.
    """
    with store.lock(join(root, HIDDEN, "lock"), {"run": "clean"}):
        before = find_in_output(store, root)
        published = read_manifest(store, root)
        unfinished, strayed = find_runs(store, root)
        remove_strays(store, root, strayed)
        for run in unfinished or [""]:
            folder = RunFolder(root, run)
            if drops_unfinished and run and not (published and published.run_id == run):
                discard_run(store, folder)
            else:
                sweep(store, folder)
        kept = {found.name for found in find_in_output(store, root)}
    return [found for found in before if found.name not in kept]


def _started() -> Iterator[Leftover]:
    try:
        started = find_started(find_engine())
    except EngineError:
        return
    for each in started:
        yield Leftover(each.kind, f"{each.name} ({each.stage})", each.run_id, each.since, each.is_orphan)


def _scratch_folders() -> Iterator[Leftover]:
    for folder in sorted(Path(tempfile.gettempdir()).glob(f"{SCRATCH_PREFIX}*")):
        try:
            owner = from_bytes((folder / OWNER_FILE).read_bytes())
        except OSError:
            continue  # not ours, not readable, or removed just now
        yield Leftover("scratch", str(folder), str(owner.get("run", "")), str(owner.get("since", "")), is_dead(owner))


def _sweep_orders() -> Iterator[Leftover]:
    """What a killed run's watcher would have begun a sweep with: the watcher was killed too."""
    for file in sorted(Path(tempfile.gettempdir()).glob(f"{SWEEP_PREFIX}*")):
        try:
            owner = dict(from_bytes(file.read_bytes()).get("owner") or {})
        except OSError:
            continue
        yield Leftover("order", str(file), str(owner.get("run", "")), str(owner.get("since", "")), is_dead(owner))
