"""A stage that fails for everything, from some moment on: the run ends with one error, not with a million records."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.jobs import ECHO, GATE, Jobs, csv_rows, open_jobs

STAGES = """
import pandas as pd

def breaks(frame: pd.DataFrame):
    if frame.n.min() >= 2000:
        (HERE / "broken").touch()
    if (HERE / "broken").exists() and not (HERE / "mended").exists():
        raise ConnectionError("the model server is gone")
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
    assert (again.code, "failed for the first records, and none is answered" in again.err) == (5, True), again.err
    (jobs.folder / "mended").touch()
    mended = jobs.run("run", job)
    assert (mended.code, len(jobs.records())) == (0, 20_000), mended.err
    assert not jobs.hidden("*/quarantine/*")
