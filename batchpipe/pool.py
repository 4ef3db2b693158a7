"""The pool of a run and the only door to Dask: open, stream tasks through a window, release. Knows no split.

Dask stops queuing tasks that carry restrictions and pushes all of them at once, so the window is our own: a few
tasks for every place that works at the same time.
"""

import contextlib
import importlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypeVar, cast

import dask
import distributed
from distributed import Client, KilledWorker, LocalCluster, Security
from distributed.exceptions import WorkerStartTimeoutError

from batchpipe import __version__
from batchpipe.errors import BatchpipeError, JobError, PoolError
from batchpipe.job import ClusterByAddress, ClusterByClass, ComputeSpec, WorkerRange
from batchpipe.processes import QUIET_DASK, SPLITS_AT_A_TIME, WorkerProcesses

Task = TypeVar("Task")
Result = TypeVar("Result")
Gauge: TypeAlias = Callable[[], dict[str, int]]
"""Read on a worker: counters that move inside a task."""

WAITING_PER_PLACE = 1
"""Tasks that wait on a worker for each one that runs, so that the next begins without a round trip."""
MAX_LOST = 4
"""Times one task may lose its worker. Who only waited there is blamed too, so fewer would be unjust."""
WORKERS_TIMEOUT_S = 60.0
CONNECT_TIMEOUT_S = 10.0
LEASE_RENEWED_S = 2.0
RELEASE_TIMEOUT_S = 20.0
TICK_S = 0.2
FETCH_S = 2.0
"""For a result of some kilobytes; the worker that holds it may be lost meanwhile."""


class Pool:
    """Connected workers, and the window of tasks in flight on them."""

    def __init__(self, client: Client, processes: WorkerProcesses | None, gauge: Gauge) -> None:
        self._client = client
        self._gauge = gauge
        self._processes = processes
        self._seen: list[dict[str, Any]] = []
        self._seen_at = 0.0

    @property
    def workers(self) -> int:
        """Workers that are there now."""
        return len(self._infos())

    @property
    def places(self) -> int:
        """Tasks that can run at the same time."""
        return sum(worker["nthreads"] for worker in self._infos()) or SPLITS_AT_A_TIME

    def progress(self) -> dict[str, int]:
        """Counters that move inside tasks, summed over workers: what each worker's heartbeat last said."""
        total: dict[str, int] = {}
        for worker in self._infos():
            for name, value in (worker["metrics"].get("batchpipe") or {}).items():
                total[name] = total.get(name, 0) + value
        return total

    def call(self, function: Callable[..., Result], *args: Any) -> Result:
        """Run one task and return its result, again on another worker if it loses its own."""
        once = iter([function])
        for _, result in self.stream(_call, lambda _: next(once, None), *args):
            return cast("Result", result)
        msg = "a task ended without a result"
        raise PoolError(msg)

    def stream(
        self,
        function: Callable[..., Result],
        take: Callable[[int], Task | None],
        *args: Any,
        on_tick: Callable[[], None] = lambda: None,
    ) -> Generator[tuple[Task, Result], None, None]:
        """Run ``function(task, *args)`` for every task that `take(places)` hands out; yield each as it ends.

        Close it to cancel what is in flight.

        `take` is asked again whenever a place is free; an empty task means that none waits now. A task that loses
        its worker runs again. Raises what a task raised, and PoolError when workers are lost beyond retry.
        """
        done: queue.SimpleQueue[distributed.Future[Any]] = queue.SimpleQueue()
        running: dict[Any, tuple[distributed.Future[Any], Task, int]] = {}

        def submit(task: Task, lost: int) -> None:
            future = self._client.submit(_run, self._gauge, function, task, *args, pure=False)
            running[future.key] = (future, task, lost)
            future.add_done_callback(done.put)

        try:
            while True:
                places = self.places
                while len(running) < places * (1 + WAITING_PER_PLACE) and (task := take(places)):
                    submit(task, 0)
                if not running:
                    return
                future = self._next_done(done, on_tick)
                if future is None:
                    continue
                try:
                    error, result = _ended(future)
                except TimeoutError:  # its worker was lost before it could be asked for the result: Dask runs it again
                    future.add_done_callback(done.put)
                    continue
                _, task, lost = running.pop(future.key)
                if isinstance(error, KilledWorker) or future.status == "cancelled":
                    if lost + 1 >= MAX_LOST:
                        raise self._lost(task)
                    submit(task, lost + 1)
                elif error is not None:
                    raise self._explained(error)
                else:
                    if self._processes:
                        self._processes.task_done()
                    yield task, result
                future.release()
        finally:
            self._client.cancel([future for future, _, _ in running.values()], force=True)

    def _infos(self) -> list[dict[str, Any]]:
        if time.monotonic() - self._seen_at > TICK_S:
            self._seen = list(self._client.scheduler_info(n_workers=-1)["workers"].values())
            self._seen_at = time.monotonic()
        return self._seen

    def _next_done(self, done: "queue.SimpleQueue[distributed.Future[Any]]", on_tick: Callable[[], None]) -> Any:
        if self._processes and self._processes.error:
            raise self._processes.error
        try:
            return done.get(timeout=TICK_S)
        except queue.Empty:
            return None
        finally:
            on_tick()

    def _lost(self, task: object) -> PoolError:
        return PoolError(
            f"{_describe(task)} lost its worker {MAX_LOST} times: a record may kill it (memory, segfault)",
            log=self._processes.log_tail() if self._processes else "",
            next="the same command again resumes the run; finished splits are kept",
        )

    def _explained(self, error: BaseException) -> BaseException:
        if isinstance(error, BatchpipeError):
            return error
        if isinstance(error, ModuleNotFoundError) and (error.name or "").startswith("batchpipe"):
            return PoolError(
                "the cluster's workers cannot import batchpipe", next=f"install batchpipe {__version__} there"
            )
        return error


