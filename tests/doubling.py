"""A stage of the tests that doubles numbers, and misbehaves for those it is told to."""

import asyncio

import numpy as np
import pyarrow as pa

from batchpipe.batch import Records
from batchpipe.outcome import Outcome
from batchpipe.stages import Answer, InvocationFailed, Remedy


class Doubling:
    """A stage that answers 2n to n; fails for `bad` numbers; drops multiples of `drops`; may be slow in any order."""

    name = "doubling"
    takes_table = True
    is_exclusive = False
    one_at_a_time = False

    def __init__(self, bad: set[int] = frozenset(), drops: int = 0, concurrency: int = 1) -> None:  # type: ignore[assignment]
        self.bad, self.drops, self.concurrency = bad, drops, concurrency
        self.calls: list[list[int]] = []
        self.inside = self.most_inside = 0

    def takes_one(self, records: Records) -> bool:
        return self.one_at_a_time

    async def invoke(self, records: Records, *, alone: bool = False) -> Answer:
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
