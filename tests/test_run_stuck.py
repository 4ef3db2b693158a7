"""Runs in which nothing moves, or that take too long: they end with 6, and say what each worker was doing."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.jobs import ECHO, Jobs, csv_rows, open_jobs

STAGES = """
import ctypes, os, time
from pathlib import Path
import pandas as pd

def sleeps(frame: pd.DataFrame):
    time.sleep(600)

def keeps_the_interpreter(frame: pd.DataFrame):
    ctypes.PyDLL(None).sleep(600)

def clogs(frame: pd.DataFrame):
    # It fails for a record, and the second time, which is the run itself, it leaves a pipe in the place of the input.
    if (frame.n == 5).any():
        raise ValueError("five")
    if frame.n.max() == 19:
        tried, object_ = Path(__file__).with_name("tried"), Path(__file__).with_name("in") / "a.csv"
        if tried.exists():
            object_.unlink()
            os.mkfifo(object_)
        tried.touch()
    return frame
"""


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[Jobs]:
    with open_jobs(tmp_path) as jobs:
        jobs.write("stages.py", ECHO + STAGES)
        jobs.write("in/a.csv", csv_rows(20))
        yield jobs


@pytest.mark.parametrize("function", ["sleeps", "keeps_the_interpreter"])
@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("no_progress_timeout_s", "nothing moved for on_error.no_progress_timeout_s: 6 s"),
        ("max_runtime_s", "the run took longer than on_error.max_runtime_s: 6 s"),
    ],
)
def test_stuck_run_ends_with_6_and_shows_the_stacks_of_its_workers(jobs: Jobs, function: str, key: str, text: str):
    ran = jobs.run("run", jobs.job(f"stages:{function}", on_error={key: 6.0}))

    assert ran.code == 6, ran.err
    assert f"error: {text}\n  log:   worker-0\n" in ran.err
    assert f"in {function}\n" in ran.err
    assert "next:  the same command resumes it" in ran.err
    assert jobs.is_released()


def test_a_run_that_is_stuck_behind_its_splits_ends_with_6_too(jobs: Jobs):
    """The lines of failed records are counted at the end: here in a pipe that nobody writes to."""
    ran = jobs.run("run", jobs.job("stages:clogs", on_error={"max_failed_records": 1, "no_progress_timeout_s": 4.0}))

    assert ran.code == 6, ran.err
    assert "error: nothing moved for on_error.no_progress_timeout_s: 4 s\n" in ran.err
    assert jobs.is_released()
