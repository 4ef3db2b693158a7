"""Failed records as an error: which one, where it lies, why, and what to type next. Pure."""

from batchpipe.errors import RecordsFailedError
from batchpipe.job import Job
from batchpipe.manifest import Failure
from batchpipe.redact import clean_uri
from batchpipe.schedule import Tally


def too_many_failed(job: Job, tally: Tally, quarantine: str, line: int | None = None) -> RecordsFailedError:
    """The error that ends a run which lost more records than it may, naming the first one, with its line if known."""
    first, failed = tally.failures[0], tally.accounts.quarantined
    allowed = job.on_error.max_failed_records
    budget = f"{allowed:,} allowed" if allowed is not None else f"{job.on_error.max_failed_percent:g} % allowed"
    count = "1 record" if failed == 1 else f"{failed:,} records"
    kept = f"{tally.settled:,} of {tally.splits:,} splits are kept"
    return RecordsFailedError(
        f"stage {first.stage!r} failed for {count}, {budget}: {_why(first)}",
        where=f"{describe_failure(first, line)}; kept in {clean_uri(quarantine)}",
        next=f"allow it and resume, {kept}: batchpipe run {job.path} --set on_error.max_failed_records={failed}",
    )


def first_failed(job: Job, first: Failure, line: int | None = None, quarantine: str = "") -> RecordsFailedError:
    """The error that ends a run before it begins: no record of the first mini-batch is answered."""
    kept = f"; kept in {clean_uri(quarantine)}" if quarantine else ""
    return RecordsFailedError(
        f"stage {first.stage!r} failed for the first records, and none is answered: {_why(first)}",
        where=f"{describe_failure(first, line)}{kept}",
        next=f"mend it and try one mini-batch: batchpipe check {job.path}",
    )


def _why(failure: Failure) -> str:
    location = f" ({failure.location})" if failure.location else ""
    return f"{failure.reason}: {failure.message}{location}"


def describe_failure(failure: Failure, line: int | None = None) -> str:
    """Where a failed record lies, for people."""
    number = f", record {failure.record + 1:,}" if failure.record is not None else ""
    number = f", line {line:,}" if line is not None else number
    offset = f", byte {failure.offset:,}" if failure.offset >= 0 else ""
    return f"{failure.object}{number}{offset}"
