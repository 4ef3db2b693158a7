"""Progress: a bar on a terminal, ``key=value`` lines without one, nothing where none is asked for."""

import io
import json
import os
import pty
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from batchpipe.job import Job
from batchpipe.jobfile import load_job
from batchpipe.manifest import Accounts
from batchpipe.progress import Log
from batchpipe.schedule import Progress, Tally
from tests.jobs import COMMAND, ECHO, GATE, Jobs, csv_rows, open_jobs, until

SLOW = """
import pandas as pd

def slow(frame: pd.DataFrame):
    if frame.n.min() >= 100:
        (HERE / "began").touch()
        wait_for("go")
        assert "FAILS" not in os.environ
    return frame
"""


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[Jobs]:
    with open_jobs(tmp_path) as jobs:
        jobs.write("stages.py", GATE + ECHO + SLOW)
        jobs.write("in/a.csv", csv_rows(200))
        yield jobs


def read_all(terminal: int) -> str:
    shown = b""
    try:
        while chunk := os.read(terminal, 1 << 16):
            shown += chunk
    except OSError:  # EIO: whoever had the terminal has ended
        pass
    return shown.decode()


def test_a_terminal_shows_a_bar_with_records_rate_failures_and_workers(jobs: Jobs):
    """It moves inside a split: the only one waits half-way while its records are shown."""
    job = jobs.job("stages:slow", batch={"max_records": 50})
    terminal, theirs = pty.openpty()
    run = subprocess.Popen(
        [*COMMAND, "run", str(job)], cwd=jobs.folder, env=jobs.environment, stdout=subprocess.PIPE, stderr=theirs
    )
    os.close(theirs)
    until((jobs.folder / "began").exists, within_s=60)
    shown = ""
    while " 100 records" not in shown:
        shown += os.read(terminal, 1 << 16).decode()
    jobs.write("go", "")
    shown += read_all(terminal)
    out, _ = run.communicate(timeout=60)
    os.close(terminal)

    head, *_ = shown.splitlines()
    assert re.fullmatch(
        r"job [0-9a-f]{8}: 1 object, 2\.\d KB csv -> 1 split, 1 stage; output out; resume with: .*", head
    )
    assert re.search(r"\d+% \|.{20}\| 100 records  [\d.k]+/s  eta \S.*  failed 0  workers 1", shown)
    assert "done in" in out.decode()


@pytest.mark.parametrize("ends", ["signal", "error"])
def test_what_ends_a_run_is_told_on_a_line_below_the_bar(jobs: Jobs, ends: str):
    job = jobs.job("stages:slow", batch={"max_records": 50})
    terminal, theirs = pty.openpty()
    environment = {**jobs.environment, "FAILS": "1"}
    run = subprocess.Popen([*COMMAND, "run", str(job)], cwd=jobs.folder, env=environment, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = ""
    while " 100 records" not in shown:
        shown += os.read(terminal, 1 << 16).decode()
    if ends == "signal":
        run.send_signal(signal.SIGTERM)
    else:
        jobs.write("go", "")
    shown += read_all(terminal)
    run.wait(timeout=60)
    os.close(terminal)

    told = {"signal": "stopped by SIGTERM: ", "error": "error: stage 'slow' failed for "}[ends]
    assert f"workers 1\r\n{told}" in shown


def test_without_a_terminal_each_step_is_a_line_of_pairs_and_stdout_one_json_object(jobs: Jobs):
    ran = jobs.run("run", jobs.job(), "--json")

    lines = ran.err.splitlines()
    assert [re.search(r"step=(\w+)", line)[1] for line in lines] == ["plan", "start", "publish", "done"]  # type: ignore[index]
    assert all(re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ job run=[0-9a-f]{8} step=", line) for line in lines)
    assert 'output=out resume="batchpipe run ' in lines[0]
    assert "records=200 " in lines[-1]
    assert json.loads(ran.out)["accounts"]["written"] == 200


def test_quiet_prints_nothing(jobs: Jobs):
    ran = jobs.run("run", jobs.job(), "-q")

    assert (ran.code, ran.out, ran.err) == (0, "", "")


@pytest.fixture
def job(tmp_path: Path) -> Job:
    (tmp_path / "job.yaml").write_text("input: {uri: in}\nstages: [{callable: 'a:b'}]\noutput: {uri: out}\n")
    return load_job(tmp_path / "job.yaml")


def test_the_log_repeats_itself_every_ten_seconds_and_at_each_new_step(job: Job):
    stream, now = io.StringIO(), 0.0
    log = Log(stream, "batchpipe run job.yaml", clock=lambda: now)
    for second in range(31):
        now = float(second)
        tally = Tally(splits=4, settled=second // 10, accounts=Accounts(read=second, written=second))
        log(Progress("transform", "r1", job, tally, records_at_work=5, workers=2))
    log(Progress("publish", "r1", job, tally))

    lines = stream.getvalue().splitlines()
    assert [line.partition("step=")[2].split()[:2] for line in lines] == [
        ["transform", "records=15"],
        ["transform", "records=25"],
        ["transform", "records=35"],
        ["publish", "records=30"],
    ]
    assert lines[0].endswith("per_s=1 splits=1 of=4 failed=0 workers=2")
