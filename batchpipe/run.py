"""One start of a run that has its output: the steps between the plan and the manifest."""

import contextlib
import importlib.metadata
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING
from uuid import uuid4

from batchpipe.errors import BatchpipeError, PoolError
from batchpipe.failures import first_failed, too_many_failed
from batchpipe.job import Job, OnErrorSpec
from batchpipe.manifest import (
    SCHEMA_VERSION,
    Input,
    LongTable,
    Manifest,
    RunAccounts,
    SplitResult,
    StageAccount,
    StageStats,
)
from batchpipe.mirror import assemble
from batchpipe.orders import Orders, Place, Schemas
from batchpipe.output import Output
from batchpipe.plan import Inputs, Plan
from batchpipe.processes import Host, available_cores
from batchpipe.redact import clean_uri
from batchpipe.schedule import OnProgress, Progress, Schedule, Tally
from batchpipe.source import line_of, read_gauge
from batchpipe.stages.watcher import Watcher, WatcherLostError
from batchpipe.transform import probe, prove_nothing, run_splits
from batchpipe.worker_chain import close_worker_chain, renew_lease

if TYPE_CHECKING:
    from batchpipe.pool import Pool

PROBED_AT_ONCE = 32


@contextlib.contextmanager
def sweeping_if_killed(output: Output, watcher: Watcher) -> Iterator[None]:
    """Have the watcher discard what nobody journaled, if this process is killed before it can do so itself."""
    descriptor, name = tempfile.mkstemp(prefix="batchpipe-sweep-")  # outlives the scratch; readable by this user only
    with os.fdopen(descriptor, "w") as file:
        options = output.job.output.storage_options
        json.dump({"root": output.folder.root, "options": options, "run_id": output.folder.run_id}, file)
    watcher.at_end([sys.executable, "-P", "-m", "batchpipe.sweep", name])
    try:
        yield
    finally:
        with contextlib.suppress(WatcherLostError):  # it is gone, and what matters is how the run ended
            watcher.at_end(None)
        Path(name).unlink(missing_ok=True)


class Run:
    """One start of a run that has its output: the steps between the plan and the manifest."""

    def __init__(self, job: Job, run_id: str, plan: Plan, output: Output, on_progress: OnProgress) -> None:
        self.job = job
        self.run_id = run_id
        self.plan = plan
        self.output = output
        self.started = time.monotonic()
        self.workers = 0
        self._on_progress = on_progress
        self.schedule = Schedule(plan, plan.count, output.replay())
        output.begin()

    def show(self, step: str, gauge: Mapping[str, int] = MappingProxyType({})) -> None:
        """Tell whoever watches where the run is; `gauge` is what workers say of the splits they are at work on."""
        self._on_progress(
            Progress(
                step=step,
                run_id=self.run_id,
                job=self.job,
                tally=self.schedule.tally,
                objects=self.plan.inputs.count,
                bytes=self.plan.inputs.bytes,
                records_at_work=gauge.get("records", 0),
                bytes_at_work=gauge.get("bytes", 0),
                workers=self.workers,
            )
        )

    def transform(self, host: Host) -> None:
        """Run every split that has not settled, on a pool that is opened and released here."""
        self.show("plan")
        if self.schedule.is_done and self.job.output.layout == "parts":
            return
        with open_workers(self.job, self.run_id, self.plan.count, host) as pool:
            self.workers = pool.workers
            self.show("start")
            orders = self._orders(pool)
            watch = Stopwatch(self.job.on_error)
            tasks = pool.stream(run_splits, self.schedule.take, orders, on_tick=lambda: self._tick(pool, watch))
            with contextlib.closing(tasks):
                for task, outcomes in tasks:
                    for result in self.schedule.settle(task, outcomes):
                        self._settle(result, pool)
            if self.job.output.layout == "mirror":
                self._assemble(pool, orders.place)
            self.workers = pool.workers

    def publish(self, inputs: Inputs) -> Manifest:
        """Prove the accounts, make the pieces visible, write the manifest."""
        tally = self.schedule.tally
        self._prove()
        return self.output.publish(self._manifest(tally), self._input_rows(inputs, tally))

    def _orders(self, pool: "Pool") -> Orders:
        """What tasks are told. The schemas in it are proved by the first mini-batch, now or in an earlier start."""
        output, limit = self.output, self.job.on_error.max_failed_records
        place = Place(
            self.job, self.run_id, output.part_prefix, f"{self.run_id}-{output.journal.epoch}-{uuid4().hex[:8]}"
        )
        orders = Orders(place, Schemas(), limit)
        if output.schemas:
            return replace(orders, schemas=Schemas.from_json(output.schemas))
        splits = iter(self.plan)
        while not orders.schemas.is_proved and (probed := tuple(islice(splits, PROBED_AT_ONCE))):
            found = pool.call(probe, probed, orders)
            if isinstance(found, SplitResult):
                raise self._hopeless(found, pool)
            orders = replace(orders, schemas=found)
        if not orders.schemas.is_proved:
            orders = replace(orders, schemas=pool.call(prove_nothing, orders))
        output.set_schemas(orders.schemas.to_json())
        return orders

    def _assemble(self, pool: "Pool", place: Place) -> None:
        """Join the pieces of every object that was cut."""
        self.output.journal.flush()  # which pieces count: they are visible to workers from here on
        waiting = self.output.assemblies(self.plan.inputs, place)
        joined = pool.stream(assemble, lambda _: next(waiting, None), place, on_tick=self.output.journal.flush_if_due)
        with contextlib.closing(joined):
            for assembly, piece in joined:
                self.output.assembled_as(assembly, piece)

    def _tick(self, pool: "Pool", watch: "Stopwatch") -> None:
        self.output.journal.flush_if_due()
        self.workers = pool.workers
        gauge = pool.progress()
        watch.check((self.schedule.tally.settled, *gauge.values()))
        self.show("transform", gauge)

    def _hopeless(self, result: SplitResult, pool: "Pool") -> BatchpipeError:
        """What ends a run whose first mini-batch had no answer: its first failed record."""
        self.output.keep_quarantine(result)
        first, quarantine = result.failures[0], self.output.folder / "quarantine"
        line = pool.call(line_of, first, self.job.input)
        if self.job.on_error.max_failed_records != 0:
            return first_failed(self.job, first, line, quarantine)
        self.schedule.tally.accounts, self.schedule.tally.failures = result.accounts, [first]
        return too_many_failed(self.job, self.schedule.tally, quarantine, line)

    def _settle(self, result: SplitResult, pool: "Pool") -> None:
        """Journal a settled split; end the run if more records failed than it may lose."""
        tally, allowed = self.schedule.tally, self.job.on_error.max_failed_records
        if result.stopped:  # it must run again, once more may fail; its failures are worth seeing all the same
            self.output.keep_quarantine(result)
        else:
            self.output.settle(result)
        if result.stopped or (allowed is not None and tally.accounts.quarantined > allowed):
            line = pool.call(line_of, tally.failures[0], self.job.input)
            raise too_many_failed(self.job, tally, self.output.folder / "quarantine", line)

    def _prove(self) -> None:
        """Check the accounts of every object, and the percentage that may fail (G1)."""
        tally, percent = self.schedule.tally, self.job.on_error.max_failed_percent
        if percent is not None and tally.accounts.quarantined > tally.accounts.read * percent / 100:
            raise too_many_failed(self.job, tally, self.output.folder / "quarantine")
        for found in self.plan.inputs:
            accounts = tally.of_object(found.index)
            if not accounts.balanced:
                msg = f"the accounts of {clean_uri(found.uri)} do not add up: {accounts}"
                raise BatchpipeError(msg, next="this is a defect of batchpipe; nothing was published")

    def _input_rows(self, inputs: Inputs, tally: Tally) -> Iterator[Input]:
        for found in inputs:
            numbers = asdict(tally.of_object(found.index))
            yield Input(uri=clean_uri(found.uri), bytes=found.size, version=found.version, **numbers)

    def _manifest(self, tally: Tally) -> Manifest:
        empty = LongTable(uri="", rows=0, bytes=0, sha256="")
        return Manifest(
            schema_version=SCHEMA_VERSION,
            run_id=self.run_id,
            name=self.job.name,
            fingerprint=self.output.fingerprint.sha256,
            input=tuple(map(clean_uri, self.job.input.uri)),
            output=clean_uri(self.job.output.uri),
            output_format=self.job.output.format,
            output_layout=self.job.output.layout,
            replaces=self.output.replaced.run_id if self.output.replaced else "",
            job=self.job.document(),
            inputs=empty,
            parts=empty,
            accounts=RunAccounts(**asdict(tally.accounts)),
            stages={
                stage.name: StageAccount(**asdict(tally.stages.get(stage.name, StageStats())))
                for stage in self.job.stages
            },
            read_s=tally.read_s,
            write_s=tally.write_s,
            worker_seconds=tally.worker_seconds,
            workers=self.workers,
            splits=tally.splits,
            started=self.output.started,
            finished="",
            seconds=time.monotonic() - self.started,
            versions=versions(),
            failures=tuple(asdict(failure) for failure in tally.failures),
        )


