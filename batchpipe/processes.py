"""The worker processes of a local pool: started before the cluster they join, replaced when lost, stopped.

Knows processes, not Dask: what a worker does with its folder is `batchpipe.worker`'s business.
"""

import contextlib
import json
import os
import pickle
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

from batchpipe.errors import DISK_FULL, BatchpipeError, PoolError
from batchpipe.job import ComputeSpec
from batchpipe.stages import stacks
from batchpipe.stages.logs import crash_in
from batchpipe.stages.watcher import WatchedProcess, Watcher, WatcherLostError, open_watcher
from batchpipe.storage import owner

SCRATCH_PREFIX = "batchpipe-"
SWEEP_PREFIX = "batchpipe-sweep-"
"""Begins the names of files that tell a killed run's sweep what to do: they outlive its scratch folder."""
OWNER_FILE = "owner.json"
"""Says in a scratch folder whose it is, for `clean` after a power cut."""
POLL_S = 0.1
MOST_PRINTED_BYTES = 4 << 20
"""What is kept of the log of a worker: its end."""
QUIET_DASK = {
    "distributed.worker.profile.enabled": False,
    "distributed.admin.tick.interval": "1s",
    "distributed.admin.system-monitor.interval": "5s",
    "distributed.diagnostics.computations.max-history": 1,
    "distributed.admin.low-level-log-length": 0,
}
"""For every process of a local pool: Dask else samples stacks 100 times a second, for a dashboard that is not there,
and keeps the last 1,000 messages to each worker, with the splits they carried, for its own developers."""
MAX_LOST_IN_A_ROW = 5
"""Workers lost without one task finished between them: then replacing them is of no use."""
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True, slots=True)
class Host:
    """What a command holds on this host: a private temporary folder, its watcher, and local workers if it has any."""

    scratch: Path
    watcher: Watcher
    workers: "WorkerProcesses | None" = None


