"""What a signal does to a Dask cluster that is being opened."""

import signal
import sys
import threading
import traceback

import pytest

from batchpipe.cluster import let_open
from tests.jobs import until

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
