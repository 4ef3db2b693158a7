"""What a signal does to a Dask cluster that is being opened, and what its driver keeps of the tasks that went by."""

import gc
import signal
import sys
import threading
import traceback
from pathlib import Path

import pytest

from batchpipe import load_job
from batchpipe.cluster import let_open
from batchpipe.processes import open_host
from batchpipe.split import Split
from batchpipe.workers import open_workers
from tests.jobs import ECHO, Jobs, until

MAIN = threading.main_thread().ident or 0


def test_G5_signal_waits_until_the_cluster_is_open_and_closes_it():
    events: list[str] = []
    interrupted = threading.Event()

    class Slow:
        def __init__(self) -> None:
            until(lambda: "result" in stack_of_the_main_thread())
            signal.pthread_kill(MAIN, signal.SIGUSR1)
            interrupted.wait(10)
            events.append("open")

        def close(self) -> None:
            events.append("closed")

    def interrupt(*_: object) -> None:
        interrupted.set()
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            let_open(Slow)
    finally:
        signal.signal(signal.SIGUSR1, before)

    assert events == ["open", "closed"]


def stack_of_the_main_thread() -> list[str]:
    """Names of the functions that it is in."""
    return [frame.f_code.co_name for frame, _ in traceback.walk_stack(sys._current_frames()[MAIN])]


def test_G6_the_driver_keeps_nothing_of_a_task_that_has_ended(tmp_path: Path):
    jobs = Jobs(tmp_path)
    jobs.write("stages.py", ECHO)
    job = load_job(jobs.job())
    before = count_splits()
    tasks = ((Split(index, ()),) for index in range(300))

    with open_host(job.compute) as host, open_workers(job, "run1", 300, host) as pool:
        lengths = [length for _, length in pool.stream(len, lambda _: next(tasks, ()))]
        kept = count_splits() - before

    assert lengths == [1] * 300
    assert kept < 10  # of what was sent last


def count_splits() -> int:
    """How many there are in this process."""
    gc.collect()
    return sum(type(each) is Split for each in gc.get_objects())
