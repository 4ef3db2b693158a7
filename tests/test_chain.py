"""The chain and its invocations: order kept, depth bounded, bad records alone, an early stop at the limit."""

import asyncio
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchpipe.batch import MiniBatch, Origins, Records
from batchpipe.chain import Chain, Slots, StageRefused, _run
from batchpipe.errors import PoolError
from batchpipe.invoke import Invoker
from batchpipe.orders import Orders, Place, Schemas
from batchpipe.outcome import FailureLimit, new_stats
from batchpipe.stages import Answer, InvocationFailed, Remedy
from tests.doubling import Doubling, numbers_of
from tests.jobs import until
from tests.opened_stage import make_job


@contextmanager
def open_chain_of(*stages: Doubling) -> Iterator[Chain]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=_run, args=(loop,), daemon=True)
    thread.start()
    with Chain([Invoker(stage, 0) for stage in stages], loop) as chain:
        yield chain
    thread.join()


def batches(sizes: Sequence[int]) -> Iterator[MiniBatch]:
    first = 0
    for size in sizes:
        table = pa.table({"n": pa.array(range(first, first + size), pa.int64())})
        yield MiniBatch(table, Origins.of_range(0, first, np.full(size, -1, np.int64)))
        first += size


HTTP, CALLABLE = {"endpoint": {"url": "http://a"}}, {"callable": "math:sqrt"}


@pytest.mark.parametrize(("stage", "is_proved", "together"), [(HTTP, True, 64), (HTTP, False, 1), (CALLABLE, True, 1)])
def test_single_records_travel_together_only_where_all_stages_take_one(tmp_path, stage, is_proved, together):
    job = make_job(tmp_path, {"endpoint": {"url": "http://b"}}, stage, batch={"max_records": 1})

    assert Orders(Place(job, "run", "", ""), Schemas(is_proved=is_proved)).max_batch_records == together


@settings(deadline=None)
@given(st.lists(st.integers(1, 20), max_size=12), st.sets(st.integers(0, 100)), st.integers(2, 5))
def test_G1_two_stages_account_for_every_record_in_order(sizes, bad, drops):
    stages = Doubling(bad), Doubling(drops=2 * drops)
    with open_chain_of(*stages) as chain:
        outcomes = list(chain.stream(batches(sizes), FailureLimit(None), new_stats()))

    assert [len(sent) for sent, _ in outcomes] == sizes
    for sent, outcome in outcomes:
        places = [*outcome.places, *outcome.dropped, *(failed.place for failed in outcome.failed)]
        assert sorted(places) == list(range(len(sent)))
        first = int(sent.origins.ordinals[0])
        assert numbers_of(outcome) == [4 * (first + place) for place in outcome.places]
        assert {first + failed.place for failed in outcome.failed} <= bad


@pytest.mark.parametrize(("concurrency", "depth"), [(1, 2), (3, 4), (4, 6)])
def test_no_more_mini_batches_are_taken_than_the_depth_and_none_more_are_inside_than_allowed(concurrency, depth):
    stage, taken = Doubling(concurrency=concurrency), 0

    def counted() -> Iterator[MiniBatch]:
        nonlocal taken
        for batch in batches([1] * 50):
            taken += 1
            yield batch

    with open_chain_of(stage) as chain:
        assert chain.depth == depth
        for settled, _ in enumerate(chain.stream(counted(), FailureLimit(None), new_stats())):
            assert taken <= settled + depth
    assert 1 <= stage.most_inside <= concurrency


def test_what_waits_for_a_stage_is_let_in_by_the_age_of_its_split():
    entered: list[str] = []

    async def use(slots: Slots, name: str, age: int) -> None:
        async with slots.one(age):
            entered.append(name)

    async def main() -> None:
        slots = Slots(1)
        async with slots.one(0):
            waiting = [
                asyncio.ensure_future(use(slots, name, age))
                for name, age in [("second's", 1), ("its next", 1), ("first's", 0), ("first's next", 0)]
            ]
            await asyncio.sleep(0)
        await asyncio.gather(*waiting)

    asyncio.run(main())

    assert entered == ["first's", "first's next", "second's", "its next"]


