"""The pool of a run: tasks streamed through a window to the workers of its `cluster`. Knows no split.

Dask stops queuing tasks that carry restrictions and pushes all of them at once, so the window is our own: a few
tasks for every place that works at the same time.
"""

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, TypeAlias, TypeVar, cast

import distributed
from distributed import Client, KilledWorker

from batchpipe import __version__
from batchpipe.cluster import Lease, open_client
from batchpipe.errors import BatchpipeError, PoolError
from batchpipe.job import ComputeSpec
from batchpipe.processes import WorkerProcesses, telling_of_full_scratch
from batchpipe.split import SPLITS_AT_A_TIME
from batchpipe.stages import stacks, watchdog

Task = TypeVar("Task")
Result = TypeVar("Result")
Gauge: TypeAlias = Callable[[], dict[str, int]]
"""Read on a worker: counters that move inside a task."""

WAITING_PER_PLACE = 1
"""Tasks that wait on a worker for each one that runs, so that the next begins without a round trip."""
MAX_LOST = 8
"""Times one task may lose its worker. Who only waited there is blamed too, so fewer would be unjust."""
TICK_S = 0.2
ASK_S = 5.0
"""For what workers are doing; one whose interpreter is kept by a call never answers."""
FETCH_S = 2.0
"""For a result of some kilobytes; the worker that holds it may be lost meanwhile."""


def _as_it_is(task: Task) -> Task:
    return task


class Pool:
    """Connected workers, and the window of tasks in flight on them."""

    def __init__(self, client: Client, processes: WorkerProcesses | None, gauge: Gauge) -> None:
        self._client = client
        self._gauge = gauge
        self._processes = processes
        self._seen: dict[str, dict[str, Any]] = {}
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

    def stacks(self) -> str:
        """What every worker is doing, for an error's text; those that do not answer say nothing. Never raises."""
        dumps = self._processes.stacks() if self._processes else {}
        told = {worker: stacks.calls_at_work(dump) for worker, dump in dumps.items()}
        told |= self._ask(stacks.of_this_worker)  # they know more than their stacks
        return "\n".join(f"{worker}\n{doing}" for worker, doing in told.items() if doing)

    def _ask(self, function: Callable[[], str]) -> dict[str, str]:
        """Call a function on every worker; what is there within some seconds."""
        answers: dict[str, str] = {}

        def ask(address: str, worker: str) -> None:
            with contextlib.suppress(Exception):  # whatever keeps one from answering, the others are heard
                answers[worker] = self._client.run(function, workers=[address])[address]

        names = {address: self._name(address) for address in self._seen}
        asking = [threading.Thread(target=ask, args=one, daemon=True) for one in names.items()]
        for thread in asking:
            thread.start()
        deadline = time.monotonic() + ASK_S
        for thread in asking:
            thread.join(max(0.0, deadline - time.monotonic()))
        return {name: answers[name] for name in names.values() if name in answers}

    def call(
        self,
        function: Callable[..., Result],
        task: Task,
        *args: Any,
        on_lost: Callable[[Task], Task] = _as_it_is,
        on_tick: Callable[[], None] = lambda: None,
    ) -> Result:
        """Run ``function(task, *args)`` once and return its result, again on another worker if it loses its own."""
        once = iter([(task,)])

        def lost(waiting: tuple[Task]) -> tuple[Task]:
            return (on_lost(waiting[0]),)

        calls = self.stream(_call, lambda _: next(once, None), function, *args, on_lost=lost, on_tick=on_tick)
        with contextlib.closing(calls):
            for _, result in calls:
                return cast("Result", result)
        msg = "a task ended without a result"
        raise PoolError(msg)

    def stream(
        self,
        function: Callable[..., Result],
        take: Callable[[int], Task | None],
        *args: Any,
        on_lost: Callable[[Task], Task] = _as_it_is,
        on_tick: Callable[[], None] = lambda: None,
    ) -> Generator[tuple[Task, Result], None, None]:
        """Run ``function(task, *args)`` for every task that `take(places)` hands out; yield each as it ends.

        Close it to cancel what is in flight.

        `take` is asked again whenever a place is free; an empty task means that none waits now. A task that loses
        its worker runs again, as `on_lost` makes of it. Raises what a task raised, and PoolError when workers are
        lost beyond retry.
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
                    submit(on_lost(task), lost + 1)
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
            self._seen = dict(self._client.scheduler_info(n_workers=-1)["workers"])
            self._seen_at = time.monotonic()
        return list(self._seen.values())

    def _name(self, address: str) -> str:
        """A worker of ours by the name of its log, another one by its address."""
        return f"worker-{self._seen[address]['name']}" if self._processes else address

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
    compute: ComputeSpec, processes: WorkerProcesses | None, lease: Lease, gauge: Gauge, scratch: Path
) -> Iterator[Pool]:
    """Open the job's workers: the local `processes`, or the cluster that the job names.

    Raises PoolError if no worker comes, JobError if the cluster's class cannot be imported.
    """
    with open_client(compute, processes, lease, scratch) as client:
        yield Pool(client, processes, gauge)


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
    watchdog.start()
    with telling_of_full_scratch():  # here, for it is the worker's own
        return function(*args)


def _call(task: tuple[Any], function: Callable[..., Result], *args: Any) -> Result:
    return function(task[0], *args)


def _describe(task: object) -> str:
    return str(task[0]) if isinstance(task, tuple) and task else "a task"
