"""Attempts at one mini-batch: how long is waited between them, how many there are, and that each sends the same."""

import asyncio
from itertools import pairwise
from math import inf

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchpipe.batch import Records
from batchpipe.errors import RecordsFailedError
from batchpipe.gauge import read_gauge
from batchpipe.invoke import Invoker
from batchpipe.outcome import FailureLimit, Outcome, new_stats
from batchpipe.stages import Answer, InvocationFailed, Remedy
from tests.doubling import Doubling, column

NOW = asyncio.sleep


class Busy(Doubling):
    """Answers only at the n-th attempt; or never what holds `stuck`. Says after how long to come again."""

    def __init__(self, failures: int = 0, stuck: int | None = None, retry_after_s: float | None = None) -> None:
        super().__init__()
        self.failures, self.stuck, self.retry_after_s = failures, stuck, retry_after_s
        self.sent: list[pa.Table] = []

    async def invoke(self, records: Records, *, alone: bool = False) -> Answer:
        assert isinstance(records, pa.Table)
        self.sent.append(records)
        if len(self.sent) <= self.failures or self.stuck in column(records):
            self.calls.append(column(records))
            raise InvocationFailed("HTTP 503", "busy", Remedy.RETRY, retry_after_s=self.retry_after_s)
        return await super().invoke(records, alone=alone)


def invoke(stage: Busy, retries: int, count: int = 4, longest_wait_s: float = inf) -> tuple[Outcome, list[float]]:
    """Send some records; what became of them, and the seconds waited between attempts, by a clock that runs at once."""
    waited: list[float] = []

    async def sleep(delay_s: float) -> None:
        waited.extend([delay_s] if delay_s else [])
        await NOW(0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asyncio, "sleep", sleep)
        records = pa.table({"n": pa.array(range(count), pa.int64())})
        invocation = Invoker(stage, retries, longest_wait_s).invoke(records, FailureLimit(None), new_stats())
        return asyncio.run(invocation), waited


@given(st.integers(1, 12))
def test_each_wait_is_about_twice_the_one_before_and_none_is_longer_than_a_minute(failures: int):
    outcome, waited = invoke(Busy(failures), retries=failures)

    assert len(outcome.places) == 4
    ceilings = [min(60.0, 0.2 * 2**n) for n in range(failures)]
    assert all(ceiling / 2 <= wait <= ceiling for wait, ceiling in zip(waited, ceilings, strict=True))


def test_waits_differ_from_one_worker_to_the_next():
    waits = [tuple(invoke(Busy(3), retries=3)[1]) for _ in range(5)]

    assert len(set(waits)) == 5


def test_nobody_comes_again_sooner_than_the_server_asked():
    _, waited = invoke(Busy(2, retry_after_s=7.0), retries=2)

    assert waited == [7.0, 7.0]


def test_a_server_that_wants_to_be_left_alone_for_longer_than_the_run_waits_ends_it_at_once():
    with pytest.raises(RecordsFailedError) as error:
        invoke(Busy(2, retry_after_s=101), retries=2, longest_wait_s=100)

    told = "stage 'doubling' asks to be left alone for 101 s, longer than no_progress_timeout_s allows (100 s)"
    assert error.value.message == f"{told}: HTTP 503: busy"
    assert error.value.next == (
        "run the same command again after that: it resumes, and finished splits are kept; "
        "or wait for it in the run: --set on_error.no_progress_timeout_s=202"
    )


def test_a_wait_that_is_allowed_moves_the_run_before_it_counts_as_stuck():
    before = read_gauge()["moved"]
    _, waited = invoke(Busy(1, retry_after_s=90), retries=1, longest_wait_s=100)

    assert sum(waited) == pytest.approx(90)
    assert max(waited) < 50
    assert read_gauge()["moved"] == before + len(waited) + 2


def test_a_record_that_is_not_tried_again_fails_whatever_its_server_asks_for():
    outcome, waited = invoke(Busy(stuck=1, retry_after_s=3600), retries=0, longest_wait_s=100)

    assert ([failed.place for failed in outcome.failed], waited) == ([1], [])


def test_every_attempt_sends_the_same_records():
    stage = Busy(3)
    invoke(stage, retries=3)

    assert all(one.equals(other) for one, other in pairwise(stage.sent))
    assert len(stage.sent) == 4


def test_halvings_of_what_was_tried_with_backoff_get_one_quick_second_attempt():
    stage = Busy(stuck=5)
    outcome, waited = invoke(stage, retries=3, count=8)

    assert [(failed.place, failed.attempts) for failed in outcome.failed] == [(5, 2)]
    assert [len(call) for call in stage.calls if 5 in call] == [8] * 4 + [4] * 2 + [2] * 2 + [1] * 2
    assert max(waited[3:]) <= 0.2