@given(
    st.integers(1, 3),
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 4), st.none() | st.integers(0, 6)), max_size=12),
)
def test_a_slot_is_never_lost_nor_given_twice_whoever_is_cancelled(concurrency, users):
    """Each user has the age of its split, the turns of the loop that it stays, and the one in which it is cancelled."""
    inside = most_inside = 0

    async def use(slots: Slots, age: int, stays: int) -> None:
        nonlocal inside, most_inside
        async with slots.one(age):
            inside += 1
            most_inside = max(most_inside, inside)
            try:
                for _ in range(stays):
                    await asyncio.sleep(0)
            finally:
                inside -= 1

    async def main() -> None:
        slots = Slots(concurrency)
        tasks = [asyncio.ensure_future(use(slots, age, stays)) for age, stays, _ in users]
        for turn in range(100):
            for task, (_, _, cancelled) in zip(tasks, users, strict=True):
                if cancelled == turn:
                    task.cancel()
            await asyncio.sleep(0)
        assert all(task.cancelled() or task.result() is None for task in tasks)
        assert most_inside <= concurrency
        last = [asyncio.ensure_future(use(slots, 0, 2)) for _ in range(concurrency)]
        await asyncio.sleep(0)
        assert inside == concurrency
        await asyncio.gather(*last)

    asyncio.run(main())


def test_a_spent_limit_takes_no_further_mini_batches():
    stage = Doubling(bad={3})
    with open_chain_of(stage) as chain:
        outcomes = list(chain.stream(batches([10] * 100), FailureLimit(0), new_stats()))

    assert len(outcomes) <= chain.depth
    assert [failed.place for failed in outcomes[0][1].failed] == [3]


def test_G8_a_broken_contract_is_not_halved_and_says_what_was_sent():
    class Broken(Doubling):
        async def invoke(self, records: Records, *, alone: bool = False) -> Answer:
            self.calls.append([])
            raise InvocationFailed("WrongAnswer", "short", Remedy.NONE)

    stage = Broken()
    with open_chain_of(stage) as chain, pytest.raises(StageRefused) as caught:
        list(chain.stream(batches([8]), FailureLimit(None), new_stats()))

    assert (len(stage.calls), len(caught.value.sent), caught.value.why.message) == (1, 8, "short")


def test_an_abandoned_stream_leaves_the_chain_usable():
    with open_chain_of(Doubling()) as chain:
        next(iter(chain.stream(batches([1] * 10), FailureLimit(None), new_stats())))
        outcomes = list(chain.stream(batches([3]), FailureLimit(None), new_stats()))

    assert numbers_of(outcomes[0][1]) == [0, 2, 4]


def test_statistics_count_invocations_records_and_failures_of_each_stage():
    stats = new_stats()
    with open_chain_of(Doubling(bad={2}), Doubling(drops=6)) as chain:
        list(chain.stream(batches([8]), FailureLimit(None), stats))

    total = stats["doubling"]
    assert (total.failed, total.dropped, total.answered) == (1, 3, 7 + 4)


def test_G5_closing_the_chain_frees_who_waits_for_an_answer():
    class Stuck(Doubling):
        async def invoke(self, records: Records, *, alone: bool = False) -> Answer:
            self.calls.append([])
            return await asyncio.Future()

    stage, errors = Stuck(), list[Exception]()

    def wait(chain: Chain) -> None:
        with pytest.raises(PoolError, match="its driver is gone") as caught:
            next(iter(chain.stream(batches([3]), FailureLimit(None), new_stats())))
        errors.append(caught.value)

    with open_chain_of(stage) as chain:
        thread = threading.Thread(target=wait, args=(chain,))
        thread.start()
        until(lambda: stage.calls)
    thread.join(10)

    assert len(errors) == 1
