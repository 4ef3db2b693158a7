"""What the first mini-batch decides before a run begins: whether the stages answer at all, and with which columns."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from batchpipe.batch import MiniBatch, Origins, Records
from batchpipe.chain import Chain
from batchpipe.convert import CastError, InputSchema, output_schema
from batchpipe.errors import JobError, StageStartError
from batchpipe.formats import FORMATS
from batchpipe.job import Job
from batchpipe.manifest import Failure, SplitResult
from batchpipe.orders import Orders, Schemas
from batchpipe.outcome import FailureLimit, Outcome, new_stats
from batchpipe.parts import add_source, as_columns
from batchpipe.quarantine import Quarantine, open_quarantine
from batchpipe.source import Source
from batchpipe.specs.arrow_types import arrow_type
from batchpipe.split import InputObject, Range, Split, pick
from batchpipe.storage import ObjectFile, open_store
from batchpipe.transform import chain_of, misfit, naming_what_was_sent
from batchpipe.worker_chain import open_worker_chain

FIRST_RECORDS = 16
"""So many of the first records must have failed, all of them, before a stage counts as one that answers nothing."""
MOST_FIRST_RECORDS = 1_000
"""Where more fail one after the other, the rest of the first mini-batch is not even tried."""


@dataclass(frozen=True, slots=True)
class Unproved:
    """Why a run ends before it begins: what became of the split at which that was certain."""

    result: SplitResult
    at_fault: Failure
    """The first failure of the stage that failed for most records; of reading where no stage did."""
    is_hopeless: bool
    """Whether no record was answered, of so many that the stage is at fault, and not each of them."""


def probe(splits: tuple[Split, ...], orders: Orders, is_all: bool, is_strict: bool = False) -> Schemas | Unproved:
    """Send mini-batches of these splits through the chain until a record is answered: what the columns are.

    Not proved where these splits hold no record, or all are dropped. Unproved where more records failed than may, or
    where none of the first ones is answered; `is_all` says that no others will be tried, `is_strict` that more failures
    than may be count where a record is answered, too.
    Raises what reading and opening the chain raise; no part is written.
    """
    chain = chain_of(splits, orders)
    found = orders.schemas.input or infer_input(splits, orders.job)
    schemas = Schemas(found, advice=orders.schemas.advice or chain.advice())
    trial = _Trial(chain, replace(orders, schemas=schemas), is_strict=is_strict)
    for split in splits:
        decided = trial.send(split, is_last=is_all and split is splits[-1])
        if decided is not None:
            return decided
    return schemas


class _Trial:
    """The first records on their way through the chain, until one is answered or too many have failed."""

    def __init__(self, chain: Chain, orders: Orders, *, is_strict: bool) -> None:
        self._chain = chain
        self._orders = orders
        self._is_strict = is_strict
        self._limit = orders.job.on_error.max_failed_records
        # Apart: rows that cannot be parsed must not keep the stages from showing that they answer the others.
        self._unread, self._unanswered = FailureLimit(self._limit), self._limit_of_stages()
        self._failed = self._dropped = 0
        self._failed_in = Counter[str]()
        """Records by the stage that failed for them."""
        self._has_answered = False
        self._first: list[Failure] = []

    def send(self, split: Split, *, is_last: bool) -> Schemas | Unproved | None:
        """Send a split's mini-batches; None where they decide nothing, so that the next split is to be tried."""
        chain, orders = self._chain, self._orders
        unread, unanswered = self._unread, self._unanswered
        with (
            open_quarantine(orders.place, split) as quarantine,
            Source(split, orders, quarantine, unread) as source,
            naming_what_was_sent(source, split),
        ):
            for batch in source.batches(as_tables=chain.takes_tables, with_header=chain.takes_header):
                # One at a time: most often the first one tells, and a second one would be worked on for nothing.
                for sent, outcome in chain.stream([batch], unanswered, new_stats()):
                    self._has_answered = self._has_answered or len(outcome.places) > 0
                    if self._has_answered and not (self._is_strict and self._is_beyond(unread, unanswered)):
                        try:
                            output = _output_schema(orders.job, outcome, sent, split)
                        except (TypeError, ValueError) as error:
                            raise misfit(error, source, sent.origins.take(outcome.places)) from error
                        answered = _place_of(sent.origins.take(outcome.places), split)
                        return replace(orders.schemas, output=output, is_proved=True, answered=answered)
                    source.settle(sent, outcome)
                    self._dropped += len(outcome.dropped)
                    self._failed_in.update(failed.stage for failed in outcome.failed)
                if self._has_answered or unanswered.is_spent or self._are_enough(self._failed + quarantine.count):
                    break
            self._failed += quarantine.count
            self._first += quarantine.first
            is_over = self._has_answered or unread.is_spent or unanswered.is_spent or self._are_enough(self._failed)
            if is_over or (is_last and self._failed and not self._dropped):
                enough = FIRST_RECORDS if is_over else 2  # where there are no others
                is_hopeless = not self._has_answered and not self._dropped and self._failed_in.total() >= enough
                return Unproved(self._result(split, source, quarantine), self._at_fault(), is_hopeless)
        return None

    def _limit_of_stages(self) -> FailureLimit:
        """As many as may fail, and at least so many as tell a stage that answers nothing from a record.

        But not of those that take long to fail, as by a timeout or by the death of a server.
        """
        if self._limit is None:
            return FailureLimit(MOST_FIRST_RECORDS)
        allowed = min(max(self._limit, FIRST_RECORDS - 1), MOST_FIRST_RECORDS)
        return FailureLimit(allowed, allowed_slow=self._limit)

    def _is_beyond(self, *limits: FailureLimit) -> bool:
        return self._limit is not None and max(limit.found for limit in limits) > self._limit

    def _are_enough(self, failed: int) -> bool:
        """Whether so many tell a stage that answers nothing. Where a number may fail it is that: see the limits."""
        return self._limit is None and failed >= FIRST_RECORDS and not self._dropped

    def _at_fault(self) -> Failure:
        most = {stage for stage, _ in self._failed_in.most_common(1)}
        return next((failure for failure in self._first if failure.stage in most), self._first[0])

    def _result(self, split: Split, source: Source, quarantine: Quarantine) -> SplitResult:
        kept, failures = quarantine.finish(), tuple(self._first)
        return SplitResult(split.index, source.results(), None, *kept, failures=failures, stopped=True)


def _place_of(answered: Origins, split: Split) -> Range | None:
    """The first of some records, as the range that holds it alone; None where nothing tells its place."""
    found = split.ranges[int(answered.ranges[0])]
    record, offset = int(answered.ordinals[0]) if found.is_first else -1, int(answered.offsets[0])
    return pick(found.object, [record], [offset]) if record >= 0 or offset >= 0 else None


def open_stages(orders: Orders) -> Mapping[str, Mapping[str, Any]]:
    """Open the stages, for a redrive, which knows its columns: what they advise."""
    return chain_of((), orders).advice()


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
