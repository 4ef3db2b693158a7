"""A worker's open stages: mini-batches in, their outcomes out in order, the bytes in flight bounded.

The chain belongs to the worker, is opened once, and owns the limits: however many splits run on it, a stage never
has more invocations in flight than it allows.
"""

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, CancelledError, Future, ThreadPoolExecutor, wait
from contextlib import asynccontextmanager, suppress
from copy import copy
from dataclasses import dataclass
from functools import partial
from heapq import heappop, heappush
from itertools import count, pairwise
from pathlib import Path
from typing import Any, Self

import numpy as np

from batchpipe.batch import MiniBatch, Records
from batchpipe.errors import PoolError
from batchpipe.invoke import Invoker
from batchpipe.job import Job, StageSpec
from batchpipe.manifest import StageStats
from batchpipe.outcome import FailedRecord, FailureLimit, Outcome
from batchpipe.stages import InvocationFailed, OpenStage, StageContext, open_stage
from batchpipe.stages.callable import CallableStage
from batchpipe.stages.child import ChildStage, SharedProcess
from batchpipe.stages.contract import Advice
from batchpipe.stages.http import HttpStage
from batchpipe.stages.watcher import Watcher

TICK_S = 0.1


class StageRefused(Exception):
    """What a stage did with a mini-batch breaks its contract, so that nothing more is sent to it."""

    def __init__(self, sent: MiniBatch, why: InvocationFailed) -> None:
        super().__init__(sent, why)
        self.sent = sent
        self.why = why


class Slots:
    """The invocations that one stage may have in flight. Who waits is let in by the age of its split, then in order.

    Splits that took turns would end together, and leave the stage idle while all of them finish and begin.
    """

    def __init__(self, concurrency: int) -> None:
        self._free = concurrency
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []
        self._arrivals = count()

    @asynccontextmanager
    async def one(self, age: int) -> AsyncIterator[None]:
        """Hold one of them; the lower the age, the sooner it is given."""
        if self._free:
            self._free -= 1
        else:
            await self._turn(age)
        try:
            yield
        finally:
            self._give_back()

    async def _turn(self, age: int) -> None:
        turn = asyncio.get_running_loop().create_future()
        heappush(self._waiting, (age, next(self._arrivals), turn))
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # it was given just before
                self._give_back()
            raise

    def _give_back(self) -> None:
        while self._waiting:
            *_, turn = heappop(self._waiting)
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1


@dataclass(slots=True)
class Answered:
    """A record that all stages answered when the run began, of which a task tells how it is read."""

    read: Callable[[], Records | None] = lambda: None
    """As the first stage is sent it; None where it cannot be read any more."""


