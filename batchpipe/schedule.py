"""Which split next: skips the journaled, requeues the lost and the wrongly cut, proves cuts, keeps the tally. Pure."""

from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from dataclasses import dataclass, field, replace
from itertools import islice, takewhile
from typing import TypeAlias

from batchpipe.job import Job
from batchpipe.manifest import Accounts, Failure, Kept, SplitFailed, SplitResult, StageStats
from batchpipe.split import Split

TASK_S = 1.2
"""Seconds of work a Dask task should carry: a no-op task costs the driver 2-3 ms."""
LARGEST_TASK = 256


@dataclass(slots=True)
class Tally:
    """What has settled so far. `objects` holds four numbers for each input object: see `of_object`."""

    splits: int = 0
    settled: int = 0
    accounts: Accounts = field(default_factory=Accounts)
    bytes_read: int = 0
    stages: dict[str, StageStats] = field(default_factory=dict)
    read_s: float = 0.0
    write_s: float = 0.0
    worker_seconds: float = 0.0
    failures: list[Failure] = field(default_factory=list)
    objects: "array[int]" = field(default_factory=lambda: array("q"))

    def add(self, result: SplitResult) -> None:
        """Count a split: settled, unless it stopped itself and must run again."""
        self.settled += not result.stopped
        self.accounts += result.accounts
        self.read_s += result.read_s
        self.write_s += result.write_s
        self.worker_seconds += result.seconds
        for name, stats in result.stages.items():
            self.stages[name] = self.stages.get(name, StageStats()) + stats
        for part in result.ranges:
            self.bytes_read += part.bytes_read
            self._add_to_object(part.object, part.accounts)
        self.failures.extend(result.failures[: max(0, 10 - len(self.failures))])

    def of_object(self, index: int) -> Accounts:
        """The accounts of one input object."""
        numbers = self.objects[4 * index : 4 * index + 4]
        return Accounts(*numbers) if numbers else Accounts()

    def _add_to_object(self, index: int, accounts: Accounts) -> None:
        missing = 4 * (index + 1) - len(self.objects)
        if missing > 0:
            self.objects.extend([0] * missing)
        numbers = (accounts.read, accounts.written, accounts.quarantined, accounts.dropped)
        for place, number in enumerate(numbers, start=4 * index):
            self.objects[place] += number


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run is: handed to `on_progress` several times a second and at each step."""

    step: str
    """plan, start, transform, publish or done."""
    run_id: str
    job: Job
    tally: Tally
    objects: int = 0
    bytes: int = 0
    records_at_work: int = 0
    """Records of splits that are being worked on, beside those of `tally`."""
    bytes_at_work: int = 0
    workers: int = 0


OnProgress: TypeAlias = Callable[[Progress], None]


def ignore(_: Progress) -> None:
    """Look at no progress."""


@dataclass(frozen=True, slots=True)
class _End:
    """Where a settled split's records end in its object, and how many the object has up to there (None: unknown)."""

    offset: int
    records: int | None


