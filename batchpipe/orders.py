"""What every task of a run is told beside its splits: the job, where pieces go, what columns are. Pure data."""

import base64
from collections.abc import Mapping
from dataclasses import astuple, dataclass, field, replace
from typing import Any, Self

import pyarrow as pa

from batchpipe import __version__
from batchpipe.convert import InputSchema
from batchpipe.job import Job
from batchpipe.split import InputObject, Range, Split, pick
from batchpipe.storage import join

HIDDEN = "_batchpipe"
TRIAL = "check-"
"""What the run id of a `check` begins with, of which nothing is kept."""
SINGLE_RECORDS_TOGETHER = 64
_ENDINGS = {"parquet": ".parquet", "csv": ".csv", "jsonl": ".jsonl", "raw": ".out"}
_COMPRESSED_ENDINGS = {"gzip": ".gz", "zstd": ".zst"}


def quarantine_name(split: int) -> str:
    """The file of a split's failed records, below the run's folder."""
    return f"quarantine/split-{split:08d}.jsonl"


def traceback_name(split: int) -> str:
    """The file of the tracebacks of user code on a split's records, below the run's folder."""
    return f"logs/tracebacks/split-{split:08d}.txt"


@dataclass(frozen=True, slots=True)
class Place:
    """Where the pieces of one run go. A description, sent to workers."""

    job: Job
    run_id: str
    part_prefix: str
    attempt: str
    """Unique to one start of the run, so that a published object tells whose it is."""

    @property
    def staging(self) -> str:
        """The folder for pieces that storage cannot hide at their final place."""
        return join(self.job.output.uri, HIDDEN, self.run_id, "pending")

    def piece_uri(self, split: Split) -> str:
        """Where the split's piece will be published."""
        output = self.job.output
        if output.layout == "parts":
            name = f"{self.part_prefix}{split.index:08d}{_ENDINGS[output.format]}"
            return join(output.uri, name + self._compressed_ending)
        if split.ranges[0].is_whole:
            return self.mirror_uri(split.ranges[0].object)
        return join(self.pieces, f"{split.index:08d}")

    def mirror_uri(self, found: InputObject) -> str:
        """Where the answers to one input object will be published, under `layout: mirror`."""
        return join(self.job.output.uri, f"{found.name}.out{self._compressed_ending}")

    @property
    def pieces(self) -> str:
        """The folder of pieces that are joined before anything is published."""
        return join(self.job.output.uri, HIDDEN, self.run_id, "pieces")

    @property
    def _compressed_ending(self) -> str:
        output = self.job.output
        return _COMPRESSED_ENDINGS.get(output.codec, "") if output.format != "parquet" else ""

    def quarantine_uri(self, split: Split) -> str:
        """Where the split's quarantined records will be seen."""
        return join(self.job.output.uri, HIDDEN, self.run_id, quarantine_name(split.index))

    def traceback_uri(self, split: Split) -> str:
        """Where the tracebacks of user code on the split's records will be seen."""
        return join(self.job.output.uri, HIDDEN, self.run_id, traceback_name(split.index))


@dataclass(frozen=True, slots=True)
class Schemas:
    """What the dataset's first mini-batch proved: how input is parsed, and what every answer is cast to."""

    input: InputSchema | None = None
    output: pa.Schema | None = None
    advice: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """What containers said on ``/execution-parameters``, by stage: read once, so that the plan stays fixed."""
    is_proved: bool = False
    """Whether a record was answered. Where none is, in the whole dataset, the first part stands for the columns."""
    answered: Range | None = None
    """That record: asked again, it tells records that fail from a stage that answers no more."""

    def to_json(self) -> dict[str, Any]:
        """As plain data, for the journal."""
        found = self.input
        columns = (
            {"stated": sorted(found.stated), "columns": found.columns, "header_of": found.header_of} if found else {}
        )
        input_, output = _text(found.schema if found else None), _text(self.output)
        advice = {name: dict(said) for name, said in self.advice.items()}
        proof = {"is_proved": self.is_proved, "answered": _place(self.answered)}
        return {"input": input_, **columns, "output": output, "advice": advice, **proof}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read what `to_json` wrote."""
        found, output = _schema(data["input"]), _schema(data["output"])
        schema = None
        if found is not None:
            schema = InputSchema(found, frozenset(data["stated"]), tuple(data["columns"]), data["header_of"])
        return cls(schema, output, data["advice"], data["is_proved"], _range(data.get("answered")))


@dataclass(frozen=True, slots=True)
class Orders:
    """What every task of a run is told beside its splits. A description: nothing open."""

    place: Place
    schemas: Schemas
    version: str = __version__

    @property
    def job(self) -> Job:
        """The job of the run."""
        return self.place.job

    @property
    def max_batch_bytes(self) -> int:
        """Most bytes of a mini-batch: what the stage with the smallest requests takes."""
        return min(stage.max_payload_bytes(self.job.batch, self._advised_mb(stage.name)) for stage in self.job.stages)

    @property
    def max_batch_records(self) -> int | None:
        """Most records of a mini-batch; None is no limit but bytes.

        Where every stage sends one record a request anyway, some travel together: what a mini-batch costs beside
        its requests is then paid once for all of them. The first one stays as stated, for it only tells the columns.
        """
        stated = self.job.batch.max_records
        is_alike = self.schemas.is_proved and all(stage.is_http for stage in self.job.stages)
        return SINGLE_RECORDS_TOGETHER if stated == 1 and is_alike else stated

    def _advised_mb(self, stage: str) -> float | None:
        advised = self.schemas.advice.get(stage, {}).get("MaxPayloadInMB")
        return None if advised is None else float(advised)


def _place(answered: Range | None) -> list[Any] | None:
    if answered is None or answered.picks is None:
        return None
    found = replace(answered.object, uri=answered.object.shown)
    return [astuple(found), answered.picks.records.tolist(), answered.picks.offsets.tolist()]


def _range(place: list[Any] | None) -> Range | None:
    return None if place is None else pick(InputObject(*place[0]), *place[1:])


def _text(schema: pa.Schema | None) -> str | None:
    return None if schema is None else base64.b64encode(schema.serialize()).decode()


def _schema(text: str | None) -> pa.Schema | None:
    return None if text is None else pa.ipc.read_schema(pa.py_buffer(base64.b64decode(text)))
