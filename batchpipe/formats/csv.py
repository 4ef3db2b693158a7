"""CSV: records cut outside quotes, headers matched by name, types stated or inferred from a fixed sample."""

import csv
import io
from collections.abc import Sequence
from itertools import islice
from typing import IO

import pyarrow as pa

from batchpipe.batch import ByteRecords, concat_records
from batchpipe.content import CSV
from batchpipe.convert import (
    CsvDialect,
    Field,
    InputSchema,
    Parsed,
    csv_can_hold,
    csv_to_table,
    infer_csv,
    widen_fields,
)
from batchpipe.errors import InputError
from batchpipe.formats.encodings import record_encoding
from batchpipe.formats.fields import reorder_fields, split_fields
from batchpipe.formats.lines import open_text
from batchpipe.formats.quotes import QuoteScanner
from batchpipe.formats.sampling import SAMPLE_BYTES, SAMPLE_OBJECTS, SAMPLE_TRIES, Samples, stated_types
from batchpipe.formats.text import BLOCK_BYTES, TAIL_BYTES, NewlineScanner, TextRange
from batchpipe.job import InputSpec
from batchpipe.split import WHOLE, InputObject, Range


def needs_proof(spec: InputSpec) -> bool:
    """Whether a range that begins inside an object begins at a guess, which the range before must prove."""
    return spec.newlines_in_values and bool(spec.quote)


def open_range(
    file: IO[bytes],
    range_: Range,
    number: int,
    spec: InputSpec,
    schema: InputSchema | None,
    block_bytes: int = BLOCK_BYTES,
) -> TextRange:
    """Read the CSV records of a range: the header is none of them, the order of fields is that of ``schema.columns``.

    Raises InputError where the object's header has other names than the schema.
    """
    order = _order_of(file, range_.object, spec, schema) if schema else None
    return _open(file, range_, number, spec, block_bytes, skip_first=spec.header is True, order=order)


def _open(  # noqa: PLR0913 - the switches are for this module only
    file: IO[bytes],
    range_: Range,
    number: int,
    spec: InputSpec,
    block_bytes: int,
    *,
    skip_first: bool,
    order: tuple[int, ...] | None = None,
) -> TextRange:
    def rewrite(records: ByteRecords) -> ByteRecords:
        return reorder_fields(records, order or (), spec.delimiter, spec.quote)

    return TextRange(
        open_text(file, range_.object, spec),
        range_,
        number,
        scanner=QuoteScanner(spec.delimiter, spec.quote) if needs_proof(spec) else NewlineScanner(),
        max_record_bytes=spec.max_record_bytes,
        skip_blank=True,
        skip_first=skip_first,
        content_type=CSV,
        rewrite=rewrite if order else None,
        block_bytes=block_bytes,
    )


def to_table(records: ByteRecords, schema: InputSchema, spec: InputSpec) -> Parsed:
    """Parse records that `open_range` gave."""
    return csv_to_table(records, schema, CsvDialect.of(spec, record_encoding(spec.encoding)))


def to_header(schema: InputSchema, spec: InputSpec) -> bytes:
    """Return the line of column names that fits in front of records as `open_range` gave them."""
    line = io.StringIO()
    csv.writer(line, delimiter=spec.delimiter, quotechar=spec.quote or '"', lineterminator="\n").writerow(
        schema.columns
    )
    return line.getvalue().encode()


def infer_schema(samples: Samples, spec: InputSpec) -> InputSchema:
    """Return the columns of a dataset: names by the first object's header (or ``input.header``, or f0, f1, ...).

    Types are as stated; the others are inferred from the complete records in the first `SAMPLE_BYTES` of the first
    `SAMPLE_OBJECTS` objects that hold any, and widened to hold what each object shows. A column without a value there
    is of type null, which no value fits: state it. Raises InputError.
    """
    columns, header_of, groups = _named(spec), "", list[Sequence[Field]]()
    dialect = CsvDialect.of(spec, record_encoding(spec.encoding))
    for found, file in islice(samples, SAMPLE_TRIES):
        header, records = _sample(file, found, spec)
        names = _header_names(header, found, spec) if header else columns
        if names is None and len(records):
            names = tuple(f"f{place}" for place in range(len(_fields(bytes(records[0]), found, spec))))
        if names is None:
            continue
        if columns is None:
            columns, header_of = names, found.shown
        _match(columns, header_of, names, found)
        if len(records):
            wanted = [name for name in spec.columns or columns if name in columns and name not in spec.types]
            groups.append(_infer(records, names, wanted, dialect, found))
        if len(groups) == SAMPLE_OBJECTS:
            break
    return _put_together(columns, header_of, groups, spec)


