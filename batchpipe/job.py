"""What a job is: the job file's blocks put together and checked against one another. `jobfile` makes one from text.

Pure: reads no file. Kinds and formats that a run cannot serve are refused by the runner, not by these models.
"""

import hashlib
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from os.path import normpath
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, PrivateAttr, Strict, model_validator

from batchpipe.errors import JobError
from batchpipe.redact import SECRET_KEYS, clean_document, clean_uri, mask, secrets_of
from batchpipe.specs.compute import ClusterByAddress, ClusterByClass, ComputeSpec, WorkerRange
from batchpipe.specs.input import InputSpec
from batchpipe.specs.output import OutputSpec
from batchpipe.specs.spec import AnyText, Natural, Positive, Spec, StorageOptions, Text, expect, refuse
from batchpipe.specs.stage import BatchSpec, ContainerSpec, EndpointSpec, ProcessSpec, StageSpec, stage_names

__all__ = [
    "BatchSpec",
    "ClusterByAddress",
    "ClusterByClass",
    "ComputeSpec",
    "ContainerSpec",
    "DataProcessingSpec",
    "EndpointSpec",
    "InputSpec",
    "Job",
    "OnErrorSpec",
    "OutputSpec",
    "ProcessSpec",
    "StageSpec",
    "WorkerRange",
    "fingerprint_document",
    "run_id_or_raise",
    "supported_or_raise",
]

MAX_STAGES = 15
"""As many as an Inference Pipeline of SageMaker may have."""

_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(://|::)")


def is_uri(path: str) -> bool:
    """Tell a URL (`s3://...`, `zip::...`) from a local path."""
    return bool(_URI.match(path))


def _check_job_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,62}", name):
        raise expect("up to 63 letters, digits, '.', '-' and '_'")
    return name


def _check_json_path(path: str) -> str:
    if not path.startswith("$"):
        raise expect("a JSONPath that begins with $")
    return path


def _check_line(text: str) -> str:
    if "\n" in text or "\r" in text:
        raise expect("one line, without its end")
    return text


Percent = Annotated[float, Strict(), Field(ge=0, le=100, allow_inf_nan=False)]


class DataProcessingSpec(Spec):
    """What of a record is sent, and what of it is kept beside its answer (AWS's DataProcessing)."""

    input_filter: Annotated[Text, AfterValidator(_check_json_path)] = Field(
        default="$", description="JSONPath of what is sent of each record."
    )
    join_source: Literal["none", "input"] = Field(
        default="none", description="Whether answers are joined with their record."
    )
    output_filter: Annotated[Text, AfterValidator(_check_json_path)] = Field(
        default="$", description="JSONPath of what is written of each joined record."
    )


class OnErrorSpec(Spec):
    """What a run may lose and how long it may take before it ends."""

    max_failed_records: Natural | None = Field(
        default=None,
        description="Most records that may fail; no bound if only max_failed_percent is stated.",
        json_schema_extra={"default": 0},
    )
    max_failed_percent: Percent | None = Field(
        default=None, description="Most records that may fail, in percent of those read; no bound by default."
    )
    placeholder: Annotated[AnyText, AfterValidator(_check_line)] | None = Field(
        default=None,
        description="Line written in the place of a failed record, for format csv and raw; none by default.",
    )
    no_progress_timeout_s: Positive = Field(
        default=1800.0, description="Seconds without any progress that end the run."
    )
    max_runtime_s: Positive | None = Field(
        default=None, description="Seconds that the whole run may take; no bound by default."
    )

    @model_validator(mode="before")
    @classmethod
    def _nothing_may_fail_by_default(cls, written: Any) -> Any:
        bounds = ("max_failed_records", "max_failed_percent")
        if isinstance(written, Mapping) and all(written.get(bound) is None for bound in bounds):
            return {**written, "max_failed_records": 0}
        return written