class Chain:
    """The open stages of one worker and the event loop they run on. A context manager; closing it closes them."""

    def __init__(self, invokers: Sequence[Invoker], loop: asyncio.AbstractEventLoop) -> None:
        self.stages = tuple(invoker.stage for invoker in invokers)
        self._invokers = list(invokers)
        self._loop = loop
        self._slots = [Slots(stage.concurrency) for stage in self.stages]
        self._ages = count()
        self.answered = Answered()
        for place, invoker in enumerate(invokers):
            invoker.find_proof = partial(self._answered_before, place)

    def with_children(self, job: Job, watcher: Watcher, scratch: Path) -> "Chain":
        """The same chain with its callables in child processes, for splits that lost their worker.

        Callables that hand each other DataFrames share one. Servers, and how many requests each may have in flight,
        are shared with this chain.
        """
        isolated = copy(self)
        isolated._invokers, isolated._slots = list(self._invokers), list(self._slots)
        stages = list(self.stages)
        shared: tuple[SharedProcess, Slots] | None = None
        for place, (stage, spec) in enumerate(zip(self.stages, job.stages, strict=True)):
            if isinstance(stage, CallableStage):
                process, slots = shared or (SharedProcess(job, watcher, scratch), Slots(ChildStage.concurrency))
                stages[place] = child = ChildStage(spec, stage, process)
                isolated._invokers[place] = _invoker(child, spec, job)
                isolated._invokers[place].find_proof = partial(isolated._answered_before, place)
                isolated._slots[place] = slots
                shared = (process, slots) if stage.hands_on_frames else None
        isolated.stages = tuple(stages)
        return isolated

    @property
    def takes_tables(self) -> bool:
        """Whether the first stage is given tables, so that text must be parsed before it."""
        return self.stages[0].takes_table

    @property
    def takes_header(self) -> bool:
        """Whether the first stage wants the names of columns before records of CSV."""
        return isinstance(self.stages[0], HttpStage) and self.stages[0].exchange.header

    def advice(self) -> dict[str, dict[str, object]]:
        """What servers said of themselves, by stage; nothing for callables."""
        return {stage.name: stage.advice.as_document() for stage in self.stages if isinstance(stage, HttpStage)}

    def follow(self, advice: Mapping[str, Mapping[str, Any]]) -> None:
        """Make requests as the servers advised that the first mini-batch was tried on, by stage."""
        for stage in self.stages:
            if isinstance(stage, HttpStage) and stage.name in advice:
                stage.follow(Advice.of(advice[stage.name]))

    def note_that_stages_fit(self) -> None:
        """Have been told by the first mini-batch, wherever it was tried: what does not fit is a record's fault."""
        for stage in self.stages:
            if isinstance(stage, HttpStage):
                stage.has_fitted = True

    @property
    def depth(self) -> int:
        """Mini-batches one split keeps in flight: enough to keep every HTTP stage full, two for callables alone.

        A quarter more than may be in flight, as answers that come early wait for the ones before them.
        """
        side_by_side = [stage.concurrency for stage in self.stages if stage.concurrency > 1]
        return max(2, 1 + sum(side_by_side) + sum(side_by_side) // 4)

    def stream(
        self, batches: Iterable[MiniBatch], limit: FailureLimit, stats: dict[str, StageStats]
    ) -> Iterator[tuple[MiniBatch, Outcome]]:
        """Send mini-batches through all stages; yield each with its outcome, in the order they came in.

        Ends early, without the rest, once `limit` is spent. Raises StageRefused.
        """
        in_flight: deque[tuple[MiniBatch, Future[Outcome]]] = deque()
        age = next(self._ages)
        try:
            for batch in batches:
                in_flight.append((batch, self._start(self._transform(batch, age, limit, stats))))
                if len(in_flight) >= self.depth:
                    yield _result(*in_flight.popleft())
                if limit.is_spent:
                    break
            while in_flight:
                yield _result(*in_flight.popleft())
        finally:
            for _, future in in_flight:
                future.cancel()

    def answer_to_none(self, records: Records) -> Records | None:
        """What the stages answer where there is no record, which tells its columns; None where one of them refuses."""

        async def through() -> Records:
            answer = records
            for stage in self.stages:
                answer = (await stage.invoke(answer)).records
            return answer

        with suppress(InvocationFailed):
            return asyncio.run_coroutine_threadsafe(through(), self._loop).result()
        return None

    async def _transform(
        self, batch: MiniBatch, age: int, limit: FailureLimit, stats: dict[str, StageStats]
    ) -> Outcome:
        """One mini-batch through the whole chain; places stay those of the mini-batch as it was sent."""
        outcome = Outcome(batch.records, np.arange(len(batch), dtype=np.int64))
        for invoker, slots in zip(self._invokers, self._slots, strict=True):
            if outcome.records is None or not len(outcome.places):
                break
            async with slots.one(age):
                answer = await invoker.invoke(outcome.records, limit, stats)
            outcome = _compose(outcome, answer)
        return outcome

    async def _answered_before(self, place: int) -> Records | None:
        """What the stage at this place is sent of the record that all answered; None where that cannot be told."""
        records = await asyncio.to_thread(self.answered.read)
        for stage in self.stages[:place]:
            if records is None:
                break
            try:
                records = (await stage.invoke(records)).records
            except InvocationFailed:
                return None
        return records if records is not None and len(records) else None

    def _start(self, coroutine: Coroutine[Any, Any, Outcome]) -> "Future[Outcome]":
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def close_children(self) -> None:
        """Close what `with_children` added; all else belongs to the chain it was made of."""
        for stage in self.stages:
            if isinstance(stage, ChildStage):
                stage.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close every stage, then the loop. May be called twice."""
        # Side by side: each may take some seconds until what it started has ended.
        with ThreadPoolExecutor(len(self.stages), thread_name_prefix="close") as threads:
            list(threads.map(lambda stage: stage.close(), self.stages))
        with suppress(RuntimeError):  # the loop is closed already
            self._loop.call_soon_threadsafe(self._loop.stop)


def _result(sent: MiniBatch, future: "Future[Outcome]") -> tuple[MiniBatch, Outcome]:
    try:
        return sent, future.result()
    except InvocationFailed as why:
        raise StageRefused(sent, why) from why
    except CancelledError as closed:
        raise PoolError("the chain was closed while a mini-batch was in it: its driver is gone") from closed


def _compose(before: Outcome, answer: Outcome) -> Outcome:
    """The outcome of two stages in a row, in places of the first one's records."""
    if len(answer.places) == len(before.places):  # as nearly always: every record was answered, in order
        return Outcome(answer.records, before.places, before.failed, before.dropped)
    failed = tuple(
        FailedRecord(int(before.places[late.place]), late.stage, late.why, late.attempts) for late in answer.failed
    )
    return Outcome(
        answer.records,
        before.places[answer.places],
        before.failed + failed,
        np.concatenate([before.dropped, before.places[answer.dropped]]),
    )


def open_chain(job: Job, context: StageContext, watcher: Watcher | None, ended: threading.Event | None = None) -> Chain:
    """Open all stages of a job, side by side; `watcher` is that of the worker, where there are processes to start.

    Raises the first error, with everything that was opened closed again and what was still starting given up. Setting
    `ended` gives all of them up.
    """
    cancelled, first = threading.Event(), None
    loop = asyncio.new_event_loop()
    threading.Thread(target=_run, args=(loop,), name="chain", daemon=True).start()
    with ThreadPoolExecutor(len(job.stages), thread_name_prefix="open") as threads:
        opening = [threads.submit(open_stage, stage, job, context, watcher, cancelled) for stage in job.stages]
        waiting = set(opening)
        while waiting and not cancelled.is_set():
            done, waiting = wait(waiting, timeout=TICK_S, return_when=FIRST_EXCEPTION)
            first = first or next((error for future in done if (error := future.exception())), None)
            if first or (ended and ended.is_set()):
                cancelled.set()
    first = first or next((error for future in opening if (error := future.exception())), None)
    if first is not None:
        for future in opening:
            if future.exception() is None:
                future.result().close()
        loop.call_soon_threadsafe(loop.stop)
        raise first
    stages = [future.result() for future in opening]
    for stage, following in pairwise(stages):
        if isinstance(stage, CallableStage) and isinstance(following, CallableStage):
            stage.hands_on_frames = following.takes_frames
    return Chain([_invoker(stage, spec, job) for stage, spec in zip(stages, job.stages, strict=True)], loop)


def _invoker(stage: OpenStage, spec: StageSpec, job: Job) -> Invoker:
    return Invoker(stage, spec.invocations_max_retries, job.on_error.no_progress_timeout_s)


def _run(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
    finally:
        # A split that waits for an answer must hear that none will come, or it would hold its worker's thread for ever.
        unanswered = asyncio.all_tasks(loop)
        for task in unanswered:
            task.cancel()
        loop.run_until_complete(asyncio.gather(*unanswered, return_exceptions=True))
        loop.close()
