"""One stage, one mini-batch: attempts with backoff, then halving until the records that fail stand alone."""

import asyncio
import math
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

from batchpipe import gauge
from batchpipe.batch import ByteRecords, Records, slice_records
from batchpipe.errors import RecordsFailedError
from batchpipe.manifest import StageStats
from batchpipe.outcome import NONE, FailedRecord, FailureLimit, Outcome, Part, Stats, new_stats, outvoted
from batchpipe.stages import WRONG_COUNT, Answer, InvocationFailed, OpenStage, Remedy, in_flight

FIRST_DELAY_S = 0.2
LONGEST_DELAY_S = 60.0
FAILURES_IN_A_ROW = 100
"""Records that fail one after the other before a stage must show that it still answers anything."""
DEATH_WEIGHT = 25
"""What the death of a server counts for among those failures: each costs the start of another one."""
DEATHS_THAT_PROVE = 2


class Invoker:
    """An open stage, how often it is asked again, and what was learned of it so far. Belongs to a worker's chain."""

    def __init__(self, stage: OpenStage, max_retries: int, longest_wait_s: float = math.inf) -> None:
        self.stage = stage
        self._max_retries = max_retries
        self._longest_wait_s = longest_wait_s
        """What a server may ask for: beyond that the run would end while it waits, as nothing moves."""
        self.find_proof: Callable[[], Awaitable[Records | None]] = _know_none
        """Finds a record that this stage answered in another worker, for one that has answered none here."""
        self._proof: Records | None = None
        """A record that the stage answered: asked again, it tells bad records from a stage that answers no more."""
        self._failed_in_row = 0
        self._patience = FAILURES_IN_A_ROW
        self._too_large: int | None = None
        """Bytes of the smallest mini-batch that was too large for the stage: as many are not sent again."""
        self._beginning = asyncio.Lock()
        self._runners = asyncio.Semaphore(stage.concurrency)
        """For records that are requests of their own: so many on their way, of one mini-batch before the next's."""

    async def invoke(self, records: Records, limit: FailureLimit, stats: Stats) -> Outcome:
        """Send records to the stage and return what became of each one.

        At most about 2 x log2(n) invocations for each record that fails, and none once the limit is spent: the
        records not tried then appear nowhere in the outcome. Raises InvocationFailed where the stage breaks its
        contract, RecordsFailedError where it fails for whatever it is sent.
        """
        search = _Search(limit, stats, self._max_retries, self.stage.is_exclusive)
        return self._together(await self._settle(records, search), search)

    async def _settle(self, records: Records, search: "_Search") -> list[Part]:
        """What became of the records, in the slices that were answered or failed."""
        if search.limit.is_spent:
            return []
        if len(records) > 1 and self.stage.takes_one(records):
            return await self._each(records, search)
        if len(records) > 1 and self._too_large is not None and records.nbytes >= self._too_large:
            return await self._halves(records, search)
        tries = _Tries(search, is_single=len(records) == 1)
        while True:
            try:
                answer = await self._attempt(records, search.stats, alone=tries.alone)
            except InvocationFailed as failure:
                if failure.remedy is Remedy.NONE:
                    raise
                delay_s = tries.delay_s(failure)
                if failure.remedy is Remedy.DIED:
                    await self._doubt(failure, weight=DEATH_WEIGHT)
                if delay_s is None:
                    return await self._give_up(records, search, tries, failure)
                await self._wait(delay_s, failure)
            else:
                self._failed_in_row = 0
                self._proof = _one_of(records) if self._proof is None else self._proof
                return [(0, Outcome.of(answer, len(records), self.stage.name, search.stats))]

    async def _give_up(self, records: Records, search: "_Search", tries: "_Tries", why: InvocationFailed) -> list[Part]:
        """After the last attempt: a single record has failed, others are sought by halving."""
        if len(records) > 1:
            if why.remedy is Remedy.RETRY and not search.is_halving:
                await self._prove(why)  # every attempt failed, with backoff: is it there at all?
            if why.remedy is Remedy.SMALLER:
                self._too_large = min(records.nbytes, self._too_large or records.nbytes)
            parts = await self._halves(records, search.halved(alone=tries.alone))
            answered = sum(len(outcome.places) for _, outcome in parts)
            if why.reason == WRONG_COUNT and answered == len(records) and not search.is_halving:
                await self._count_again(records, search, why)
            return parts
        search.limit.add(why)
        search.stats[self.stage.name] += StageStats(failed=1)
        await self._doubt(why, weight=1)
        return [(0, Outcome(None, NONE, (FailedRecord(0, self.stage.name, search.lean(why), tries.attempts),)))]

    async def _count_again(self, records: Records, search: "_Search", why: InvocationFailed) -> None:
        """Where no record is to blame for a wrong count: was it chance, or does the stage not go record by record?

        Raises InvocationFailed for the latter: its answers to fewer records at once are right by accident (G8).
        """
        try:
            await self._attempt(records, search.stats, alone=search.alone)
        except InvocationFailed as again:
            if again.reason == WRONG_COUNT:
                message = f"{again.message}, and sent fewer at once each is answered: answer record by record"
                raise self._breaks_contract(message) from why

    def _breaks_contract(self, message: str) -> InvocationFailed:
        return InvocationFailed("WrongAnswer", f"stage {self.stage.name!r} {message}", Remedy.NONE)

    async def _halves(self, records: Records, search: "_Search") -> list[Part]:
        middle = len(records) // 2
        left = await self._settle(slice_records(records, 0, middle), search)
        right = await self._settle(slice_records(records, middle, len(records)), search)
        return [*left, *_shifted(right, by=middle)]

    def _together(self, parts: list[Part], search: "_Search") -> Outcome:
        """One outcome of all parts. Raises InvocationFailed where nothing can hold what was answered."""
        try:
            return Outcome.merge(self._without_outvoted(parts, search))
        except TypeError as exc:
            raise self._breaks_contract(f"answered {exc}") from exc

    def _without_outvoted(self, parts: list[Part], search: "_Search") -> list[Part]:
        """Fail the records that were answered as another type than most of their mini-batch."""
        odd = outvoted(parts)
        for place, (first, outcome) in enumerate(parts):
            if first in odd:
                count = len(outcome.places)
                search.limit.add(odd[first], count)
                search.stats[self.stage.name] += StageStats(answered=-count, failed=count)
                parts[place] = (first, outcome.failing(self.stage.name, odd[first]))
        return parts

    async def _each(self, records: Records, search: "_Search") -> list[Part]:
        """Send a stage that takes one record a request each by itself: one that fails is tried again alone, at once.

        Mini-batches take turns whole, so that the oldest is answered first, and none makes ready what has to wait.
        """
        settled: dict[int, list[Part]] = {}
        waiting = deque(range(len(records)))

        async def run(place: int | None) -> None:
            try:
                while place is not None:
                    settled[place] = await self._settle(slice_records(records, place, place + 1), search)
                    place = waiting.popleft() if waiting else None
            except BaseException:
                waiting.clear()
                raise

        running: list[asyncio.Task[None]] = []
        try:
            async with self._beginning:
                while waiting:
                    await self._runners.acquire()
                    if not waiting:  # those that run took the last ones meanwhile
                        self._runners.release()
                        break
                    runner = asyncio.create_task(run(waiting.popleft()))
                    runner.add_done_callback(lambda _: self._runners.release())
                    running.append(runner)
            await asyncio.gather(*running)
        finally:
            for runner in running:
                runner.cancel()
        return [part for place in sorted(settled) for part in _shifted(settled[place], by=place)]

    async def _attempt(self, records: Records, stats: Stats, *, alone: bool) -> Answer:
        started = time.perf_counter()
        try:
            return await self.stage.invoke(records, alone=alone)
        finally:
            seconds = time.perf_counter() - started
            stats[self.stage.name] += StageStats(invocations=1, records=len(records), seconds=seconds)
            gauge.show("moved", 1)  # a run whose last record takes every attempt is not stuck: each has an end

    async def _doubt(self, why: InvocationFailed, weight: int) -> None:
        """Count what failed in a row. Where it is much the stage must prove itself, and then twice as much may fail."""
        self._failed_in_row += weight
        if self._failed_in_row >= self._patience:
            self._failed_in_row = 0  # others that fail meanwhile need not ask as well
            try:
                await self._prove(why)
            except RecordsFailedError:
                self._failed_in_row = self._patience  # a split that is run again hears of it at its first failure
                raise
            self._patience *= 2

    async def _prove(self, why: InvocationFailed) -> None:
        """Ask the stage again for what it answered before: where it answers, the records that failed are at fault.

        Raises RecordsFailedError where it does not: a stage that is broken costs one error and not every record. Where
        no record is known that it answered, nothing is learned.
        """
        if self._proof is None and (found := await self.find_proof()) is not None:
            self._proof = _one_of(found)
        search = _Search(FailureLimit(None), new_stats(), self._max_retries, why.remedy is Remedy.DIED)
        tries = _Tries(search, is_single=True)
        while self._proof is not None:
            try:
                await self._attempt(self._proof, search.stats, alone=tries.alone)
                return
            except InvocationFailed as failure:
                if (delay_s := tries.delay_s(failure)) is None:
                    raise self._broken(failure) from why
                await self._wait(delay_s, failure)

    async def _wait(self, delay_s: float, why: InvocationFailed) -> None:
        """Wait for the next attempt. Raises RecordsFailedError where the run would end meanwhile."""
        if (wanted_s := why.retry_after_s or 0.0) > self._longest_wait_s:
            asked = f"stage {self.stage.name!r} asks to be left alone for {wanted_s:,.0f} s"
            allowed = f"no_progress_timeout_s allows ({self._longest_wait_s:,.0f} s)"
            raise RecordsFailedError(
                f"{asked}, longer than {allowed}: {why}",
                next="run the same command again after that: it resumes, and finished splits are kept; "
                f"or wait for it in the run: --set on_error.no_progress_timeout_s={2 * wanted_s:.0f}",
            )
        with in_flight.Invocation(self.stage.name, "waiting for another attempt"):
            while delay_s > 0:
                slice_s = min(delay_s, self._longest_wait_s / 3)
                await asyncio.sleep(slice_s)
                gauge.show("moved", 1)  # none is waited for without an end, so that the run is not stuck
                delay_s -= slice_s

    def _broken(self, failure: InvocationFailed) -> RecordsFailedError:
        message = f"stage {self.stage.name!r} fails for whatever it is sent, also for a record that it answered before"
        return RecordsFailedError(
            f"{message}: {failure}",
            where=failure.location,
            next="mend the stage; the same command then resumes the run, and finished splits are kept",
        )