class Job(Spec):
    """One job file, checked: frozen, picklable, and without secrets in its repr."""

    name: Annotated[Text, AfterValidator(_check_job_name)] = Field(
        default="job",
        description="Name of the job; by default the file's, without its ending.",
        json_schema_extra={"default": ""},
    )
    python_path: tuple[Text, ...] = Field(
        default=(), description="Folders to import callables from, after the job file's own."
    )
    storage_options: StorageOptions = Field(
        default={}, description="Options by protocol for every input, output and model_data; the values are secrets."
    )
    input: InputSpec = Field(description="What is read, and how its bytes become records.")
    batch: BatchSpec = Field(default=BatchSpec(), description="How records are cut into mini-batches, for all stages.")
    data_processing: DataProcessingSpec = Field(
        default=DataProcessingSpec(), description="What of a record is sent, and what is kept beside its answer."
    )
    stages: Annotated[tuple[StageSpec, ...], Field(min_length=1, max_length=MAX_STAGES)] = Field(
        description="The 1 to 15 stages, in order."
    )
    output: OutputSpec = Field(description="Where answers go, and as what.")
    on_error: OnErrorSpec = Field(default=OnErrorSpec(), description="What a run may lose before it ends.")
    compute: ComputeSpec = Field(default=ComputeSpec(), description="How many workers, and whose.")

    _path: Path = PrivateAttr(Path("job.yaml"))
    _written: dict[str, Any] = PrivateAttr(default_factory=dict)
    _given: tuple[tuple[str, str], ...] = PrivateAttr(())
    """Of the command line, such as ``("--set", "output.uri=s3://b/x")``, so that a command can be told again."""

    @property
    def path(self) -> Path:
        """Where the job file lies, absolute."""
        return self._path

    @property
    def import_folders(self) -> tuple[str, ...]:
        """Folders to import callables from: the job file's own, then `python_path`."""
        return (str(self.path.parent), *self.python_path)

    def with_options(self, *options: tuple[str, str]) -> Self:
        """The same job, which tells `command` of further options."""
        job = self.model_copy()
        job._given = (*self._given, *options)
        return job

    def command(self, verb: str, **settings: object) -> str:
        """Return the command line that does `verb` with this job as it was given, and these keys of `on_error` set."""
        added = [("--set", f"on_error.{key}={value}") for key, value in settings.items()]
        keys = {text.partition("=")[0] for _, text in added}
        kept = [option for option in self._given if option[0] != "--set" or option[1].partition("=")[0] not in keys]
        words = ["batchpipe", verb, str(self.path), *(word for option in (*kept, *added) for word in option)]
        return mask(shlex.join(words), secrets_of(self))

    def document(self) -> dict[str, Any]:
        """Return the job as written (with `--set`, before variables), with secrets masked: fit for a manifest."""
        return clean_document(self._written or self.model_dump(exclude_unset=True))

    @model_validator(mode="after")
    def _blocks_fit(self) -> Self:
        if self.on_error.placeholder is not None:
            self._placeholder_fits(self.on_error.placeholder)
        for uri in self.input.uri:
            if _is_read_from(uri, self.output.uri):
                inside = f"{clean_uri(self.output.uri)!r} lies inside the input {clean_uri(uri)!r}"
                raise refuse("output.uri", f"{inside}; what is written would be read as input")
        counted = self.output.format != "raw" or self.data_processing.join_source != "none"
        for index, stage in enumerate(self.stages):
            if stage.count == "none" and counted:
                raise refuse(f"stages.{index}.count", "none is for output.format raw without a join")
            if stage.other_charset and self.input.format != "object":  # an object is sent as it lies
                why = f"charset {stage.other_charset} cannot be: records are sent in UTF-8; leave the charset out"
                raise refuse(f"stages.{index}.content_type", why)
        return self

    def _placeholder_fits(self, line: str) -> None:
        if self.output.format not in ("raw", "csv"):
            raise refuse("on_error.placeholder", f"is for output.format raw or csv, and it is {self.output.format}")
        if self.output.format == "csv" and (not line or line.count('"') % 2):
            why = "a blank line is no row" if not line else "its quote is not closed"
            raise refuse("on_error.placeholder", f"is no row of output.format csv: {why}")
        if uncounted := [index for index, stage in enumerate(self.stages) if stage.count == "none"]:
            raise refuse(
                f"stages.{uncounted[0]}.count", "none knows no record's place, where on_error.placeholder stands"
            )

    @model_validator(mode="after")
    def _complete_blocks(self) -> Self:
        """Name every stage, and merge the job's storage options into each block, so that a block stands alone."""
        names = stage_names([dict(stage) for stage in self.stages])
        if repeated := [index for index, name in enumerate(names) if name in names[:index]]:
            raise refuse(f"stages.{repeated[0]}.name", f"{names[repeated[0]]!r} is the name of another stage")
        stages = zip(self.stages, names, strict=True)
        self.__dict__.update(  # frozen for everybody else
            stages=tuple(stage.model_copy(update={"name": name, **self._options(stage)}) for stage, name in stages),
            input=self.input.model_copy(update=self._options(self.input)),
            output=self.output.model_copy(update=self._options(self.output)),
        )
        return self

    def _options(self, block: InputSpec | OutputSpec | StageSpec) -> dict[str, StorageOptions]:
        protocols = self.storage_options | block.storage_options
        merged = {
            protocol: self.storage_options.get(protocol, {}) | block.storage_options.get(protocol, {})
            for protocol in protocols
        }
        return {"storage_options": merged}


def supported_or_raise(job: Job) -> None:
    """Refuse what the models know and this version cannot do, rather than leave it out in silence. Raises JobError."""
    for key, is_used in (("data_processing", job.data_processing != DataProcessingSpec()),):
        if is_used:
            raise JobError(f"{job.path}: {key}: this version of batchpipe cannot do it yet", next="leave it out")


