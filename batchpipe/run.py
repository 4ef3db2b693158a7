"""One start of a run that has its output: the steps between the plan and the manifest."""

import contextlib
import importlib.metadata
import platform
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from types import MappingProxyType
from typing import TYPE_CHECKING
from uuid import uuid4

from batchpipe.errors import BatchpipeError
from batchpipe.failures import Budget, first_failed, is_beyond_records, too_many_failed
from batchpipe.job import Job
from batchpipe.journal import FLUSH_S
from batchpipe.manifest import (
    SCHEMA_VERSION,
    Failure,
    Generation,
    Input,
    LongTable,
    Manifest,
    RunAccounts,
    SplitResult,
    StageAccount,
    StageStats,
)
from batchpipe.mirror import assemble
from batchpipe.numbering import line_of, number_failures, object_of
from batchpipe.orders import Orders, Place, Schemas
from batchpipe.output import Output
from batchpipe.plan import Inputs, Plan
from batchpipe.probe import Unproved, open_stages, probe, prove_nothing
from batchpipe.processes import Host
from batchpipe.redact import clean_uri
from batchpipe.redrive import Redriven, RedrivePlan
from batchpipe.schedule import OnProgress, Progress, Schedule, Tally
from batchpipe.split import isolated
from batchpipe.stopwatch import Stopwatch
from batchpipe.transform import run_splits
from batchpipe.workers import open_workers

if TYPE_CHECKING:
    from batchpipe.pool import Pool

PROBED_AT_ONCE = 32


