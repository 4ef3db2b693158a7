"""The errors batchpipe raises on purpose, each with the exit code a shell, cron or Airflow sees.

    BatchpipeError             1   our own defect, or an error nobody foresaw
    |-- JobError               2   the job file or the command line is wrong
    |-- InputError             3   nothing to read, unreadable, or changed while it was read
    |-- StageStartError        4   a stage did not start, or neighbouring stages do not fit
    |-- RecordsFailedError     5   more records failed than the budget allows
    |-- PoolError              6   workers did not come, were lost, or nothing moved; no room for temporary files
    |-- OutputError            7   the output cannot be written, published or verified
    `-- LockedError           75   another run holds this output: try later (EX_TEMPFAIL of sysexits.h)

Every error says what failed, where, why, and what to type next. The text is built in ``__str__`` from the
constructor's own arguments, so an error survives the pickling between a worker and the driver.
"""

import errno

DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
"""What an OSError has for a number where a file cannot grow."""
MAX_LOG_CHARACTERS = 2_000
"""Dask replaces an exception whose text is very long by a bare ``Exception``; a log's tail stays well below."""
_UNDER = "\n         "
"""Further lines of a detail stand below its first, behind the label."""


class BatchpipeError(Exception):
    """What failed and why, with where it happened, the tail of a log, and the command to type next."""

    exit_code = 1

    def __init__(self, message: str, *, where: str = "", log: str = "", next: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.log = log[-MAX_LOG_CHARACTERS:]
        self.next = next

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.message, self.where, self.log, self.next)

    def __str__(self) -> str:
        lines = [self.message]
        lines += [f"  {label} {text}".replace("\n", _UNDER) for label, text in self._details() if text]
        return "\n".join(lines)

    def _details(self) -> list[tuple[str, str]]:
        return [("where:", self.where), ("log:  ", self.log), ("next: ", self.next)]


def _rebuild(kind: type[BatchpipeError], message: str, where: str, log: str, next_: str) -> BatchpipeError:
    return kind(message, where=where, log=log, next=next_)


class JobError(BatchpipeError):
    """The job file or the command line is wrong, or the run cannot be resumed with it."""

    exit_code = 2


class InputError(BatchpipeError):
    """The input matches nothing, cannot be listed, read or parsed, or changed while it was read."""

    exit_code = 3


class StageStartError(BatchpipeError):
    """A stage did not start, was never ready, or does not fit its neighbour."""

    exit_code = 4


class RecordsFailedError(BatchpipeError):
    """More records failed than the budget allows, or an answer had a wrong count, order or schema."""

    exit_code = 5


class PoolError(BatchpipeError):
    """Workers did not come, were lost beyond retry, nothing moved, the time was up, or the temporary folder is full."""

    exit_code = 6


class OutputError(BatchpipeError):
    """The output cannot be written, published or verified, or it exists already."""

    exit_code = 7


class LockedError(BatchpipeError):
    """Another run holds this output."""

    exit_code = 75
    passes_soon = False
    """Whether it is only the sweep after a killed run, which takes seconds."""
