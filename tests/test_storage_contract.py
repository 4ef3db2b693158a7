"""What every kind of store promises: local files, S3 and a store of fsspec, each for real."""

import hashlib
import os
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchpipe.errors import InputError, LockedError, OutputError
from batchpipe.storage import (
    Found,
    ObjectExistsError,
    ObjectMissingError,
    Pending,
    PendingLostError,
    StaleError,
    Store,
    join,
    open_store,
    relative,
)

if TYPE_CHECKING:
    from tests.s3_server import S3Server

DATA = os.urandom(20 << 20)


class Place:
    """A store and a fresh folder in it."""

    def __init__(self, folder: str, options: dict[str, Any]) -> None:
        self.folder, self.store = folder, open_store(folder, options)
        self.staging = self.at("_batchpipe", "run", "pending")

    def at(self, *parts: str) -> str:
        return join(self.folder, *parts)

    def names(self, found: Iterator[Found]) -> list[str]:
        return [relative(one.uri, self.folder) for one in found]

    def write_pending(self, name: str, data: bytes = b"rows", attempt: str = "a1") -> Pending:
        with self.store.open_pending(self.at(name), staging=self.staging, attempt=attempt) as piece:
            piece.write(data)
            return piece.finish()

    def iter_pending(self) -> list[Pending]:
        return list(self.store.iter_pending(self.folder, staging=self.staging))


