"""A manifest, a plan or an error as the text a person reads. Pure: prints nothing, reads nothing."""

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchpipe.redact import clean_uri
from batchpipe.split import SPLITS_AT_A_TIME

if TYPE_CHECKING:
    from batchpipe.errors import BatchpipeError
    from batchpipe.job import Job
    from batchpipe.manifest import Manifest
    from batchpipe.plan import Plan

_UNITS = ("B", "KB", "MB", "GB", "TB")


def format_bytes(size: float) -> str:
    """``2.9 MB``: in units of 1,024, as the job file counts."""
    for unit in _UNITS:
        if size < 1024 or unit == _UNITS[-1]:
            return f"{size:,.0f} {unit}" if unit == "B" else f"{size:,.1f} {unit}"
        size /= 1024
    raise AssertionError


def format_seconds(seconds: float) -> str:
    """``3.4 s``, ``2:05 min`` or ``1:02:05 h``."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d} min" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d}:{rest:02d} h"


def count(number: int, noun: str) -> str:
    """``1 record``, ``2 records``."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def short_path(uri: str, folder: Path) -> str:
    """A local path as seen from a folder where it lies below it; everything else as it is."""
    try:
        return str(Path(uri).relative_to(folder)) if "://" not in uri else clean_uri(uri)
    except ValueError:
        return uri


def summarize(manifest: "Manifest", folder: Path, *, was_done: bool = False, redrive: str = "") -> str:
    """What a run did, in a dozen lines; `redrive` is the command for the records that failed."""
    accounts, out = manifest.accounts, short_path(manifest.output, folder)
    failed = count(accounts.quarantined, "record") + " quarantined" if accounts.quarantined else ""
    if was_done:
        head = f"{manifest.name} {manifest.run_id}: done already at {manifest.finished}, nothing to do"
    else:
        head = f"{manifest.name} {manifest.run_id}: done in {format_seconds(manifest.seconds)}"
    lines = [head + (f", {failed}" if failed else "")]
    rows = [
        (
            "read",
            accounts.read,
            count(manifest.inputs.rows, "object"),
            manifest.inputs.bytes,
            _inputs(manifest, folder),
        ),
        ("written", accounts.written, count(manifest.parts.rows, "part"), manifest.parts.bytes, out),
    ]
    widths = [max(len(f"{row[1]:,}") for row in rows), max(len(row[2]) for row in rows)]
    for name, records, things, size, where in rows:
        sizes = f"{format_bytes(size):>9}"
        lines.append(f"  {name:<9} {_records(records, widths[0])}  {things:<{widths[1]}}  {sizes}  {where}")
    if accounts.quarantined and manifest.failures:
        where = f"{out}/_batchpipe/{manifest.run_id}/quarantine"
        lines.append(f"  failed    {_records(accounts.quarantined, widths[0])}  {_reasons(manifest)}  {where}")
    if manifest.is_redriven:
        new = manifest.generations[-1].accounts
        lines.append(
            f"  redriven  {_records(new.read, widths[0])}"
            f"  {new.written:,} written, {new.quarantined:,} failed again, {new.dropped:,} dropped"
        )
    lines.append(
        f"  accounts  {accounts.read:,} read = {accounts.written:,} written + {accounts.quarantined:,} quarantined"
        f" + {accounts.dropped:,} dropped"
    )
    lines.append(f"  time      {_shares(manifest)}")
    if accounts.quarantined and redrive:
        lines.append(f"next: {redrive}")
    return "\n".join(lines)


def describe_plan(plan: "Plan", job: "Job", run_id: str) -> str:
    """What a run would read and how it would be cut."""
    sizes = "no bytes" if not plan.inputs.bytes else format_bytes(plan.inputs.bytes)
    in_flight = min(stage.max_payload_bytes(job.batch) for stage in job.stages)
    records = f", at most {count(job.batch.max_records, 'record')}" if job.batch.max_records else ""
    return "\n".join(
        (
            f"{job.name} {run_id}",
            f"  input     {count(plan.inputs.count, 'object')}, {sizes} of {job.input.format}",
            f"  splits    {plan.count:,} of about {format_bytes(plan.split_bytes)}",
            f"  batches   at most {format_bytes(in_flight)}{records}",
            f"  chain     {' -> '.join(stage.name for stage in job.stages)}",
            f"  output    {clean_uri(job.output.uri)} as {job.output.format}, layout {job.output.layout}",
        )
    )


def _inputs(manifest: "Manifest", folder: Path) -> str:
    return ", ".join(short_path(uri, folder) for uri in manifest.input[:2]) + ", ..." * (len(manifest.input) > 2)


def _records(number: int, width: int) -> str:
    return f"{number:>{width},} {'record ' if number == 1 else 'records'}"


def _reasons(manifest: "Manifest") -> str:
    """Why records failed. The manifest keeps the first few: where more did, the first speaks for itself alone."""
    kinds = Counter(f"{failure['reason']} in {failure['stage']}" for failure in manifest.failures)
    if len(manifest.failures) < manifest.accounts.quarantined:
        return f"first: {next(iter(kinds))}"
    return ", ".join(f"{number:,} {kind}" if len(kinds) > 1 else kind for kind, number in kinds.items())


def _shares(manifest: "Manifest") -> str:
    spent = {name: stage.seconds for name, stage in manifest.stages.items()}
    spent |= {"read": manifest.read_s, "write": manifest.write_s}
    total = sum(spent.values()) or 1.0
    shares = "  ".join(f"{name} {100 * seconds / total:.0f}%" for name, seconds in spent.items())
    workers = f"{count(manifest.workers, 'worker')}, {SPLITS_AT_A_TIME} splits at a time on each"
    return f"{shares}  ({workers}, {manifest.worker_seconds:.1f} s over all splits)"


def explain(error: "BatchpipeError", folder: Path) -> str:
    """An error as printed on stderr: what, where, the end of a log, what to type next; paths as seen from a folder."""
    lines = [f"error: {error.message}"]
    for label, text in (("where", error.where), ("log", error.log), ("next", error.next)):
        if text:
            indented = text.replace("\n", "\n         ")
            lines.append(f"  {label + ':':<6} {indented}")
    return re.sub(rf"(?<![\w/]){re.escape(str(folder))}/", "", "\n".join(lines))


def error_document(error: "BatchpipeError") -> Mapping[str, Any]:
    """An error as the one JSON object of `--json`."""
    fields = {"error": error.message, "where": error.where, "log": error.log, "next": error.next}
    return {**{key: value for key, value in fields.items() if value}, "exit_code": error.exit_code}
