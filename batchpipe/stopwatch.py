"""Ends a run in which nothing moves any more, or that takes too long. The driver looks at it several times a second."""

import time
from collections.abc import Callable

from batchpipe.errors import PoolError
from batchpipe.job import OnErrorSpec


class Stopwatch:
    """Ends a run in which nothing moves any more, or that takes longer than it may."""

    def __init__(self, limits: OnErrorSpec) -> None:
        self._limits = limits
        self._started = self._moved = time.monotonic()
        self._seen: tuple[int, ...] = ()

    def check(self, figures: tuple[int, ...], stacks: Callable[[], str]) -> None:
        """Look at figures that move with the work. Raises PoolError (6), with what each worker was doing."""
        now, limits = time.monotonic(), self._limits
        if figures != self._seen:
            self._seen, self._moved = figures, now
        if limits.max_runtime_s is not None and now - self._started > limits.max_runtime_s:
            msg = f"the run took longer than on_error.max_runtime_s: {limits.max_runtime_s:g} s"
            raise PoolError(msg, log=stacks(), next="the same command resumes it; finished splits are kept")
        if now - self._moved > limits.no_progress_timeout_s:
            msg = f"nothing moved for on_error.no_progress_timeout_s: {limits.no_progress_timeout_s:g} s"
            next_ = "the same command resumes it; a larger timeout waits longer for slow stages"
            raise PoolError(msg, log=stacks(), next=next_)
