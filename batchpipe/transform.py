"""What a worker does with one split: open it, send its mini-batches through the chain, write one pending piece.

Also `run_chain`, the same chain without Dask or files. What comes before a run's first split is in `probe`.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import numpy as np

from batchpipe import __version__
from batchpipe.batch import NO_ORIGINS, MiniBatch, Origins, Records
from batchpipe.chain import Chain, StageRefused, open_chain
from batchpipe.convert import CastError
from batchpipe.errors import BatchpipeError, PoolError, RecordsFailedError
from batchpipe.job import Job
from batchpipe.manifest import SplitFailed, SplitResult
from batchpipe.orders import Orders
from batchpipe.outcome import FailureLimit, Outcome, new_stats
from batchpipe.parts import Piece, open_piece
from batchpipe.quarantine import open_quarantine
from batchpipe.redact import secrets_of
from batchpipe.source import Source
from batchpipe.split import Split
from batchpipe.stages import StageContext
from batchpipe.worker_chain import open_worker_chain

ALIKE = "have the stages answer every record alike; or state the columns, with types that hold all: output.columns"
REDRIVEN_COLUMNS = (
    "answer as the run that is redriven did, whose columns stay; or run the job again into another output.uri"
)


LONGEST_TASK_S = 3.0
"""A task that takes longer returns what it has: what was not returned is lost with its worker or its driver."""


def run_splits(splits: tuple[Split, ...], orders: Orders) -> list[SplitResult | SplitFailed]:
    """Run splits on this worker's chain, up to the first that fails, stops itself, or ends after LONGEST_TASK_S."""
    began = time.monotonic()
    chain = chain_of(splits, orders)
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
        if result.stopped or time.monotonic() - began >= LONGEST_TASK_S:
            break
    return outcomes


def chain_of(splits: tuple[Split, ...], orders: Orders) -> Chain:
    """This worker's chain for some splits, making requests as the run's first server advised, if that is known.

    Raises PoolError where the driver runs another version, and what opening a stage raises (2, 4).
    """
    if orders.version != __version__:
        msg = f"a worker runs batchpipe {__version__}, the driver {orders.version}"
        raise PoolError(msg, next=f"install batchpipe {orders.version} where the workers run")
    chain = open_worker_chain(orders.job, orders.place.run_id, isolated=any(split.isolated for split in splits))
    chain.follow(orders.schemas.advice)
    chain.answered.read = partial(read_answered, chain, orders)
    return chain


def read_answered(chain: Chain, orders: Orders) -> Records | None:
    """The record that is known to be answered, as the first stage is sent it; None where it cannot be read."""
    if (found := orders.schemas.answered) is None:
        return None
    split = Split(0, (found,))
    with (
        suppress(BatchpipeError),
        open_quarantine(orders.place, split) as quarantine,
        Source(split, orders, quarantine, FailureLimit(None)) as source,
    ):
        batches = source.batches(as_tables=chain.takes_tables, with_header=chain.takes_header)
        return next((batch.records for batch in batches), None)
    return None


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
        naming_what_was_sent(source, split),
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
def naming_what_was_sent(source: Source, split: Split) -> Iterator[None]:
    """Make of a refusal by a stage an error that names the records (5)."""
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
        where, next_ = source.describe(origins.slice(first, first + 1)), REDRIVEN_COLUMNS if split.is_picked else ALIKE
        raise RecordsFailedError(msg, where=where, next=next_) from error
    except (TypeError, ValueError) as error:
        raise misfit(error, source, origins) from error


def misfit(error: Exception, source: Source, origins: Origins) -> RecordsFailedError:
    """The error for answers that the output cannot hold, of which nobody knows which one is at fault."""
    more = f" and the {len(origins) - 1:,} after it" if len(origins) > 1 else ""
    return RecordsFailedError(
        f"an answer does not fit the output: {error}",
        where=f"{source.describe(origins)}{more}",
        next="mend what the last stage answers; or state output.format: raw, which takes it as it is",
    )


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
