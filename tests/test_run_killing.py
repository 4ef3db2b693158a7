"""Records that kill or stop their worker, through the real command line: each costs itself, and nothing else."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.jobs import ECHO, GATE, Jobs, csv_rows, open_jobs, until
from tests.memory_group import open_memory_group

STAGES = """
import ctypes, os, signal, time
import pandas as pd

def dies(frame: pd.DataFrame, at=157):
    if at in frame.n.values:
        ctypes.string_at(0)
    return frame

def hangs(frame: pd.DataFrame):
    if 157 in frame.n.values:
        time.sleep(600)
    return frame

def keeps_the_interpreter(frame: pd.DataFrame):
    if 157 in frame.n.values:
        ctypes.PyDLL(None).sleep(600)
    return frame

def dies_once(frame: pd.DataFrame):
    if 157 in frame.n.values and not (HERE / "died").exists():
        (HERE / "died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return frame

def lambdas(frame: pd.DataFrame):
    return frame.assign(call=[lambda n=n: n for n in frame.n])

def calling(frame: pd.DataFrame):
    return pd.DataFrame({"n": [call() for call in frame.call]})

def waits_in_a_child(frame: pd.DataFrame):
    if 157 in frame.n.values:
        (HERE / f"pid-{os.getpid()}-{os.getppid()}").touch()
        wait_for("open")
    return frame

def eats(frame: pd.DataFrame):
    if 157 in frame.n.values:
        eaten = [bytearray(b"1") * (16 << 20) for _ in range(250)]
    return frame

class DiesAtItsStart:
    def __init__(self):
        ctypes.string_at(0)

    def __call__(self, frame: pd.DataFrame):
        return frame
"""


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[Jobs]:
    with open_jobs(tmp_path) as jobs:
        jobs.write("stages.py", GATE + ECHO + STAGES)
        jobs.write("in/a.csv", csv_rows(300))
        yield jobs


def job(jobs: Jobs, function: str, *, allowed: int = 1, **blocks: Any) -> Path:
    stage = {"callable": f"stages:{function}", "invocations_timeout_s": 1.0, **blocks.pop("stage", {})}
    return jobs.job([stage], batch={"split_mb": 0.001}, on_error={"max_failed_records": allowed}, **blocks)


@pytest.mark.parametrize(
    ("function", "reason"), [("dies", "Killed"), ("hangs", "Timeout"), ("keeps_the_interpreter", "Timeout")]
)
def test_record_that_kills_or_stops_its_worker_costs_itself_alone(jobs: Jobs, function: str, reason: str):
    ran = jobs.run("run", job(jobs, function))

    assert ran.code == 0, ran.err
    assert [record["n"] for record in jobs.records()] == [n for n in range(300) if n != 157]
    (failed,) = jobs.quarantined()
    assert (failed["record"], failed["line"], failed["reason"], failed["stage"]) == (157, 159, reason, function)
    assert failed["location"].endswith(f"in {function}")
    assert jobs.is_released()


def test_record_that_kills_in_the_first_mini_batch_costs_itself_alone(jobs: Jobs):
    ran = jobs.run("run", job(jobs, "dies", stage={"params": {"at": 0}}))

    assert ran.code == 0, ran.err
    assert [record["n"] for record in jobs.records()] == list(range(1, 300))


def test_record_that_kills_ends_a_run_without_a_budget_with_5_and_is_named(jobs: Jobs):
    ran = jobs.run("run", job(jobs, "dies", allowed=0))

    assert ran.code == 5, ran.err
    assert "stage 'dies' failed for 1 record, 0 allowed: Killed: the process of the callable was killed" in ran.err
    assert "signal 11 (SIGSEGV) (stages.py:" in ran.err
    assert "in/a.csv, line 159" in ran.err
    assert jobs.is_released()


def test_record_that_takes_more_memory_than_there_is_costs_itself_alone(jobs: Jobs, memory_group: Path):
    run = jobs.start("run", job(jobs, "eats", stage={"invocations_timeout_s": 60.0}))
    (memory_group / "cgroup.procs").write_text(str(run.pid))

    _, err = run.communicate(timeout=110)

    assert run.returncode == 0, err
    assert [record["n"] for record in jobs.records()] == [n for n in range(300) if n != 157]
    (failed,) = jobs.quarantined()
    assert failed["message"] == "the process of the callable was killed by signal 9 (SIGKILL)"
    assert jobs.is_released()


@pytest.fixture
def memory_group() -> Iterator[Path]:
    with ExitStack() as release:
        try:
            group = release.enter_context(open_memory_group())
        except OSError as error:
            pytest.skip(f"needs Linux and root, to make a control group: {error}")
        yield group


def test_check_survives_a_record_that_kills(jobs: Jobs):
    ran = jobs.run("check", job(jobs, "dies", allowed=0, stage={"params": {"at": 0}}))

    assert (ran.code, "Killed: the process of the callable" in ran.err) == (5, True), ran.err
    assert jobs.is_released()


def test_worker_that_was_preempted_costs_no_record(jobs: Jobs):
    ran = jobs.run("run", job(jobs, "dies_once", allowed=0))

    assert ran.code == 0, ran.err
    assert [record["n"] for record in jobs.records()] == list(range(300))


@pytest.mark.parametrize(("function", "lost"), [("dies_once", []), ("dies", [157])])
def test_what_cannot_be_pickled_between_callables_costs_nothing_where_their_worker_is_lost(
    jobs: Jobs, function: str, lost: list[int]
):
    chain = [{"callable": f"stages:{name}"} for name in ("lambdas", function, "calling")]
    ran = jobs.run("run", jobs.job(chain, batch={"split_mb": 0.001}, on_error={"max_failed_records": len(lost)}))

    assert ran.code == 0, ran.err
    assert [record["n"] for record in jobs.records()] == [n for n in range(300) if n not in lost]
    assert [(failed["record"], failed["stage"]) for failed in jobs.quarantined()] == [(n, function) for n in lost]
    assert jobs.is_released()


def test_worker_that_is_lost_again_while_its_callables_run_in_children_costs_no_record(jobs: Jobs):
    run = jobs.start("run", job(jobs, "waits_in_a_child", allowed=0, stage={"invocations_timeout_s": 60.0}))
    for times in (1, 2, 3):
        wait_for_children(jobs, times)
        jobs.processes("batchpipe.worker")[0].kill()

    wait_for_children(jobs, 4)
    jobs.write("open", "")

    _, err = run.communicate(timeout=60)
    assert run.returncode == 0, err
    assert [record["n"] for record in jobs.records()] == list(range(300))
    assert jobs.is_released()


def wait_for_children(jobs: Jobs, count: int) -> None:
    until(lambda: len(list(jobs.folder.glob("pid-*"))) == count, 30)


def test_stage_that_kills_its_worker_at_its_start_ends_the_run_with_6_and_shows_where(jobs: Jobs):
    ran = jobs.run("run", job(jobs, "DiesAtItsStart"))

    assert ran.code == 6, ran.err
    assert "log:   Fatal Python error: Segmentation fault" in ran.err
    assert "the same command again resumes the run" in ran.err
    assert len(ran.err) < 4000
    assert jobs.is_released()
