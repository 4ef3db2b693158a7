"""One stage, one mini-batch: attempts with backoff, then halving until the records that fail stand alone."""

import asyncio
import random
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from operator import itemgetter

import numpy as np

from batchpipe.batch import Int64s, Records, concat_records, slice_records
from batchpipe.manifest import StageStats
from batchpipe.stages import Answer, InvocationFailed, OpenStage, Remedy

FIRST_DELAY_S = 0.2
LONGEST_DELAY_S = 60.0

NONE: Int64s = np.empty(0, np.int64)


@dataclass(frozen=True, slots=True)
class FailedRecord:
    """A record that failed for good: its place among those sent, the stage, why, and after how many attempts."""

    place: int
    stage: str
    why: InvocationFailed
    attempts: int


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """What became of the records sent: answers with the places they belong to, failures, and places dropped."""

    records: Records | None
    places: Int64s
    failed: tuple[FailedRecord, ...] = ()
    dropped: Int64s = field(default_factory=lambda: NONE)

    @classmethod
    def merge(cls, parts: Iterable[tuple[int, "Outcome"]]) -> "Outcome":
        """Put outcomes of consecutive slices together; each comes with the place its slice begins at.

        Raises InvocationFailed where some answers are tables and others bytes: nothing can hold both.
        """
        shifted = [(first, outcome) for first, outcome in parts]
        records = [outcome.records for _, outcome in shifted if outcome.records is not None and len(outcome.places)]
        if len({type(each) for each in records}) > 1:
            message = "answered some records as a table and others as bytes"
            raise InvocationFailed("WrongAnswer", message, Remedy.NONE)
        return cls(
            concat_records(records) if records else None,
            np.concatenate([outcome.places + first for first, outcome in shifted]),
            tuple(_moved(failed, first) for first, outcome in shifted for failed in outcome.failed),
            np.concatenate([outcome.dropped + first for first, outcome in shifted]),
        )


def _moved(failed: FailedRecord, by: int) -> FailedRecord:
    return FailedRecord(failed.place + by, failed.stage, failed.why, failed.attempts)


@dataclass(slots=True)
class FailureLimit:
    """How many more records of this split may fail before it stops itself; None is no limit."""

    allowed: int | None
    found: int = 0

    @property
    def is_spent(self) -> bool:
        """Whether more records failed than are allowed, so that finding further ones is of no use."""
        return self.allowed is not None and self.found > self.allowed


async def invoke(
    stage: OpenStage, records: Records, max_retries: int, limit: FailureLimit, stats: dict[str, StageStats]
) -> Outcome:
    """Send records to a stage and return what became of each one.

    At most about 2 x log2(n) invocations for each record that fails, and none once the limit is spent: the
    records not tried then appear nowhere in the outcome. Raises InvocationFailed where the stage breaks its contract.
    """
    if limit.is_spent:
        return Outcome(None, NONE)
    if len(records) > 1 and stage.takes_one(records):
        return await _invoke_each(stage, records, max_retries, limit, stats)
    attempts = 0
    while True:
        attempts += 1
        try:
            return _answered(await _attempt(stage, records, stats), len(records), stage.name, stats)
        except InvocationFailed as failure:
            if failure.remedy is Remedy.NONE:
                raise
            if failure.remedy is not Remedy.RETRY or attempts > max_retries:
                why = failure
                break
            await asyncio.sleep(_delay_s(attempts, failure.retry_after_s))
    if len(records) == 1:
        limit.found += 1
        stats[stage.name] += StageStats(failed=1)
        return Outcome(None, NONE, (FailedRecord(0, stage.name, why, attempts),))
    middle = len(records) // 2
    # A halving gets at most one quick second attempt: the whole mini-batch has had its backoff.
    retries = min(max_retries, 1)
    left = await invoke(stage, slice_records(records, 0, middle), retries, limit, stats)
    right = await invoke(stage, slice_records(records, middle, len(records)), retries, limit, stats)
    return Outcome.merge([(0, left), (middle, right)])


async def _invoke_each(
    stage: OpenStage, records: Records, max_retries: int, limit: FailureLimit, stats: dict[str, StageStats]
) -> Outcome:
    """Send a stage that takes one record a request each by itself: one that fails is tried again alone, at once."""
    outcomes: dict[int, Outcome] = {}
    places = iter(range(len(records)))

    async def run() -> None:
        for i in places:
            outcomes[i] = await invoke(stage, slice_records(records, i, i + 1), max_retries, limit, stats)

    running = [asyncio.ensure_future(run()) for _ in range(min(stage.concurrency, len(records)))]
    try:
        await asyncio.gather(*running)
    finally:
        for runner in running:
            runner.cancel()
    return Outcome.merge(sorted(outcomes.items(), key=itemgetter(0)))


async def _attempt(stage: OpenStage, records: Records, stats: dict[str, StageStats]) -> Answer:
    started = time.perf_counter()
    try:
        return await stage.invoke(records)
    finally:
        seconds = time.perf_counter() - started
        stats[stage.name] += StageStats(invocations=1, records=len(records), seconds=seconds)


def _answered(answer: Answer, sent: int, name: str, stats: dict[str, StageStats]) -> Outcome:
    if answer.kept is None:
        stats[name] += StageStats(answered=sent)
        return Outcome(answer.records, np.arange(sent, dtype=np.int64))
    places, dropped = np.flatnonzero(answer.kept), np.flatnonzero(~answer.kept)
    stats[name] += StageStats(answered=len(places), dropped=len(dropped))
    return Outcome(answer.records, places.astype(np.int64), (), dropped.astype(np.int64))


def _delay_s(attempts: int, retry_after_s: float | None) -> float:
    """Exponential backoff with full jitter, never sooner than the server asked for."""
    ceiling = min(LONGEST_DELAY_S, FIRST_DELAY_S * 2 ** (attempts - 1))
    return max(retry_after_s or 0.0, random.uniform(ceiling / 2, ceiling))
