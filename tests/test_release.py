"""G5: however a run ends, within 10 s no process, no temporary file and no unjournaled piece of it is left."""

import os
import pty
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from tests.jobs import COMMAND, ECHO, GATE, Jobs, csv_rows, open_jobs, until

if TYPE_CHECKING:
    from subprocess import Popen

BLOCK = """
import pandas as pd

def block(frame: pd.DataFrame):
    if frame.n.min() > 0:  # the first mini-batch passes: it opens the window
        (HERE / f"began-{frame.n.min()}").touch()
        wait_for("go")
    return frame

def wait(frame: pd.DataFrame):
    (HERE / "waits").touch()
    wait_for("go")
    return frame
"""
BROKEN = """
class Broken:
    def __init__(self):
        raise OSError("no model")

    def __call__(self, frame):
        return frame

def refuse(frame):
    raise ValueError("no")
"""

SPLITS: dict[str, Any] = {"batch": {"split_mb": 0.0005}, "compute": {"workers": 2}}


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[Jobs]:
    with open_jobs(tmp_path) as jobs:
        jobs.write("stages.py", GATE + ECHO + BLOCK + BROKEN)
        jobs.write("in/a.csv", csv_rows(300))
        yield jobs


@pytest.fixture
def blocked(jobs: Jobs) -> "Popen[str]":
    """A run on two workers, each with two splits that wait for the file ``go``."""
    run = jobs.start("run", jobs.job("stages:block", **SPLITS))
    until(lambda: len(list(jobs.folder.glob("began-*"))) >= 2, within_s=60)
    return run


def watchers(jobs: Jobs) -> list[psutil.Process]:
    return jobs.processes("watcher_process.py")


def unjournaled(jobs: Jobs) -> list[Path]:
    """Pending files that no segment of the journal names."""
    journal = "".join(path.read_text() for path in jobs.hidden("*/journal/0*.jsonl"))
    return [path for path in jobs.hidden("*/pending/*") if path.name not in journal]


@pytest.mark.parametrize(("stage", "code"), [("echo", 0), ("refuse", 5), ("Broken", 4)])
def test_G5_nothing_is_left_when_a_run_ends_by_itself(jobs: Jobs, stage: str, code: int):
    ran = jobs.run("run", jobs.job(f"stages:{stage}"))

    assert ran.code == code, ran.err
    assert jobs.is_released()
    assert not unjournaled(jobs)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_G5_a_signal_ends_the_run_with_its_code_after_release(jobs: Jobs, blocked, number: signal.Signals):
    blocked.send_signal(number)

    _, err = blocked.communicate(timeout=10)
    assert blocked.returncode == 128 + number
    assert f"stopped by {number.name}: everything is released; the same command resumes" in err
    assert "Traceback" not in err
    assert jobs.is_released()
    assert not unjournaled(jobs)


def test_G5_a_signal_ends_a_check_which_does_not_resume(jobs: Jobs):
    check = jobs.start("check", jobs.job("stages:wait", **SPLITS))
    until((jobs.folder / "waits").exists, within_s=60)

    check.send_signal(signal.SIGTERM)

    _, err = check.communicate(timeout=20)
    assert (check.returncode, err) == (143, "stopped by SIGTERM: everything is released\n")
    assert jobs.is_released(), jobs.left()


def test_G5_ctrl_c_at_a_terminal_reaches_the_driver_alone_and_ends_it_with_130(jobs: Jobs):
    job = jobs.job("stages:block", **SPLITS)
    pid, terminal = pty.fork()
    if not pid:
        os.chdir(jobs.folder)
        os.execve(COMMAND[0], [*COMMAND, "run", str(job)], jobs.environment)
    until(lambda: list(jobs.folder.glob("began-*")), within_s=60)

    os.write(terminal, b"\x03")

    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 130
    assert jobs.is_released()
    os.close(terminal)


def test_G5_a_second_signal_does_not_cut_the_release_short(jobs: Jobs, blocked):
    blocked.send_signal(signal.SIGTERM)
    blocked.send_signal(signal.SIGINT)

    blocked.communicate(timeout=10)
    assert blocked.returncode in (130, 143)
    assert jobs.is_released()


def test_G5_kill_of_the_driver_leaves_nothing_after_ten_seconds(jobs: Jobs, blocked):
    blocked.kill()

    until(lambda: jobs.is_released() and not unjournaled(jobs))


def test_G5_kill_of_driver_and_watcher_together_leaves_no_process(jobs: Jobs, blocked):
    for process in [*watchers(jobs), psutil.Process(blocked.pid)]:
        process.kill()

    until(lambda: not jobs.processes())


def test_G5_kill_of_the_watcher_ends_the_run_with_what_it_held_released(jobs: Jobs, blocked):
    for process in watchers(jobs):
        process.kill()

    _, err = blocked.communicate(timeout=10)
    assert blocked.returncode == 6
    assert "error: the run's watcher process (pid " in err
    assert "was killed, and nothing would release what the run holds" in err
    assert "next:  the same command again resumes the run" in err
    until(jobs.is_released)


def test_G5_kill_of_a_worker_gives_back_its_share_and_the_run_goes_on(jobs: Jobs, blocked):
    worker = jobs.processes("batchpipe.worker")[0]
    worker.kill()

    until(lambda: worker.pid not in [process.pid for process in jobs.processes()])
    until(lambda: len(jobs.processes("batchpipe.worker")) == 2)
    jobs.write("go", "")
    _, err = blocked.communicate(timeout=60)
    assert blocked.returncode == 0, err
    assert [record["n"] for record in jobs.records()] == list(range(300))
    assert jobs.is_released()
