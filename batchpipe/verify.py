"""Recompute what a manifest promises: checksums, sizes and counts of the published parts, and that none is foreign."""

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any

from batchpipe.errors import InputError, OutputError
from batchpipe.formats import FORMATS
from batchpipe.job import InputSpec
from batchpipe.manifest import Input, LongTable, Manifest, Part
from batchpipe.published import iter_parts, read_manifest
from batchpipe.redact import clean_uri
from batchpipe.split import WHOLE, InputObject, Range
from batchpipe.storage import ObjectMissingError, Store, join, relative

CHUNK_BYTES = 4 * 1024 * 1024
READERS = 4
MAX_SHOWN = 10


def load_manifest(store: Store, root: str) -> Manifest:
    """The manifest of a finished output. Raises OutputError (7) where there is none."""
    manifest = read_manifest(store, root)
    if manifest is None:
        msg = f"there is no finished run in {clean_uri(root)}"
        raise OutputError(
            msg, next="name the folder that output.uri names; an unfinished run resumes with batchpipe run JOB"
        )
    return manifest


def verify_output(store: Store, root: str) -> Manifest:
    """Read every part again and compare it with the manifest. Raises OutputError (7) that lists what is wrong."""
    manifest = load_manifest(store, root)
    problems = [*_table_problems(store, root, manifest.parts), *_table_problems(store, root, manifest.inputs)]
    if not problems:
        parts = list(iter_parts(store, root, manifest))
        inputs = [Input.model_validate_json(line) for line in store.read(join(root, manifest.inputs.uri)).splitlines()]
        with ThreadPoolExecutor(READERS, thread_name_prefix="verify") as threads:
            for found in threads.map(lambda part: _part_problems(store, root, manifest, part), parts):
                problems += found
        problems += _account_problems(manifest, parts, inputs)
        problems += _foreign_problems(store, root, parts)
    if problems:
        more = f"\n  and {len(problems) - MAX_SHOWN} more" if len(problems) > MAX_SHOWN else ""
        listed = "\n  ".join(problems[:MAX_SHOWN])
        msg = f"the output is not what run {manifest.run_id} published:\n  {listed}{more}"
        raise OutputError(msg, where=clean_uri(root), next="run the job again into another output.uri")
    return manifest


def _table_problems(store: Store, root: str, table: LongTable) -> list[str]:
    try:
        data = store.read(join(root, table.uri))
    except ObjectMissingError:
        return [f"{table.uri} is missing"]
    if hashlib.sha256(data).hexdigest() != table.sha256:
        return [f"{table.uri} was changed: its SHA-256 is not the manifest's"]
    return []


def _part_problems(store: Store, root: str, manifest: Manifest, part: Part) -> list[str]:
    uri = join(root, part.uri)
    try:
        found = store.stat(uri)
    except ObjectMissingError:
        return [f"{part.uri} is missing"]
    if found.size != part.bytes:
        return [f"{part.uri} has {found.size:,} bytes, published were {part.bytes:,}"]
    with store.open(uri, size=found.size, version=found.version) as file:
        if _sha256(file) != part.sha256:
            return [f"{part.uri} was changed: its SHA-256 is not the published one"]
        file.seek(0)
        try:
            records = count_records(file, InputObject(0, uri, found.size, found.version), manifest.output_format)
        except InputError as error:
            return [f"{part.uri} cannot be read: {error.message}"]
    published = part.records + part.placeholders
    if records not in (None, published):
        return [f"{part.uri} holds {records:,} records, published were {published:,}"]
    return []


def count_records(file: IO[bytes], found: InputObject, output_format: str) -> int | None:
    """Records in an output file; None for raw, whose records have no marks of their own."""
    if output_format == "raw" or not found.size:
        return None
    spec = InputSpec.model_validate({"uri": [found.uri], "format": output_format})
    form = FORMATS[output_format]
    reader = form.open_range(file, Range(found, 0, WHOLE), 0, spec, form.infer_schema([(found, file)], spec))
    return sum(len(batch) for batch in reader)


def _account_problems(manifest: Manifest, parts: list[Part], inputs: list[Input]) -> Iterator[str]:
    accounts = manifest.accounts
    written = sum(part.records for part in parts)
    if written != accounts.written:
        yield f"the parts hold {written:,} records, the accounts say {accounts.written:,}"
    for number, generation in enumerate(manifest.generations):
        stand_in = sum(part.placeholders for part in parts if part.generation == number)
        failed = generation.accounts.quarantined
        if stand_in not in (0, failed):
            yield f"the parts of {generation.run_id} hold {stand_in:,} placeholders, quarantined were {failed:,}"
    if accounts.read != accounts.written + accounts.quarantined + accounts.dropped:
        yield f"the accounts do not add up: {json.dumps(accounts.model_dump())}"
    for name in ("read", "written", "quarantined", "dropped"):
        total: Any = sum(getattr(row, name) for row in inputs)
        if total != getattr(accounts, name):
            yield f"the inputs' {name} add up to {total:,}, the accounts say {getattr(accounts, name):,}"


def _foreign_problems(store: Store, root: str, parts: list[Part]) -> Iterator[str]:
    named = {part.uri for part in parts}
    for found in store.find(root):
        if (name := relative(found.uri, root)) not in named:
            yield f"{name} is no part of this run"


def _sha256(file: IO[bytes]) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(CHUNK_BYTES):
        digest.update(chunk)
    return digest.hexdigest()
