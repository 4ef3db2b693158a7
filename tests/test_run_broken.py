"""A stage that fails for everything, from some moment on: the run ends with one error, not with a million records."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.jobs import ECHO, GATE, Jobs, csv_rows, open_jobs

STAGES = """
import os, signal, time
import pandas as pd

def breaks(frame: pd.DataFrame):
    if frame.n.min() >= 2000:
        (HERE / "broken").touch()
    if (HERE / "broken").exists() and not (HERE / "mended").exists():
        raise ConnectionError("the model server is gone")
    return frame

def works_in_one_process(frame: pd.DataFrame):
    try:
        (HERE / "worker").open("x").write(str(os.getpid()))
    except FileExistsError:
        if (HERE / "worker").read_text() not in ("", str(os.getpid())):
            raise RuntimeError("no device here")
    return frame

def dies_from_then_on(frame: pd.DataFrame):
    if frame.n.min() >= 9000:
        (HERE / "broken").touch()
    if (HERE / "broken").exists():
        (HERE / f"death-{os.getpid()}").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return frame

def fails_for_some(frame: pd.DataFrame):
    if (HERE / "broken").exists():
        (HERE / f"attempt-{time.monotonic_ns()}").touch()
        gone = ConnectionError("the model server is gone")
        gone.retry = True
        raise gone
    if (frame.n % 500 == 7).any():
        raise ValueError("seven")
    return frame
"""


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[Jobs]:
    with open_jobs(tmp_path) as jobs:
        jobs.write("stages.py", GATE + ECHO + STAGES)
        jobs.write("in/a.csv", csv_rows(20_000))
        yield jobs


def test_stage_that_breaks_ends_the_run_early_and_when_it_is_resumed_and_goes_on_once_mended(jobs: Jobs):
    job = jobs.job("stages:breaks", batch={"split_mb": 0.005}, on_error={"max_failed_percent": 99})

    broken, again = jobs.run("run", job), jobs.run("run", job)

    text = "stage 'breaks' fails for whatever it is sent, also for a record that it answered before: ConnectionError"
    assert (broken.code, text in broken.err) == (5, True), broken.err
    assert "next:  mend the stage; the same command then resumes the run, and finished splits are kept" in broken.err
    assert (again.code, text in again.err) == (5, True), again.err
    (jobs.folder / "mended").touch()
    mended = jobs.run("run", job)
    assert (mended.code, len(jobs.records())) == (0, 20_000), mended.err
    assert not jobs.hidden("*/quarantine/*")


BROKEN = "fails for whatever it is sent, also for a record that it answered before"


def test_stage_that_works_in_one_worker_only_ends_the_run_early(jobs: Jobs):
    limits = {"max_failed_percent": 99}
    stages = [{"callable": "stages:echo"}, {"callable": "stages:works_in_one_process"}]
    job = jobs.job(stages, batch={"split_mb": 0.005}, compute={"workers": 2}, on_error=limits)

    ran = jobs.run("run", job)

    assert ran.code == 5, ran.err
    assert f"stage 'works_in_one_process' {BROKEN}: RuntimeError: no device here" in ran.err
    assert jobs.is_released()


def test_stage_that_kills_its_worker_whatever_it_is_sent_ends_the_run_after_few_deaths(jobs: Jobs):
    job = jobs.job("stages:dies_from_then_on", batch={"split_mb": 0.15}, on_error={"max_failed_percent": 99})

    ran = jobs.run("run", job)

    assert (ran.code, f"stage 'dies_from_then_on' {BROKEN}: Killed" in ran.err) == (5, True), ran.err
    assert len(list(jobs.folder.glob("death-*"))) < 20
    assert jobs.is_released()


def test_redrive_to_a_stage_that_is_gone_ends_early(jobs: Jobs):
    stage = {"callable": "stages:fails_for_some", "invocations_max_retries": 1}
    job = jobs.job([stage], on_error={"max_failed_records": 40})
    first = jobs.run("run", job)
    assert (first.code, len(jobs.records())) == (0, 20_000 - 40), first.err

    (jobs.folder / "broken").touch()
    gone = jobs.run("redrive", job)

    assert (gone.code, f"stage 'fails_for_some' {BROKEN}: ConnectionError" in gone.err) == (5, True), gone.err
    assert len(list(jobs.folder.glob("attempt-*"))) == 4  # twice all of them, twice the record that was answered
    (jobs.folder / "broken").unlink()
    assert jobs.run("redrive", job).code == 0
