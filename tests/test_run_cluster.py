"""Runs on somebody else's Dask: a scheduler by its address, a cluster by its class; workers give the chain back."""

import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from distributed import Client

from batchpipe.errors import PoolError
from batchpipe.jobfile import load_job
from batchpipe.runner import run_job
from tests.jobs import ECHO, GATE, Jobs, csv_rows, open_jobs, running, until

STAGES = """
import pandas as pd

class Block:
    def __call__(self, frame: pd.DataFrame):
        if frame.n.min() > 0:
            (HERE / "began").touch()
            wait_for("go")
        return frame
"""


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[Jobs]:
    with open_jobs(tmp_path) as jobs:
        jobs.write("stages.py", GATE + ECHO + STAGES)
        jobs.write("in/a.csv", csv_rows(100))
        yield jobs


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A scheduler and a worker with two threads, without TLS, as other programs start them; its address."""
    folder = tmp_path_factory.mktemp("cluster")
    code = "from distributed.cli.dask_{0} import main; main()"
    at, log = folder / "scheduler.json", (folder / "log").open("w")
    common = ["--no-dashboard", "--scheduler-file", str(at)]
    environment = {**os.environ, "DASK_TEMPORARY_DIRECTORY": str(folder)}
    options: dict[str, Any] = {"cwd": folder, "stderr": log, "stdout": log, "env": environment}
    with (
        running(
            [sys.executable, "-c", code.format("scheduler"), "--host", "127.0.0.1", "--port", "0", *common], **options
        ),
        running([sys.executable, "-c", code.format("worker"), "--nthreads", "2", "--no-nanny", *common], **options),
    ):
        until(lambda: at.exists() and at.read_text().rstrip().endswith("}"), within_s=60)
        with Client(scheduler_file=str(at), set_as_default=False) as client:
            client.wait_for_workers(1, timeout=60)
            yield client.scheduler.address
    log.close()


def at(address: str) -> dict[str, Any]:
    return {"compute": {"cluster": {"address": address}}}


def held_runs() -> list[str]:
    """Asked on a worker: runs whose chain it holds."""
    from batchpipe import worker_chain

    return list(worker_chain._held)


def test_G5_a_cluster_by_its_address_is_used_and_given_back(jobs: Jobs, cluster: str):
    ran = jobs.run("run", jobs.job(**at(cluster)), "--json")

    assert (ran.code, ran.manifest["workers"]) == (0, 1), ran.err
    assert [record["n"] for record in jobs.records()] == list(range(100))
    with Client(cluster, set_as_default=False) as client:
        assert client.run(held_runs) == {name: [] for name in client.scheduler_info()["workers"]}
    assert jobs.is_released()


def test_G5_workers_of_others_give_the_chain_back_when_the_driver_is_killed(jobs: Jobs, cluster: str):
    run = jobs.start("run", jobs.job("stages:Block", batch={"split_mb": 0.0002}, **at(cluster)), "--run-id", "killed")
    until((jobs.folder / "began").exists, within_s=60)
    with Client(cluster, set_as_default=False) as client:
        assert list(client.run(held_runs).values()) == [["killed"]]

        run.kill()
        run.communicate()

        until(lambda: list(client.run(held_runs).values()) == [[]])
    jobs.write("go", "")
    until(jobs.is_released)
    again = jobs.run("run", jobs.job("stages:Block", batch={"split_mb": 0.0002}, **at(cluster)), "--run-id", "killed")
    assert (again.code, len(jobs.records())) == (0, 100), again.err


def test_workers_of_others_say_what_they_do_where_a_run_is_stuck(jobs: Jobs, cluster: str):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        stage = {"name": "model", "endpoint": {"url": url}, "content_type": "text/csv"}
        ran = jobs.run("run", jobs.job([stage], on_error={"no_progress_timeout_s": 8.0}, **at(cluster)))

    assert ran.code == 6, ran.err
    assert "  log:   tcp://127.0.0.1:" in ran.err
    assert "\n         stage 'model': 1 invocation in flight for " in ran.err


def test_a_cluster_by_its_class_is_opened_with_its_options_and_closed(jobs: Jobs):
    local = {"class": "distributed.LocalCluster", "options": {"n_workers": 1, "dashboard_address": None}}

    ran = jobs.run("run", jobs.job(compute={"workers": 1, "cluster": local}))

    assert (ran.code, len(jobs.records())) == (0, 100), ran.err
    assert jobs.is_released()


def test_a_class_that_is_not_there_is_2(jobs: Jobs):
    ran = jobs.run("run", jobs.job(compute={"cluster": {"class": "distributed.NoCluster"}}))

    assert ran.code == 2
    assert "compute.cluster.class: cannot import 'distributed.NoCluster'" in ran.err


def test_an_address_where_nobody_answers_is_6(jobs: Jobs, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("batchpipe.cluster.CONNECT_TIMEOUT_S", 0.5)

    with pytest.raises(PoolError, match=r"no Dask scheduler answers at tcp://127\.0\.0\.1:9") as caught:
        run_job(load_job(jobs.job(**at("tcp://127.0.0.1:9"))))
    assert (caught.value.exit_code, caught.value.next) == (6, "compute.cluster.address must name a running scheduler")
