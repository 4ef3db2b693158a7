"""What callables print in a worker is kept beside the output, whatever becomes of the run."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.jobs import ECHO, Jobs, csv_rows, open_jobs

CHATTY = """
import logging
import pandas as pd

def chatty(frame: pd.DataFrame, worst):
    print("hello from", len(frame), "records, with hunter2-s3")
    logging.warning("and a warning")
    assert frame.n.min() > worst, "too small"
    return frame
"""
SECRETS = {"s3": {"secret": "hunter2-s3"}}


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[Jobs]:
    with open_jobs(tmp_path) as jobs:
        jobs.write("stages.py", ECHO + CHATTY)
        jobs.write("in/a.csv", csv_rows(20))
        yield jobs


@pytest.mark.parametrize(("worst", "code"), [(-1, 0), (0, 5)])
def test_G7_what_a_callable_prints_is_kept_with_secrets_masked(jobs: Jobs, worst: int, code: int):
    stages = [{"callable": "stages:chatty", "params": {"worst": worst}}]

    ran = jobs.run("run", jobs.job(stages, storage_options=SECRETS, compute={"workers": 1}))

    assert ran.code == code, ran.err
    (log,) = jobs.hidden("*/logs/worker-*.log")
    assert "hello from 20 records, with ***\n" in log.read_text()
    assert "WARNING:root:and a warning\n" in log.read_text()
    assert "hello" not in ran.err + ran.out


def test_a_worker_that_printed_nothing_leaves_no_log(jobs: Jobs):
    ran = jobs.run("run", jobs.job("stages:echo"))

    assert ran.code == 0, ran.err
    assert not jobs.hidden("*/logs/worker-*.log")
