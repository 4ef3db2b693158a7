"""Runs whose watchers are killed: the driver itself stops what it started, and says what happened."""

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests import images
from tests.jobs import Jobs, open_jobs, until
from tests.opened_stage import SERVER

WATCHER = "watcher_process.py"
GONE = ("error: the run's watcher process (pid ", "next:  the same command again resumes the run")


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[Jobs]:
    with open_jobs(tmp_path) as jobs:
        jobs.write("in/a.csv", "".join(f"!slow 0.1 {i}\n" for i in range(200)))
        yield jobs


@pytest.fixture(params=["process", pytest.param("container", marks=pytest.mark.container)])
def stage(request: pytest.FixtureRequest) -> dict[str, Any]:
    if request.param == "process":
        return {"name": "model", "process": {"command": SERVER}}
    return {"name": "model", "container": {"image": images.stage_image(request.getfixturevalue("engine"))}}


@pytest.fixture
def servers(request: pytest.FixtureRequest, jobs: Jobs, stage: dict[str, Any]) -> Callable[[], list[str]]:
    """What serves the stage of this folder's runs and is still there."""
    if "process" in stage:
        return lambda: [str(process.pid) for process in jobs.processes("stage_server.py")]
    engine = request.getfixturevalue("engine")
    return lambda: images.run(engine, "ps", "-aq", f"--filter=label=batchpipe.run={jobs.run_id}").split()


def start(jobs: Jobs, stage: dict[str, Any]) -> Any:
    batch = {"max_records": 1, "max_concurrent_transforms": 4}
    job = jobs.job([stage], input={"uri": "in", "header": False}, output={"uri": "out", "format": "raw"}, batch=batch)
    return jobs.start("run", job, "--run-id", jobs.run_id)


def assert_ends_without_watchers(jobs: Jobs, run: Any, servers: Callable[[], list[str]]) -> None:
    """Kill all watchers of a run: it ends with 6, says so, and leaves nothing."""
    for process in jobs.processes(WATCHER):
        process.kill()

    _, err = run.communicate(timeout=30)
    assert run.returncode == 6, err
    for text in GONE:
        assert text in err
    until(lambda: not servers() and jobs.is_released())


def test_G5_watcher_killed_at_the_very_start_ends_the_run_with_6(jobs: Jobs, stage: dict[str, Any], servers):
    run = start(jobs, stage)
    until(lambda: jobs.processes(WATCHER), 30)

    assert_ends_without_watchers(jobs, run, servers)


def test_G5_all_watchers_killed_while_stages_start_end_the_run_with_6(jobs: Jobs, stage: dict[str, Any], servers):
    run = start(jobs, stage)
    until(lambda: len(jobs.processes(WATCHER)) == 2, 30)  # the driver's, and the one its worker opened for the stage

    assert_ends_without_watchers(jobs, run, servers)


def test_G5_all_watchers_killed_in_the_middle_end_the_run_with_6(jobs: Jobs, stage: dict[str, Any], servers):
    run = start(jobs, stage)
    until(lambda: jobs.hidden("*/pending/*"), 60)

    assert_ends_without_watchers(jobs, run, servers)


def test_G5_run_goes_on_without_the_watcher_of_a_worker_and_stops_its_stages(
    jobs: Jobs, stage: dict[str, Any], servers
):
    run = start(jobs, stage)
    until(lambda: jobs.hidden("*/pending/*"), 60)
    [of_the_worker] = [process for process in jobs.processes(WATCHER) if process.ppid() != run.pid]

    of_the_worker.kill()

    _, err = run.communicate(timeout=60)
    assert run.returncode == 0, err
    assert not servers()
    assert jobs.is_released()


def test_server_that_dies_without_a_watcher_is_not_started_again(jobs: Jobs, stage: dict[str, Any], servers, request):
    run = start(jobs, stage)
    until(lambda: jobs.hidden("*/pending/*"), 60)
    [of_the_worker] = [process for process in jobs.processes(WATCHER) if process.ppid() != run.pid]
    of_the_worker.kill()

    for server in servers():
        if "process" in stage:
            psutil.Process(int(server)).send_signal(signal.SIGKILL)
        else:
            images.run(request.getfixturevalue("engine"), "kill", server)

    _, err = run.communicate(timeout=60)
    assert run.returncode == 6, err
    for text in GONE:
        assert text in err
    assert not servers()
    assert jobs.is_released()
