"""What a worker does with one split: open it, send its mini-batches through the chain, write one pending piece.

Also `run_chain`, the same chain without Dask or files, and the probe that proves the chain on the first mini-batch.
"""

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from batchpipe import __version__
from batchpipe.batch import NO_ORIGINS, MiniBatch, Origins, Records
from batchpipe.chain import Chain, StageRefused, new_stats, open_chain
from batchpipe.convert import CastError, InputSchema, output_schema
from batchpipe.errors import BatchpipeError, JobError, PoolError, RecordsFailedError, StageStartError
from batchpipe.formats import FORMATS
from batchpipe.invoke import FailureLimit, Outcome
from batchpipe.job import Job
from batchpipe.manifest import Failure, SplitFailed, SplitResult
from batchpipe.orders import Orders, Schemas
from batchpipe.parts import Piece, add_source, as_columns, open_piece
from batchpipe.quarantine import open_quarantine
from batchpipe.redact import secrets_of
from batchpipe.source import Source
from batchpipe.specs.arrow_types import arrow_type
from batchpipe.split import InputObject, Split
from batchpipe.stages import StageContext
from batchpipe.storage import ObjectFile, open_store
from batchpipe.worker_chain import open_worker_chain

REDRIVEN_COLUMNS = (
    "answer as the run that is redriven did, whose columns stay; or run the job again into another output.uri"
)


def run_splits(splits: tuple[Split, ...], orders: Orders) -> list[SplitResult | SplitFailed]:
    """Run consecutive splits on this worker's chain; stops at the first that fails or stops itself."""
    _same_version_or_raise(orders)
    chain = _open_chain(splits, orders)
    chain.follow(orders.schemas.advice)
    if orders.schemas.is_proved:
        chain.note_that_stages_fit()
    outcomes: list[SplitResult | SplitFailed] = []
    for split in splits:
        try:
            result = run_split(chain, split, orders)
        except BatchpipeError as error:
            outcomes.append(SplitFailed(split.index, error))
            break
        outcomes.append(result)
        if result.stopped:
            break
    return outcomes


def _open_chain(splits: tuple[Split, ...], orders: Orders) -> Chain:
    return open_worker_chain(orders.job, orders.place.run_id, isolated=any(split.isolated for split in splits))


def run_split(chain: Chain, split: Split, orders: Orders) -> SplitResult:
    """Stream one split through the chain into one pending piece.

    Raises InputError (3) where it cannot be read, RecordsFailedError (5) where answers do not fit the output,
    OutputError (7) where the piece cannot be written.
    """
    started, stats, limit = time.perf_counter(), new_stats(), FailureLimit(split.allowed_failures)
    schemas, write_s = orders.schemas, 0.0
    with (
        open_piece(orders.place, split, schemas.output, keeps_empty=not schemas.is_proved) as piece,
        open_quarantine(orders.place, split) as quarantine,
        Source(split, orders, quarantine, limit) as source,
        _naming_what_was_sent(source, split),
    ):
        batches = source.batches(as_tables=chain.takes_tables, with_header=chain.takes_header)
        for sent, outcome in chain.stream(batches, limit, stats):
            began = time.perf_counter()
            _write(piece, outcome, sent, source, split)
            write_s += time.perf_counter() - began
            source.settle(sent, outcome)
        piece.write(None, NO_ORIGINS, source.unparsed())
        quarantined, tracebacks = quarantine.finish()
        return SplitResult(
            split=split.index,
            ranges=source.results(),
            piece=None if limit.is_spent else piece.finish(),
            quarantine=quarantined,
            tracebacks=tracebacks,
            failures=tuple(quarantine.first),
            stopped=limit.is_spent,
            stages=dict(stats),
            read_s=source.read_s,
            write_s=write_s,
            seconds=time.perf_counter() - started,
        )


@contextmanager
def _naming_what_was_sent(source: Source, split: Split) -> Iterator[None]:
    try:
        yield
    except StageRefused as refused:
        why, origins = refused.why, refused.sent.origins
        more = f" and the {len(origins) - 1:,} sent with it" if len(origins) > 1 else ""
        raise RecordsFailedError(
            f"{why.message} ({why.location})" if why.location else why.message,
            where=f"{source.describe(origins)}{more}, in split {split.index}",
            next="mend the stage, then run it again",
        ) from why


def _write(piece: Piece, outcome: Outcome, sent: MiniBatch, source: Source, split: Split) -> None:
    origins = sent.origins.take(outcome.places)
    try:
        piece.write(outcome.records if len(origins) else None, origins, source.failed_of(sent, outcome))
    except CastError as error:
        first = error.index or 0
        msg = f"an answer does not fit the output: {error}"
        where, next_ = source.describe(origins.slice(first, first + 1)), REDRIVEN_COLUMNS if split.is_picked else ""
        raise RecordsFailedError(msg, where=where, next=next_) from error
    except (TypeError, ValueError) as error:
        msg = f"an answer does not fit the output: {error}"
        where = f"{source.describe(origins)} and the {len(origins) - 1:,} after it"
        raise RecordsFailedError(msg, where=where) from error


FIRST_RECORDS = 16
"""So many of the first records must have failed, all of them, before a stage counts as one that answers nothing."""
MOST_FIRST_RECORDS = 1_000
"""Where more fail one after the other, the rest of the first mini-batch is not even tried."""