@pytest.fixture(params=["local", "s3", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "s3":
        server: S3Server = request.getfixturevalue("s3_server")
        bucket: str = request.getfixturevalue("bucket")
        return Place(f"s3://{bucket}/out", {"s3": server.storage_options})
    return Place(str(tmp_path / "out") if request.param == "local" else f"memory://{uuid.uuid4().hex}", {})


NAMES = ["a-b.csv", "a.csv", "a/b/c.csv", "a/x.csv", "a/x.csv.gz", "ab/x.csv", "b [1].csv", "é/ü.csv"]
HIDDEN = ["_batchpipe/manifest.json", ".x.csv", "a/_SUCCESS", "a/.b/x.csv", "a/_b/x.csv"]


@pytest.fixture
def filled(place: Place) -> Place:
    for name in NAMES + HIDDEN:
        place.store.put(place.at(name), name.encode())
    return place


def test_a_folder_is_all_its_data_in_the_order_of_the_uris(filled: Place):
    assert filled.names(filled.store.find(filled.folder)) == sorted(NAMES)


def test_a_folder_is_never_a_string_prefix(filled: Place):
    assert filled.names(filled.store.find(filled.at("a"))) == ["a/b/c.csv", "a/x.csv", "a/x.csv.gz"]
    assert list(filled.store.find(filled.at("a/x.cs"))) == []


def test_one_object_is_itself_with_its_size_and_version(filled: Place):
    uri = filled.at("a", "x.csv")
    assert list(filled.store.find(uri)) == [filled.store.stat(uri)]
    assert filled.store.stat(uri).size == len("a/x.csv")


def test_an_object_named_outright_is_data_whatever_its_name(filled: Place):
    assert filled.names(filled.store.find(filled.at("a/_SUCCESS"))) == ["a/_SUCCESS"]
    assert filled.names(filled.store.find(filled.at("_batchpipe"))) == ["_batchpipe/manifest.json"]


@pytest.mark.parametrize("name", ["nothing", "a.csv/nothing", "nothing/*.csv", "a/*.parquet"])
def test_where_there_is_nothing_nothing_is_found(filled: Place, name: str):
    assert list(filled.store.find(filled.at(name))) == []


@pytest.mark.parametrize(
    ("glob", "names"),
    [
        ("*.csv", ["a-b.csv", "a.csv", "b [1].csv"]),
        ("a?b.csv", ["a-b.csv"]),
        ("a*/*.csv", ["a/x.csv", "ab/x.csv"]),
        ("a/**", ["a/b/c.csv", "a/x.csv", "a/x.csv.gz"]),
        ("**/x.csv", ["a/x.csv", "ab/x.csv"]),
        ("a/**/*.csv", ["a/b/c.csv", "a/x.csv"]),
        ("[!a]*/*", ["é/ü.csv"]),
        ("b [[]1].csv", ["b [1].csv"]),
        ("*/_b/x.csv", []),
    ],
)
def test_globs(filled: Place, glob: str, names: list[str]):
    assert filled.names(filled.store.find(filled.at(glob))) == names


def test_a_glob_finds_the_same_everywhere(filled: Place, tmp_path: Path):
    local = Place(str(tmp_path / "local"), {})
    for name in NAMES + HIDDEN:
        local.store.put(local.at(name), b"")

    @settings(max_examples=60, deadline=None)
    @given(
        st.lists(st.sampled_from(["*", "**", "a*", "*.csv", "[!a]*", "?", "x.*", "b", "a?b*"]), min_size=1, max_size=3)
    )
    def find_both(pattern: list[str]) -> None:
        assert filled.names(filled.store.find(filled.at(*pattern))) == local.names(local.store.find(local.at(*pattern)))

    find_both()


def test_two_stars_beside_a_name_are_refused_with_what_to_write(place: Place):
    with pytest.raises(
        InputError, match=r"'\*\*' must stand alone between slashes\n  next:  write 'x\*' for one level"
    ):
        list(place.store.find(place.at("x**")))


def test_a_whole_folder_shows_hidden_objects_too_and_takes_its_name_literally(filled: Place):
    assert filled.names(filled.store.iter_folder(filled.folder)) == sorted(NAMES + HIDDEN)
    assert list(filled.store.iter_folder(filled.at("a*"))) == []


def test_what_is_written_is_read(place: Place):
    version = place.store.put(place.at("x"), b"one")
    assert place.store.read_with_version(place.at("x")) == (b"one", version)
    assert place.store.exists(place.at("x"))


def test_what_is_missing_is_an_input_error_that_says_so(place: Place):
    assert not place.store.exists(place.at("x"))
    for read in (place.store.read, place.store.stat):
        with pytest.raises(ObjectMissingError, match=r"cannot read '.*/x': there is nothing\n  next:  check the name"):
            read(place.at("x"))


def test_deleting_is_repeatable(filled: Place):
    for _ in range(2):
        filled.store.delete([filled.at("a.csv"), filled.at("a-b.csv")])
        filled.store.remove_folder(filled.at("a"))
    assert filled.names(filled.store.find(filled.folder)) == ["ab/x.csv", "b [1].csv", "é/ü.csv"]


def test_create_never_overwrites(place: Place):
    version = place.store.create(place.at("x"), b"first")
    with pytest.raises(ObjectExistsError, match=r"cannot create .*: it exists already"):
        place.store.create(place.at("x"), b"second")
    assert place.store.read_with_version(place.at("x")) == (b"first", version)


def test_replace_needs_the_version_that_is_there(place: Place):
    first = place.store.create(place.at("x"), b"1")
    second = place.store.replace(place.at("x"), b"2", first)
    assert second != first
    for stale in (
        lambda: place.store.replace(place.at("x"), b"3", first),
        lambda: place.store.replace(place.at("y"), b"", "7"),
    ):
        with pytest.raises(StaleError, match=r"cannot replace .*: it was changed by somebody else"):
            stale()
    assert place.store.read(place.at("x")) == b"2"


@pytest.fixture(params=["local", "s3"])
def strong_place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "local":
        return Place(str(tmp_path / "out"), {})
    return Place(
        f"s3://{request.getfixturevalue('bucket')}/out", {"s3": request.getfixturevalue("s3_server").storage_options}
    )


def race(contend: Callable[[int], Any]) -> list[Any]:
    """What sixteen threads that start at once come to: a result or an exception each."""
    barrier = threading.Barrier(16)

    def start(number: int) -> Any:
        barrier.wait()
        try:
            return contend(number)
        except OutputError as exc:
            return exc

    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(start, range(16)))


def test_of_sixteen_racing_creators_one_wins(strong_place: Place):
    strong_place.store.put(strong_place.at("before"), b"")  # a new bucket's first object takes its time
    outcomes = race(lambda number: strong_place.store.create(strong_place.at("x"), b"%d" % number))
    winners = [number for number, outcome in enumerate(outcomes) if isinstance(outcome, str)]
    assert [strong_place.store.read(strong_place.at("x"))] == [b"%d" % number for number in winners]
    assert sum(isinstance(outcome, ObjectExistsError) for outcome in outcomes) == 15


def test_of_sixteen_racing_publishers_one_wins(tmp_path: Path):
    place = Place(str(tmp_path), {})  # on S3 the run's lock keeps publishers apart, see `S3Store.publish`
    pieces = [place.write_pending("p", b"%d" % number, f"a{number}") for number in range(16)]
    outcomes = race(lambda number: place.store.publish(pieces[number]))
    winners = [number for number, outcome in enumerate(outcomes) if isinstance(outcome, str)]
    assert [place.store.read(place.at("p"))] == [b"%d" % number for number in winners]


def test_a_store_says_whether_it_knows_conditional_puts_and_leaves_nothing(strong_place: Place, tmp_path: Path):
    assert strong_place.store.supports_conditional_put(strong_place.folder)
    assert list(strong_place.store.iter_folder(strong_place.folder)) == []
    assert not open_store("memory://x").supports_conditional_put("memory://x")


def test_reading_in_order_and_at_random_gives_the_bytes(place: Place):
    place.store.publish(place.write_pending("x", DATA))
    found = place.store.stat(place.at("x"))
    with place.store.open(found.uri, size=found.size, version=found.version) as file:
        assert b"".join(iter(lambda: file.read(1_234_567), b"")) == DATA
        for start, length in [(0, 10), (19 << 20, 5 << 20), (5, 0), (7_000_001, 9_000_000), (100, 1)]:
            file.seek(start)
            assert file.read(length) == DATA[start : start + length]
        assert file.seek(-5, os.SEEK_END) == len(DATA) - 5
        assert file.read() == DATA[-5:]


def test_readahead_stops_where_the_reader_stops_but_reading_goes_on(place: Place):
    place.store.publish(place.write_pending("x", DATA))
    found = place.store.stat(place.at("x"))
    with place.store.open(found.uri, size=found.size, version=found.version, stop=9 << 20) as file:
        file.seek(1 << 20)
        assert file.read(18 << 20) == DATA[1 << 20 : 19 << 20]


def test_an_object_that_changed_since_it_was_listed_is_refused(place: Place):
    place.store.put(place.at("x"), b"before")
    found = place.store.stat(place.at("x"))
    place.store.put(place.at("x"), b"after!")
    with pytest.raises(
        InputError, match=r"'.*/x': it changed since it was listed\n  next:  wait until nobody writes it"
    ):
        read_all(place.store, found)


def test_an_empty_object_that_was_filled_is_refused_too(place: Place):
    place.store.put(place.at("x"), b"")
    found = place.store.stat(place.at("x"))
    assert read_all(place.store, found) == b""
    place.store.put(place.at("x"), b"filled")
    with pytest.raises(InputError, match="it changed since it was listed"):
        read_all(place.store, found)


def read_all(store: Store, found: Found) -> bytes:
    with store.open(found.uri, size=found.size, version=found.version) as file:
        return file.read()


@pytest.mark.parametrize("size", [0, 5, 8 << 20, 20 << 20])
def test_a_pending_piece_is_invisible_until_it_is_published(place: Place, size: int):
    pending = place.write_pending("p", DATA[:size])
    assert list(place.store.find(place.folder)) == []
    assert (pending.size, pending.sha256) == (size, hashlib.sha256(DATA[:size]).hexdigest())
    version = place.store.publish(pending)
    assert read_all(place.store, Found(place.at("p"), size, version)) == DATA[:size]
    assert place.iter_pending() == []


def test_publishing_twice_is_publishing_once(place: Place):
    pending = Pending.from_json(place.write_pending("p").to_json())
    assert place.store.publish(pending) == place.store.publish(pending)
    assert place.names(place.store.find(place.folder)) == ["p"]


def test_a_late_writer_cannot_change_what_was_published(place: Place):
    first = place.write_pending("p", b"first")
    assert not place.store.holds(first)
    place.store.publish(first)
    late = place.write_pending("p", b"later", attempt="a2")
    with pytest.raises(ObjectExistsError):
        place.store.publish(late)
    assert place.store.read(place.at("p")) == b"first"
    assert (place.store.holds(first), place.store.holds(late)) == (True, False)


def test_a_discarded_piece_cannot_be_published(place: Place):
    pending = place.write_pending("p")
    place.store.discard(pending)
    place.store.discard(pending)
    with pytest.raises(PendingLostError, match=r"cannot publish .*/p': its pending (upload|piece) .*is gone"):
        place.store.publish(pending)


def test_replacing_needs_the_version_that_was_seen(place: Place):
    old = place.store.put(place.at("p"), b"old")
    place.store.publish(place.write_pending("p", b"new", "a1"), replaces=old)
    with pytest.raises(ObjectExistsError, match=r"cannot publish .*: another (file|object) is there"):
        place.store.publish(place.write_pending("p", b"wrong", "a2"), replaces=old)
    assert place.store.read(place.at("p")) == b"new"


def test_what_was_to_be_replaced_may_be_gone(place: Place):
    old = place.store.put(place.at("p"), b"old")
    place.store.delete([place.at("p")])
    place.store.publish(place.write_pending("p", b"new"), replaces=old)
    assert place.store.read(place.at("p")) == b"new"


def test_a_lost_piece_is_told_while_the_old_object_stands(place: Place):
    old = place.store.put(place.at("p"), b"older")
    pending = place.write_pending("p", b"newer")
    place.store.discard(pending)
    with pytest.raises(PendingLostError):
        place.store.publish(pending, replaces=old)


def test_a_piece_that_is_not_finished_is_discarded(place: Place):
    with place.store.open_pending(place.at("p"), staging=place.staging, attempt="a1") as piece:
        piece.write(DATA)
        assert piece.tell() == len(DATA)
    assert place.iter_pending() == []


def test_pieces_that_a_killed_run_left_are_found_and_discarded(place: Place):
    left = [place.write_pending(f"p{number}", attempt=f"run-{number}") for number in range(3)]
    found = place.iter_pending()
    assert {one.upload_id or one.staging for one in found} == {one.upload_id or one.staging for one in left}
    for one in found:
        place.store.discard(one)
    assert place.iter_pending() == []


def test_a_lock_names_its_holder_to_who_comes_later(place: Place):
    with place.store.lock(place.at("_batchpipe/lock"), {"run": "91c07be2"}) as lock:
        text = rf"run 91c07be2 on .*, pid {os.getpid()}, since 20.* UTC holds this output\n  where: .*/lock\n  next: "
        with pytest.raises(LockedError, match=text):
            place.store.lock(place.at("_batchpipe/lock"), {"run": "other"})
        lock.renew()
    assert not place.store.exists(place.at("_batchpipe/lock"))
    place.store.lock(place.at("_batchpipe/lock"), {"run": "other"}).release()


def test_a_lost_lock_is_noticed_and_another_run_s_lock_is_left_alone(place: Place):
    lock = place.store.lock(place.at("lock"), {"run": "mine"}, ttl_s=3600)
    place.store.delete([place.at("lock")])
    with place.store.lock(place.at("lock"), {"run": "theirs"}):
        with pytest.raises(OutputError, match=r"the lock .* was lost: .*\n  next:  see that no other run writes here"):
            lock.renew()
        lock.release()
        assert place.store.exists(place.at("lock"))
