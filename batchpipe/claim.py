"""Who may write an output: one run at a time, which first finishes what others had begun to publish.

A run holds the lock from here until it ends, and from then on speaks to the `Output` that it was given.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from batchpipe.errors import BatchpipeError, JobError, LockedError, OutputError
from batchpipe.fingerprint import Fingerprint
from batchpipe.held import HeldResults
from batchpipe.job import Job
from batchpipe.journal import open_journal
from batchpipe.manifest import Manifest
from batchpipe.orders import HIDDEN
from batchpipe.output import Output
from batchpipe.publication import (
    PiecesLostError,
    committed_pieces,
    drop_run,
    finish_published,
    is_committed,
    roll_forward,
    unpublish,
)
from batchpipe.published import find_damage, iter_parts_left, read_manifest
from batchpipe.redact import clean_uri
from batchpipe.runs import (
    PieceSpool,
    RunFolder,
    discard_each,
    find_runs,
    has_settled,
    iter_pending,
    remove_strays,
    start_of,
    unfinished_runs,
)
from batchpipe.storage import Lock, Store, join, open_store, relative

LOCK_POLL_S = 0.5
SWEEP_S = 30.0
"""How long the sweep of a killed run is waited for: who starts it again at once does not want to hear of it."""


@contextmanager
def open_output(  # noqa: PLR0913 - one step of a run, which has all of these
    job: Job,
    run_id: str,
    fingerprint: Fingerprint,
    scratch: Path,
    *,
    restart: bool = False,
    wait_s: float = 0.0,
    redrives: Manifest | None = None,
) -> Iterator[Output]:
    """Hold the output for this run, or this redrive of a run: lock it and find out what of it is there.

    Raises LockedError (75) if another run holds it, OutputError (7) if it holds something already or lost some of what
    this run published, and JobError (2) if an unfinished run of another id is there, or another job or input under
    this run id.
    """
    store, root = open_store(job.output.uri, job.output.storage_options), job.output.uri
    output = Output(job, fingerprint, RunFolder(root, run_id), store)
    with _lock(store, root, {"run": run_id, "job": job.name}, wait_s) as output.lock:
        finished, unfinished = _finish_begun(store, root, job.output.storage_options)
        is_done = finished is not None and _is_done(output, finished)
        if finished and (is_done or redrives) and (damage := find_damage(store, root, finished)):
            _drop_damaged_or_raise(output, finished, damage, unfinished, drops=restart and not redrives)
            finished, is_done = None, False
        if finished and is_done:
            if not unfinished:  # uploads that a late writer has begun since
                discard_each(store, iter_pending(store, RunFolder(root, finished.run_id), finished.output_layout))
            output.manifest = finished
            yield output
            return
        output.replaced, output.redrives = finished, redrives
        _make_room(output, finished, unfinished, drops=restart)
        output.pieces, output.held = PieceSpool(scratch / "pieces.spool"), HeldResults(scratch / "held.spool")
        output.begun = start_of(store, output.folder) or {}
        output.journal = open_journal(store, output.folder / "journal")
        with closing(output.pieces), closing(output.held):
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


def finished_run(job: Job, wait_s: float) -> tuple[Manifest | None, bool]:
    """The output's finished run, None for none; and whether it had begun to publish, and is finished only now.

    Raises LockedError (75) if another run holds the output.
    """
    output = job.output
    store = open_store(output.uri, output.storage_options)
    if not (begun := unfinished_runs(store, output.uri)):
        return read_manifest(store, output.uri, output.storage_options), False
    with _lock(store, output.uri, {"run": "redrive", "job": job.name}, wait_s):
        finished, _ = _finish_begun(store, output.uri, output.storage_options)
        return finished, finished is not None and finished.run_id in begun


def _finish_begun(store: Store, root: str, options: Mapping[str, Any]) -> tuple[Manifest | None, list[str]]:
    """Finish what had begun to publish. Returns the run that is finished, and the ids of those that are not.

    One that lost pieces is not: only its own job can make them anew.
    """
    unfinished, strayed = find_runs(store, root)
    remove_strays(store, root, strayed)
    finished = read_manifest(store, root, options)
    if finished and finished.run_id in unfinished:
        finish_published(store, RunFolder(root, finished.run_id), finished)
        unfinished.remove(finished.run_id)
    for run in [run for run in unfinished if is_committed(store, RunFolder(root, run))]:
        with suppress(PiecesLostError):
            roll_forward(store, RunFolder(root, run))
            unfinished.remove(run)
        finished = read_manifest(store, root, options)
    return finished, unfinished


def _is_done(output: Output, finished: Manifest) -> bool:
    """Whether what is finished is this run: by its id, or, where that follows from the job, as a redrive mended it.

    Raises JobError where only the id is the same. An id that somebody chose, and no run had, asks for another run.
    """
    run_id, sha256 = output.folder.run_id, output.fingerprint.sha256
    is_known = any(each.run_id == run_id for each in finished.generations)
    if any(each.fingerprint == sha256 for each in finished.generations):
        return is_known or run_id == output.fingerprint.run_id
    if is_known:
        msg = f"run {run_id} is finished, and its job, inputs, code, images or models have changed since"
        raise JobError(
            msg,
            where=clean_uri(output.folder.root),
            next="choose another --run-id, or leave it out: it then follows from all of these",
        )
    return False


def _drop_damaged_or_raise(
    output: Output, finished: Manifest, damage: str, unfinished: list[str], *, drops: bool
) -> None:
    """Remove a finished run that is not whole any more, so that it runs again, where that was asked for."""
    if drops:
        _only_named_or_raise(output, finished, unfinished)
        unpublish(output.store, output.folder.root, finished, output.lock)
        return
    raise OutputError(
        f"the output is not what run {finished.run_id} published: {damage}",
        where=clean_uri(output.folder.root),
        next=f"put it back, or run the job again in its place: {output.job.command('run')} --restart",
    )


def _make_room(output: Output, finished: Manifest | None, unfinished: list[str], *, drops: bool) -> None:
    """Drop unfinished runs where that was asked for, once nothing speaks against this one: who is refused drops none.

    One that settled nothing is no loss: whoever mends the job after its first error need not ask for it.
    """
    store, root = output.store, output.folder.root
    dropped = [run for run in unfinished if drops or not has_settled(store, RunFolder(root, run))]
    kept = [run for run in unfinished if run not in dropped]
    _no_other_run_or_raise(output, kept)
    if output.folder.run_id not in kept or output.redrives:
        _free_or_raise(output, finished, unfinished)
    for run in dropped:
        drop_run(store, RunFolder(root, run))


def _no_other_run_or_raise(output: Output, unfinished: list[str]) -> None:
    for run in unfinished:
        theirs = start_of(output.store, RunFolder(output.folder.root, run))
        changes = output.fingerprint.differences(theirs["fingerprint"]) if theirs else []
        if run == output.folder.run_id and not changes:
            continue
        if _is_redrive_of(output.replaced, run) and not output.redrives:
            raise JobError(
                f"the output holds the unfinished redrive {run}",
                where=clean_uri(output.folder.root),
                next=f"finish it: {output.job.command('redrive')}",
            )
        msg = f"the output holds the unfinished run {run} of another job or input" + "".join(
            f"\n  changed: {change}" for change in changes[:5]
        )
        raise JobError(
            msg,
            where=clean_uri(output.folder.root),
            next="undo the change to resume it, or add --restart to drop it and begin anew",
        )


def _is_redrive_of(finished: Manifest | None, run: str) -> bool:
    return finished is not None and run.startswith(f"{finished.generations[0].run_id}-redrive-")


def _free_or_raise(output: Output, finished: Manifest | None, unfinished: list[str]) -> None:
    """Refuse a folder that holds what this run did not make."""
    root, run_id = output.folder.root, output.folder.run_id
    if output.redrives:
        if finished is None or finished.run_id != output.redrives.run_id:
            msg = f"run {output.redrives.run_id} is not the one any more that the output holds"
            raise OutputError(msg, where=clean_uri(root), next="the same command again redrives what is there now")
    elif finished and output.job.output.if_exists == "error":
        msg = f"the output holds the finished run {finished.run_id} of {finished.finished}, and this is run {run_id}"
        raise OutputError(
            msg, where=clean_uri(root), next="choose another output.uri, or set output.if_exists: replace"
        )
    _only_named_or_raise(output, finished, unfinished)


def _only_named_or_raise(output: Output, finished: Manifest | None, unfinished: list[str]) -> None:
    """Refuse a folder with data that no manifest names, and that no unfinished run had begun to publish."""
    root = output.folder.root
    named = {part.uri for part in iter_parts_left(output.store, root, finished)}
    folders = (RunFolder(root, run) for run in unfinished)
    named |= {relative(piece.uri, root) for folder in folders for piece in committed_pieces(output.store, folder)}
    for found in output.store.find(root):
        if (name := relative(found.uri, root)) not in named:
            msg = f"the output folder holds {name!r}, which no manifest names"
            raise OutputError(msg, where=clean_uri(root), next="choose another output.uri, or move what is there")