@dataclass(frozen=True, slots=True)
class _Search:
    """What an invocation and its halvings share: the split's limit and account, further attempts, sent alone or not."""

    limit: FailureLimit
    stats: Stats
    retries: int
    alone: bool
    is_halving: bool = False
    tracebacks: dict[tuple[str, str], str] = field(default_factory=dict)
    """The first of each kind, of which one is kept: a mini-batch may hold a hundred thousand records that fail."""

    def lean(self, why: InvocationFailed) -> InvocationFailed:
        """A failure without the calls that it came through, which hold on to all that they were called with."""
        text = self.tracebacks.setdefault((why.reason, why.location), why.traceback)
        return InvocationFailed(why.reason, why.message, why.remedy, location=why.location, traceback=text)

    def halved(self, *, alone: bool) -> "_Search":
        """A halving gets at most one quick second attempt: the whole mini-batch has had its backoff."""
        return replace(self, retries=min(self.retries, 1), alone=alone, is_halving=True)


class _Tries:
    """The attempts at one invocation, and whether another one may help.

    A death proves little: it may have been another request's doing, or chance. So the same records are sent once more
    with nothing beside them, and a single record has failed only once its server died of it twice, alone.
    """

    def __init__(self, search: _Search, *, is_single: bool) -> None:
        self.attempts = 0
        self.alone = search.alone
        self._retries = search.retries
        self._is_single = is_single
        self._retried = self._deaths = 0

    def delay_s(self, failure: InvocationFailed) -> float | None:
        """Count an attempt that failed; seconds until the next one, None where there is none."""
        self.attempts += 1
        if failure.remedy is Remedy.DIED:
            was_alone, self.alone = self.alone, True
            self._deaths += was_alone
            return 0.0 if not was_alone or (self._is_single and self._deaths < DEATHS_THAT_PROVE) else None
        if failure.remedy is not Remedy.RETRY or self._retried >= self._retries:
            return None
        self._retried += 1
        return _delay_s(self._retried, failure.retry_after_s)


def _shifted(parts: Iterable[Part], by: int) -> Iterator[Part]:
    return ((first + by, outcome) for first, outcome in parts)


async def _know_none() -> None:
    """Know no record that the stage answered."""


def _one_of(records: Records) -> Records:
    """The first record, in memory of its own: a slice would keep its whole mini-batch."""
    one = slice_records(records, 0, 1)
    return ByteRecords.concat([one]) if isinstance(one, ByteRecords) else one.take([0])


def _delay_s(attempts: int, retry_after_s: float | None) -> float:
    """Exponential backoff, half of it by chance so that workers spread; never sooner than the server asked for."""
    ceiling = min(LONGEST_DELAY_S, FIRST_DELAY_S * 2 ** (attempts - 1))
    return max(retry_after_s or 0.0, random.uniform(ceiling / 2, ceiling))
