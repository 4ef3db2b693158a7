"""One stage, one mini-batch: bad and killing records stand alone in few invocations, a broken stage is recognised."""

import asyncio
import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from batchpipe import invoke
from batchpipe.batch import ByteRecords, Records
from batchpipe.errors import RecordsFailedError
from batchpipe.invoke import Invoker
from batchpipe.outcome import FailureLimit, Outcome, new_stats
from batchpipe.stages import WRONG_COUNT, Answer, InvocationFailed, Remedy
from tests.doubling import Doubling, column, numbers_of


def invoke_now(stage: Doubling, numbers: Sequence[int], limit: FailureLimit, retries: int = 0) -> Outcome:
    return asyncio.run(Invoker(stage, retries).invoke(table(numbers), limit, new_stats()))


def table(numbers: Sequence[int]) -> pa.Table:
    return pa.table({"n": pa.array(numbers, pa.int64())})


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


@given(st.lists(st.integers(2, 30), min_size=1, max_size=8), st.integers(1, 8))
def test_single_records_of_several_mini_batches_are_sent_one_mini_batch_after_the_other(sizes, concurrency):
    stage = Doubling(concurrency=concurrency)
    stage.one_at_a_time = True
    invoker, ends = Invoker(stage, 0), np.cumsum([0, *sizes]).tolist()

    async def all_at_once() -> list[Outcome]:
        batches = [table(range(first, end)) for first, end in pairwise(ends)]
        return await asyncio.gather(*(invoker.invoke(batch, FailureLimit(None), new_stats()) for batch in batches))

    outcomes = asyncio.run(all_at_once())

    sent = [n for (n,) in stage.calls]
    assert sorted(sent) == list(range(sum(sizes)))
    assert (np.diff(np.searchsorted(ends, sent, side="right")) >= 0).all()
    assert [numbers_of(outcome) for outcome in outcomes] == [
        [2 * n for n in range(first, end)] for first, end in pairwise(ends)
    ]
    assert stage.most_inside == min(concurrency, sum(sizes))


@pytest.mark.parametrize("ends", ["breaks", "is cancelled"])
def test_a_mini_batch_of_single_records_that_is_given_up_gives_back_its_turns(ends):
    class Breaking(Doubling):
        """Breaks its contract at the fifth record, or never answers it."""

        async def invoke(self, records: Records, *, alone: bool = False) -> Answer:
            if 5 in column(records):
                if ends == "breaks":
                    raise InvocationFailed("WrongAnswer", "not a number", Remedy.NONE)
                reached.set()
                await asyncio.Event().wait()
            return await super().invoke(records, alone=alone)

    stage = Breaking(concurrency=3)
    stage.one_at_a_time = True
    invoker, reached = Invoker(stage, 0), asyncio.Event()

    async def one_then_another() -> Outcome:
        first = asyncio.create_task(invoker.invoke(table(range(100)), FailureLimit(None), new_stats()))
        if ends == "is cancelled":
            await reached.wait()
            first.cancel()
        with pytest.raises((InvocationFailed, asyncio.CancelledError)):
            await first
        await asyncio.sleep(0)  # what was cancelled ends in the loop's next turn
        assert len(stage.calls) < 10
        stage.most_inside = stage.inside = 0
        return await invoker.invoke(table(range(100, 110)), FailureLimit(None), new_stats())

    outcome = asyncio.run(one_then_another())

    assert numbers_of(outcome) == [2 * n for n in range(100, 110)]
    assert stage.most_inside == 3


def test_single_records_that_are_left_when_the_limit_is_spent_are_not_sent():
    stage = Doubling({0, 1, 2})
    stage.one_at_a_time = True

    outcome = invoke_now(stage, range(100), FailureLimit(1))

    assert stage.calls == [[0], [1]]
    assert (len(outcome.failed), len(outcome.places)) == (2, 0)


def test_G8_tables_and_bytes_are_not_put_together():
    table, text = pa.table({"n": [1]}), ByteRecords.of([b"1"])
    parts = [(0, Outcome(table, np.zeros(1, np.int64))), (1, Outcome(text, np.zeros(1, np.int64)))]

    with pytest.raises(TypeError, match="some records as a table and others as bytes"):
        Outcome.merge(parts)


