"""JSON Lines: every line that is not blank is a record; columns are those stated and those seen in a fixed sample."""

from collections.abc import Sequence
from itertools import islice
from typing import IO

import pyarrow as pa

from batchpipe.batch import ByteRecords
from batchpipe.content import JSON_LINES
from batchpipe.convert import (
    Field,
    InputSchema,
    NoCommonTypeError,
    Parsed,
    infer_jsonl,
    jsonl_can_hold,
    jsonl_to_table,
    widen_fields,
)
from batchpipe.errors import InputError
from batchpipe.formats.encodings import record_encoding
from batchpipe.formats.lines import open_text
from batchpipe.formats.sampling import SAMPLE_BYTES, SAMPLE_OBJECTS, SAMPLE_TRIES, Samples, stated_types
from batchpipe.formats.text import BLOCK_BYTES, TextRange
from batchpipe.job import InputSpec
from batchpipe.split import WHOLE, InputObject, Range


def open_range(
    file: IO[bytes],
    range_: Range,
    number: int,
    spec: InputSpec,
    schema: object = None,  # noqa: ARG001 - Format's shape
    block_bytes: int = BLOCK_BYTES,
) -> TextRange:
    """Read the lines of a range that are not blank."""
    return TextRange(
        open_text(file, range_.object, spec),
        range_,
        number,
        max_record_bytes=spec.max_record_bytes,
        skip_blank=True,
        content_type=JSON_LINES,
        block_bytes=block_bytes,
    )


def to_table(records: ByteRecords, schema: InputSchema, spec: InputSpec) -> Parsed:
    """Parse records that `open_range` gave."""
    return jsonl_to_table(records, schema, record_encoding(spec.encoding))


def infer_schema(samples: Samples, spec: InputSpec) -> InputSchema:
    """Return the columns of a dataset: the keys stated in ``input.types`` and those of a sample, as for CSV.

    ``input.columns`` picks among them. A key first seen after the sample is not read: state it in ``input.types``.
    Raises InputError where a key holds values of different kinds.
    """
    stated = stated_types(spec, jsonl_can_hold)
    groups: list[Sequence[Field]] = []
    seen = ""
    for found, file in islice(samples, SAMPLE_TRIES):
        for batch in open_range(file, Range(found, 0, WHOLE), 0, spec, block_bytes=SAMPLE_BYTES):
            assert isinstance(batch.records, ByteRecords)
            groups.append(_infer(batch.records, spec, found))
            seen = seen or found.shown
            break
        if len(groups) == SAMPLE_OBJECTS:
            break
    inferred = _merge(groups, stated, seen)
    names = spec.columns or tuple({**inferred, **stated})
    missing = [name for name in names if name not in inferred and name not in stated]
    if missing and groups:
        raise InputError(
            f"input.columns names {missing[0]!r}, which the first records do not have",
            where=f"{seen}: {', '.join(inferred)}",
            next=f"if it comes later, state its type: input.types.{missing[0]}: string",
        )
    if groups and not names:
        raise InputError(
            f"none of the first records of {seen!r} is a JSON object with a key",
            where=seen,
            next="jsonl is one JSON object a line; for records of any other kind state input.format: lines",
        )
    schema = pa.schema([pa.field(name, stated.get(name, inferred.get(name, pa.null()))) for name in names])
    return InputSchema(schema, frozenset(stated) & frozenset(names), tuple(names), seen)


def _infer(records: ByteRecords, spec: InputSpec, found: InputObject) -> list[Field]:
    try:
        return infer_jsonl(records, record_encoding(spec.encoding), lambda name: _is_guessed(name, spec))
    except NoCommonTypeError as error:
        raise _mixed(str(error), found.shown) from error


def _is_guessed(name: str, spec: InputSpec) -> bool:
    return name not in spec.types and (spec.columns is None or name in spec.columns)


def _merge(groups: list[Sequence[Field]], stated: dict[str, pa.DataType], uri: str) -> dict[str, pa.DataType]:
    try:
        return {field.name: field.type for field in widen_fields(groups, is_text=False) if field.name not in stated}
    except NoCommonTypeError as error:
        raise _mixed(str(error), uri) from error


def _mixed(kinds: str, uri: str) -> InputError:
    name = kinds.partition(":")[0]
    return InputError(
        f"a key holds values of different kinds, so that its type cannot be inferred: {kinds}",
        where=uri,
        next=f"state the type that its good records have: input.types.{name}: string",
    )