@contextlib.contextmanager
def open_host(compute: ComputeSpec | None = None) -> Iterator[Host]:
    """Hold a scratch folder and the watcher that deletes it however this process ends.

    For a job with local workers the first of them is started at once: it imports while this process plans.
    Raises PoolError where there is no temporary folder, or it is full; now, or whenever something is spooled to it.
    """
    with telling_of_full_scratch(), contextlib.ExitStack() as release:
        scratch = release.enter_context(_open_scratch())
        watcher = release.enter_context(open_watcher(scratch=scratch))
        write_private(scratch / OWNER_FILE, owner.to_bytes(owner.this_process({})))
        if compute is None or compute.cluster != "local":
            yield Host(scratch, watcher)
            return
        stated = compute.workers if isinstance(compute.workers, int) else available_cores()
        workers = WorkerProcesses(scratch, watcher, threads=max(1, available_cores() // stated))
        release.callback(workers.stop)
        workers.start(1)
        yield Host(scratch, watcher, workers)


@contextlib.contextmanager
def _open_scratch() -> Iterator[Path]:
    try:
        folder = tempfile.TemporaryDirectory(prefix=SCRATCH_PREFIX)
    except FileNotFoundError as error:
        raise PoolError(
            f"there is no temporary folder: {error.strerror}",
            where=error.filename or "",
            next="make one, or run the same command with TMPDIR=/a/folder before it",
        ) from error
    with folder as name:
        yield Path(name).resolve()  # on macOS the temporary folder is behind a link


@contextlib.contextmanager
def telling_of_full_scratch() -> Iterator[None]:
    """Turn what a full temporary folder raises, whatever was being spooled to it, into an error that names it (6)."""
    try:
        yield
    except Exception as error:
        # Dask wraps what its own start raises.
        full = next((each for each in (error, error.__cause__) if _is_of_full_scratch(each)), None)
        if full is None or isinstance(error, BatchpipeError):
            raise
        raise PoolError(
            f"the temporary folder is full: {full.strerror}",
            where=f"{tempfile.gettempdir()} on {socket.gethostname()}",
            next="make room there, or run the same command with TMPDIR=/a/larger/disk before it;"
            " splits that are finished are kept",
        ) from error


def _is_of_full_scratch(error: BaseException | None) -> TypeGuard[OSError]:
    """Whether a file there cannot grow. Who writes elsewhere tells his own errors: what names no file is of ours."""
    if not isinstance(error, OSError) or error.errno not in DISK_FULL:
        return False
    folder = Path(tempfile.gettempdir()).resolve()
    return error.filename is None or Path(error.filename).resolve().is_relative_to(folder)


@dataclass(slots=True)
class _Worker:
    process: WatchedProcess
    log: Path


class WorkerProcesses:
    """Worker processes on this host, each in a process group of its own so that Ctrl-C reaches only the driver."""

    def __init__(self, scratch: Path, watcher: Watcher, threads: int) -> None:
        self._scratch = scratch
        self._watcher = watcher
        self._workers: list[_Worker] = []
        self._started = 0
        self._lost_in_a_row = 0
        self._threads = threads
        self._closing = threading.Event()
        self._guard = threading.Thread(target=self._replace_lost, name="workers", daemon=True)
        self.error: PoolError | None = None

    def start(self, count: int) -> None:
        """Start workers until there are `count`; each has `threads` cores for libraries with threads of their own."""
        self._workers += [self._start_one(copy) for copy in range(len(self._workers), count)]

    def open_chain(self, job: object, run_id: str) -> None:
        """Tell all workers, also those that come later, whose chain to open; from here on the lost are replaced."""
        write_private(self._scratch / "chain.pickle", pickle.dumps((job, run_id)))
        self._guard.start()

    def join_cluster(self, address: str, security: dict[str, str]) -> None:
        """Tell all workers, also those that come later, where their scheduler is."""
        # As files: a worker that is given the texts writes them to a temporary folder, which a kill would leave.
        files = {name: self._scratch / f"{name}.pem" for name in security}
        for name, file in files.items():
            write_private(file, security[name].encode())
        told = {"address": address, "security": {name: str(file) for name, file in files.items()}}
        write_private(self._scratch / "cluster.json", json.dumps(told).encode())

    def check_watcher(self) -> None:
        """Raise WatcherLostError where the watcher was killed, which ends the workers, too."""
        for worker in self._workers:
            worker.process.poll()

    def task_done(self) -> None:
        """Note that the workers get on with the work."""
        self._lost_in_a_row = 0

    def log_tail(self) -> str:
        """The last crash that a worker printed, of those that were replaced too; else the end of what they printed."""
        texts = []
        for log in sorted(self._scratch.glob("worker-*.log"), key=lambda log: log.stat().st_mtime_ns, reverse=True):
            with contextlib.suppress(OSError):
                texts.append(log.read_text(errors="replace").strip())
        crash = next((crash for text in texts if (crash := crash_in(text).text)), "")
        return crash or next((text[-1500:] for text in texts if text), "")

    def printed(self) -> Iterator[tuple[str, str]]:
        """What each worker has printed, the replaced ones too: a name, and the end of the text. Nothing for most."""
        for log in sorted(self._scratch.glob("worker-*.log")):
            with log.open("rb") as file:
                file.seek(max(0, log.stat().st_size - MOST_PRINTED_BYTES))
                if data := file.read():
                    yield log.name, data.decode(errors="replace")

    def stacks(self) -> dict[str, str]:
        """What every worker is doing, also one whose interpreter is kept by a call: faulthandler's dumps, by worker."""
        workers = list(self._workers)
        dumps = stacks.asked([(worker.process, worker.log) for worker in workers])
        return {worker.log.stem: dump for worker, dump in zip(workers, dumps, strict=True)}

    def stop(self) -> None:
        """Kill all workers, and wait until they are gone: what they hold is pending, and journaled or given up."""
        self._closing.set()
        if self._guard.ident:
            self._guard.join()
        for worker in self._workers:
            worker.process.stop(grace_s=0)
        self._workers.clear()

    def _start_one(self, copy: int) -> _Worker:
        number, self._started = self._started, self._started + 1
        log = self._scratch / f"worker-{number}.log"
        command = [sys.executable, "-u", "-P", "-m", "batchpipe.worker", str(self._scratch), str(number), str(copy)]
        env = {**dict.fromkeys(_THREAD_VARIABLES, str(self._threads)), **os.environ, "PYTHONFAULTHANDLER": "1"}
        process = self._watcher.start(command, env=env, cwd=Path.cwd(), log=log)
        return _Worker(process, log)

    def _replace_lost(self) -> None:
        while not self._closing.wait(POLL_S):
            try:
                self._replace_once()
            except WatcherLostError as error:
                self.error = error
                return
            except OSError as error:
                self.error = PoolError(f"a worker process cannot be started: {error}")
                return

    def _replace_once(self) -> None:
        for place, worker in enumerate(self._workers):
            code = worker.process.poll()
            if code is None:
                continue
            self._lost_in_a_row += 1
            if self._lost_in_a_row > MAX_LOST_IN_A_ROW:
                how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
                msg = f"{self._lost_in_a_row} workers were lost in a row, the last one {how}"
                self.error = PoolError(msg, log=self.log_tail(), next="the same command again resumes the run")
                self._closing.set()
                return
            self._workers[place] = self._start_one(place)


def available_cores() -> int:
    """Cores this process may use: its affinity, which a container or taskset may have narrowed."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def write_private(path: Path, data: bytes) -> None:
    """Write a file that only this user can read, all at once: workers wait for its name."""
    waiting = path.with_suffix(".part")
    descriptor = os.open(waiting, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
    waiting.rename(path)
