"""The schedule: every split settles exactly once, wrong guesses run again, lost and journaled splits are respected."""

import random
import tracemalloc
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchpipe.errors import InputError
from batchpipe.held import HeldResults
from batchpipe.manifest import Accounts, Failure, Kept, RangeResult, SplitFailed, SplitResult
from batchpipe.schedule import Schedule
from batchpipe.split import InputObject, Range, Split

STEP = 10
OBJECT = InputObject(0, "a.csv", 1000, "v")


def make_splits(count: int) -> list[Split]:
    """Consecutive ranges of one object."""
    return [Split(i, (Range(OBJECT, i * STEP, (i + 1) * STEP),)) for i in range(count)]


class World:
    """Records that begin at `starts`; a reader that guesses wrongly where told to."""

    def __init__(self, starts: list[int], end: int, wrong: set[int]) -> None:
        self.starts, self.end, self.wrong = sorted(starts), end, wrong
        self.ran: list[int] = []

    def next_record(self, offset: int) -> int:
        return next((start for start in self.starts if start >= offset), self.end)

    def run(self, split: Split) -> SplitResult | SplitFailed:
        self.ran.append(split.index)
        found = split.ranges[0]
        first = found.start if found.exact else self.next_record(found.start)
        if split.index in self.wrong and not (found.exact or found.is_first):
            if split.index % 2:
                return SplitFailed(split.index, InputError("a quote in an unquoted field"))
            first += 1
        read = sum(first <= start < found.stop for start in self.starts)
        end = max(self.next_record(found.stop), first)
        part = RangeResult(0, found.start, first, end, 1, Accounts(read=read, written=read))
        return SplitResult(split.index, (part,), None)


def drive(schedule: Schedule, world: World, choice: random.Random, lose: float = 0.0) -> list[SplitResult]:
    """Run tasks in a random order, losing some, until nothing is left."""
    settled: list[SplitResult] = []
    running: list[tuple[Split, ...]] = []
    while True:
        while len(running) < 4 and (task := schedule.take(4)):
            running.append(task)
        if not running:
            return settled
        task = running.pop(choice.randrange(len(running)))
        if choice.random() < lose:
            schedule.give_back(task)
            continue
        outcomes = []
        for split in task:
            outcomes.append(world.run(split))
            if isinstance(outcomes[-1], SplitFailed):
                break
        settled += schedule.settle(task, outcomes)


worlds = st.tuples(st.integers(1, 30), st.sets(st.integers(1, 299)), st.sets(st.integers(1, 29)), st.integers())


@given(worlds)
def test_every_record_is_read_by_exactly_one_settled_split(world):
    count, starts, wrong, seed = world
    starts = [0, *(start for start in starts if start < count * STEP)]

    with TemporaryDirectory() as folder, closing(HeldResults(Path(folder) / "held")) as held:
        schedule = Schedule(make_splits(count), count, held=held)
        settled = drive(schedule, World(starts, count * STEP, wrong), random.Random(seed), lose=0.2)

    assert sorted(result.split for result in settled) == list(range(count))
    assert schedule.is_done
    assert schedule.tally.accounts == Accounts(read=len(starts), written=len(starts))


@given(worlds, st.integers(0, 30))
def test_a_resumed_schedule_runs_only_what_was_not_journaled(world, cut):
    count, starts, wrong, seed = world
    starts = [0, *(start for start in starts if start < count * STEP)]
    reality = World(starts, count * STEP, wrong)
    journaled = drive(Schedule(make_splits(count), count), reality, random.Random(seed))[:cut]

    schedule = Schedule(make_splits(count), count, [(result, Kept.SETTLED) for result in journaled])
    again = drive(schedule, reality, random.Random(seed))

    assert {result.split for result in again}.isdisjoint(result.split for result in journaled)
    assert schedule.tally.accounts == Accounts(read=len(starts), written=len(starts))


@given(worlds, st.integers(0, 40))
def test_a_resumed_schedule_takes_up_what_was_held_back(world, steps):
    """A start that is killed after so many tasks: what was done behind a range that was not is not done again."""
    count, starts, wrong, seed = world
    starts = [0, *(start for start in starts if start < count * STEP)]
    reality, choice = World(starts, count * STEP, wrong), random.Random(seed)
    killed = Schedule(make_splits(count), count)
    kept: list[SplitResult] = []
    held: dict[int, SplitResult] = {}
    running: list[tuple[Split, ...]] = []
    for _ in range(steps):
        while len(running) < 8 and (task := killed.take(8)):
            running.append(task)
        if not running:
            break
        (split,) = running.pop(choice.randrange(len(running)))
        kept += killed.settle((split,), [reality.run(split)])
        held.update({result.split: result for result in killed.held_back()})
    for result in kept:
        held.pop(result.split, None)

    reality.ran.clear()
    schedule = Schedule(
        make_splits(count),
        count,
        [*((result, Kept.SETTLED) for result in kept), *((result, Kept.HELD) for result in held.values())],
    )
    settled = [*schedule.settle_held(), *drive(schedule, reality, random.Random(seed), lose=0.2)]

    assert sorted(result.split for result in kept + settled) == list(range(count))
    assert schedule.is_done
    assert schedule.tally.accounts == Accounts(read=len(starts), written=len(starts))
    right = {index for index, result in held.items() if result.ranges[0].first == reality.next_record(index * STEP)}
    assert right.isdisjoint(reality.ran)


