"""Runs in which nothing moves, or that take too long: they end with 6, and say what each worker was doing."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.jobs import ECHO, Jobs, csv_rows, open_jobs
from tests.stage_server import Server, Stage

STAGES = """
import ctypes, os, signal, time
from pathlib import Path
import pandas as pd

def sleeps(frame: pd.DataFrame):
    time.sleep(600)

def keeps_the_interpreter(frame: pd.DataFrame):
    ctypes.PyDLL(None).sleep(600)

def kills(frame: pd.DataFrame):
    # It is the end of the worker the first time; then it is called in a process of its own.
    killed = Path(__file__).with_name("killed")
    if not killed.exists():
        killed.touch()
        os.kill(os.getpid(), signal.SIGKILL)

def kills_then_keeps_the_interpreter(frame: pd.DataFrame):
    kills(frame)
    keeps_the_interpreter(frame)

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
        ("no_progress_timeout_s", "nothing moved for on_error.no_progress_timeout_s: 10 s"),
        ("max_runtime_s", "the run took longer than on_error.max_runtime_s: 10 s"),
    ],
)
def test_stuck_run_ends_with_6_and_shows_the_stacks_of_its_workers(jobs: Jobs, function: str, key: str, text: str):
    ran = jobs.run("run", jobs.job(f"stages:{function}", on_error={key: 10.0}))

    assert ran.code == 6, ran.err
    assert f"error: {text}\n  log:   worker-0\n" in ran.err
    assert f"in {function}\n" in ran.err
    assert "next:  the same command resumes it" in ran.err
    assert jobs.is_released()


def test_a_call_that_hangs_in_a_child_process_is_shown_by_the_stacks_of_that(jobs: Jobs):
    ran = jobs.run("run", jobs.job("stages:kills_then_keeps_the_interpreter", on_error={"no_progress_timeout_s": 15.0}))

    assert ran.code == 6, ran.err
    worker, stage, innermost, *_ = told(ran.err)
    assert worker == "worker-1"
    assert stage == "stage 'kills_then_keeps_the_interpreter': 1 invocation in a process of its own"
    assert innermost.endswith("in keeps_the_interpreter")
    assert jobs.is_released()


def test_an_endpoint_that_never_answers_is_told_with_the_invocations_it_has(jobs: Jobs):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        ran = jobs.run("run", endpoint_job(jobs, silent.getsockname()[1], no_progress_timeout_s=10.0))

    assert ran.code == 6, ran.err
    assert told(ran.err) == ["worker-0", "stage 'model': 1 invocation in flight"]
    assert jobs.is_released()


def test_an_invocation_that_waits_for_its_next_attempt_is_told(jobs: Jobs):
    jobs.write("in/a.csv", "n\n!status 503 600\n")
    with serving() as port:
        ran = jobs.run("run", endpoint_job(jobs, port, max_runtime_s=12.0))

    assert ran.code == 6, ran.err
    assert told(ran.err) == ["worker-0", "stage 'model': 1 invocation waiting for another attempt"]
    assert jobs.is_released()


@contextmanager
def serving() -> Iterator[int]:
    """The port of the stage server."""
    with Server(("127.0.0.1", 0), Stage) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def endpoint_job(jobs: Jobs, port: int, **limits: float) -> Path:
    endpoint = {"endpoint": {"url": f"http://127.0.0.1:{port}/"}, "content_type": "text/csv"}
    return jobs.job([{"name": "model", **endpoint, "invocations_timeout_s": 100.0}], on_error=limits)


def told(err: str) -> list[str]:
    """The lines that say what workers were doing, without the seconds."""
    _, _, doing = err.partition("  log:   ")
    return [line.strip().rpartition(" for ")[0] or line.strip() for line in doing.partition("  next:")[0].splitlines()]


def test_a_run_that_is_stuck_behind_its_splits_ends_with_6_and_shows_what_it_reads(jobs: Jobs):
    """The lines of failed records are counted at the end: here in a pipe that nobody writes to."""
    ran = jobs.run("run", jobs.job("stages:clogs", on_error={"max_failed_records": 1, "no_progress_timeout_s": 4.0}))

    assert ran.code == 6, ran.err
    assert "error: nothing moved for on_error.no_progress_timeout_s: 4 s\n" in ran.err
    assert told(ran.err)[0] == "worker-0"
    assert "batchpipe/storage/local.py" in ran.err
    assert jobs.is_released()
