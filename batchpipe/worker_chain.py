"""The chain of a run in a worker process: opened by whoever needs it first, held by a lease where drivers may vanish.

A local worker ends with its driver. A worker of somebody else's cluster outlives it, so there the driver renews a lease
every few seconds; without news the chain is closed, and with it every process and container of its stages.
"""

import contextlib
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from batchpipe.chain import Chain, open_chain
from batchpipe.errors import BatchpipeError, PoolError
from batchpipe.job import Job
from batchpipe.orders import TRIAL
from batchpipe.processes import OWNER_FILE, SCRATCH_PREFIX, write_private
from batchpipe.redact import clean_uri, secrets_at_work
from batchpipe.runs import RunFolder
from batchpipe.stages import StageContext
from batchpipe.stages.callable import forget_imports
from batchpipe.stages.watcher import Watcher, open_watcher
from batchpipe.storage import join, open_store, owner

LEASE_S = 6.0


@dataclass(slots=True)
class Held:
    """An open chain with what it needs beside it: a folder, its logs, and the watcher that outlives a killed worker."""

    chain: Chain
    job: Job
    run_id: str
    logs: Path
    release: contextlib.ExitStack
    watcher: Watcher | None = None
    isolated: Chain | None = None
    """The same chain with its callables in child processes, once a split has asked for it."""

    def isolate(self) -> Chain:
        """The chain for splits that lost their worker."""
        if self.isolated is None:
            scratch = self.logs.parent
            if self.watcher is None:
                scratch, self.watcher = _open_scratch(self.run_id, self.release)
            self.isolated = self.chain.with_children(self.job, self.watcher, scratch)
        return self.isolated

    def close(self) -> None:
        """Close the stages, then release the rest; their logs are kept beside the output on the way."""
        with self.release:
            if self.isolated:
                self.isolated.close_children()
            self.chain.close()


@dataclass(frozen=True, slots=True)
class _Run:
    """Of a run that has, or had, its chain in this process."""

    ended: threading.Event = field(default_factory=threading.Event)
    """Its driver has: a chain that is being opened is given up, and none is opened again, which nobody would close."""
    closing: threading.Lock = field(default_factory=threading.Lock)
    """Whoever closes second waits until the first is done."""


_runs: dict[str, _Run] = {}
_held: dict[str, Held] = {}
_renewed: dict[str, float] = {}
_opening = threading.Lock()
_copy = 0
_scratch: Path | None = None


def be_copy(number: int, scratch: Path) -> None:
    """Tell this process which copy of the chain it has, from 0: that chooses its devices (`gpus`).

    `scratch` is its driver's folder, which goes with the driver: what this process makes there is never left.
    """
    global _copy, _scratch
    _copy, _scratch = number, scratch


def open_worker_chain(job: Job, run_id: str, *, isolated: bool = False) -> Chain:
    """The chain of a run in this process, opened by whoever asks first; `isolated`: its callables in child processes.

    Raises what opening a stage raises (2, 4), and PoolError where the run has ended.
    """
    ended = _run(run_id).ended
    with _opening:
        if ended.is_set():
            raise PoolError(f"run {run_id} has ended: its driver is gone")
        if run_id not in _held:
            _held[run_id] = _open(job, run_id, ended)
        held = _held[run_id]
        return held.isolate() if isolated else held.chain


def close_worker_chain(run_id: str) -> None:
    """Close the chain of a run in this process, if it was opened, for good: until a driver renews its lease."""
    run = _run(run_id)
    run.ended.set()
    with run.closing:
        with _opening:
            held = _held.pop(run_id, None)
            _renewed.pop(run_id, None)
        if held is not None:
            held.close()


def close_all() -> None:
    """Close the chains of all runs in this process."""
    for run_id in list(_runs):
        close_worker_chain(run_id)


def renew_lease(run_id: str) -> None:
    """Note that the run's driver is alive."""
    _run(run_id).ended.clear()
    is_new = run_id not in _renewed
    _renewed[run_id] = time.monotonic()
    if is_new:
        threading.Thread(target=_watch_lease, args=(run_id,), name=f"lease {run_id}", daemon=True).start()


def _run(run_id: str) -> _Run:
    return _runs.setdefault(run_id, _Run())


def _watch_lease(run_id: str) -> None:
    while (renewed := _renewed.get(run_id)) is not None:
        left = renewed + LEASE_S - time.monotonic()
        if left <= 0:
            close_worker_chain(run_id)
            return
        time.sleep(left)


def _open(job: Job, run_id: str, ended: threading.Event) -> Held:
    if not _held:
        forget_imports()
    with contextlib.ExitStack() as release:
        watcher: Watcher | None = None
        scratch = logs = Path()
        if any(stage.kind in ("container", "process") for stage in job.stages):
            scratch, watcher = _open_scratch(run_id, release)
            logs = scratch / "logs"
            logs.mkdir()
            release.callback(_keep_logs, job, run_id, logs)  # those of stages that did not start too
        kept = "" if run_id.startswith(TRIAL) else clean_uri(_logs_uri(job, run_id))
        context = StageContext(run_id, _copy, scratch, logs, secrets_at_work(job), kept_logs=kept)
        chain = open_chain(job, context, watcher, ended)
        return Held(chain, job, run_id, logs, release.pop_all(), watcher)


def _open_scratch(run_id: str, release: contextlib.ExitStack) -> tuple[Path, Watcher]:
    """A folder for what stages need beside them, and the watcher that outlives a killed worker."""
    scratch = Path(release.enter_context(tempfile.TemporaryDirectory(prefix=f"{SCRATCH_PREFIX}stages-", dir=_scratch)))
    watcher = release.enter_context(open_watcher(scratch=scratch))
    write_private(scratch / OWNER_FILE, owner.to_bytes(owner.this_process({"run": run_id})))
    return scratch, watcher


def _logs_uri(job: Job, run_id: str) -> str:
    return RunFolder(job.output.uri, run_id) / "logs"


def _keep_logs(job: Job, run_id: str, logs: Path) -> None:
    """Put the stages' logs under the run's ``logs/``."""
    for log in sorted(logs.glob("*.log")):
        keep_under_logs(job, run_id, log.name, log.read_bytes())


def keep_under_logs(job: Job, run_id: str, name: str, data: bytes) -> None:
    """Put a log, masked already, under the run's ``logs/``. One that cannot be kept fails no run."""
    with contextlib.suppress(BatchpipeError, OSError):
        open_store(job.output.uri, job.output.storage_options).put(join(_logs_uri(job, run_id), name), data)
