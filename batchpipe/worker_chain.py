"""The chain of a run in a worker process: opened by whoever needs it first, held by a lease where drivers may vanish.

A local worker ends with its driver. A worker of somebody else's cluster outlives it, so there the driver renews a lease
every few seconds; without news the chain is closed, and with it every process and container of its stages.
"""

import contextlib
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from batchpipe.chain import Chain, open_chain
from batchpipe.errors import BatchpipeError
from batchpipe.job import Job
from batchpipe.orders import HIDDEN
from batchpipe.processes import OWNER_FILE, SCRATCH_PREFIX, write_private
from batchpipe.redact import secrets_of
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

    def close(self) -> None:
        """Close the stages, keep their logs beside the output, and release the rest."""
        with self.release:
            self.chain.close()
            _keep_logs(self.job, self.run_id, self.logs)


_held: dict[str, Held] = {}
_renewed: dict[str, float] = {}
_opening = threading.Lock()
_copy = 0


def be_copy(number: int) -> None:
    """Tell this process which copy of the chain it has, from 0: that chooses its devices (`gpus`)."""
    global _copy  # noqa: PLW0603 - a worker process is one copy for all of its life
    _copy = number


def open_worker_chain(job: Job, run_id: str) -> Chain:
    """The chain of a run in this process, opened by whoever asks first. Raises what opening a stage raises (2, 4)."""
    with _opening:
        if run_id not in _held:
            _held[run_id] = _open(job, run_id)
        return _held[run_id].chain


def close_worker_chain(run_id: str) -> None:
    """Close the chain of a run in this process, if it was opened."""
    with _opening:
        held = _held.pop(run_id, None)
        _renewed.pop(run_id, None)
    if held is not None:
        held.close()


def renew_lease(run_id: str) -> None:
    """Note that the run's driver is alive."""
    is_new = run_id not in _renewed
    _renewed[run_id] = time.monotonic()
    if is_new:
        threading.Thread(target=_watch_lease, args=(run_id,), name=f"lease {run_id}", daemon=True).start()


def _watch_lease(run_id: str) -> None:
    while (renewed := _renewed.get(run_id)) is not None:
        left = renewed + LEASE_S - time.monotonic()
        if left <= 0:
            close_worker_chain(run_id)
            return
        time.sleep(left)


def _open(job: Job, run_id: str) -> Held:
    if not _held:
        forget_imports()
    with contextlib.ExitStack() as release:
        watcher: Watcher | None = None
        scratch = logs = Path()
        if any(stage.kind in ("container", "process") for stage in job.stages):
            scratch = Path(release.enter_context(tempfile.TemporaryDirectory(prefix=f"{SCRATCH_PREFIX}stages-")))
            watcher = release.enter_context(open_watcher(scratch=scratch))
            write_private(scratch / OWNER_FILE, owner.to_bytes(owner.this_process({"run": run_id})))
            logs = scratch / "logs"
            logs.mkdir()
        chain = open_chain(job, StageContext(run_id, _copy, scratch, logs, secrets_of(job)), watcher)
        return Held(chain, job, run_id, logs, release.pop_all())


def _keep_logs(job: Job, run_id: str, logs: Path) -> None:
    """Put the stages' logs under the run's ``logs/``. A log that cannot be kept fails no run."""
    store = open_store(job.output.uri, job.output.storage_options)
    for log in sorted(logs.glob("*.log")) if logs.is_absolute() else ():
        with contextlib.suppress(BatchpipeError, OSError):
            store.put(join(job.output.uri, HIDDEN, run_id, "logs", log.name), log.read_bytes())
