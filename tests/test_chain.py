"""The chain and its invocations: order kept, depth bounded, bad records alone, an early stop at the limit."""

import asyncio
import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchpipe.batch import ByteRecords, MiniBatch, Origins, Records
from batchpipe.chain import Chain, StageRefused, _run, new_stats
from batchpipe.errors import PoolError
from batchpipe.invoke import FailureLimit, Outcome, invoke
from batchpipe.orders import Orders, Place, Schemas
from batchpipe.stages import Answer, InvocationFailed, Remedy
from tests.jobs import until
from tests.opened_stage import make_job


class Doubling:
    """A stage that answers 2n to n; fails for `bad` numbers; drops multiples of `drops`; may be slow in any order."""

    name = "doubling"
    takes_table = True
    one_at_a_time = False

    def __init__(self, bad: set[int] = frozenset(), drops: int = 0, concurrency: int = 1) -> None:  # type: ignore[assignment]
        self.bad, self.drops, self.concurrency = bad, drops, concurrency
        self.calls: list[list[int]] = []
        self.inside = self.most_inside = 0

    def takes_one(self, records: Records) -> bool:
        return self.one_at_a_time

    async def invoke(self, records: Records) -> Answer:
        numbers = column(records)
        self.calls.append(numbers)
        self.inside += 1
        self.most_inside = max(self.most_inside, self.inside)
        await asyncio.sleep(0)
        self.inside -= 1
        if self.bad.intersection(numbers):
            raise InvocationFailed("Bad", "number", Remedy.ISOLATE)
        kept = np.array([not self.drops or n % self.drops != 0 for n in numbers], np.bool_)
        answer = pa.table({"n": pa.array([2 * n for n, keep in zip(numbers, kept, strict=True) if keep], pa.int64())})
        return Answer(answer, kept if self.drops else None)

    def close(self) -> None: ...

    def advice(self) -> dict[str, object]:
        return {}


def numbers_of(outcome: Outcome) -> list[int]:
    return column(outcome.records)


def column(records: Records | None) -> list[int]:
    return [int(n) for n in records.column("n").to_numpy()] if isinstance(records, pa.Table) else []


def invoke_now(stage: Doubling, numbers: Sequence[int], limit: FailureLimit) -> Outcome:
    table = pa.table({"n": pa.array(numbers, pa.int64())})
    return asyncio.run(invoke(stage, table, 0, limit, new_stats()))


@contextmanager
def open_chain_of(*stages: Doubling) -> Iterator[Chain]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=_run, args=(loop,))
    thread.start()
    with Chain(stages, [0] * len(stages), loop) as chain:
        yield chain
    thread.join()


def batches(sizes: Sequence[int]) -> Iterator[MiniBatch]:
    first = 0
    for size in sizes:
        table = pa.table({"n": pa.array(range(first, first + size), pa.int64())})
        yield MiniBatch(table, Origins.of_range(0, first, np.full(size, -1, np.int64)))
        first += size


@given(st.integers(1, 200), st.sets(st.integers(0, 199)))
def test_halving_finds_exactly_the_bad_records_in_few_invocations(count, bad):
    bad = {n for n in bad if n < count}
    stage = Doubling(bad)

    outcome = invoke_now(stage, range(count), FailureLimit(None))

    good = [n for n in range(count) if n not in bad]
    assert sorted(failed.place for failed in outcome.failed) == sorted(bad)
    assert (outcome.places.tolist(), numbers_of(outcome)) == (good, [2 * n for n in good])
    assert len(stage.calls) <= max(1, len(bad) * (2 * math.ceil(math.log2(count)) + 1))


@given(st.integers(1, 200), st.sets(st.integers(0, 199)), st.integers(0, 5))
def test_the_limit_stops_the_search_after_one_record_too_many(count, bad, allowed):
    bad = {n for n in bad if n < count}
    limit = FailureLimit(allowed)

    outcome = invoke_now(Doubling(bad), range(count), limit)

    assert sorted(failed.place for failed in outcome.failed) == sorted(bad)[: allowed + 1]
    assert limit.is_spent == (len(bad) > allowed)
    assert set(outcome.places.tolist()).isdisjoint(bad)


@given(st.integers(2, 100), st.sets(st.integers(0, 99)), st.integers(1, 8))
def test_single_records_are_each_sent_once_and_answered_in_order(count, bad, concurrency):
    bad = {n for n in bad if n < count}
    stage = Doubling(bad, concurrency=concurrency)
    stage.one_at_a_time = True

    outcome = invoke_now(stage, range(count), FailureLimit(None))

    assert sorted(stage.calls) == [[n] for n in range(count)]
    assert [failed.place for failed in outcome.failed] == sorted(bad)
    assert numbers_of(outcome) == [2 * place for place in outcome.places]
    assert stage.most_inside == min(concurrency, count)


def test_single_records_that_are_left_when_the_limit_is_spent_are_not_sent():
    stage = Doubling({0, 1, 2})
    stage.one_at_a_time = True

    outcome = invoke_now(stage, range(100), FailureLimit(1))

    assert stage.calls == [[0], [1]]
    assert (len(outcome.failed), len(outcome.places)) == (2, 0)


def test_G8_tables_and_bytes_are_not_put_together():
    table, text = pa.table({"n": [1]}), ByteRecords.of([b"1"])
    parts = [(0, Outcome(table, np.zeros(1, np.int64))), (1, Outcome(text, np.zeros(1, np.int64)))]

    with pytest.raises(InvocationFailed, match="answered some records as a table and others as bytes"):
        Outcome.merge(parts)


HTTP, CALLABLE = {"endpoint": {"url": "http://a"}}, {"callable": "math:sqrt"}


@pytest.mark.parametrize(("stage", "is_proved", "together"), [(HTTP, True, 64), (HTTP, False, 1), (CALLABLE, True, 1)])
def test_single_records_travel_together_only_where_all_stages_take_one(tmp_path, stage, is_proved, together):
    job = make_job(tmp_path, {"endpoint": {"url": "http://b"}}, stage, batch={"max_records": 1})

    assert Orders(Place(job, "run", "", ""), Schemas(is_proved=is_proved), 0).max_batch_records == together


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


@pytest.mark.parametrize(("concurrency", "depth"), [(1, 2), (4, 5)])
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


def test_a_spent_limit_takes_no_further_mini_batches():
    stage = Doubling(bad={3})
    with open_chain_of(stage) as chain:
        outcomes = list(chain.stream(batches([10] * 100), FailureLimit(0), new_stats()))

    assert len(outcomes) <= chain.depth
    assert [failed.place for failed in outcomes[0][1].failed] == [3]


def test_G8_a_broken_contract_is_not_halved_and_says_what_was_sent():
    class Broken(Doubling):
        async def invoke(self, records: Records) -> Answer:
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
        async def invoke(self, records: Records) -> Answer:
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
