import errno
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from batchpipe.errors import BatchpipeError, InputError, LockedError, OutputError
from batchpipe.storage import ObjectExistsError, Pending, StaleError, flock, open_store
from batchpipe.storage.explain import WRITING, explained

STORE = open_store("/")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write_pending(folder: Path, data: bytes = b"rows", name: str = "p") -> Pending:
    with STORE.open_pending(str(folder / name), staging=str(folder / "pending"), attempt="run-7") as piece:
        piece.write(data)
        return piece.finish()


def test_a_file_that_grows_while_it_is_read_is_told_when_reading_ends(tmp_path: Path):
    (tmp_path / "x").write_bytes(b"before")
    found = STORE.stat(str(tmp_path / "x"))
    file = STORE.open(found.uri, size=found.size, version=found.version)
    assert file.read() == b"before"
    with (tmp_path / "x").open("ab") as writer:
        writer.write(b" and after")
    with pytest.raises(InputError, match="it changed since it was listed"), file:
        pass
    assert file.closed


def test_an_error_while_reading_is_not_hidden_by_the_change(tmp_path: Path):
    (tmp_path / "x").write_bytes(b"before")
    found = STORE.stat(str(tmp_path / "x"))
    file = STORE.open(found.uri, size=found.size, version=found.version)
    (tmp_path / "x").write_bytes(b"after, and longer")
    with pytest.raises(ZeroDivisionError), file:
        _ = 1 / 0
    assert file.closed


def test_a_changed_file_leaves_no_descriptor_open(tmp_path: Path):
    (tmp_path / "x").write_bytes(b"before")
    before = names(Path("/dev/fd"))
    with pytest.raises(InputError):
        STORE.open(str(tmp_path / "x"), size=1, version="0")
    assert names(Path("/dev/fd")) == before


def test_versions_of_quick_replacements_all_differ(tmp_path: Path):
    versions = [STORE.create(str(tmp_path / "x"), b"")]
    for _ in range(50):
        versions.append(STORE.replace(str(tmp_path / "x"), b"", versions[-1]))
    assert len(set(versions)) == 51


def test_of_racing_replacers_in_other_processes_one_wins(tmp_path: Path):
    version = STORE.create(str(tmp_path / "x"), b"")
    program = "import sys; from batchpipe.storage import *; open_store('/').replace(sys.argv[1], b'', sys.argv[2])"
    command = [sys.executable, "-c", program, str(tmp_path / "x"), version]
    racers = [subprocess.Popen(command, stderr=subprocess.PIPE) for _ in range(4)]
    texts = [racer.communicate(timeout=60)[1] for racer in racers]
    assert sorted(b"StaleError" in text for text in texts) == [False, True, True, True]


def test_a_replacer_that_has_stopped_is_not_waited_for_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(flock, "REPLACES_WITHIN_S", 0.1)
    version = STORE.create(str(tmp_path / "x"), b"1")
    with flock.locked_folder(tmp_path), pytest.raises(LockedError) as raised:
        STORE.replace(str(tmp_path / "x"), b"2", version)
    assert (raised.value.exit_code, raised.value.where) == (75, str(tmp_path))
    assert "another process has held this folder for 0.1 s, as if it had stopped" in str(raised.value)
    assert f"fuser -v {tmp_path}" in raised.value.next
    STORE.replace(str(tmp_path / "x"), b"2", version)
    assert names(tmp_path) == ["x"]


def test_writing_leaves_only_what_was_written(tmp_path: Path):
    version = STORE.create(str(tmp_path / "x"), b"1")
    with pytest.raises(ObjectExistsError):
        STORE.create(str(tmp_path / "x"), b"2")
    with pytest.raises(StaleError):
        STORE.replace(str(tmp_path / "x"), b"2", "1")
    STORE.put(str(tmp_path / "x"), b"3")
    assert (names(tmp_path), version != STORE.stat(str(tmp_path / "x")).version) == (["x"], True)


def test_a_publish_that_a_kill_cut_short_is_finished(tmp_path: Path):
    pending = write_pending(tmp_path)
    os.link(pending.staging, tmp_path / "p")  # killed before the staged name was removed
    STORE.publish(pending)
    assert (tmp_path / "p").read_bytes() == b"rows"
    assert names(tmp_path / "pending") == []


def test_a_publish_by_a_process_that_died_is_recognized_by_its_bytes(tmp_path: Path):
    pending = write_pending(tmp_path)
    program = (
        "import json, sys; from batchpipe.storage import *; p = Pending.from_json(json.loads(sys.argv[1]));"
        "open_store(p.uri).publish(p); import os; os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", program, json.dumps(pending.to_json())], check=False).returncode == -9
    STORE.publish(pending)
    (tmp_path / "p").write_bytes(b"ROWS")
    with pytest.raises(ObjectExistsError, match="another file is there"):
        STORE.publish(pending)


def test_a_piece_staged_on_another_device_is_published_too(tmp_path: Path):
    elsewhere = Path("/dev/shm" if sys.platform == "linux" else "/tmp") / tmp_path.name
    try:
        with STORE.open_pending(str(tmp_path / "p"), staging=str(elsewhere), attempt="a") as piece:
            piece.write(b"rows")
            STORE.publish(piece.finish())
        assert (names(tmp_path), names(elsewhere)) == (["p"], [])
    finally:
        shutil.rmtree(elsewhere)


