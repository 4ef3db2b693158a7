"""What a run will do, before it does it: inputs listed, splits. A pure function of inputs and job.

The listing is paged and spooled to a file and splits are a generator, so a million objects cost the driver no memory.
"""

import hashlib
import heapq
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import numpy as np

from batchpipe.errors import InputError
from batchpipe.formats import FORMATS
from batchpipe.job import InputSpec, Job
from batchpipe.redact import clean_listed, clean_uri
from batchpipe.split import SPLITS_AT_A_TIME, WHOLE, InputObject, Range, Split
from batchpipe.storage import Found, open_store, relative, resolve
from batchpipe.storage.address import Pattern, has_wildcard

SPLITS_WANTED = 128
SPLITS_NEEDED = 32
"""The fewest that are left where splits are made larger, so that they fill the requests in flight."""
SMALLEST_SPLIT = 256 * 1024
LARGEST_SPLIT = 64 * 1024 * 1024
MAX_OBJECTS_PER_SPLIT = 1_000


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

    Raises InputError if nothing matches one of the URIs (unless `allow_empty`) or one cannot be listed.
    """
    digest, count, size, last = hashlib.sha256(), 0, 0, ""
    listings = [_named_or_raise(uri, spec) for uri in spec.uri]
    spool = scratch / "inputs.spool"
    with spool.open("w") as lines:
        for found, name in heapq.merge(*listings, key=lambda listed: listed[0].uri):
            if found.uri == last:
                continue
            _utf8_or_raise(found.uri)
            line = json.dumps([found.uri, found.size, found.version, name]) + "\n"
            lines.write(line)
            digest.update(line.encode())
            count, size, last = count + 1, size + found.size, found.uri
    return Inputs(spool, count, size, digest.hexdigest())


def _utf8_or_raise(uri: str) -> None:
    try:
        uri.encode()
    except UnicodeEncodeError as exc:
        shown = clean_listed(os.fsencode(uri).decode("utf-8", "backslashreplace"))
        raise InputError(
            f"the name of an input object is not UTF-8: {shown!r}",
            next="rename it: manifest and quarantine could not hold its name",
        ) from exc


def _named_or_raise(uri: str, spec: InputSpec) -> Iterator[tuple[Found, str]]:
    """The objects of one URI with their names; half of a dataset that is not there must not pass in silence."""
    is_empty = True
    for each in _named(uri, spec):
        is_empty = False
        yield each
    if is_empty and not spec.allow_empty:
        hint = "input.uri takes a file, a folder or a glob; input.allow_empty: true accepts what is empty"
        raise InputError(f"no input object matches {clean_uri(uri)!r}", next=hint)


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


def make_plan(inputs: Inputs, job: Job, begun: int | None = None) -> Plan:
    """Choose the size of splits and count them. A run that has ``begun`` with a size keeps it."""
    if job.output.layout == "mirror" and len(job.input.uri) > 1:
        _names_differ_or_raise(inputs)
    split_bytes = begun or job.batch.split_bytes or _default_split_bytes(inputs.bytes, job)
    count = sum(1 for _ in iter_splits(inputs, job, split_bytes))
    return Plan(inputs, job, split_bytes, count)


def _names_differ_or_raise(inputs: Inputs) -> None:
    """Refuse objects of several URIs that would be mirrored to one place. Eight bytes are kept of each name."""
    digests = np.fromiter((_digest(found) for found in inputs), np.uint64, inputs.count)
    ordered = np.sort(digests)
    for repeated in ordered[1:][ordered[1:] == ordered[:-1]]:
        first, second, *_ = (found for found in inputs if _digest(found) == repeated)
        raise InputError(
            f"two input objects would be mirrored to one place, {first.name!r}",
            where=f"{first.shown} and {second.shown}",
            next="list them by one glob whose folder holds both, so that their names tell them apart; "
            "or state output.layout: parts",
        )


def _digest(found: InputObject) -> int:
    return int.from_bytes(hashlib.blake2b(found.name.encode(), digest_size=8).digest())


def _default_split_bytes(total: int, job: Job) -> int:
    """So many splits that workers are kept busy to the end; fewer where each would not fill its mini-batches.

    Those are its share of the requests that the job wants in flight, as far as it states them: what a container
    advises is not known yet, nor may another machine's cores change the plan.
    """
    payload = min(stage.max_payload_bytes(job.batch) for stage in job.stages)
    in_flight = max((stage.concurrent_transforms(job.batch, 1) for stage in job.stages if stage.is_http), default=1)
    filled = payload * -(-in_flight // SPLITS_AT_A_TIME)
    return min(max(total // SPLITS_WANTED, min(filled, total // SPLITS_NEEDED), SMALLEST_SPLIT), LARGEST_SPLIT)


def iter_splits(inputs: Inputs, job: Job, split_bytes: int) -> Iterator[Split]:
    """Cut the dataset: a large object into ranges, small objects together up to `split_bytes`.

    Under `layout: mirror` a split never holds more than one object. A dataset without objects is one split without
    ranges, whose part stands for the columns.
    """
    index, waiting, size = 0, list[Range](), 0
    for found in inputs:
        cuts = _iter_cuts(found, job, split_bytes)
        some = list(islice(cuts, 2))
        alone = len(some) > 1 or job.output.layout == "mirror"
        if waiting and (alone or size + found.size > split_bytes or len(waiting) >= MAX_OBJECTS_PER_SPLIT):
            yield Split(index, tuple(waiting))
            index, waiting, size = index + 1, [], 0
        if not alone:
            waiting, size = [*waiting, *some], size + found.size
            continue
        for cut in chain(some, cuts):
            yield Split(index, (cut,))
            index += 1
    if waiting or (not index and job.output.layout == "parts"):
        yield Split(index, tuple(waiting))


def _iter_cuts(found: InputObject, job: Job, split_bytes: int) -> Iterator[Range]:
    # Who writes each record's place in its object must read the object from its first record on.
    if found.size <= split_bytes or job.output.add_source:
        yield Range(found, 0, WHOLE)
        return
    spec = job.input
    store = open_store(found.uri, spec.storage_options)
    cuts = FORMATS[spec.format].iter_cuts(
        lambda: store.open(found.uri, size=found.size, version=found.version), found, split_bytes, spec
    )
    yield from (Range(found, start, stop) for start, stop in cuts)
