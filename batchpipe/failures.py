"""How many records may fail; and failed records as an error: which one, where it lies, why, what to type next. Pure."""

from fractions import Fraction
from functools import cached_property
from math import ceil

from batchpipe.errors import RecordsFailedError
from batchpipe.formats.compression import compression_of
from batchpipe.job import Job, OnErrorSpec
from batchpipe.manifest import READING, Failure
from batchpipe.plan import Inputs
from batchpipe.probe import MOST_FIRST_RECORDS
from batchpipe.redact import clean_uri
from batchpipe.schedule import Tally


class Budget:
    """How many records of a run may fail, and whether more did; of `records` in all where that is known before."""

    def __init__(self, job: Job, inputs: Inputs, records: int | None = None) -> None:
        self._limits = job.on_error
        self._spec = job.input
        self._inputs = inputs
        self._records = records

    def is_exceeded(self, tally: Tally, *, at_end: bool = False) -> bool:
        """Whether more records failed than may; of a percentage, whether that is certain whatever is still unread."""
        percent, failed = self._limits.max_failed_percent, tally.accounts.quarantined
        if not failed or is_beyond_records(self._limits, failed):
            return failed > 0
        if not percent:  # of 0 percent the first failure is one too many, whatever is still unread
            return percent is not None
        most = self._records or (tally.accounts.read if at_end else self._most_records(tally))
        return most is not None and 100 * failed > Fraction(str(percent)) * most

    def _most_records(self, tally: Tally) -> int | None:
        """The most records there can be: of text, every unread byte may be one. None where nobody knows."""
        if self._spec.format == "object":
            return self._inputs.count
        if self._spec.format == "parquet" or self._has_compressed:
            return None
        return tally.accounts.read + self._inputs.bytes - tally.bytes_read

    @cached_property
    def _has_compressed(self) -> bool:
        return any(compression_of(found.uri, self._spec.compression) != "none" for found in self._inputs)


def is_beyond_records(limits: OnErrorSpec, failed: int) -> bool:
    """Whether more records failed than the job allows by their number."""
    return limits.max_failed_records is not None and failed > limits.max_failed_records


def too_many_failed(
    job: Job, tally: Tally, quarantine: str = "", line: int | None = None, *, redriven_of: int | None = None
) -> RecordsFailedError:
    """The error that ends a run which lost more records than it may, naming the first one, with its line if known.

    `redriven_of` is how many records the run had that is redriven; without a `quarantine` nothing was kept.
    """
    first, failed, limits = tally.failures[0], tally.accounts.quarantined, job.on_error
    read, verb = redriven_of or tally.accounts.read, "redrive" if redriven_of else "run"
    if is_beyond_records(limits, failed):
        budget = f"{limits.max_failed_records:,} allowed"
        # That one more failed is all that is known: the next power of ten asks less often than one more each time.
        remedy: dict[str, object] = {"max_failed_records": 10 ** len(str(failed - 1)) if failed > 1 else 1}
    else:
        enough = ceil(100_000 * failed / read) / 1_000
        budget = f"{limits.max_failed_percent:g} % of {read:,} allowed"
        remedy = {"max_failed_percent": f"{enough:g}"}
    kept = f" and resume, {tally.settled:,} of {tally.splits:,} splits are kept" if tally.settled else ""
    # What was asked again and again is more likely not there than sent a bad record.
    ask = "see that it answers and run again; or " if first.attempts > 1 else ""
    return RecordsFailedError(
        _what_failed(tally.failures, failed, budget),
        where=f"{describe_failure(first, line)}{_kept_in(quarantine)}",
        next=f"{ask}allow it{kept}: {job.command(verb, **remedy)}",
    )


def _what_failed(failures: list[Failure], count: int, budget: str) -> str:
    """How many failed and why: one reason, or the first of each stage where there are several."""
    firsts: dict[str, Failure] = {}
    for failure in failures:
        firsts.setdefault(failure.stage, failure)
    number = "1 record" if count == 1 else f"{count:,} records"
    if len(firsts) == 1:
        [(stage, first)] = firsts.items()
        return f"{_who(stage)} failed for {number}, {budget}: {_why(first)}"
    whys = (f"{_who(stage)}: {_why(first)}" for stage, first in firsts.items())
    return f"{number} failed, {budget}; first of each: {'; '.join(whys)}"


def _who(stage: str) -> str:
    return "reading" if stage == READING else f"stage {stage!r}"


def first_failed(job: Job, first: Failure, line: int | None = None, quarantine: str = "") -> RecordsFailedError:
    """The error that ends a run before it begins: no record of the first mini-batch is answered."""
    limit = job.on_error.max_failed_records
    # Beyond that no more are tried before the run begins, whatever may fail.
    has_more = limit is not None and limit < MOST_FIRST_RECORDS
    more = job.command("run", max_failed_records=max(100, 10 ** len(str(limit)))) if has_more else ""
    return RecordsFailedError(
        f"{_who(first.stage)} failed for the first records, and none is answered: {_why(first)}",
        where=f"{describe_failure(first, line)}{_kept_in(quarantine)}",
        next=f"mend it and try one mini-batch: {job.command('check')}"
        + (f"; or, if those behind are well, allow it: {more}" if more else ""),
    )


def _kept_in(quarantine: str) -> str:
    return f"; kept in {clean_uri(quarantine)}" if quarantine else ""


def _why(failure: Failure) -> str:
    location = f" ({failure.location})" if failure.location else ""
    return f"{failure.reason}: {failure.message}{location}"


def describe_failure(failure: Failure, line: int | None = None) -> str:
    """Where a failed record lies, for people: records count from 0, as in the quarantine, and lines from 1."""
    number = f", record {failure.record:,}" if failure.record is not None else ""
    number = f", line {line:,}" if line is not None else number
    offset = f", byte {failure.offset:,}" if failure.offset >= 0 else ""
    return f"{failure.object}{number}{offset}"
