"""What a run will do, before it does it: inputs listed, fingerprint, splits. A pure function of inputs and job.

The listing is paged and spooled to a file and splits are a generator, so a million objects cost the driver no memory.
"""

import hashlib
import heapq
import importlib.machinery
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batchpipe.errors import InputError
from batchpipe.formats import FORMATS
from batchpipe.job import InputSpec, Job, fingerprint_document
from batchpipe.redact import clean_uri
from batchpipe.split import WHOLE, InputObject, Range, Split
from batchpipe.storage import Found, open_store, relative, resolve
from batchpipe.storage.address import Pattern, has_wildcard

SPLITS_WANTED = 128
SPLITS_NEEDED = 32
"""The fewest that are left where a split is made larger to fill a mini-batch."""
SMALLEST_SPLIT = 256 * 1024
LARGEST_SPLIT = 64 * 1024 * 1024
MAX_OBJECTS_PER_SPLIT = 1_000
HASHED_WHOLE_BELOW = 16 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Inputs:
    """The dataset as it was listed: iterate for its objects, in order. `sha256` covers URI, size and version."""

    spool: Path
    count: int
    bytes: int
    sha256: str

    def __iter__(self) -> Iterator[InputObject]:
        with self.spool.open() as lines:
            for index, line in enumerate(lines):
                uri, size, version, name = json.loads(line)
                yield InputObject(index, uri, size, version, name)


def list_inputs(spec: InputSpec, scratch: Path) -> Inputs:
    """List the input objects, sorted by URI and each one once, into a file in `scratch`.

    Raises InputError if nothing matches (unless `allow_empty`) or a URI cannot be listed.
    """
    digest, count, size, last = hashlib.sha256(), 0, 0, ""
    listings = [_named(uri, spec) for uri in spec.uri]
    spool = scratch / "inputs.spool"
    with spool.open("w") as lines:
        for found, name in heapq.merge(*listings, key=lambda listed: listed[0].uri):
            if found.uri == last:
                continue
            line = json.dumps([found.uri, found.size, found.version, name]) + "\n"
            lines.write(line)
            digest.update(line.encode())
            count, size, last = count + 1, size + found.size, found.uri
    if not count and not spec.allow_empty:
        uris = ", ".join(repr(clean_uri(uri)) for uri in spec.uri)
        msg = f"no input object matches {uris}"
        hint = "input.uri takes a file, a folder or a glob; input.allow_empty: true accepts an empty dataset"
        raise InputError(msg, next=hint)
    return Inputs(spool, count, size, digest.hexdigest())


def _named(uri: str, spec: InputSpec) -> Iterator[tuple[Found, str]]:
    root = Pattern.of(resolve(uri)).folder if has_wildcard(uri) else resolve(uri)
    for found in open_store(uri, spec.storage_options).find(uri):
        yield found, relative(found.uri, root) if found.uri != root else found.uri.rpartition("/")[2]


@dataclass(frozen=True, slots=True)
class Plan:
    """The splits of a run: iterate for them, in order. Their number is `count`."""

    inputs: Inputs
    job: Job
    split_bytes: int
    count: int

    def __iter__(self) -> Iterator[Split]:
        return iter_splits(self.inputs, self.job, self.split_bytes)


def make_plan(inputs: Inputs, job: Job) -> Plan:
    """Choose the size of splits and count them."""
    split_bytes = job.batch.split_bytes or _default_split_bytes(inputs.bytes, job)
    count = sum(1 for _ in iter_splits(inputs, job, split_bytes))
    return Plan(inputs, job, split_bytes, count)


