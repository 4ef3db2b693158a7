"""G2, G3: a start that dies, or freezes and goes on too late, at any single write leaves nothing half done.

First every write in turn, then any sequence of such starts, restarts and new generations.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from batchpipe.leftovers import clean_output
from batchpipe.storage import flock
from tests.killed_start import FROZEN, SmallRun, Start, ending

# Python 3.12 warns of a fork beside threads; the child here neither needs them nor their locks.
pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")

LAYOUTS = ("parts", "mirror")
# Every write is synced to its disk, some ten thousand times here, and what a power cut does is not looked at.
MEMORY = Path("/dev/shm") if Path("/dev/shm").is_dir() else None
DOCUMENTED = (0, 2, 3, 7, 75)


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        yield Path(folder)


def assert_readers_see_whole_generations(run: SmallRun) -> None:
    """Who starts from the manifest finds just the parts it names, whole; before a commit nobody finds anything."""
    visible, manifest, committed = run.visible(), run.manifest(), run.committed()
    generations = [int(each.removeprefix("run")) for each in committed]
    named: dict[str, bytes] = {}
    if manifest is not None:
        generation = int(manifest["run_id"].removeprefix("run"))
        named = run.expected(generation)
        assert parts_of(run, manifest) == set(named)
        # Under mirror an object is replaced in its place while a later run publishes; the design says so.
        if run.layout == "parts" or not set(generations) - {generation}:
            assert {name: visible.get(name) for name in named} == named
    others = {name: data for name, data in visible.items() if named.get(name) != data}
    if not committed:
        assert others == {}
    known = [run.expected(number) for number in range(1, run.generation + 1)]
    assert [name for name, data in others.items() if not any(each.get(name) == data for each in known)] == []


def parts_of(run: SmallRun, manifest: dict[str, Any]) -> set[str]:
    table = run.store.read(f"{run.root}/{manifest['parts']['uri']}")
    return {json.loads(line)["uri"] for line in table.splitlines()}


def assert_finished(run: SmallRun) -> None:
    """The output holds the present generation and nothing else: no lock, no journal, no pending piece, no scrap."""
    manifest = run.manifest()
    assert manifest is not None
    assert manifest["run_id"] == run.run.run_id
    assert manifest["accounts"]["quarantined"] == 1
    assert run.visible() == run.expected(run.generation)
    kept = ["run.json", "inputs.jsonl", "parts.jsonl", "quarantine/split-00000002.jsonl"]
    assert set(run.hidden()) == {"manifest.json", *(f"{run.run.run_id}/{name}" for name in kept)}


def settled_on_disk(run: SmallRun) -> set[int]:
    """What is settled, or done and held back: neither is done again."""
    return {int(entry["split"]) for type_ in ("split", "held") for entry in run.entries(type_)}


def writes_of(layout: str) -> Iterator[int]:
    """Every second write, of each layout the other ones: what differs between the two is not how they are written."""
    return count(LAYOUTS.index(layout), 2)


@pytest.mark.parametrize(("layout", "if_exists"), [("parts", "error"), ("parts", "replace"), ("mirror", "replace")])
def test_G2_a_start_that_dies_at_any_write_is_finished_by_the_next(folder: Path, layout: str, if_exists: str):
    for number in count() if if_exists == "error" else writes_of(layout):
        run = SmallRun(folder / str(number), layout, if_exists)
        if if_exists == "replace":
            assert run.start().wait() == 0
            run.generation = 2
        died = run.start(kill_at=number).wait()
        assert_readers_see_whole_generations(run)
        settled = settled_on_disk(run)

        again = run.start()

        assert again.wait() == 0, f"after dying at write {number}"
        assert not settled & set(again.made), f"splits that were journaled at write {number} were made again"
        assert_finished(run)
        if died == 0:
            assert number > 40
            return


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("generation", [1, 2])
def test_G2_a_late_writer_that_stopped_at_any_write_changes_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, generation: int, layout: str
):
    monkeypatch.setattr(flock, "REPLACES_WITHIN_S", 0.1)
    for number in count() if generation == 1 else writes_of(layout):
        run = SmallRun(folder / str(number), layout)
        for run.generation in range(1, generation):
            assert run.start().wait() == 0
        run.generation = generation
        with ending(run.start(freeze_at=number)) as late:
            if late.wait() != FROZEN:
                assert number > 40
                return
            lapse_lock(run)
            first = run.start().wait()
            assert first in ((0,) if generation == 1 else (0, 75)), f"while another was frozen at write {number}"
            if first == 0:
                assert_finished(run)
            finished = run.hidden() if first == 0 else {}

            code = late.thaw()

        assert code in DOCUMENTED, f"thawed at write {number}"
        assert finished.items() <= run.hidden().items(), f"thawed at write {number}"
        assert_readers_see_whole_generations(run)
        assert run.start().wait() == 0
        assert_finished(run)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_G2_a_late_writer_wedges_nothing_where_another_start_that_drops_the_run_dies(folder: Path, layout: str):
    for number in writes_of(layout):
        run = SmallRun(folder / str(number), layout)
        with ending(run.start(freeze_at=number)) as late:
            if late.wait() != FROZEN:
                assert number > 40
                return
            lapse_lock(run)
            run.start(restart=True, kill_at=number * 7 % 60).wait()
            late.thaw()

        assert_readers_see_whole_generations(run)
        assert 0 in (run.start().wait(), run.start().wait()), f"thawed at write {number}"
        assert_finished(run)


def lapse_lock(run: SmallRun) -> None:
    """What time does to the lock of a start that has stopped, on S3 and on a file server."""
    (run.root / "_batchpipe" / "lock").unlink(missing_ok=True)


def test_G2_a_late_writer_changes_nothing_of_the_generation_that_followed(folder: Path):
    for number in count():
        run = SmallRun(folder / str(number))
        with ending(run.start(freeze_at=number)) as late:
            if late.wait() != FROZEN:
                return
            lapse_lock(run)
            assert run.start().wait() == 0
            run.generation = 2
            assert run.start().wait() == 0

            code = late.thaw()

        assert code in DOCUMENTED, f"thawed at write {number}"
        assert_readers_see_whole_generations(run)
        assert run.start().wait() == 0
        clean_output(run.store, str(run.root), drops_unfinished=True)
        assert_finished(run)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_G2_a_redrive_that_dies_at_any_write_is_finished_by_the_next(folder: Path, layout: str):
    for number in writes_of(layout):
        run = SmallRun(folder / str(number), layout)
        assert run.start().wait() == 0
        first, accounts = run.visible(), (run.manifest() or {})["accounts"]

        died = run.start(redrives=True, kill_at=number).wait()

        visible, manifest = run.visible(), run.manifest()
        assert manifest is not None
        assert visible in (first, {**first, **run.redriven})
        assert parts_of(run, manifest) <= set(visible)
        again = run.start(redrives=True)
        assert again.wait() == 0, f"after dying at write {number}"
        assert run.visible() == {**first, **run.redriven}
        manifest = run.manifest()
        assert manifest is not None
        assert parts_of(run, manifest) == set(run.visible())
        assert manifest["accounts"] == {**accounts, "written": accounts["written"] + 1, "quarantined": 0}
        kept = ["run.json", "inputs.jsonl", "parts.jsonl"]
        # The file of a lock that nobody holds may be left of who died last: there was nothing to do, and so to lock.
        assert set(run.hidden()) - {"lock"} == {"manifest.json", *(f"run1-redrive-1/{name}" for name in kept)}
        if died == 0:
            assert number > 20
            return


@pytest.mark.parametrize("layout", LAYOUTS)
def test_G2_a_damaged_output_whose_restart_dies_at_any_write_is_made_anew_by_the_next(folder: Path, layout: str):
    for number in writes_of(layout):
        run = SmallRun(folder / str(number), layout, "error")
        assert run.start().wait() == 0
        (run.root / next(iter(run.expected(1)))).unlink()

        died = run.start(restart=True, kill_at=number).wait()

        assert run.visible().items() <= run.expected(1).items()
        assert run.start().wait() in (0, 7), f"after dying at write {number}"
        assert run.start(restart=True).wait() == 0, f"after dying at write {number}"
        assert_finished(run)
        if died == 0:
            assert number > 50
            return


class Starts(RuleBasedStateMachine):
    """Starts of one output that die or freeze at any write, go on too late, drop what was begun, or replace it."""

    layout = "parts"

    def __init__(self) -> None:
        super().__init__()
        self.release = ExitStack()
        folder = Path(tempfile.mkdtemp(dir=MEMORY))
        self.release.callback(shutil.rmtree, folder)
        self.release.enter_context(pytest.MonkeyPatch.context()).setattr(flock, "REPLACES_WITHIN_S", 0.1)
        self.run = SmallRun(folder, self.layout)
        self.late: Start | None = None
        self.has_dropped = False

    def teardown(self) -> None:
        self.release.close()

    @rule(write=st.integers(0, 80), restart=st.booleans())
    def die(self, write: int, restart: bool) -> None:
        # A start that dies while it drops what was begun leaves a journal whose pieces are gone.
        self.has_dropped = self.has_dropped or restart
        settled = set() if self.has_dropped else settled_on_disk(self.run)
        start = self.run.start(kill_at=write, restart=restart)
        start.wait()
        assert not settled & set(start.made)

    @precondition(lambda self: self.late is None)
    @rule(write=st.integers(0, 80), restart=st.booleans())
    def freeze(self, write: int, restart: bool) -> None:
        """A start stops, and time takes its lock from it."""
        self.has_dropped = self.has_dropped or restart
        late = self.release.enter_context(ending(self.run.start(freeze_at=write, restart=restart)))
        if late.wait() == FROZEN:
            self.late = late
            lapse_lock(self.run)

    @precondition(lambda self: self.late is not None)
    @rule()
    def thaw(self) -> None:
        assert self.late is not None
        assert self.late.thaw() in DOCUMENTED
        self.late = None

    @rule()
    def finish(self) -> None:
        """Running again is right: at the latest the second time, where a late writer was in the way.

        One that has stopped while it replaced the manifest is in the way until it goes on, or dies.
        """
        codes = (self.run.start().wait(), self.run.start().wait())
        if self.late and codes == (75, 75):
            self.thaw()
            codes = (self.run.start().wait(), self.run.start().wait())
        assert 0 in codes
        self.has_dropped = False
        assert self.run.manifest() == {**(self.run.manifest() or {}), "run_id": self.run.run.run_id}

    @precondition(lambda self: (self.run.manifest() or {}).get("run_id") == self.run.run.run_id)
    @rule()
    def replace(self) -> None:
        """The next generation: another job on the same output."""
        self.run.generation += 1

    @invariant()
    def readers_see_whole_generations(self) -> None:
        assert_readers_see_whole_generations(self.run)


class MirrorStarts(Starts):
    """The same where pieces are joined and objects replaced in their place."""

    layout = "mirror"


TestStarts = Starts.TestCase
TestMirrorStarts = MirrorStarts.TestCase
# A failing sequence is not made shorter: that takes minutes, in which no time limit holds.
BOUNDED = settings(
    max_examples=15,
    stateful_step_count=8,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.explicit, Phase.reuse, Phase.generate),
)
TestStarts.settings = TestMirrorStarts.settings = BOUNDED
