"""A stage as the job file states it: one of callable, container, process or endpoint, and how it is called."""

import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, model_validator

from batchpipe.specs.spec import (
    MB,
    AnyText,
    Count,
    Flag,
    Natural,
    Positive,
    Spec,
    StorageOptions,
    Text,
    Texts,
    expect,
    refuse,
)

StageKind = Literal["callable", "container", "process", "endpoint"]
STAGE_KINDS: tuple[StageKind, ...] = ("callable", "container", "process", "endpoint")

DEFAULT_PAYLOAD_MB = 6.0
PORT = "SAGEMAKER_BIND_TO_PORT"
"""The variable that tells a server where to listen; a job may state it."""

_OUR_HEADERS = {
    "content-type": "is stated by the stage's content_type",
    "accept": "is stated by the stage's accept",
    "accept-encoding": "is not for a job to state: answers come as they are",
    "host": "is that of the url",
    **dict.fromkeys(
        ("content-length", "transfer-encoding", "connection", "expect", "te", "upgrade"),
        "is not for a job to state: it says how the request is sent",
    ),
}
_CALLABLE_ONLY = ("params", "may_drop", "thread_safe")
_HTTP_ONLY = ("content_type", "accept", "request_key", "answer_key", "header", "count")


def is_utf8(charset: str) -> bool:
    """Whether UTF-8, in which everything is written here, may be called this."""
    return charset.lower() in ("utf-8", "utf8", "us-ascii", "ascii")


def _check_name(name: str) -> str:
    # Names stand in dotted paths (no dots), beside indices (not only digits), in file names and container names.
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_-]{0,62}", name):
        raise expect("up to 63 letters, digits, - and _ that begin with a letter")
    return name


def _check_callable(path: str) -> str:
    if not all(part.isidentifier() for part in re.split(r"[.:]", path)) or path.count(":") != 1:
        raise expect("'module:attribute'")
    return path


def _check_content_type(content_type: str) -> str:
    if not re.fullmatch(r"[\w.+-]+/[\w.+-]+( *; *[\w.-]+=[^;\r\n]+)*", content_type):
        raise expect("a content type such as text/csv or application/json")
    return content_type


def _check_url(url: str) -> str:
    if not re.fullmatch(r"https?://[^\s/]+(/\S*)?", url):
        raise refuse("", "expected a URL that begins with http:// or https://")
    try:
        host, _ = urlsplit(url).hostname, urlsplit(url).port
    except ValueError as exc:
        raise refuse("", f"is no URL: {exc}") from exc
    if not host:
        raise refuse("", "names no host")
    return url


def _check_environment(environment: dict[str, str]) -> dict[str, str]:
    for name in environment:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.-]*", name):
            raise refuse("", f"{name!r} cannot be the name of an environment variable")
    port = environment.get(PORT, "1")
    if not (re.fullmatch("[0-9]{1,5}", port) and 0 < int(port) < 65536):
        raise refuse(PORT, "must be a port, from 1 to 65535")
    return environment