class Run:
    """One start of a run that has its output: the steps between the plan and the manifest."""

    def __init__(
        self,
        job: Job,
        run_id: str,
        plan: Plan | RedrivePlan,
        output: Output,
        on_progress: OnProgress,
        redriven: Redriven | None = None,
    ) -> None:
        self.job = job
        self.redriven = redriven
        self.run_id = run_id
        self.plan = plan
        self.output = output
        self.started = time.monotonic()
        self.workers = 0
        self._kept = self.started
        self._on_progress = on_progress
        self._watch = Stopwatch(job.on_error)
        output.begin(plan.count, plan.split_bytes)
        self.schedule = Schedule(plan, plan.count, output.replay(), job.on_error.max_failed_records, output.held)
        self.budget = Budget(job, plan.inputs, redriven.manifest.accounts.read if redriven else None)
        attempt = f"{run_id}-{output.journal.epoch}-{uuid4().hex[:8]}"
        self.place = Place(job, run_id, output.part_prefix, attempt)

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
        is_numbered = not self.schedule.tally.accounts.quarantined
        if self.schedule.is_done and self.job.output.layout == "parts" and is_numbered:
            return
        with open_workers(self.job, self.run_id, self.plan.count, host) as pool:
            self.workers = pool.workers
            self.show("start")
            if self.budget.is_exceeded(self.schedule.tally):  # with what earlier starts have kept
                raise self._beyond_budget(pool)
            orders = self._orders(pool)
            tick = partial(self._tick, pool, "transform")
            for result in self.schedule.settle_held():
                self._settle(result, pool)
            tasks = pool.stream(run_splits, self.schedule.take, orders, on_lost=isolated, on_tick=tick)
            with contextlib.closing(tasks):
                for task, outcomes in tasks:
                    for result in self.schedule.settle(task, outcomes):
                        self._settle(result, pool)
            if self.job.output.layout == "mirror":
                self._assemble(pool)
            if self.budget.is_exceeded(self.schedule.tally, at_end=True):
                raise self._beyond_budget(pool)
            self._number(pool)
            self.workers = pool.workers

    def finish(self, host: Host) -> Manifest:
        """Do all that is left to do."""
        self.transform(host)
        self.show("publish")
        manifest = self.publish(self.plan.inputs)
        self.show("done")
        return manifest

    def publish(self, inputs: Inputs) -> Manifest:
        """Prove the accounts, make the pieces visible, write the manifest."""
        tally = self.schedule.tally
        self._prove()
        rows = self._input_rows(inputs, tally)
        if self.redriven:
            rows = self.redriven.inputs_with(inputs, tally.of_object)
        return self.output.publish(self._manifest(tally), rows)

    def _orders(self, pool: "Pool") -> Orders:
        """What tasks are told. The schemas in it are proved by the first mini-batch, now or in an earlier start.

        A later start sends that mini-batch too, for its stages may be broken by now, and keeps the earlier schemas.
        A redrive has the columns of its run, and no record of which it is known that it can be answered.
        """
        output, tick = self.output, partial(self._tick, pool, "start")
        if self.redriven and self.redriven.schemas.is_proved:
            if not output.schemas:
                advice = pool.call(open_stages, Orders(self.place, self.redriven.schemas), on_tick=tick)
                output.set_schemas(replace(self.redriven.schemas, advice=advice).to_json())
            kept = Schemas.from_json(output.schemas)
            return Orders(self.place, replace(kept, answered=self.redriven.schemas.answered))
        orders = Orders(self.place, Schemas.from_json(output.schemas) if output.schemas else Schemas())
        splits, is_proved = iter(self.plan), self.schedule.is_done
        while not is_proved and (probed := tuple(islice(splits, PROBED_AT_ONCE))):
            is_all = probed[-1].index + 1 == self.plan.count
            found = pool.call(probe, probed, orders, is_all, on_lost=isolated, on_tick=tick)
            if isinstance(found, Unproved):
                raise self._unproved(found, pool)
            is_proved = found.is_proved
            kept = replace(orders.schemas, answered=found.answered or orders.schemas.answered)
            orders = replace(orders, schemas=kept if output.schemas else found)
        if output.schemas:
            return orders
        if not orders.schemas.is_proved:
            orders = replace(orders, schemas=pool.call(prove_nothing, orders, on_tick=tick))
        output.set_schemas(orders.schemas.to_json())
        return orders

    def _assemble(self, pool: "Pool") -> None:
        """Join the pieces of every object that was cut."""
        self.output.journal.flush()  # which pieces count: they are visible to workers from here on
        waiting = self.output.assemblies(self.plan.inputs, self.place)
        tick = partial(self._tick, pool, "transform")
        joined = pool.stream(assemble, lambda _: next(waiting, None), self.place, on_tick=tick)
        with contextlib.closing(joined):
            for assembly, piece in joined:
                self.output.assembled_as(assembly, piece)

    def _number(self, pool: "Pool", stopped: SplitResult | None = None) -> None:
        """Fill in which record and line of its object each quarantined record is."""
        if not self.schedule.tally.accounts.quarantined and not stopped:
            return
        waiting = self.output.numberings(self.plan.inputs, stopped)
        tick = partial(self._tick, pool, "transform")
        numbered = pool.stream(number_failures, lambda _: next(waiting, None), self.place, on_tick=tick)
        with contextlib.closing(numbered):
            for _ in numbered:
                pass

    def keep_held(self) -> None:
        """Journal what is done and waits for the ranges before it, which may take long."""
        self._kept = time.monotonic()
        for result in self.schedule.held_back():
            self.output.hold(result)

    def _tick(self, pool: "Pool", step: str) -> None:
        if time.monotonic() - self._kept >= FLUSH_S:
            self.keep_held()
        self.output.journal.flush_if_due()
        self.workers = pool.workers
        gauge = pool.progress()
        self._watch.check((self.schedule.tally.settled, *gauge.values()), pool.stacks)
        self.show(step, gauge)

    def _unproved(self, found: Unproved, pool: "Pool") -> BatchpipeError:
        """What ends a run whose first mini-batch had no answer, or lost more records than the run may."""
        result, quarantine = found.result, self.output.folder / "quarantine"
        if self.schedule.is_done_with(result.split):  # in an earlier start, whose quarantine stays as it is
            return first_failed(self.job, found.at_fault, self._line_of(found.at_fault, pool))
        self.output.keep_quarantine(result)
        with contextlib.suppress(BatchpipeError):  # the first failure is what matters
            self._number(pool, result)
        if found.is_hopeless or not is_beyond_records(self.job.on_error, result.accounts.quarantined):
            return first_failed(self.job, found.at_fault, self._line_of(found.at_fault, pool), quarantine)
        self.schedule.tally.accounts, self.schedule.tally.failures = result.accounts, list(result.failures)
        return self._too_many_failed(self._line_of(result.failures[0], pool))

    def _settle(self, result: SplitResult, pool: "Pool") -> None:
        """Journal a settled split; end the run if more records failed than it may lose."""
        if result.stopped:  # it must run again, once more may fail; its failures are worth seeing all the same
            self.output.keep_quarantine(result)
        else:
            self.output.settle(result)
        if result.stopped or self.budget.is_exceeded(self.schedule.tally):
            raise self._beyond_budget(pool, result if result.stopped else None)

    def _beyond_budget(self, pool: "Pool", stopped: SplitResult | None = None) -> BatchpipeError:
        """What ends a run that lost more records than it may: the first of them. All that are kept are numbered."""
        with contextlib.suppress(BatchpipeError):  # the budget is what matters
            self._number(pool, stopped)
        tally = self.schedule.tally
        return self._too_many_failed(self._line_of(tally.failures[0], pool))

    def _line_of(self, failure: Failure, pool: "Pool") -> int | None:
        """The line for an error's text; None where that cannot be found out, and the failure is what matters."""
        found, tick = object_of(failure, self.plan.inputs), partial(self._tick, pool, "transform")
        with contextlib.suppress(BatchpipeError):
            return pool.call(line_of, found, failure.offset, self.job.input, on_tick=tick) if found else None
        return None

    def _too_many_failed(self, line: int | None) -> BatchpipeError:
        quarantine = self.output.folder / "quarantine"
        of = self.redriven.manifest.accounts.read if self.redriven else None
        return too_many_failed(self.job, self.schedule.tally, quarantine, line, redriven_of=of)

    def _prove(self) -> None:
        """Check that every split has settled, and the accounts of every object (G1)."""
        tally = self.schedule.tally
        if not self.schedule.is_done:
            msg = f"only {tally.settled:,} of {tally.splits:,} splits have settled"
            raise BatchpipeError(msg, next="this is a defect of batchpipe; nothing was published")
        for found in self.plan.inputs:
            accounts = tally.of_object(found.index)
            if not accounts.balanced:
                msg = f"the accounts of {found.shown} do not add up: {accounts}"
                raise BatchpipeError(msg, next="this is a defect of batchpipe; nothing was published")

    def _input_rows(self, inputs: Inputs, tally: Tally) -> Iterator[Input]:
        for found in inputs:
            numbers = asdict(tally.of_object(found.index))
            yield Input(uri=found.shown, bytes=found.size, version=found.version, **numbers)

    def _manifest(self, tally: Tally) -> Manifest:
        empty, redriven = LongTable(uri="", rows=0, bytes=0, sha256=""), self.redriven
        accounts = RunAccounts(**asdict(tally.accounts))
        mine = Generation(run_id=self.run_id, fingerprint=self.output.fingerprint.sha256, accounts=accounts)
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
            accounts=redriven.accounts_with(tally.accounts) if redriven else accounts,
            generations=(*redriven.manifest.generations, mine) if redriven else (mine,),
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


def versions() -> dict[str, str]:
    """Versions of what shapes the output."""
    names = ("batchpipe", "pyarrow", "pandas", "numpy", "dask", "distributed", "fsspec", "s3fs")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in names}}
