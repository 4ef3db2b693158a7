"""Locks and what becomes of them when their holder dies, pauses or meets others."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from batchpipe.errors import LockedError, OutputError
from batchpipe.storage import Lock, Store, open_store
from batchpipe.storage import owner as owners
from tests.s3_server import S3Server

HOLDER = """
import json, subprocess, sys
from batchpipe.storage import open_store
uri, options, child = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3:]
lock = open_store(uri, options).lock(uri, {"run": "killed"})
quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
children = [subprocess.Popen(child, close_fds=False, **quiet) for _ in range(1) if child]
print(*[child.pid for child in children], "held", flush=True)
sys.stdin.read()
"""


class Place:
    def __init__(self, uri: str, options: dict[str, Any]) -> None:
        self.uri, self.options, self.store = uri, options, open_store(uri, options)

    def lock(self, ttl_s: float = 30) -> Lock:
        return self.store.lock(self.uri, {"run": "mine"}, ttl_s=ttl_s)

    def lock_elsewhere(self, *child: str) -> tuple[subprocess.Popen[str], str]:
        """A process of its own that holds the lock, and what it said."""
        command = [sys.executable, "-c", HOLDER, self.uri, json.dumps(self.options), *child]
        holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert holder.stdout
        return holder, holder.stdout.readline()


@pytest.fixture(params=["local", "s3", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    return make_place(request, tmp_path)


@pytest.fixture(params=["local", "s3"])
def shared_place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    return make_place(request, tmp_path)


def make_place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "s3":
        server: S3Server = request.getfixturevalue("s3_server")
        return Place(f"s3://{request.getfixturevalue('bucket')}/out/lock", {"s3": server.storage_options})
    return Place(f"{tmp_path}/out/lock" if request.param == "local" else f"memory://{tmp_path}/lock", {})


def test_a_killed_holder_s_lock_is_taken_over_at_once(shared_place: Place):
    holder, _ = shared_place.lock_elsewhere()
    with pytest.raises(LockedError, match=rf"run killed on .*, pid {holder.pid}, since"):
        shared_place.lock()
    holder.kill()
    holder.communicate()
    shared_place.lock().release()


def test_a_child_of_the_holder_does_not_keep_the_lock(shared_place: Place):
    holder, said = shared_place.lock_elsewhere("sleep", "60")
    holder.kill()
    holder.communicate()
    shared_place.lock().release()
    os.kill(int(said.split()[0]), signal.SIGKILL)  # it lived till now, or this raises


def test_of_many_who_want_it_one_has_it(shared_place: Place):
    barrier = threading.Barrier(8)

    def take(_: int) -> Lock | None:
        barrier.wait()
        try:
            return shared_place.lock()
        except LockedError:
            return None

    with ThreadPoolExecutor(8) as pool:
        held = [lock for lock in pool.map(take, range(8)) if lock]
    assert len(held) == 1
    held[0].release()


def test_a_holder_that_lets_go_between_our_opening_and_our_locking_does_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    place, held = Place(f"{tmp_path}/lock", {}), []
    held.append(place.lock())

    def let_go_then_lock(descriptor: int, operation: int) -> None:
        monkeypatch.undo()
        held.pop().release()  # its file, which we have open, is now no file's
        fcntl.flock(descriptor, operation)

    monkeypatch.setattr("batchpipe.storage.flock.fcntl.flock", let_go_then_lock)
    with place.lock(), pytest.raises(LockedError):
        place.lock()


def put_lock(store: Store, uri: str, **owner: Any) -> None:
    """A lock as a run on another host would leave it."""
    store.put(uri, owners.to_bytes(owners.this_process({"run": "theirs"}) | {"host": "elsewhere"} | owner))


def take_when_stale(place: Place, ttl_s: float) -> Lock:
    deadline = time.monotonic() + 20
    while True:
        try:
            return place.lock(ttl_s)
        except LockedError:
            assert time.monotonic() < deadline


@pytest.fixture
def s3_place(s3_server: S3Server, bucket: str) -> Place:
    return Place(f"s3://{bucket}/lock", {"s3": s3_server.storage_options})


def test_a_silent_holder_s_lock_lapses_by_the_store_s_clock(s3_place: Place):
    put_lock(s3_place.store, s3_place.uri, pid=2**22 + 1)
    with pytest.raises(LockedError, match=r"run theirs on elsewhere, pid \d+, since .*\n.*\n.* lapses 30 s after"):
        s3_place.lock()
    take_when_stale(s3_place, ttl_s=1).release()


def test_of_many_who_take_a_stale_lock_over_one_has_it(s3_place: Place):
    put_lock(s3_place.store, s3_place.uri, host=owners.this_process({})["host"], pid=2**22 + 1)  # that pid cannot be
    test_of_many_who_want_it_one_has_it(s3_place)


def test_a_holder_renews_its_lock_by_itself(s3_place: Place):
    with s3_place.lock(ttl_s=0.6):
        first = s3_place.store.stat(s3_place.uri).version
        deadline = time.monotonic() + 20
        while s3_place.store.stat(s3_place.uri).version == first:
            assert time.monotonic() < deadline


def test_a_holder_whose_lock_was_taken_over_finds_out_and_leaves_it(s3_place: Place):
    lock = s3_place.lock(ttl_s=3600)
    put_lock(s3_place.store, s3_place.uri)
    with pytest.raises(OutputError, match=r"the lock .*/lock.* was lost: another run has taken it, or it was removed"):
        lock.renew()
    lock.release()
    assert b"elsewhere" in s3_place.store.read(s3_place.uri)


def test_a_lock_with_nonsense_in_it_is_somebody_s(s3_place: Place):
    s3_place.store.put(s3_place.uri, b"nonsense")
    with pytest.raises(LockedError, match=r"^another run holds this output\n  where: s3://.*/lock"):
        s3_place.lock()


def test_a_weak_store_s_lock_lapses_by_the_hosts_clocks(tmp_path: Path):
    place = Place(f"memory://{tmp_path}/lock", {})
    put_lock(place.store, place.uri, renewed=time.time())
    with pytest.raises(LockedError, match="lapses after 30 s"):
        place.lock()
    put_lock(place.store, place.uri, renewed=time.time() - 31)
    place.lock().release()


def test_a_released_lock_may_be_released_again(place: Place):
    lock = place.lock()
    lock.release()
    lock.release()
    assert not place.store.exists(place.uri)


def test_only_a_process_that_we_can_see_is_called_dead():
    here = owners.this_process({})
    assert not owners.is_dead(here)
    assert owners.is_dead(here | {"pid": 2**22 + 1})
    assert owners.is_dead(here | {"started": "1"})  # the pid belongs to a later process
    for other in ({"host": "x"}, {"boot": "x"}, {"processes": "pid:[1]"}):
        assert not owners.is_dead(here | {"pid": 2**22 + 1} | other)