class Stopwatch:
    """Ends a run in which nothing moves any more, or that takes longer than it may."""

    def __init__(self, limits: OnErrorSpec) -> None:
        self._limits = limits
        self._started = self._moved = time.monotonic()
        self._seen: tuple[int, ...] = ()

    def check(self, figures: tuple[int, ...]) -> None:
        """Look at figures that move with the work. Raises PoolError (6)."""
        now, limits = time.monotonic(), self._limits
        if figures != self._seen:
            self._seen, self._moved = figures, now
        if limits.max_runtime_s is not None and now - self._started > limits.max_runtime_s:
            msg = f"the run took longer than on_error.max_runtime_s: {limits.max_runtime_s:g} s"
            raise PoolError(msg, next="the same command resumes it; finished splits are kept")
        if now - self._moved > limits.no_progress_timeout_s:
            msg = f"nothing moved for on_error.no_progress_timeout_s: {limits.no_progress_timeout_s:g} s"
            raise PoolError(msg, next="the same command resumes it; a larger timeout waits longer for slow stages")


@contextlib.contextmanager
def open_workers(job: Job, run_id: str, splits: int, host: Host) -> Iterator["Pool"]:
    """Open the pool of a job. Local workers open their chains while this process imports Dask."""
    if host.workers is not None:
        host.workers.open_chain(job, run_id)
        host.workers.start(worker_count(job, splits))
    from batchpipe.pool import Lease, open_pool  # the slowest import of all

    lease = Lease(renew_lease, close_worker_chain, (run_id,), any(stage.is_http for stage in job.stages))
    with open_pool(job.compute, host.workers, lease, read_gauge, host.scratch) as pool:
        yield pool


def worker_count(job: Job, splits: int) -> int:
    """Local workers: as stated, else one for each core but not more than splits; one where every stage is HTTP."""
    stated = job.compute.workers
    if isinstance(stated, int):
        return stated
    most = available_cores() if isinstance(stated, str) else stated.maximum
    if isinstance(stated, str) and all(stage.is_http for stage in job.stages):
        return 1
    return max(1, min(most, splits))


def versions() -> dict[str, str]:
    """Versions of what shapes the output."""
    names = ("batchpipe", "pyarrow", "pandas", "numpy", "dask", "distributed", "fsspec", "s3fs")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in names}}
