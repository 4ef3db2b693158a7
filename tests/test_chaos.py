"""A bounded part of the chaos suite, each fault once where it is cheap; `make chaos` plays them all, many times."""

from collections.abc import Iterator
from random import Random
from zlib import crc32

import pytest

from tests.chaos.checks import check
from tests.chaos.faults import FAULTS, POISON
from tests.chaos.poison import choose_poison
from tests.chaos.scene import Scene
from tests.chaos.setting import Setting, open_setting
from tests.chaos.suite import Episode, Played, deal, few_poison, play
from tests.chaos.table import to_table

pytestmark = pytest.mark.timeout(300)  # a run that is resumed several times is several runs
SEED = 7


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setting]:
    with open_setting(tmp_path_factory.mktemp("chaos")) as setting:
        yield setting


def episode(*kinds: str) -> Episode:
    """One run with these faults, in this order."""
    faults = tuple(fault for kind in kinds for fault in FAULTS if fault.kind == kind)
    assert len(faults) == len(kinds)
    return Episode(faults[0].scene, faults, few_poison(SEED), number=crc32(repr(kinds).encode()))


@pytest.mark.parametrize(
    "kinds",
    [
        ("input truncated", "worker killed", "second run on the same output", "driver killed"),
        ("watcher killed", "run frozen, then late"),
        (
            "S3: connection reset",
            "S3: 503 SlowDown",
            "S3: answer of a request lost",
            "S3: answer of a publication lost",
        ),
        ("S3: driver killed while it publishes",),
        ("stage process killed",),
        pytest.param(("container paused", "container killed"), marks=pytest.mark.container),
    ],
    ids=lambda kinds: " and ".join(kinds).replace(" ", "-"),
)
def test_run_with_faults_ends_as_if_nothing_had_been_done_to_it(setting: Setting, kinds: tuple[str, ...]):
    dealt = episode(*kinds)

    assert play(setting, SEED, dealt) == dealt.counted


def test_every_poison_record_and_no_other_is_quarantined(setting: Setting):
    poison = choose_poison(Random(SEED), {"exception": 3, "bad row": 3, "segfault": 1})
    play(setting, SEED, Episode("poison", (), poison, number=1))


def test_the_same_seed_deals_the_same_faults():
    assert deal(1, 200) == deal(1, 200) != deal(2, 200)


def test_two_hundred_faults_are_dealt_of_every_kind_and_not_with_poison_alone():
    counted = sum((each.counted for each in deal(1, 200)), start=episode("disk full").counted)

    assert counted.keys() == {fault.kind for fault in FAULTS} | POISON.keys()
    assert sum(counted[kind] for kind in counted.keys() - POISON.keys()) >= 100
    assert counted.total() >= 200


def test_fault_whose_run_broke_a_promise_has_not_survived():
    killed = episode("worker killed")
    table = to_table([Played(killed, 1.0, killed.counted), Played(killed, 1.0, killed.counted, "AssertionError")])

    assert table.splitlines()[2:] == ["| worker killed |     2 |        1 |", "| **all**       |     2 |        1 |"]


@pytest.fixture
def done(setting: Setting) -> Iterator[Scene]:
    """A run that nobody has disturbed."""
    with setting.open("local", "done", few_poison(SEED)) as scene:
        scene.start()
        scene.finish()
        yield scene


def test_checks_see_what_is_wrong(setting: Setting, done: Scene):
    undisturbed = setting.undisturbed(done.poison, "local")
    check(done, undisturbed)
    (first, *_), (quarantine, *_) = done.jobs.parts(), done.jobs.hidden("*/quarantine/*")

    for path, data in {
        first: first.read_bytes() + b"x",
        quarantine: b"",
        done.jobs.out / "part-9.parquet": b"",
        done.jobs.out / "_batchpipe" / "lock": b"",
    }.items():
        before = path.read_bytes() if path.exists() else None
        path.write_bytes(data)
        with pytest.raises(AssertionError):
            check(done, undisturbed)
        path.unlink() if before is None else path.write_bytes(before)