def test_a_split_whose_piece_was_lost_costs_no_number_of_the_records_behind_it():
    reality = World([0, 12, 15, 23, 34], 40, set())
    results = [reality.run(split) for split in make_splits(4)]
    first, lost, third, fourth = (result for result in results if isinstance(result, SplitResult))
    failed = Failure("a.csv", "v", 30, 0, 34, "stage", "ValueError", "")
    fourth = replace(fourth, failures=(failed,))
    journaled = [(first, Kept.SETTLED), (lost, Kept.LOST), (third, Kept.SETTLED)]

    schedule = Schedule(make_splits(4), 4, journaled)
    (again,), (last,) = schedule.take(1), schedule.take(1)
    settled = [*schedule.settle((last,), [fourth]), *schedule.settle((again,), [replace(lost, failures=(failed,))])]

    assert [(result.split, result.failures[0].record) for result in settled] == [(3, 4), (1, 1)]
    assert schedule.is_done


def test_an_error_counts_only_when_the_split_is_proved_to_begin_at_a_record():
    schedule = Schedule(make_splits(2), 2)
    first, second = schedule.take(1), schedule.take(1)
    failed = SplitFailed(1, InputError("a quote in an unquoted field"))

    assert list(schedule.settle(second, [failed])) == []
    world = World([0, 15], 20, set())
    assert [result.split for result in schedule.settle(first, [world.run(first[0])])] == [0]
    (again,) = schedule.take(1)

    assert (again.ranges[0].start, again.ranges[0].exact) == (15, True)
    with pytest.raises(InputError, match="a quote in an unquoted field"):
        list(schedule.settle((again,), [failed]))


def test_a_split_carries_what_is_left_of_the_budget():
    schedule = Schedule(make_splits(4), 4, allowed_failures=5)
    world = World([0, 10, 20, 30], 40, set())
    first, second = schedule.take(1), schedule.take(1)
    result = world.run(first[0])
    assert isinstance(result, SplitResult)
    failing = replace(result, ranges=(replace(result.ranges[0], accounts=Accounts(read=3, quarantined=3)),))

    list(schedule.settle(first, [failing]))
    third = schedule.take(1)
    schedule.give_back(second)

    assert [task[0].allowed_failures for task in (first, second, third, schedule.take(1))] == [5, 5, 2, 2]


def test_splits_travel_together_when_they_are_short_and_alone_near_the_end():
    schedule = Schedule(make_splits(1000), 1000)
    world = World([0], 10_000, set())
    for _ in range(10):
        task = schedule.take(2)
        list(schedule.settle(task, [world.run(split) for split in task]))

    assert len(schedule.take(2)) > 5
    while task := schedule.take(2):
        last = task
        list(schedule.settle(task, [world.run(split) for split in task]))
    assert len(last) == 1


def test_what_a_task_did_not_come_to_is_run_next_and_travels_together_again():
    schedule = Schedule(make_splits(1000), 1000)
    world = World([0], 10_000, set())
    while len(task := schedule.take(2)) < 20:
        list(schedule.settle(task, [world.run(split) for split in task]))

    settled = list(schedule.settle(task, [world.run(split) for split in task[:5]]))
    again = schedule.take(2)

    assert [result.split for result in settled] == [split.index for split in task[:5]]
    assert again == task[5 : 5 + len(again)]
    assert len(again) > 5


def test_G6_a_result_that_waits_for_the_ranges_before_it_takes_few_bytes(tmp_path: Path):
    message = "some words on what a stage says of a record that it fails for" * 5

    def take_all_but_the_first(count: int) -> None:
        with closing(HeldResults(tmp_path / "held")) as held:
            schedule = Schedule(iter(make_splits(count)), count, held=held)
            schedule.take(1)
            while task := schedule.take(1):
                index = task[0].index
                failed = Failure(
                    "a.csv", "v", index * STEP, 0, index * STEP, "stage", "ValueError", message + str(index)
                )
                part = RangeResult(0, index * STEP, index * STEP, (index + 1) * STEP, 1, Accounts(1, 0, 1))
                assert not list(schedule.settle(task, [SplitResult(index, (part,), None, failures=(failed,) * 5)]))
            sizes.append(tracemalloc.get_traced_memory()[0])

    sizes: list[int] = []
    tracemalloc.start()
    for count in (10, 1010):
        take_all_but_the_first(count)
    tracemalloc.stop()

    assert (sizes[1] - sizes[0]) / 1000 < 600  # most of it is the split, as its range may have been guessed wrongly