class Schedule:
    """Hands out splits in runs worth about a second of work, and takes their results until all have settled.

    A range of a quoted CSV guesses where its first record begins. Its result counts only when the range before it
    has settled and ends exactly there; otherwise the range is run again from the proved place.
    """

    def __init__(
        self,
        splits: Iterable[Split],
        count: int,
        journaled: Iterable[tuple[SplitResult, Kept]] = (),
        allowed_failures: int | None = None,
        held: MutableMapping[int, SplitResult | SplitFailed] | None = None,
    ) -> None:
        """`held` is where to keep the outcomes of splits that wait for the ranges before them: it may be many."""
        self.tally = Tally(splits=count)
        self._allowed_failures = allowed_failures
        self._settled = bytearray(count)
        self._ends: dict[int, _End] = {}
        self._held = {} if held is None else held
        for result, kept in journaled:
            match kept:
                case Kept.SETTLED:
                    self._count(result)
                case Kept.LOST:
                    self._numbered(result)
                case Kept.HELD:
                    self._held[result.split] = result
        self._ends = {
            split: end for split, end in self._ends.items() if split + 1 < count and not self._settled[split + 1]
        }
        self._untold: set[int] = set()
        """Of those that are held the ones that nobody has been told of by `held_back`."""
        begun = frozenset(self._held)
        self._running = {split.index: split for split in _up_to(max(begun, default=-1), splits) if split.index in begun}
        self._fresh: Iterator[Split] = (
            split for split in splits if not self._settled[split.index] and split.index not in begun
        )
        self._again: deque[Split] = deque()
        self._seconds_per_split = TASK_S

    @property
    def is_done(self) -> bool:
        """Whether every split has settled."""
        return self.tally.settled == self.tally.splits

    def is_done_with(self, split: int) -> bool:
        """Whether this split has settled, or is done and held back."""
        return bool(self._settled[split]) or split in self._held

    def take(self, slots: int) -> tuple[Split, ...]:
        """The next splits, for one of `slots` places that work side by side; empty if none waits.

        Those that must run again come first. Each carries how many more records of the run may fail.
        """
        left = self.tally.splits - self.tally.settled - len(self._running)
        size = max(1, min(int(TASK_S / max(self._seconds_per_split, 1e-6)), LARGEST_TASK, left // (2 * slots)))
        if self._again:
            taken = [self._again.popleft() for _ in range(min(size, len(self._again)))]
        else:
            taken = list(islice(self._fresh, size))
        if self._allowed_failures is not None:
            left = max(0, self._allowed_failures - self.tally.accounts.quarantined)
            taken = [replace(split, allowed_failures=left) for split in taken]
        self._running.update({split.index: split for split in taken})
        return tuple(taken)

    def give_back(self, splits: Iterable[Split]) -> None:
        """Queue splits again whose worker was lost before it could answer."""
        for split in splits:
            if self._running.pop(split.index, None):
                self._again.append(split)

    def settle(self, task: Iterable[Split], outcomes: Iterable[SplitResult | SplitFailed]) -> Iterator[SplitResult]:
        """Take a task's outcomes; yield every result that is settled by them, to be journaled.

        Splits of the task without an outcome are queued again. Raises the error of a split that is certain to
        have begun at a record.
        """
        for outcome in outcomes:
            yield from self._settle_from(outcome.split, outcome)
        self.give_back(split for split in task if split.index in self._running and split.index not in self._held)

    def settle_held(self) -> Iterator[SplitResult]:
        """Yield what earlier starts held back and that can settle now, to be journaled; once, before anything runs."""
        for index in sorted(self._held):
            if index in self._held:
                yield from self._settle_from(index, self._held.pop(index))
        self._untold.clear()

    def held_back(self) -> Iterator[SplitResult]:
        """Results that wait for the ranges before them, each once: a kill now shall not cost them."""
        while self._untold:
            outcome = self._held[self._untold.pop()]
            if isinstance(outcome, SplitResult) and not outcome.stopped:
                yield outcome

    def _settle_from(self, index: int, outcome: SplitResult | SplitFailed | None) -> Iterator[SplitResult]:
        """Settle a split if its start is proved, and those behind it that waited for that; hold it if it is not."""
        while outcome is not None:
            split = self._running[index]
            proof = self._prove(split, outcome)
            if proof is None:
                self._held[index] = outcome
                self._untold.add(index)
                return
            del self._running[index]
            if proof is not split:
                self._again.append(proof)
                return
            if isinstance(outcome, SplitFailed):
                raise outcome.error
            self._seconds_per_split += 0.2 * (outcome.seconds - self._seconds_per_split)
            yield self._count(outcome)
            index += 1
            outcome = self._held.pop(index, None)
            self._untold.discard(index)

    def _prove(self, split: Split, outcome: SplitResult | SplitFailed) -> Split | None:
        """The split itself if it began at a record, a corrected one if it did not, None while nobody knows."""
        if not split.ranges or split.ranges[0].exact or split.ranges[0].is_first:
            return split
        first = split.ranges[0]
        end = self._ends.get(split.index - 1)
        if end is None:
            return None
        if isinstance(outcome, SplitResult) and outcome.ranges[0].first == end.offset:
            return split
        return replace(split, ranges=(replace(first, start=end.offset, exact=True),))

    def _count(self, result: SplitResult) -> SplitResult:
        """Settle a result: number its failed records, and count it."""
        result = self._numbered(result)
        self._ends.pop(result.split - 1, None)
        self._settled[result.split] = 1
        self.tally.add(result)
        return result

    def _numbered(self, result: SplitResult) -> SplitResult:
        """Note where a result's records end, and number the failed ones within their objects where that is known."""
        before = self._ends.get(result.split - 1)
        last = result.ranges[-1] if result.ranges else None
        if last is not None:
            continues = len(result.ranges) == 1 and last.start > 0
            records = before.records if before and continues else None if continues else 0
            so_far = None if records is None else records + last.accounts.read
            self._ends[result.split] = _End(last.next_start, so_far)
            if records is not None:
                failures = (replace(failure, record=records + failure.ordinal) for failure in result.failures)
                result = replace(result, failures=tuple(failures))
        return result


def _up_to(index: int, splits: Iterable[Split]) -> Iterator[Split]:
    return takewhile(lambda split: split.index <= index, splits)