def _default_split_bytes(total: int, job: Job) -> int:
    """So many splits that workers are kept busy to the end; fewer where each would not fill one mini-batch."""
    payload = min(stage.max_payload_bytes(job.batch) for stage in job.stages)
    filled = min(payload, total // SPLITS_NEEDED)
    return min(max(total // SPLITS_WANTED, filled, SMALLEST_SPLIT), LARGEST_SPLIT)


def iter_splits(inputs: Inputs, job: Job, split_bytes: int) -> Iterator[Split]:
    """Cut the dataset: a large object into ranges, small objects together up to `split_bytes`.

    Under `layout: mirror` a split never holds more than one object. A dataset without objects is one split without
    ranges, whose part stands for the columns.
    """
    index, waiting, size = 0, list[Range](), 0
    for found in inputs:
        cuts = _cuts(found, job, split_bytes)
        alone = len(cuts) > 1 or job.output.layout == "mirror"
        if waiting and (alone or size + found.size > split_bytes or len(waiting) >= MAX_OBJECTS_PER_SPLIT):
            yield Split(index, tuple(waiting))
            index, waiting, size = index + 1, [], 0
        if not alone:
            waiting, size = [*waiting, cuts[0]], size + found.size
            continue
        for cut in cuts:
            yield Split(index, (cut,))
            index += 1
    if waiting or (not index and job.output.layout == "parts"):
        yield Split(index, tuple(waiting))


def _cuts(found: InputObject, job: Job, split_bytes: int) -> list[Range]:
    # Who writes each record's place in its object must read the object from its first record on.
    if found.size <= split_bytes or job.output.add_source:
        return [Range(found, 0, WHOLE)]
    spec = job.input
    store = open_store(found.uri, spec.storage_options)
    cuts = FORMATS[spec.format].iter_cuts(
        lambda: store.open(found.uri, size=found.size, version=found.version), found, split_bytes, spec
    )
    return [Range(found, start, stop) for start, stop in cuts]


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What decides a run's answers. `document` is kept, so that a later start can say what changed."""

    document: dict[str, Any]

    @property
    def sha256(self) -> str:
        """Digest of the document; its first eight characters are the default run id."""
        return hashlib.sha256(json.dumps(self.document, sort_keys=True).encode()).hexdigest()

    def differences(self, other: dict[str, Any]) -> list[str]:
        """What differs from another run's document, one dotted key each."""
        mine, theirs = dict(_flat(self.document)), dict(_flat(other))
        keys = sorted(key for key in {*mine, *theirs} if mine.get(key) != theirs.get(key))
        return [f"{key} was {theirs.get(key, 'not set')!r}, is {mine.get(key, 'not set')!r}" for key in keys]


def make_fingerprint(job: Job, inputs: Inputs) -> Fingerprint:
    """Put together what shapes the output: the job's answers-deciding keys, its sources, and the input listing."""
    sources = {stage.name: _source_sha256(stage.callable, job) for stage in job.stages if stage.callable}
    listed = {"objects": inputs.count, "bytes": inputs.bytes, "listing_sha256": inputs.sha256}
    document = {"name": job.name, "job": fingerprint_document(job), "sources": sources, "inputs": listed}
    return Fingerprint(document)


def _source_sha256(reference: str, job: Job) -> str | None:
    """Digest of a callable's source: its whole package where it lies on the job's path, model files beside it included.

    An installed library is known by its one module; None for what has no file.
    """
    module = reference.partition(":")[0]
    top = module.partition(".")[0]
    spec = importlib.machinery.PathFinder.find_spec(top, list(job.import_folders))
    if spec is None:
        return None
    folder = Path(next(iter(spec.submodule_search_locations))) if spec.submodule_search_locations else None
    files = sorted(folder.rglob("*")) if folder else [Path(str(spec.origin))]
    digest = hashlib.sha256()
    for file in files:
        if file.is_file() and "__pycache__" not in file.parts:
            digest.update(f"{file.relative_to(folder) if folder else file.name}\0{_file_digest(file)}\n".encode())
    return digest.hexdigest()


def _file_digest(file: Path) -> str:
    stat = file.stat()
    if stat.st_size >= HASHED_WHOLE_BELOW:  # a model of gigabytes is known by its size and time
        return f"{stat.st_size} {stat.st_mtime_ns}"
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _flat(document: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(document, dict) and document:
        for key, value in document.items():
            yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(document, list) and document and isinstance(document[0], dict):
        for place, value in enumerate(document):
            yield from _flat(value, f"{prefix}.{value.get('name') or place}")
    else:
        yield prefix, document