@contextlib.contextmanager
def open_pool(
    compute: ComputeSpec, processes: WorkerProcesses | None, lease: "Lease", gauge: Gauge, scratch: Path
) -> Iterator[Pool]:
    """Connect to the job's workers: the local `processes`, or the cluster that the job names.

    Raises PoolError if no worker comes, JobError if the cluster's class cannot be imported.
    """
    with contextlib.ExitStack() as release:
        # A scheduler makes a folder too and leaves it: in our scratch it goes with the rest.
        release.enter_context(dask.config.set({"temporary-directory": str(scratch)}))
        if processes is not None:
            client = _open_local(processes, release)
            if lease.is_for_local_workers:
                release.callback(_end, client, lease)
        else:
            client = _open_foreign(compute, release)
        try:
            client.wait_for_workers(1, timeout=WORKERS_TIMEOUT_S)
        except (WorkerStartTimeoutError, TimeoutError) as error:
            raise _no_workers(processes) from error
        if processes is None:
            release.enter_context(_renewing(client, lease))
        yield Pool(client, processes, gauge)


@dataclass(frozen=True, slots=True)
class Lease:
    """How workers that outlive the driver know that it lives: `renew(*args)` runs on each of them every few seconds.

    A worker whose lease lapses releases by itself what it holds for the run; `end` makes it do so at once.
    """

    renew: Callable[..., None]
    end: Callable[..., None]
    args: tuple[Any, ...]
    is_for_local_workers: bool
    """Whether also local workers must end it before they are killed: they hold processes that want to be asked."""


def _open_local(processes: WorkerProcesses, release: contextlib.ExitStack) -> Client:
    security = Security.temporary()
    settings = {
        **QUIET_DASK,
        "distributed.scheduler.http.routes": [],
        # A death is reported at once: the window counts them itself (see `Pool.stream`).
        "distributed.scheduler.allowed-failures": 0,
        "distributed.comm.timeouts.connect": "10s",
    }
    release.enter_context(dask.config.set(settings))
    release.enter_context(_quiet_dask())
    cluster = release.enter_context(
        LocalCluster(
            n_workers=0,
            processes=True,
            security=security,
            silence_logs=logging.CRITICAL,
            # The HTTP server cannot be left out, only its routes: a free port, so that runs do not collide.
            scheduler_kwargs={"dashboard": False, "dashboard_address": "127.0.0.1:0"},
        )
    )
    tls = security.get_tls_config_for_role("worker")
    pem = {"tls_ca_file": tls["ca_file"], "tls_worker_cert": tls["cert"], "tls_worker_key": tls["key"]}
    processes.join_cluster(cluster.scheduler_address, pem)
    client: Client = release.enter_context(Client(cluster, set_as_default=False))
    release.callback(processes.stop)
    return client


