"""The chain that a worker process holds for a run: opened once, closed once, and then for good."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from batchpipe import worker_chain
from batchpipe.errors import PoolError
from batchpipe.job import Job
from batchpipe.worker_chain import close_worker_chain, open_worker_chain, renew_lease
from tests.jobs import until
from tests.opened_stage import make_job


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    (tmp_path / "kept.py").write_text("def same(frame):\n    return frame\n")
    yield make_job(tmp_path, {"callable": "kept:same"})
    close_worker_chain("run")


def test_G5_task_that_waited_does_not_open_the_chain_of_a_run_that_has_ended(job: Job):
    assert open_worker_chain(job, "run") is open_worker_chain(job, "run")

    close_worker_chain("run")

    with pytest.raises(PoolError, match="run run has ended: its driver is gone"):
        open_worker_chain(job, "run")


def test_driver_that_comes_back_opens_the_chain_and_holds_it_by_its_lease(job: Job, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(worker_chain, "LEASE_S", 1.0)
    close_worker_chain("run")

    renew_lease("run")

    open_worker_chain(job, "run")
    until(lambda: not worker_chain._held)
