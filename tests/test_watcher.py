"""The watcher, against real processes: what it releases when its owner closes it, dies, or is interrupted."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from batchpipe.stages.logs import read_log
from batchpipe.stages.watcher import WatchedProcess, Watcher, WatcherLostError, open_watcher
from tests.jobs import running, until

OWNER = """
import os, sys, time
from pathlib import Path
from batchpipe.stages.logs import read_log
from batchpipe.stages.watcher import open_watcher
folder, command = Path(sys.argv[1]), sys.argv[2:]
(folder / "scratch").mkdir()
watcher = open_watcher(scratch=folder / "scratch")
watcher.at_end([sys.executable, "-c", f"open({str(folder / 'cleaned')!r}, 'w').close()"])
process = watcher.start(command, env=dict(os.environ), cwd=folder, log=folder / "log")
print(watcher.pid, process.pid, flush=True)
time.sleep(60)
"""
SLEEP = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(60)"]
STUBBORN = [
    sys.executable,
    "-c",
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)",
]
# A server whose helper leaves the group, as daemons do.
STRAY = [
    sys.executable,
    "-c",
    "import subprocess, sys, time; p = subprocess.Popen(['sleep', '60'], start_new_session=True);"
    "print(p.pid, flush=True); time.sleep(60)",
]


@pytest.fixture
def watcher() -> Iterator[Watcher]:
    with open_watcher() as watcher:
        yield watcher


def is_running(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    return False


def start(watcher: Watcher, command: list[str], folder: Path) -> WatchedProcess:
    process = watcher.start(command, env=dict(os.environ), cwd=folder, log=folder / "log")
    until((folder / "log").read_text)
    return process


@pytest.fixture
def owner(tmp_path: Path) -> Iterator[Callable[[list[str]], tuple[subprocess.Popen[bytes], int, int]]]:
    """Start a process that owns a watcher, which started a command; give its Popen and the pids of both."""
    owners = []

    def start_owner(command: list[str]) -> tuple[subprocess.Popen[bytes], int, int]:
        process = subprocess.Popen(
            [sys.executable, "-c", OWNER, str(tmp_path), *command], stdout=subprocess.PIPE, start_new_session=True
        )
        owners.append(process)
        assert process.stdout
        watcher_pid, child_pid = process.stdout.readline().split()
        return process, int(watcher_pid), int(child_pid)

    yield start_owner
    for process in owners:
        process.kill()
        process.communicate()


def test_G5_process_scratch_and_watcher_are_gone_after_the_owner_is_killed(owner, tmp_path: Path):
    process, watcher_pid, child_pid = owner(SLEEP)

    process.kill()

    until(lambda: not is_running(child_pid) and not is_running(watcher_pid))
    assert not (tmp_path / "scratch").exists()
    until((tmp_path / "cleaned").exists)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_G5_watcher_survives_signals_and_still_releases(owner, number: int):
    process, watcher_pid, child_pid = owner(SLEEP)

    os.kill(watcher_pid, number)
    os.killpg(process.pid, signal.SIGKILL)

    until(lambda: not is_running(child_pid) and not is_running(watcher_pid))


def test_G5_process_that_ignores_sigterm_is_killed(owner, tmp_path: Path):
    process, _, child_pid = owner(STUBBORN)
    until((tmp_path / "log").read_text)

    process.kill()

    until(lambda: not is_running(child_pid))


def test_G5_helper_that_left_the_group_is_killed_too(owner, tmp_path: Path):
    process, _, _ = owner(STRAY)
    until((tmp_path / "log").read_text)
    stray = int((tmp_path / "log").read_text())

    process.kill()

    until(lambda: not is_running(stray))


def test_G5_watcher_of_a_worker_finishes_after_the_driver_is_killed(owner, tmp_path: Path):
    (tmp_path / "worker").mkdir()
    worker = [sys.executable, "-c", OWNER, str(tmp_path / "worker"), *STUBBORN]
    process, _, worker_pid = owner(worker)
    until((tmp_path / "log").read_text)
    until((tmp_path / "worker" / "log").read_text)

    process.kill()

    until((tmp_path / "worker" / "cleaned").exists)
    assert not is_running(worker_pid)
    assert not (tmp_path / "worker" / "scratch").exists()


def test_G5_forked_child_that_holds_the_pipe_does_not_keep_the_watcher_waiting(watcher: Watcher, tmp_path: Path):
    code = OWNER.replace("time.sleep(60)", "\nif os.fork() == 0:\n    time.sleep(15)\nelse:\n    time.sleep(60)")
    with running([sys.executable, "-c", code, str(tmp_path), *SLEEP], stdout=subprocess.PIPE) as process:
        assert process.stdout
        child_pid = int(process.stdout.readline().split()[1])
        process.kill()
        until(lambda: not is_running(child_pid))


def test_close_waits_until_everything_is_released_and_needs_no_clean_up(tmp_path: Path):
    watcher = open_watcher(scratch=tmp_path / "scratch")
    (tmp_path / "scratch").mkdir()
    watcher.at_end(["touch", str(tmp_path / "cleaned")])
    process = start(watcher, SLEEP, tmp_path)

    watcher.close()

    assert not is_running(process.pid)
    assert not is_running(watcher.pid)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log"]
    watcher.close()


def test_stop_ends_the_group_and_poll_tells_the_signal(watcher: Watcher, tmp_path: Path):
    process = start(watcher, SLEEP, tmp_path)
    assert process.poll() is None

    process.stop()

    assert process.poll() == -signal.SIGTERM


def test_stop_kills_after_the_grace(watcher: Watcher, tmp_path: Path):
    process = start(watcher, STUBBORN, tmp_path)

    process.stop(grace_s=0.1)

    assert process.poll() == -signal.SIGKILL


def test_poll_tells_the_exit_code(watcher: Watcher, tmp_path: Path):
    process = watcher.start(
        ["sh", "-c", "exit 7"], env={"PATH": os.environ["PATH"]}, cwd=tmp_path, log=tmp_path / "log"
    )

    until(lambda: process.poll() is not None)

    assert process.returncode == 7


def test_watcher_lives_through_the_ends_of_many_processes_that_it_is_asked_about(watcher: Watcher, tmp_path: Path):
    command = ["sh", "-c", "echo words; exit 3"]

    for _ in range(60):
        process = watcher.start(command, env={"PATH": os.environ["PATH"]}, cwd=tmp_path, log=tmp_path / "log")
        while process.poll() is None:
            pass
        assert (tmp_path / "log").read_text() == "words\n"


def test_watcher_may_be_asked_again_for_an_end_it_has_told(watcher: Watcher, tmp_path: Path):
    child = watcher.start(["sh", "-c", "exit 3"], env=dict(os.environ), cwd=tmp_path, log=tmp_path / "log")
    until(lambda: watcher.poll(child.pid) == 3)

    assert watcher.poll(child.pid) == 3


def test_process_gets_its_environment_folder_and_default_signals(watcher: Watcher, tmp_path: Path):
    code = "import json, os, signal; print(json.dumps([dict(os.environ), os.getcwd(), signal.getsignal(15).name]))"

    watcher.start([sys.executable, "-I", "-c", code], env={"A": "ü"}, cwd=tmp_path, log=tmp_path / "log")

    until(lambda: (tmp_path / "log").read_text().endswith("\n"))
    env, cwd, handler = json.loads((tmp_path / "log").read_text())
    assert (env["A"], cwd, handler) == ("ü", str(tmp_path), "SIG_DFL")


def test_command_that_does_not_exist_is_an_os_error_that_names_it(watcher: Watcher, tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="no-such-server"):
        watcher.start(["no-such-server"], env={}, cwd=tmp_path, log=tmp_path / "log")


def test_log_keeps_the_end_of_a_flood_in_two_bounded_files(watcher: Watcher, tmp_path: Path):
    code = "import sys; [sys.stdout.write('x' * 1023 + '\\n') for _ in range(30 << 10)]; print('end')"

    watcher.start([sys.executable, "-c", code], env={}, cwd=tmp_path, log=tmp_path / "log")

    until(lambda: read_log([tmp_path / "log"]).endswith("end\n"))
    sizes = [path.stat().st_size for path in (tmp_path / "log", tmp_path / "log.1")]
    assert max(sizes) <= 8 << 20
    assert (tmp_path / "log").stat().st_mode & 0o077 == 0


def test_watcher_that_was_killed_is_told(watcher: Watcher, tmp_path: Path):
    os.kill(watcher.pid, signal.SIGKILL)

    with pytest.raises(WatcherLostError, match=f"run's watcher process \\(pid {watcher.pid}\\) was killed") as error:
        watcher.scratch(tmp_path)

    assert error.value.exit_code == 6


def test_process_is_stopped_also_where_the_watcher_was_killed(watcher: Watcher, tmp_path: Path):
    process = start(watcher, STUBBORN, tmp_path)
    os.kill(watcher.pid, signal.SIGKILL)

    process.stop()

    until(lambda: not is_running(process.pid))


def test_an_order_that_a_signal_cuts_short_leaves_the_next_ones_their_own_replies(watcher: Watcher, tmp_path: Path):
    process = watcher.start(SLEEP, env=dict(os.environ), cwd=tmp_path, log=tmp_path / "log")
    os.kill(watcher.pid, signal.SIGSTOP)
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    try:
        with pytest.raises(KeyboardInterrupt):
            watcher.poll(process.pid)
    finally:
        signal.signal(signal.SIGALRM, before)
        os.kill(watcher.pid, signal.SIGCONT)

    assert watcher.signal(process.pid, 0) is True
    assert watcher.poll(process.pid) is None