def _put_together(
    columns: tuple[str, ...] | None, header_of: str, groups: list[Sequence[Field]], spec: InputSpec
) -> InputSchema:
    stated = stated_types(spec, csv_can_hold)
    if columns is None:
        columns = spec.columns or tuple(stated)
    else:
        _check_known(columns, header_of, spec)
    inferred = {field.name: field.type for field in widen_fields(groups, is_text=True)}
    picked = spec.columns or columns
    fields = [pa.field(name, stated.get(name, inferred.get(name, pa.null()))) for name in picked]
    return InputSchema(pa.schema(fields), frozenset(stated) & frozenset(picked), tuple(columns), header_of)


def _named(spec: InputSpec) -> tuple[str, ...] | None:
    return None if isinstance(spec.header, bool) else tuple(spec.header)


def _sample(file: IO[bytes], found: InputObject, spec: InputSpec) -> tuple[bytes | None, ByteRecords]:
    """Return the header record, if the object begins with one, and the sampled records."""
    parts: list[ByteRecords] = []
    needed = 1 + (spec.header is True)
    for batch in _open(file, Range(found, 0, WHOLE), 0, spec, SAMPLE_BYTES, skip_first=False):
        assert isinstance(batch.records, ByteRecords)
        parts.append(batch.records)
        if sum(map(len, parts)) >= needed:
            break
    whole = concat_records(parts) if parts else ByteRecords.of([])
    assert isinstance(whole, ByteRecords)
    if spec.header is not True or not len(whole):
        return None, whole
    return bytes(whole[0]), whole.slice(1, len(whole))


def read_header(file: IO[bytes], found: InputObject, spec: InputSpec) -> tuple[str, ...] | None:
    """Return the names in an object's header record by a small read at its head; None if it holds no record."""
    for batch in _open(file, Range(found, 0, WHOLE), 0, spec, TAIL_BYTES, skip_first=False):
        assert isinstance(batch.records, ByteRecords)
        return _header_names(bytes(batch.records[0]), found, spec)
    return None


def _header_names(header: bytes, found: InputObject, spec: InputSpec) -> tuple[str, ...]:
    names = _fields(header, found, spec)
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise InputError(
            f"the header of {found.shown!r} names column {repeated[0]!r} twice",
            where=f"{found.shown}, byte 0",
            next="mend the header; or remove it and state input.header: [names]",
        )
    return names


def _fields(record: bytes, found: InputObject, spec: InputSpec) -> tuple[str, ...]:
    encoding = record_encoding(spec.encoding)
    try:
        return split_fields(record, encoding, spec.delimiter, spec.quote)
    except (UnicodeDecodeError, csv.Error) as error:
        msg = f"cannot read the first record of {found.shown!r}: {error}"
        raise InputError(
            msg, where=f"{found.shown}, byte 0", next="state its input.encoding, delimiter or quote"
        ) from error


def _order_of(file: IO[bytes], found: InputObject, spec: InputSpec, schema: InputSchema) -> tuple[int, ...] | None:
    """Return the places of the schema's columns in this object's records, None where they are in order."""
    if spec.header is not True or found.uri == schema.header_of:  # as it was listed: two may be shown alike
        return None
    names = read_header(file, found, spec)
    if names is None or names == schema.columns:
        return None
    _match(schema.columns, schema.header_of, names, found)
    return tuple(names.index(name) for name in schema.columns)


def _match(columns: tuple[str, ...], header_of: str, names: tuple[str, ...], found: InputObject) -> None:
    if set(columns) == set(names):
        return
    missing, unknown = sorted(set(columns) - set(names)), sorted(set(names) - set(columns))
    parts = [f"lacks {', '.join(map(repr, missing))}"] * bool(missing)
    parts += [f"has {', '.join(map(repr, unknown))} more"] * bool(unknown)
    raise InputError(
        f"the header of {found.shown!r} {' and '.join(parts)}, compared with {header_of!r}",
        where=f"{found.shown}: {_listed(names)}; {header_of}: {_listed(columns)}",
        next="give the objects the same columns (their order is free), or read them by two jobs",
    )


def _check_known(columns: tuple[str, ...], header_of: str, spec: InputSpec) -> None:
    for key, names in (("input.columns", spec.columns or ()), ("input.types", tuple(spec.types))):
        unknown = [name for name in names if name not in columns]
        if unknown:
            raise InputError(
                f"{key} names {unknown[0]!r}, which is not a column of {header_of or 'input.header'!r}",
                where=f"{header_of or 'input.header'}: {_listed(columns)}",
                next=f"name one of these columns in {key}",
            )


def _infer(
    records: ByteRecords, names: tuple[str, ...], wanted: list[str], dialect: CsvDialect, found: InputObject
) -> list[Field]:
    try:
        return infer_csv(records, names, wanted, dialect)
    except UnicodeDecodeError as error:
        msg = f"cannot read {found.shown!r} as {dialect.encoding}: {error}"
        raise InputError(msg, where=found.shown, next="state its input.encoding, such as latin-1") from error


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(names) if len(names) <= 20 else f"{', '.join(names[:20])} and {len(names) - 20} more"
