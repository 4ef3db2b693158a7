"""Runs whose container is paused, as an operator or a suspended machine does: it answers nothing, and says nothing."""

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests import images
from tests.jobs import Jobs, open_jobs, until

if TYPE_CHECKING:
    from subprocess import Popen

ROWS = [f"!slow 0.1 {i}" for i in range(100)]


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[Jobs]:
    with open_jobs(tmp_path) as jobs:
        jobs.write("in/a.csv", "".join(f"{row}\n" for row in ROWS))
        yield jobs


def containers(jobs: Jobs, engine: str) -> list[str]:
    return images.run(engine, "ps", "-aq", f"--filter=label=batchpipe.run={jobs.run_id}").split()


@pytest.fixture
def paused(jobs: Jobs, engine: str) -> "Popen[str]":
    """A run whose container was paused while it answered."""
    stage = {"name": "model", "container": {"image": images.stage_image(engine)}, "invocations_timeout_s": 2}
    batch = {"max_records": 1, "max_concurrent_transforms": 4}
    job = jobs.job([stage], input={"uri": "in", "header": False}, output={"uri": "out", "format": "raw"}, batch=batch)
    run = jobs.start("run", job, "--run-id", jobs.run_id)
    until(lambda: jobs.hidden("*/pending/*"), 60)
    images.run(engine, "pause", *containers(jobs, engine))
    return run


def test_container_that_is_paused_is_replaced_and_no_record_is_lost(jobs: Jobs, engine: str, paused: "Popen[str]"):
    _, err = paused.communicate(timeout=100)

    assert paused.returncode == 0, err
    assert [line for part in jobs.parts() for line in part.read_text().splitlines()] == ROWS
    assert jobs.hidden("*/logs/model.log")[0].read_text().count("serving on ") == 2
    assert not containers(jobs, engine)
    assert jobs.is_released()


def test_G5_paused_container_is_removed_when_the_run_is_interrupted(jobs: Jobs, engine: str, paused: "Popen[str]"):
    paused.send_signal(signal.SIGINT)

    _, err = paused.communicate(timeout=20)
    assert paused.returncode == 130, err
    assert not containers(jobs, engine)
    assert jobs.is_released()


def test_G5_paused_container_is_removed_when_the_driver_is_killed(jobs: Jobs, engine: str, paused: "Popen[str]"):
    paused.kill()

    until(lambda: not containers(jobs, engine))
