"""Mini-batches: cut greedily by count and exact bytes, every record in exactly one, in order."""

import sys
from collections import deque
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchpipe.batch import ByteRecords, MiniBatch, Origins, concat_records, iter_batches

records = st.lists(st.binary(max_size=9), max_size=40)
limits = st.tuples(st.one_of(st.none(), st.integers(1, 7)), st.integers(1, 30))


def in_blocks(values: list[bytes], cuts: list[int]) -> list[MiniBatch]:
    """The records as blocks that end at these places."""
    places = [0, *sorted({cut % (len(values) + 1) for cut in cuts}), len(values)]
    whole = ByteRecords.of(values)
    block = MiniBatch(whole, Origins.of_range(0, 0, whole.starts))
    return [block.slice(start, stop) for start, stop in pairwise(places)]


def lines(batch: MiniBatch) -> list[bytes]:
    """The records of a mini-batch of bytes."""
    assert isinstance(batch.records, ByteRecords)
    return batch.records.to_list()


def greedy(values: list[bytes], most: int | None, size: int) -> list[list[bytes]]:
    """What the cut should be, one record at a time."""
    batches: list[list[bytes]] = []
    for value in values:
        current = batches[-1] if batches else None
        if current is None or sum(map(len, current)) + len(value) > size or len(current) == most:
            batches.append([])
        batches[-1].append(value)
    return batches


@given(records, st.lists(st.integers(0, 99), max_size=5), limits)
def test_byte_records_are_cut_greedily_whatever_blocks_they_come_in(values, cuts, limit):
    most, size = limit

    batches = list(iter_batches(in_blocks(values, cuts), most, size))

    assert [lines(batch) for batch in batches if len(batch)] == greedy(values, most, size)


@given(records, st.lists(st.integers(0, 99), max_size=5), limits)
def test_origins_stay_with_their_records(values, cuts, limit):
    batches = [batch for batch in iter_batches(in_blocks(values, cuts), *limit) if len(batch)]

    ordinals = [int(each) for batch in batches for each in batch.origins.ordinals]

    assert ordinals == list(range(len(values)))


def uncounted(numbers: Any) -> Any:
    return numbers.view(np.ndarray) if isinstance(numbers, Counted) else numbers


class Counted(np.ndarray[Any, Any]):
    """Numbers that tell how many of them were worked on."""

    worked_on = 0

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        return self.count(getattr(ufunc, method), *inputs, **options)

    def __array_function__(self, function: Any, types: Any, inputs: Any, options: Any) -> Any:
        return self.count(function, *inputs, **options)

    def count(self, function: Any, *inputs: Any, **options: Any) -> Any:
        plain = [list(map(uncounted, each)) if isinstance(each, list) else uncounted(each) for each in inputs]
        if function is not np.searchsorted:  # which halves
            Counted.worked_on += sum(sum(map(np.size, one)) if isinstance(one, list) else np.size(one) for one in plain)
        return np.asarray(function(*plain, **options)).view(Counted)


@pytest.mark.parametrize("block_records", [1, 100, 1_000_000])
@pytest.mark.parametrize("max_records", [1, 7, None])
def test_ten_times_the_records_are_ten_times_the_work(block_records: int, max_records: int | None):
    """Counted in numbers that are worked on and in calls: no clock says it as well."""

    def work(count: int) -> tuple[int, int]:
        ends = np.arange(1, count + 1, dtype=np.int64).view(Counted)
        whole = MiniBatch(ByteRecords(memoryview(b"x" * count), ends - 1, ends), Origins.of_range(0, 0, ends))
        blocks = [whole.slice(cut, min(cut + block_records, count)) for cut in range(0, count, block_records)]
        calls, Counted.worked_on = 0, 0

        def note(*_: object) -> None:
            nonlocal calls
            calls += 1

        sys.setprofile(note)
        deque(iter_batches(blocks, max_records, 50), maxlen=0)
        sys.setprofile(None)
        return Counted.worked_on, calls

    once, tenfold = work(1_000), work(10_000)

    assert 0 < tenfold[0] <= 11 * once[0]
    assert 0 < tenfold[1] <= 11 * once[1]


@given(st.lists(st.integers(1, 9), max_size=6), limits)
def test_tables_keep_every_row_in_order_and_the_limit_on_records(lengths, limit):
    rows = iter(range(100))
    blocks = [
        MiniBatch(pa.table({"n": [next(rows) for _ in range(n)]}), Origins.of_range(0, 0, np.zeros(n, np.int64)))
        for n in lengths
    ]

    batches = list(iter_batches(blocks, limit[0], limit[1] * 8))

    tables = [batch.records for batch in batches if isinstance(batch.records, pa.Table)]
    assert [row for table in tables for row in table["n"].to_pylist()] == list(range(sum(lengths)))
    assert all(limit[0] is None or len(batch) <= limit[0] for batch in batches)
    assert all(len(batch) == 1 or batch.nbytes <= limit[1] * 8 for batch in batches)


@given(records, st.data())
def test_taking_records_then_joining_their_bytes_keeps_them(values, data):
    places = data.draw(st.lists(st.integers(0, len(values) - 1), max_size=9)) if values else []
    taken = ByteRecords.of(values).take(np.array(places, np.int64))

    assert bytes(taken.body()) == b"".join(values[place] for place in places)
    assert taken.nbytes == sum(len(values[place]) for place in places)


def test_concatenated_bytes_keep_their_content_type():
    parts = [ByteRecords.of([b"a\n"], "text/csv"), ByteRecords.of([b"b\n", b"c\n"], "text/csv")]

    joined = concat_records(parts)

    assert isinstance(joined, ByteRecords)
    assert (joined.to_list(), joined.content_type) == ([b"a\n", b"b\n", b"c\n"], "text/csv")