def test_G8_a_stage_whose_answers_are_of_other_types_for_other_records_breaks_its_contract():
    class Mixed(Doubling):
        """Answers text for numbers from ten on, which one answer cannot hold beside numbers."""

        async def invoke(self, records: Records, *, alone: bool = False) -> Answer:
            numbers = column(records)
            if len({n >= 10 for n in numbers}) > 1:
                raise InvocationFailed("ValueError", "of no one type", Remedy.ISOLATE)
            return Answer(pa.table({"n": [str(n) if n >= 10 else n for n in numbers]}))

    with pytest.raises(InvocationFailed) as caught:
        invoke_now(Mixed(), range(20), FailureLimit(None))

    assert caught.value.remedy is Remedy.NONE
    assert "stage 'doubling' answered some records with other types than others: " in str(caught.value)


@given(st.integers(3, 100), st.sets(st.integers(0, 99), min_size=1), st.sampled_from(["table", "text"]))
def test_records_that_are_answered_as_another_type_than_most_fail_and_no_other_does(count, odd, kind):
    """However the halves lie: two records that stand alone are of two types, and cannot tell which is odd."""
    odd = {n for n in odd if n < count}
    assume(0 < 2 * len(odd) < count)

    class Odd(Doubling):
        async def invoke(self, records: Records, *, alone: bool = False) -> Answer:
            numbers = column(records)
            if len({n in odd for n in numbers}) > 1:
                raise InvocationFailed("ValueError", "of no one type", Remedy.ISOLATE)
            is_odd = numbers[0] in odd
            if kind == "table":
                return Answer(pa.table({"n": [str(n) if is_odd else n for n in numbers]}))
            body = [b"<p>sorry</p>\n" if is_odd else b'{"n": 1}\n' for _ in numbers]
            return Answer(ByteRecords.of(body, "text/html" if is_odd else "application/json"))

    outcome = invoke_now(Odd(), range(count), FailureLimit(None))

    assert [failed.place for failed in outcome.failed] == sorted(odd)
    assert outcome.places.tolist() == [n for n in range(count) if n not in odd]
    assert {failed.why.reason for failed in outcome.failed} == {"WrongAnswer"}


class Miscounting(Doubling):
    """A server that leaves out every number that it was sent twice at once, or one by chance, as `chances` says."""

    def __init__(self, chances: int = 0) -> None:
        super().__init__()
        self.chances = chances

    async def invoke(self, records: Records, *, alone: bool = False) -> Answer:
        numbers = column(records)
        answered = len(set(numbers)) - (self.chances > 0)
        self.chances -= 1
        if answered != len(numbers):
            self.calls.append(numbers)
            raise InvocationFailed(WRONG_COUNT, f"answered {answered} records for {len(numbers)} sent", Remedy.ISOLATE)
        return await super().invoke(records)


@given(st.lists(st.integers(0, 50), min_size=2, max_size=100))
def test_G8_a_wrong_count_that_no_record_is_to_blame_for_is_never_made_right_by_halving(numbers):
    stage = Miscounting()

    if len(set(numbers)) == len(numbers):
        assert numbers_of(invoke_now(stage, numbers, FailureLimit(None))) == [2 * n for n in numbers]
    else:
        with pytest.raises(InvocationFailed) as caught:
            invoke_now(stage, numbers, FailureLimit(None))
        assert caught.value.remedy is Remedy.NONE
        assert caught.value.message == (
            f"stage 'doubling' answered {len(set(numbers))} records for {len(numbers)} sent, "
            "and sent fewer at once each is answered: answer record by record"
        )


def test_a_wrong_count_by_chance_costs_no_record():
    stage = Miscounting(chances=1)

    outcome = invoke_now(stage, range(4), FailureLimit(None))

    assert numbers_of(outcome) == [0, 2, 4, 6]
    assert stage.calls == [[0, 1, 2, 3], [0, 1], [2, 3], [0, 1, 2, 3]]


class Killed(Doubling):
    """Dies of its `bad` numbers, and whatever it was sent beside dies with them."""

    def __init__(self, bad: set[int], *, concurrency: int = 1, one_at_a_time: bool = False) -> None:
        super().__init__(bad, concurrency=concurrency)
        self.one_at_a_time = one_at_a_time
        self.deaths = 0
        self.sent_alone: list[bool] = []

    async def invoke(self, records: Records, *, alone: bool = False) -> Answer:
        self.sent_alone.append(alone)
        before = self.deaths
        try:
            answer = await super().invoke(records)
        except InvocationFailed as bad:
            self.deaths += 1
            raise InvocationFailed("Died", "exit code 9", Remedy.DIED) from bad
        if self.deaths != before and not alone:
            raise InvocationFailed("Died", "of another request", Remedy.DIED)
        return answer


