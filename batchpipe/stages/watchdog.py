"""Ends a worker in which a callable takes longer than it may: no thread can be ended, and it may hold the interpreter.

The split is then run again with its callables in child processes, where the record that hangs is found. The timer is
faulthandler's, which runs without the interpreter and writes the stacks of all threads to the worker's log.
"""

import faulthandler
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count

ARM_S = 1.0
"""How often the timer is set anew; calls are ended up to so much late, never early."""

_ends: dict[int, float] = {}
_numbers = count()
_shortest = float("inf")
_watching = threading.Event()


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Mark a call that may take so long."""
    global _shortest  # noqa: PLW0603 - a process has one timer
    number = next(_numbers)
    _ends[number] = time.monotonic() + seconds
    if seconds < _shortest:
        _shortest = seconds
        _arm()
    try:
        yield
    finally:
        del _ends[number]


def start() -> None:
    """Watch over the calls of this process from now on; the second time nothing happens."""
    if not _watching.is_set():
        _watching.set()
        threading.Thread(target=_keep, name="watchdog", daemon=True).start()


def _keep() -> None:
    while True:
        _arm()
        time.sleep(ARM_S / 2)


def _arm() -> None:
    now = time.monotonic()
    # A call that begins right after this, and keeps the interpreter, has its time too.
    first = min([*list(_ends.values()), now + _shortest])
    if _watching.is_set() and first < float("inf"):
        faulthandler.dump_traceback_later(max(first + ARM_S - now, 0.01), exit=True)