def _check_headers(headers: dict[str, str]) -> dict[str, str]:
    for name, value in headers.items():
        if not re.fullmatch(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+", name):
            raise refuse("", f"{name!r} cannot be the name of an HTTP header")
        if name.lower() in _OUR_HEADERS:
            raise refuse(name, _OUR_HEADERS[name.lower()])
        if re.search(r"[\r\n]", value):
            raise refuse(name, "must be one line")
    return headers


ContentType = Annotated[Text, AfterValidator(_check_content_type)]
Environment = Annotated[dict[str, AnyText], AfterValidator(_check_environment)]


class ContainerSpec(Spec):
    """An image that serves the SageMaker inference contract, and what it may use."""

    image: Text = Field(description="Image to run, by tag or digest.")
    model_data: Text | None = Field(
        default=None, description="Folder, tar.gz or zip mounted read-only at /opt/ml/model: a path or any fsspec URL."
    )
    environment: Environment = Field(default={}, description="Environment variables; the values are secrets.")
    cpus: Positive | None = Field(default=None, description="CPU limit, may be a fraction; none by default.")
    memory_mb: Positive | None = Field(default=None, description="Memory limit in MB; none by default.")
    shm_mb: Positive | None = Field(
        default=None, description="Size of /dev/shm in MB; the engine's own default otherwise."
    )
    pids: Count = Field(default=4096, description="Limit on processes and threads.")
    cap_add: Texts = Field(default=(), description="Linux capabilities given back, by name; all are dropped otherwise.")
    new_privileges: Flag = Field(default=False, description="Whether programs in it may gain privileges, as sudo does.")
    init: Flag = Field(
        default=True, description="Whether the engine's own init runs first, which reaps dead processes."
    )
    network: Text = Field(
        default="default",
        description="`default` (the engine's own), `none` (no way out, but to this machine itself), `host`, or the "
        "name of an existing network.",
    )
    startup_timeout_s: Positive = Field(
        default=600.0, description="Seconds until the stage must answer its first ping."
    )


class ProcessSpec(Spec):
    """A command that serves the same contract, for machines without a container engine."""

    command: Annotated[Texts, Field(min_length=1)] = Field(
        description="Command and arguments as a list, run exactly as written in the job file's folder."
    )
    model_data: Text | None = Field(
        default=None,
        description="Folder, tar.gz or zip whose unpacked place is given in SM_MODEL_DIR: a path or fsspec URL.",
    )
    environment: Environment = Field(default={}, description="Environment variables; the values are secrets.")
    startup_timeout_s: Positive = Field(
        default=600.0, description="Seconds until the stage must answer its first ping."
    )


class EndpointSpec(Spec):
    """A URL that already answers the same contract."""

    url: Annotated[Text, AfterValidator(_check_url)] = Field(description="URL that mini-batches are posted to.")
    headers: Annotated[dict[str, AnyText], AfterValidator(_check_headers)] = Field(
        default={}, description="HTTP headers sent with every request; the values are secrets."
    )


class BatchSpec(Spec):
    """How records are cut into mini-batches: the defaults of all stages."""

    max_records: Count | None = Field(
        default=None,
        description="Most records of a mini-batch, bounded by bytes alone by default; 1 is AWS's SingleRecord.",
    )
    max_payload_mb: Positive | None = Field(
        default=None,
        description="Most MB of one request; by default what a container advises, else 6.",
        json_schema_extra={"default": DEFAULT_PAYLOAD_MB},
    )
    max_concurrent_transforms: Count | None = Field(
        default=None,
        description="Invocations in flight per worker; by default what a container advises, else the cores.",
    )
    split_mb: Positive | None = Field(
        default=None,
        description="MB of one split; by default 1/128 of the input, held between 0.25 and 64, or what fills its "
        "mini-batches (max_payload_mb x max_concurrent_transforms / 2) where that leaves 32 splits.",
    )

    @property
    def max_payload_bytes(self) -> int:
        """Most bytes of a mini-batch where no stage states its own bound."""
        return _payload_bytes(self.max_payload_mb)

    @property
    def split_bytes(self) -> int | None:
        """The stated size of a split; None where it follows from the size of the input."""
        return None if self.split_mb is None else max(1, int(self.split_mb * MB))


class StageSpec(Spec):
    """One step of the chain."""

    name: Annotated[Text, AfterValidator(_check_name)] = Field(
        default="",
        description="Name of the stage; by default the callable's attribute or the kind, numbered if repeated.",
    )
    callable: Annotated[Text, AfterValidator(_check_callable)] | None = Field(
        default=None, description="`module:attribute` of a function, or of a class that is constructed once per worker."
    )
    container: ContainerSpec | None = Field(default=None, description="An image that serves the SageMaker contract.")
    process: ProcessSpec | None = Field(default=None, description="A command that serves the SageMaker contract.")
    endpoint: EndpointSpec | None = Field(default=None, description="A URL that already serves the SageMaker contract.")
    params: dict[str, Any] = Field(default={}, description="Keyword arguments of the callable, passed as they are.")
    content_type: ContentType | None = Field(
        default=None,
        description="Content type of the requests; by default that of the records, and for a table what the server "
        "advises.",
    )
    accept: ContentType | None = Field(
        default=None, description="Content type asked for; by default the next stage's stated content_type."
    )
    request_key: Text | None = Field(default=None, description='Key that wraps JSON requests: `{"instances": [...]}`.')
    answer_key: Text | None = Field(default=None, description='Key that wraps JSON answers: `{"predictions": [...]}`.')
    header: Flag = Field(default=False, description="Whether CSV requests begin with a header row.")
    count: Literal["auto", "none"] = Field(
        default="auto",
        description="Whether answer records are counted; `none` only with output.format raw and no join.",
    )
    max_payload_mb: Positive | None = Field(
        default=None, description="Most MB of one request; by default batch.max_payload_mb."
    )
    max_concurrent_transforms: Count | None = Field(
        default=None, description="Invocations in flight per worker; by default batch.max_concurrent_transforms."
    )
    invocations_timeout_s: Positive = Field(default=600.0, description="Seconds one invocation may take.")
    invocations_max_retries: Natural = Field(default=3, description="Attempts after the first one.")
    may_drop: Flag = Field(
        default=False, description="Whether the callable may drop records by returning (result, kept)."
    )
    thread_safe: Flag = Field(
        default=False, description="Whether the callable may be entered by several threads at once."
    )
    gpus: Natural = Field(default=0, description="GPUs of each copy of the stage.")
    storage_options: StorageOptions = Field(
        default={}, description="Options by protocol for this stage's model_data; the values are secrets."
    )

    @property
    def other_charset(self) -> str | None:
        """The charset that `content_type` states for rows or documents, where it is not UTF-8."""
        stated = re.fullmatch(
            r".*(?:csv|json|ndjson|jsonl|lines)\b.*; *charset=[\"']?([\w.-]+).*", self.content_type or "", re.I
        )
        return stated[1] if stated and not is_utf8(stated[1]) else None

    @property
    def kind(self) -> StageKind:
        """Which of the four this stage is."""
        return next(kind for kind in STAGE_KINDS if getattr(self, kind) is not None)

    @property
    def is_http(self) -> bool:
        """Whether the stage is called over HTTP: every kind but callable."""
        return self.callable is None

    @property
    def block(self) -> ContainerSpec | ProcessSpec | EndpointSpec | None:
        """The kind's own block; None for a callable, which has none."""
        return self.container or self.process or self.endpoint

    def max_payload_bytes(self, batch: BatchSpec, advised_mb: float | None = None) -> int:
        """Most bytes of one request: what the job states, else what the container advises, else 6 MB."""
        return _payload_bytes(self.max_payload_mb, batch.max_payload_mb, advised_mb)

    def concurrent_transforms(self, batch: BatchSpec, default: int) -> int:
        """Invocations in flight per worker: what the job states, else *default* (the container's advice, or cores)."""
        return self.max_concurrent_transforms or batch.max_concurrent_transforms or default

    @model_validator(mode="after")
    def _keys_fit_the_kind(self) -> Self:
        kinds = [kind for kind in STAGE_KINDS if getattr(self, kind) is not None]
        if len(kinds) > 1:
            raise refuse(kinds[1], f"{kinds[0]} is stated too; a stage is one of {', '.join(STAGE_KINDS)}")
        if not kinds:
            raise refuse("", f"states none of {', '.join(STAGE_KINDS)}; a stage is one of them")
        for key in _HTTP_ONLY if self.kind == "callable" else _CALLABLE_ONLY:
            if key in self.model_fields_set:
                fitting = "container, process and endpoint" if self.kind == "callable" else "callable"
                raise refuse(key, f"is for {fitting} stages, and this stage is a {self.kind}")
        if self.kind == "endpoint" and self.gpus:
            raise refuse("gpus", "is not for endpoints: the devices of a URL that already runs are its own")
        return self


def stage_names(stages: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the name of every stage: as stated, else the callable's attribute or the kind, numbered if repeated.

    Works on stages as written, checked or not, so that an error can name the stage it lies in.
    """
    stages = list(stages)
    taken = {str(stage["name"]) for stage in stages if stage.get("name")}
    names = []
    for stage in stages:
        name = str(stage["name"]) if stage.get("name") else _free_name(_default_name(stage), taken)
        taken.add(name)
        names.append(name)
    return names


def _default_name(stage: Mapping[str, Any]) -> str:
    attribute = re.split(r"[.:]", str(stage.get("callable") or ""))[-1]
    kind = next((kind for kind in STAGE_KINDS if stage.get(kind)), "stage")
    # A Python name may hold any letter, a stage's name only those that a container's may.
    return re.sub(r"[^A-Za-z0-9_-]", "_", attribute)[:60] or kind


def _free_name(name: str, taken: set[str]) -> str:
    numbered = (f"{name}-{number}" for number in range(2, len(taken) + 3))
    return name if name not in taken else next(candidate for candidate in numbered if candidate not in taken)


def _payload_bytes(*choices_mb: float | None) -> int:
    stated = next((choice for choice in choices_mb if choice is not None), DEFAULT_PAYLOAD_MB)
    return max(1, int(stated * MB))