@given(st.integers(1, 120), st.sets(st.integers(0, 119), max_size=4), st.integers(1, 8), st.booleans())
def test_exactly_the_killing_records_fail_each_after_two_deaths_alone(count, bad, concurrency, single):
    bad = {n for n in bad if n < count}
    stage = Killed(bad, concurrency=concurrency, one_at_a_time=single)

    outcome = invoke_now(stage, range(count), FailureLimit(None))

    assert sorted(failed.place for failed in outcome.failed) == sorted(bad)
    assert numbers_of(outcome) == [2 * n for n in range(count) if n not in bad]
    assert all(stage.calls.count([n]) >= 2 for n in bad)
    assert stage.deaths <= len(bad) * (math.ceil(math.log2(count)) + 4)


def test_a_death_by_chance_costs_no_record_and_one_more_invocation():
    class Once(Killed):
        async def invoke(self, records: Records, *, alone: bool = False) -> Answer:
            self.bad = set() if self.deaths else {3}
            return await super().invoke(records, alone=alone)

    stage = Once(set())

    outcome = invoke_now(stage, range(8), FailureLimit(None))

    assert numbers_of(outcome) == [2 * n for n in range(8)]
    assert (len(stage.calls), stage.sent_alone) == (2, [False, True])


class Counted(Doubling):
    """Breaks for good after so many invocations, in the way that `remedy` says."""

    def __init__(self, healthy: int, remedy: Remedy, *, one_at_a_time: bool = False) -> None:
        super().__init__()
        self.healthy, self.remedy, self.one_at_a_time = healthy, remedy, one_at_a_time

    async def invoke(self, records: Records, *, alone: bool = False) -> Answer:
        if len(self.calls) >= self.healthy:
            self.calls.append(column(records))
            raise InvocationFailed("HTTP 503", "model not loaded", self.remedy)
        return await super().invoke(records, alone=alone)


@pytest.mark.parametrize("remedy", [Remedy.ISOLATE, Remedy.DIED])
def test_a_stage_that_fails_for_every_record_is_recognised_after_a_hundred(remedy):
    stage = Counted(1, remedy, one_at_a_time=True)

    with pytest.raises(RecordsFailedError) as caught:
        invoke_now(stage, range(100_000), FailureLimit(None))

    assert str(caught.value).startswith(
        "stage 'doubling' fails for whatever it is sent, also for a record that it answered before: "
        "HTTP 503: model not loaded"
    )
    assert len(stage.calls) <= 103
    assert stage.calls[-1] == [0]


def test_a_stage_whose_every_attempt_failed_is_asked_for_what_it_answered_before_a_mini_batch_is_halved(monkeypatch):
    monkeypatch.setattr(invoke, "FIRST_DELAY_S", 0.0)
    stage = Counted(1, Remedy.RETRY)
    invoker = Invoker(stage, 1)

    async def two() -> None:
        await invoker.invoke(table([7, 8]), FailureLimit(None), new_stats())
        await invoker.invoke(table(range(1000)), FailureLimit(None), new_stats())

    with pytest.raises(RecordsFailedError):
        asyncio.run(two())

    assert [len(call) for call in stage.calls] == [2, 1000, 1000, 1, 1]


def test_a_thousand_bad_records_in_a_row_do_not_end_a_stage_that_answers_others():
    stage = Doubling(bad=set(range(1, 1001)))
    stage.one_at_a_time = True

    outcome = invoke_now(stage, range(1100), FailureLimit(None))

    assert [failed.place for failed in outcome.failed] == list(range(1, 1001))
    assert stage.calls.count([0]) == 1 + 3  # after 100, 200 and 400 more


def test_what_was_too_large_once_is_not_sent_again():
    class Small(Doubling):
        async def invoke(self, records: Records, *, alone: bool = False) -> Answer:
            if len(records) > 10:
                self.calls.append(column(records))
                raise InvocationFailed("HTTP 413", "", Remedy.SMALLER)
            return await super().invoke(records)

    stage = Small()
    invoker = Invoker(stage, 0)

    async def two() -> list[Outcome]:
        return [await invoker.invoke(table(range(40)), FailureLimit(None), new_stats()) for _ in range(2)]

    outcomes = asyncio.run(two())

    assert [numbers_of(outcome) for outcome in outcomes] == [[2 * n for n in range(40)]] * 2
    assert [len(call) for call in stage.calls] == [40, 20] + [10] * 8