def run_id_or_raise(run_id: str) -> None:
    """Refuse a run id that cannot be a folder's name beside those of the output's own files. Raises JobError."""
    if not _RUN_ID.fullmatch(run_id) or run_id in ("lock", "manifest.json"):
        raise JobError(
            f"the run id {run_id!r} cannot be the name of the run's folder",
            next="give --run-id 1 to 100 letters, digits and . _ - : +, a letter or digit first"
            " (and neither lock nor manifest.json)",
        )


def fingerprint_document(job: Job) -> dict[str, Any]:
    """Return the part of *job* that decides its answers: what the fingerprint is made of, beside inputs and sources.

    Left out are compute, on_error but for its placeholder, timeouts, retries, concurrency, resource limits and storage
    options, so that these can be changed and the run resumed; and keys at their default. Of environments, headers and
    URLs with a query only the SHA-256 goes in; of credentials among the headers, and of queries of data (signatures),
    nothing.
    Take it before `fill_run_id`: the default run id is made from it.
    """
    document = job.model_dump(mode="json", by_alias=True, exclude_defaults=True, exclude=_NOT_IN_FINGERPRINT)
    for stage, spec in zip(document["stages"], job.stages, strict=True):
        block = stage[spec.kind] if spec.is_http else {}
        if "model_data" in block:
            block["model_data"] = clean_uri(block["model_data"])
        if "headers" in block:
            block["headers"] = _without_credentials(block["headers"])
    stages = [_digest_secrets(stage) for stage in document.pop("stages")]
    return {**{key: block for key, block in clean_document(document).items() if block}, "stages": stages}


_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:+-]{0,99}")
_RESOURCES = {"startup_timeout_s", "cpus", "memory_mb", "shm_mb", "pids"}
_NOT_IN_FINGERPRINT: Any = {
    "name": True,
    "python_path": True,
    "storage_options": True,
    "on_error": {"max_failed_records", "max_failed_percent", "no_progress_timeout_s", "max_runtime_s"},
    "compute": True,
    "batch": {"max_concurrent_transforms"},
    "input": {"storage_options"},
    "output": {"storage_options"},
    "stages": {
        "__all__": {
            "invocations_timeout_s": True,
            "invocations_max_retries": True,
            "max_concurrent_transforms": True,
            "thread_safe": True,
            "storage_options": True,
            "container": _RESOURCES,
            "process": _RESOURCES,
        }
    },
}
_CREDENTIAL_HEADERS = {"authorization", "proxy-authorization", "cookie", "x-api-key", "x-amz-security-token"}


def _without_credentials(headers: Mapping[str, str]) -> dict[str, str]:
    # A bearer token changes by the hour; a header such as a model version changes the answers.
    return {name: value for name, value in headers.items() if name.lower() not in _CREDENTIAL_HEADERS}


def _digest_secrets(value: Any) -> Any:
    # One digest for all values of a block, so that a short one cannot be found by trying.
    match value:
        case dict():
            return {
                key: _sha256(item) if key in SECRET_KEYS else _digest_secrets(item)
                for key, item in value.items()
                if item or key not in SECRET_KEYS
            }
        case list():
            return [_digest_secrets(item) for item in value]
        case str() if clean_uri(value) != value:
            return f"{clean_uri(value)} {_sha256(value)}"
    return value


def _sha256(value: Any) -> str:
    return "sha256:" + hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _is_read_from(pattern: str, folder: str) -> bool:
    """Tell whether what is written to *folder* could be read as input by *pattern*; both as text, nothing is listed."""
    wanted, places = _segments(pattern), _segments(folder)
    literal = [*_literal_prefix(wanted)]
    if places[: len(literal)] != literal:
        return False
    return len(literal) == len(wanted) or _matches_below(wanted[len(literal) :], places[len(literal) :])


def _segments(uri: str) -> list[str]:
    """Split a URI at its slashes, protocol first; a local path is made absolute and has the protocol "file"."""
    uri = uri.removeprefix("file://")
    if not is_uri(uri):
        return ["file", *normpath(Path(uri).absolute()).split("/")[1:]]
    protocol, _, rest = clean_uri(uri).partition("://")
    return ["s3" if protocol == "s3a" else protocol, *(segment for segment in rest.split("/") if segment)]


def _literal_prefix(segments: Sequence[str]) -> Sequence[str]:
    wild = next((index for index, segment in enumerate(segments) if re.search(r"[*?\[]", segment)), len(segments))
    return segments[:wild]


def _matches_below(pattern: Sequence[str], folders: Sequence[str]) -> bool:
    """Tell whether *pattern* could match an object somewhere below *folders*."""
    if not pattern or not folders:
        return bool(pattern)
    if "**" in pattern[0]:
        return _matches_below(pattern[1:], folders) or _matches_below(pattern, folders[1:])
    return fnmatchcase(folders[0], pattern[0]) and _matches_below(pattern[1:], folders[1:])