def probe(splits: tuple[Split, ...], orders: Orders, is_all: bool, is_strict: bool = False) -> Schemas | SplitResult:
    """Send mini-batches of these splits through the chain until a record is answered: what the columns are.

    Not proved where these splits hold no record, or all are dropped. The result of a split that stopped where more
    records failed than may, or where none of the first ones is answered; `is_all` says that no others will be tried,
    `is_strict` that more failures than may be count where a record is answered, too.
    Raises what reading and opening the chain raise; no part is written.
    """
    _same_version_or_raise(orders)
    job = orders.job
    found = orders.schemas.input or infer_input(splits, job)
    chain = _open_chain(splits, orders)
    chain.follow(orders.schemas.advice)  # of an earlier start, where there was one
    schemas = Schemas(found, advice=orders.schemas.advice or chain.advice())
    orders = replace(orders, schemas=schemas)
    limit = job.on_error.max_failed_records
    allowed = MOST_FIRST_RECORDS if limit is None else min(limit, MOST_FIRST_RECORDS)
    failed, dropped, first = 0, 0, list[Failure]()
    for split in splits:
        # Apart: rows that cannot be parsed must not keep the stages from showing that they answer the others.
        unread, unanswered = FailureLimit(limit), FailureLimit(allowed)
        with (
            open_quarantine(orders.place, split) as quarantine,
            Source(split, orders, quarantine, unread) as source,
            _naming_what_was_sent(source, split),
        ):
            for batch in source.batches(as_tables=chain.takes_tables, with_header=chain.takes_header):
                # One at a time: most often the first one tells, and a second one would be worked on for nothing.
                for sent, outcome in chain.stream([batch], unanswered, new_stats()):
                    is_beyond = limit is not None and max(unread.found, unanswered.found) > limit
                    if len(outcome.places) and not (is_strict and is_beyond):
                        return replace(schemas, output=_output_schema(job, outcome, sent, split), is_proved=True)
                    source.settle(sent, outcome)
                    dropped += len(outcome.dropped)
                if unanswered.is_spent or (failed + quarantine.count >= FIRST_RECORDS and not dropped):
                    break
            failed += quarantine.count
            first += quarantine.first
            is_last = is_all and split is splits[-1] and failed > 0
            if unread.is_spent or unanswered.is_spent or ((failed >= FIRST_RECORDS or is_last) and not dropped):
                return SplitResult(
                    split.index, source.results(), None, *quarantine.finish(), failures=tuple(first), stopped=True
                )
    return schemas


def open_stages(orders: Orders) -> Mapping[str, Mapping[str, Any]]:
    """Open the stages, for a redrive, which knows its columns: what they advise."""
    _same_version_or_raise(orders)
    return _open_chain((), orders).advice()


def prove_nothing(orders: Orders) -> Schemas:
    """The columns of an output without a record: those stated, else those that callables answer to no records."""
    job, found = orders.job, orders.schemas.input
    stated = job.output.columns or {}
    answer: Records | None = None
    if stated and all(stated.values()):
        answer = pa.table({name: pa.array([], arrow_type(str(kind))) for name, kind in stated.items()})
    elif found is not None and not any(stage.is_http for stage in job.stages):
        answer = open_worker_chain(job, orders.place.run_id).answer_to_none(found.schema.empty_table())
    if job.output.format == "raw" or not isinstance(answer, pa.Table) or not answer.num_columns:
        return orders.schemas
    if job.output.add_source:
        answer = answer.append_column("_object", pa.array([], pa.string())).append_column(
            "_record", pa.array([], pa.int64())
        )
    return replace(orders.schemas, output=answer.schema)


def infer_input(splits: Iterable[Split], job: Job) -> InputSchema | None:
    """The columns of the dataset by its first objects; None for a format without columns."""
    spec = job.input

    def samples() -> Iterator[tuple[InputObject, ObjectFile]]:
        for one in (found.object for split in splits for found in split.ranges if found.is_first):
            if one.size:
                with open_store(one.uri, spec.storage_options).open(
                    one.uri, size=one.size, version=one.version
                ) as file:
                    yield one, file

    return FORMATS[spec.format].infer_schema(samples(), spec)


def run_chain(job: Job, table: Records) -> Outcome:
    """Send records through the stages of a job, here and now, without Dask or files: for tests of stages.

    Raises StageStartError or JobError where a stage cannot be opened, RecordsFailedError where one breaks its
    contract; records that fail are in the outcome.
    """
    batch = MiniBatch(table, Origins.of_range(0, 0, np.full(len(table), -1, np.int64)))
    with open_chain(job, StageContext("", 0, Path(), Path(), secrets_of(job)), None) as chain:
        try:
            return next(outcome for _, outcome in chain.stream([batch], FailureLimit(None), new_stats()))
        except StageRefused as refused:
            raise RecordsFailedError(refused.why.message, where=refused.why.location) from refused.why


def _output_schema(job: Job, outcome: Outcome, sent: MiniBatch, split: Split) -> pa.Schema | None:
    """What every answer is cast to: as stated, the rest as the first mini-batch's answer has it."""
    if job.output.format == "raw" or outcome.records is None:
        return None
    records = as_columns(outcome.records, job)
    if not isinstance(records, pa.Table):
        msg = f"the last stage answers bytes, which output.format {job.output.format} cannot hold"
        raise StageStartError(msg, next="set output.format: raw, or answer records")
    if job.output.add_source:
        records = add_source(records, sent.origins.take(outcome.places), split)
    try:
        return output_schema(records.schema, job.output.columns)
    except CastError as error:
        raise JobError(f"output.columns: {error}", where=str(job.path)) from error


def _same_version_or_raise(orders: Orders) -> None:
    if orders.version != __version__:
        msg = f"a worker runs batchpipe {__version__}, the driver {orders.version}"
        raise PoolError(msg, next=f"install batchpipe {orders.version} where the workers run")