def _open_foreign(compute: ComputeSpec, release: contextlib.ExitStack) -> Client:
    if isinstance(compute.cluster, ClusterByAddress):
        address = compute.cluster.address
        try:
            client: Client = release.enter_context(Client(address, timeout=CONNECT_TIMEOUT_S, set_as_default=False))
        except (OSError, TimeoutError, ValueError) as error:
            msg = f"no Dask scheduler answers at {address}: {error}"
            raise PoolError(msg, next="compute.cluster.address must name a running scheduler") from error
        return client
    assert isinstance(compute.cluster, ClusterByClass)
    module, _, name = compute.cluster.class_.replace(":", ".").rpartition(".")
    try:
        class_ = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        msg = f"compute.cluster.class: cannot import {compute.cluster.class_!r}: {error}"
        raise JobError(msg) from error
    cluster = release.enter_context(class_(**compute.cluster.options))
    match compute.workers:
        case int(count):
            cluster.scale(count)
        case WorkerRange(minimum=minimum, maximum=maximum):
            cluster.adapt(minimum=minimum, maximum=maximum)
    connected: Client = release.enter_context(Client(cluster, set_as_default=False))
    return connected


@contextlib.contextmanager
def _quiet_dask() -> Iterator[None]:
    """Dask logs every closed connection of a worker that we killed ourselves; what went wrong is in our own errors."""
    handlers = logging.getLogger("distributed").handlers
    before = [handler.level for handler in handlers]
    for handler in handlers:
        handler.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for handler, level in zip(handlers, before, strict=False):
            handler.setLevel(level)


@contextlib.contextmanager
def _renewing(client: Client, lease: Lease) -> Iterator[None]:
    ended = threading.Event()

    def renew() -> None:
        while not ended.wait(LEASE_RENEWED_S):
            with contextlib.suppress(OSError, TimeoutError):
                client.run(lease.renew, *lease.args, on_error="ignore")

    # Before the first task: a chain that is opened without a lease would be held for ever if we were killed.
    client.run(lease.renew, *lease.args, on_error="ignore")
    thread = threading.Thread(target=renew, name="lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        _end(client, lease)


def _end(client: Client, lease: Lease) -> None:
    """End the lease on every worker that answers in time; the watchers of the others release what they hold."""
    asking = threading.Thread(
        target=client.run, args=(lease.end, *lease.args), kwargs={"on_error": "ignore"}, daemon=True
    )
    asking.start()
    asking.join(RELEASE_TIMEOUT_S)


def _no_workers(processes: WorkerProcesses | None) -> PoolError:
    if processes is not None and processes.error:
        return processes.error
    log = processes.log_tail() if processes else ""
    return PoolError(
        f"no worker came within {WORKERS_TIMEOUT_S:.0f} s", log=log, next="compute.cluster names the workers"
    )


def _ended(future: "distributed.Future[Any]") -> tuple[BaseException | None, Any]:
    """The error or the result of a future that is done. Raises TimeoutError where it is done no more."""
    if future.status == "cancelled":
        return None, None
    if future.status == "error":
        return future.exception(timeout=FETCH_S), None
    try:
        return None, future.result(timeout=FETCH_S)
    except KilledWorker as error:
        return error, None


def _run(gauge: Gauge, function: Callable[..., Result], *args: Any) -> Result:
    """Run a task on a worker, whose heartbeats carry the gauge from its first task on."""
    distributed.get_worker().metrics.setdefault("batchpipe", lambda _: gauge())
    return function(*args)


def _call(function: Callable[..., Result], *args: Any) -> Result:
    return function(*args)


def _describe(task: object) -> str:
    return str(task[0]) if isinstance(task, tuple) and task else "a task"
