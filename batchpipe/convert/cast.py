"""Answers held to the output schema that was fixed once: safe casts, and who does not fit is named. Pure."""

from collections.abc import Mapping

import pyarrow as pa
import pyarrow.compute as pc

from batchpipe.convert.parsed import shown
from batchpipe.convert.schema import Column, Field, plain_field, plain_schema, plain_type
from batchpipe.specs.arrow_types import arrow_type


class CastError(ValueError):
    """An answer does not fit the output schema: ``column``, and ``index`` of the first record that does not fit.

    ``index`` is None where no single record is to blame (a column is missing or one too many).
    """

    def __init__(self, message: str, column: str, index: int | None = None, value: str | None = None) -> None:
        super().__init__(message, column, index, value)
        self.message = message
        self.column = column
        self.index = index
        self.value = value

    def __str__(self) -> str:
        return self.message


def output_schema(found: pa.Schema, stated: Mapping[str, str | None] | None) -> pa.Schema:
    """Return the schema that every answer is cast to: the first answer's, or ``output.columns`` over it, in its order.

    Raises CastError where a stated column is neither in the answer nor given a type, where the answer has one that is
    not stated, and where a type is known from nowhere: a column that is all null in the first answer.
    """
    if stated is None:
        fields = list(plain_schema(found))
    else:
        _check_names(found.empty_table(), pa.schema([pa.field(name, pa.null()) for name in stated]))
        fields = [
            plain_field(found.field(name)) if kind is None else pa.field(name, arrow_type(kind))
            for name, kind in stated.items()
        ]
    empty = [field.name for field in fields if pa.types.is_null(field.type)]
    if empty:
        msg = f"column {empty[0]!r} has no value in the first answers, so its type is not known"
        raise CastError(f"{msg}: state it (output.columns.{empty[0]}: float64, for example)", empty[0])
    return pa.schema(fields)


def cast_table(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Return the table with the columns of the schema, in its order, with its types.

    Casts lose nothing: an integer that a float cannot hold, a fraction under an integer, text under a number, a null
    where the schema allows none, all raise. Raises CastError, also for a missing or an unknown column.
    """
    if table.schema.equals(schema, check_metadata=False):
        return table.replace_schema_metadata(None)
    _check_names(table, schema)
    columns = [_cast_column(table.column(field.name), field) for field in schema]
    return pa.table(columns, schema=schema)


def _check_names(table: pa.Table, schema: pa.Schema) -> None:
    repeated = [name for name in table.column_names if table.column_names.count(name) > 1]
    if repeated:
        raise CastError(f"the answer has column {repeated[0]!r} twice", repeated[0])
    missing = [name for name in schema.names if name not in table.column_names]
    unknown = [name for name in table.column_names if name not in schema.names]
    if missing:
        has = f"it has {', '.join(map(repr, table.column_names)) or 'none'}"
        raise CastError(f"the answer lacks column {missing[0]!r} of the output (output.columns); {has}", missing[0])
    if unknown:
        msg = f"the answer has column {unknown[0]!r}, which the output does not have (output.columns)"
        raise CastError(msg, unknown[0])


def _cast_column(column: Column, field: Field) -> Column:
    if not field.nullable and column.null_count:
        index = int(pc.index(pc.is_null(column), True).as_py())
        raise CastError(f"a null in column {field.name!r}, which the output does not allow", field.name, index, "null")
    if column.type.equals(field.type):
        return column
    try:
        return _cast(column, field.type)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError):
        index = _first_misfit(column, field.type)
    value = str(column[index].as_py())
    remedy = (
        "state one that holds all answers" if not pa.types.is_null(field.type) else "it had no value in the first ones"
    )
    raise CastError(
        f"{shown(value)} ({column.type}) in column {field.name!r} does not fit its type {field.type}: {remedy} "
        f"(output.columns.{field.name})",
        field.name,
        index,
        value,
    )


def _cast(column: Column, kind: pa.DataType) -> Column:
    # Text is not read as numbers, nor numbers written as text: such an answer is a mistake, not a variant.
    have = plain_type(column.type)
    if _is_text(have) != _is_text(kind) and not pa.types.is_null(have):
        raise pa.ArrowInvalid(f"{have} is not {kind}")
    if pa.types.is_boolean(have) != pa.types.is_boolean(kind) and not pa.types.is_null(have):
        raise pa.ArrowInvalid(f"{have} is not {kind}")
    return column.cast(kind)


def _is_text(kind: pa.DataType) -> bool:
    return any(
        test(kind)
        for test in (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
    )


def _first_misfit(column: Column, kind: pa.DataType) -> int:
    """Return the place of the first value that alone cannot be cast, found by halving."""
    start, stop = 0, len(column)
    while stop - start > 1:
        middle = (start + stop) // 2
        try:
            _cast(column.slice(start, middle - start), kind)
            start = middle
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError):
            stop = middle
    # Where the types themselves do not fit, every value fails: name one that is there.
    values = column.slice(start, 1)
    if values.null_count and column.null_count < len(column):
        return int(pc.index(pc.is_valid(column), True).as_py())
    return start