def test_links_are_followed_but_not_in_circles(tmp_path: Path):
    (tmp_path / "in" / "a").mkdir(parents=True)
    (tmp_path / "in" / "a" / "x").touch()
    (tmp_path / "in" / "a" / "up").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "b").symlink_to(tmp_path / "in" / "a")
    found = [found.uri for found in STORE.find(str(tmp_path / "in"))]
    assert found == [str(tmp_path / "in" / "a" / "x"), str(tmp_path / "in" / "b" / "x")]


def test_what_another_process_removes_while_a_folder_is_listed_is_not_there(tmp_path: Path):
    for name in ("a/1", "a/2", "b/1", "c"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    listing = open_store(str(tmp_path)).iter_folder(str(tmp_path))
    first = next(listing)
    (tmp_path / "a/2").unlink()
    shutil.rmtree(tmp_path / "b")

    assert [Path(found.uri) for found in (first, *listing)] == [tmp_path / "a/1", tmp_path / "c"]


def test_a_link_that_leads_nowhere_is_told(tmp_path: Path):
    (tmp_path / "x").symlink_to("nowhere")
    with pytest.raises(InputError, match=r"'.*/x': its symbolic link leads nowhere\n  next:  see where to: ls -l"):
        list(STORE.find(str(tmp_path)))


def test_a_pipe_is_passed_over_in_a_folder_and_refused_by_name(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    assert list(STORE.find(str(tmp_path))) == []
    with pytest.raises(InputError, match=r"cannot read '.*/pipe': it is not a regular file\n  next:  copy it into one"):
        list(STORE.find(str(tmp_path / "pipe")))


def test_a_folder_read_as_a_file_is_an_input_error(tmp_path: Path):
    with pytest.raises(InputError, match=r"cannot read '.*': it is a folder\n  next:  name an object in it"):
        STORE.read(str(tmp_path))


def test_a_file_where_a_folder_should_be_is_an_output_error(tmp_path: Path):
    (tmp_path / "out").touch()
    with pytest.raises(
        OutputError, match=r"cannot make the folder '.*/out': a file is where a folder should be\n"
    ) as told:
        STORE.put(str(tmp_path / "out" / "x"), b"")
    assert told.value.next == f"check the path: ls -ld {tmp_path}/out"


def test_a_folder_that_another_run_removed_while_a_piece_was_written_is_told(tmp_path: Path):
    with STORE.open_pending(str(tmp_path / "p"), staging=str(tmp_path / "pending"), attempt="late") as piece:
        piece.write(b"rows")
        shutil.rmtree(tmp_path / "pending")
        with pytest.raises(OutputError) as told:
            piece.finish()

    assert str(told.value).partition("late-")[2].partition("'")[2] == (
        ": its folder was removed meanwhile\n"
        "  next:  see that no other run writes here, then run the same command again: it resumes"
    )


def test_a_full_disk_is_an_output_error_that_names_what_to_do():
    text = "cannot write '/dev/full': no space left on the device\n  next:  free some space there, then run the same"
    with pytest.raises(OutputError, match=text), explained(WRITING, "/dev/full"), Path("/dev/full").open("wb") as file:
        file.write(b"x" * 10_000)


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (errno.EACCES, "permission denied\n  next:  check its owner and mode: ls -ld /"),
        (errno.EROFS, "the file system is read-only\n  next:  choose another place, or mount it writable"),
        (errno.EDQUOT, "the disk quota is used up\n  next:  free some space there, then run the same command again"),
        (errno.EIO, "Input/output error"),
    ],
)
def test_what_the_system_refuses_is_told_in_one_line_and_what_to_check(number: int, text: str):
    with pytest.raises(OutputError) as told, explained(WRITING, "/out/x"):
        raise OSError(number, os.strerror(number))
    assert str(told.value).startswith(f"cannot write '/out/x': {text}")


def test_a_user_without_the_right_to_write_is_told(tmp_path: Path):
    tmp_path.chmod(0o555)
    become_nobody = "import os, sys; from batchpipe.storage import *; os.geteuid() or os.setuid(65534)"
    program = f"{become_nobody}; open_store('/').put(sys.argv[1], b'')"
    command = [sys.executable, "-c", program, str(tmp_path / "x")]
    told = subprocess.run(command, capture_output=True, text=True, check=False).stderr
    assert f"OutputError: cannot write '{tmp_path / 'x'}': permission denied" in told


def test_a_place_that_takes_no_folder_is_told_with_what_is_there():
    with pytest.raises(OutputError) as proc:
        STORE.lock("/proc/out/_batchpipe/lock", {})
    with pytest.raises(OutputError) as sys_:
        STORE.lock("/sys/out/_batchpipe/lock", {})

    assert (proc.value.message, proc.value.next) == (
        "cannot make the folder '/proc/out': its file system takes no folder there",
        "choose another place",
    )
    assert re.match(r"cannot make the folder '/sys/out': (operation not permitted|permission denied)", str(sys_.value))
    assert re.fullmatch(r"check its owner.* ls -ld /sys", sys_.value.next)


def test_our_errors_survive_pickling():
    error = ObjectExistsError("cannot create 'x'", next="look")
    copy: BatchpipeError = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), copy.exit_code) == (ObjectExistsError, str(error), 7)
