"""What a run did, as data: accounts, failed records, what one split yielded, and the manifest. Pure: no I/O.

A `SplitResult` travels from a worker to the driver and into the journal as one JSON line of a few hundred bytes;
the `Manifest` is what a reader of the output starts from (G2), and its JSON Schema is published.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr

from batchpipe.errors import BatchpipeError  # noqa: TC001 - the dataclass travels by pickle, whole

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class Accounts:
    """Records of one object, stage or run: read = written + quarantined + dropped (G1)."""

    read: int = 0
    written: int = 0
    quarantined: int = 0
    dropped: int = 0

    @property
    def balanced(self) -> bool:
        """Whether every record that was read is accounted for."""
        return self.read == self.written + self.quarantined + self.dropped

    def __add__(self, other: Accounts) -> Accounts:
        return Accounts(
            self.read + other.read,
            self.written + other.written,
            self.quarantined + other.quarantined,
            self.dropped + other.dropped,
        )

    def __str__(self) -> str:
        return (
            f"{self.read:,} read = {self.written:,} written + {self.quarantined:,} quarantined + "
            f"{self.dropped:,} dropped"
        )


READING = "read"
"""The stage that failures of reading and parsing are reported under."""


@dataclass(frozen=True, slots=True)
class Failure:
    """A record that failed for good: which one, where, why, and the record itself.

    ``record`` counts from 0 within the object and is None until the earlier splits have settled; ``offset`` is
    its first byte in the decompressed object, -1 where the format has none. ``traceback`` names the file below the
    run's folder that holds the user's traceback, empty for none.
    """

    object: str
    version: str
    range_start: int
    ordinal: int
    offset: int
    stage: str
    reason: str
    message: str
    attempts: int = 1
    location: str = ""
    traceback: str = ""
    payload: str = ""
    record: int | None = None
    line: int | None = None


@dataclass(frozen=True, slots=True)
class RangeResult:
    """What one range of one object yielded.

    ``first`` and ``next_start`` are the places where its first record and the record after its last one begin:
    the proof that neighbouring ranges of a quoted CSV fit together.
    """

    object: int
    start: int
    first: int
    next_start: int
    bytes_read: int
    accounts: Accounts


@dataclass(frozen=True, slots=True)
class StageStats:
    """What one stage did for one split, or for a run: seconds are summed over invocations."""

    invocations: int = 0
    records: int = 0
    answered: int = 0
    failed: int = 0
    dropped: int = 0
    seconds: float = 0.0

    def __add__(self, other: StageStats) -> StageStats:
        return StageStats(
            self.invocations + other.invocations,
            self.records + other.records,
            self.answered + other.answered,
            self.failed + other.failed,
            self.dropped + other.dropped,
            self.seconds + other.seconds,
        )


def _fields(record: Any) -> dict[str, Any]:
    """A slotted dataclass as a mapping. Not `asdict`, which copies every value in depth."""
    return {name: getattr(record, name) for name in record.__slots__}


@dataclass(frozen=True, slots=True)
class SplitResult:
    """What one split yielded; journaled by the driver once it has settled."""

    split: int
    ranges: tuple[RangeResult, ...]
    piece: dict[str, Any] | None
    """The pending output (`storage.Pending` as JSON), None where the split wrote nothing."""
    quarantine: dict[str, Any] | None = None
    tracebacks: dict[str, Any] | None = None
    failures: tuple[Failure, ...] = ()
    """The first few failed records, for the error text; all of them are in the quarantine file."""
    stopped: bool = False
    """The split ended itself because it found more failed records than the whole run may have."""
    stages: dict[str, StageStats] = field(default_factory=dict)
    read_s: float = 0.0
    write_s: float = 0.0
    seconds: float = 0.0
    worker: str = ""

    @property
    def accounts(self) -> Accounts:
        """The split's own accounts."""
        return sum((result.accounts for result in self.ranges), Accounts())

    def to_json(self) -> dict[str, Any]:
        """As plain data; `from_json` reads it back."""
        return {
            **_fields(self),
            "ranges": [{**_fields(result), "accounts": _fields(result.accounts)} for result in self.ranges],
            "failures": [_fields(failure) for failure in self.failures],
            "stages": {name: _fields(stats) for name, stats in self.stages.items()},
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> SplitResult:
        """Read what `to_json` wrote."""
        ranges = tuple(RangeResult(**{**r, "accounts": Accounts(**r["accounts"])}) for r in data["ranges"])
        return cls(
            **{
                **data,
                "ranges": ranges,
                "failures": tuple(Failure(**f) for f in data["failures"]),
                "stages": {name: StageStats(**stats) for name, stats in data["stages"].items()},
            }
        )


class Kept(Enum):
    """What an earlier start knew of a split."""

    SETTLED = "it counts, and its piece is there"
    LOST = "it had settled, but its piece is gone: it runs again, and how many records it has is known"
    HELD = "it is done, and counts if the ranges before it end where it began"


@dataclass(frozen=True, slots=True)
class SplitFailed:
    """A split ended with an error instead of a result."""

    split: int
    error: BatchpipeError


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Part(_Model):
    """One published output file: a line of ``parts.jsonl``."""

    uri: str = Field(description="Where the file lies, relative to the output's folder.")
    records: int = Field(description="Records in the file.")
    bytes: int = Field(description="Size of the file in bytes.")
    sha256: str = Field(description="SHA-256 of the file's bytes, in hexadecimal.")
    placeholders: int = Field(0, description="Lines beside them that stand for failed records (on_error.placeholder).")
    splits: tuple[int, int] = Field(description="First and last split whose records the file holds.")
    generation: int = Field(
        default=0, description="0 for the run's own files, n for those that its n-th redrive added."
    )


class Input(_Model):
    """One input object: a line of ``inputs.jsonl``."""

    uri: str = Field(description="Where the object lies, without user information and query.")
    bytes: int = Field(description="Size in bytes, as listed.")
    version: str = Field(description="ETag, or modification time in nanoseconds.")
    read: int = Field(description="Records read from it.")
    written: int = Field(description="Records of it that were written.")
    quarantined: int = Field(description="Records of it that failed for good.")
    dropped: int = Field(description="Records of it that a stage with may_drop left out.")


class LongTable(_Model):
    """A table too long for the manifest itself, as JSON Lines beside it."""

    uri: str = Field(description="Where the table lies, relative to the output's folder.")
    rows: int = Field(description="Lines in the table.")
    bytes: int = Field(description="Sum of the sizes of the objects it lists, in bytes.")
    sha256: str = Field(description="SHA-256 of the table's own bytes.")


class RunAccounts(_Model):
    """Records of the run: read = written + quarantined + dropped."""

    read: int
    written: int
    quarantined: int
    dropped: int


class Generation(_Model):
    """What a run added to the output, or a redrive of it."""

    run_id: str = Field(description="Id of the run or the redrive.")
    fingerprint: str = Field(
        description="SHA-256 over the run's inputs and the parts of its job that shape the output."
    )
    accounts: RunAccounts = Field(description="A redrive reads what the generation before it quarantined.")


class StageAccount(_Model):
    """What one stage did in the run."""

    invocations: int = Field(description="Calls of the stage, halvings and further attempts included.")
    records: int = Field(description="Records sent to it.")
    answered: int = Field(description="Records it answered.")
    failed: int = Field(description="Records that failed in it for good.")
    dropped: int = Field(description="Records it left out (may_drop).")
    seconds: float = Field(description="Seconds spent in it, summed over invocations.")


class Manifest(_Model):
    """What a run read, wrote and failed: written last, the only mark of success."""

    schema_version: int = Field(SCHEMA_VERSION, description="Version of this schema.")
    run_id: str = Field(description="The run's id, its idempotency key; after a redrive that of the redrive.")
    name: str = Field(description="The job's name.")
    fingerprint: str = Field(description="SHA-256 over the inputs and the parts of the job that shape the output.")
    input: tuple[str, ...] = Field(description="What was read: paths, URLs and globs, without user information.")
    output: str = Field(description="The output's folder, without user information and query.")
    output_format: str = Field(description="parquet, csv, jsonl or raw.")
    output_layout: str = Field(description="parts or mirror.")
    replaces: str = Field(description="Id of the run whose output this one took the place of; empty for none.")
    job: dict[str, Any] = Field(description="The job file as written, secrets masked.")
    inputs: LongTable
    parts: LongTable
    accounts: RunAccounts
    generations: tuple[Generation, ...] = Field(
        description="What the run added, then what each redrive of it did. The accounts above are those of all "
        "together; the stages, times, workers and splits below are those of the last."
    )
    stages: dict[str, StageAccount]
    read_s: float = Field(description="Seconds spent reading, summed over workers.")
    write_s: float = Field(description="Seconds spent writing, summed over workers.")
    worker_seconds: float = Field(description="Seconds of work, summed over splits.")
    workers: int = Field(description="Workers the run ended with.")
    splits: int = Field(description="Splits of the plan.")
    started: str = Field(description="When the run first started, UTC, ISO 8601.")
    finished: str = Field(description="When it was published, UTC, ISO 8601.")
    seconds: float = Field(description="Wall seconds of the start that finished the run.")
    versions: dict[str, str] = Field(
        description="Versions of batchpipe, Python and the libraries that shape the output."
    )
    failures: tuple[dict[str, Any], ...] = Field((), description="The first failed records; all are in the quarantine.")

    _open_dataset: Callable[[], Any] | None = PrivateAttr(None)

    @property
    def is_redriven(self) -> bool:
        """Whether a redrive wrote this manifest."""
        return len(self.generations) > 1

    def dataset(self) -> Any:
        """The published parts, and nothing else in the folder, as a `pyarrow.dataset.Dataset`.

        For a manifest that `run_job` returned or that was read from its output. Raises ValueError for another one,
        and for output.format raw, which has no columns.
        """
        if self._open_dataset is None or self.output_format == "raw":
            why = "its parts have no columns" if self.output_format == "raw" else "it was not read from its output"
            raise ValueError(f"the manifest of run {self.run_id} has no dataset: {why}")
        return self._open_dataset()

    def read_from(self, open_dataset: Callable[[], Any]) -> Manifest:
        """The manifest, knowing how to open its parts."""
        self._open_dataset = open_dataset
        return self


def manifest_schema() -> dict[str, Any]:
    """The JSON Schema of the manifest and of the lines of its long tables (``Part``, ``Input``)."""
    schema = Manifest.model_json_schema(mode="serialization")
    lines = {model.__name__: model.model_json_schema(mode="serialization") for model in (Part, Input)}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:batchpipe:manifest:{SCHEMA_VERSION}",
        **schema,
        "$defs": {**schema["$defs"], **lines},
    }
