"""What is known of the columns of an input: names, Arrow types, and which types were stated rather than inferred."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import pyarrow as pa

Field: TypeAlias = "pa.Field[Any]"
Column: TypeAlias = "pa.ChunkedArray[Any]"


@dataclass(frozen=True)
class InputSchema:
    """The columns of a dataset, fixed once for all its objects. Small and picklable.

    ``schema`` has the columns that are read, with their types; ``stated`` names those whose types the job states.
    ``columns`` names every field of a CSV record in order, as in the header of ``header_of`` (a URI): more than
    ``schema`` has where ``input.columns`` picks. Elsewhere it is the same as the schema's names.
    """

    schema: pa.Schema
    stated: frozenset[str]
    columns: tuple[str, ...]
    header_of: str = ""

    @property
    def is_whole(self) -> bool:
        """Whether a record holds the columns of the schema and no others, so that its bytes may be passed on."""
        return tuple(self.schema.names) == self.columns


class NoCommonTypeError(ValueError):
    """Two types that were inferred for one column, which no type holds both of."""


def plain_type(kind: pa.DataType) -> pa.DataType:
    """Return the one type that stands for all of its layouts: no dictionaries, views, extensions or 64-bit offsets."""
    is_ = pa.types
    plain = kind
    if isinstance(kind, pa.BaseExtensionType):
        plain = plain_type(kind.storage_type)
    elif is_.is_dictionary(kind) or is_.is_run_end_encoded(kind):
        plain = plain_type(kind.value_type)
    elif is_.is_large_string(kind) or is_.is_string_view(kind):
        plain = pa.string()
    elif is_.is_large_binary(kind) or is_.is_binary_view(kind):
        plain = pa.binary()
    elif is_.is_struct(kind):
        plain = pa.struct([plain_field(field) for field in kind.fields])
    elif is_.is_map(kind):
        plain = pa.map_(plain_type(kind.key_type), plain_type(kind.item_type))
    elif is_.is_fixed_size_list(kind):
        plain = pa.list_(plain_field(kind.value_field), kind.list_size)
    elif any(test(kind) for test in (is_.is_list, is_.is_large_list, is_.is_list_view, is_.is_large_list_view)):
        plain = pa.list_(plain_field(kind.value_field))  # type: ignore[attr-defined]  # the tests have said so
    return plain


def plain_field(field: Field) -> Field:
    """Return the field without metadata, with its plain type."""
    return pa.field(field.name, plain_type(field.type), field.nullable)


def plain_schema(schema: pa.Schema) -> pa.Schema:
    """Return the schema without metadata, with plain types."""
    return pa.schema([plain_field(field) for field in schema])


def widen(first: pa.DataType, second: pa.DataType, *, is_text: bool) -> pa.DataType:
    """Return the type that holds what was inferred as either; in ``is_text`` (CSV) a string holds anything.

    Raises NoCommonTypeError.
    """
    if pa.types.is_null(first) or pa.types.is_null(second) or first.equals(second):
        return second if pa.types.is_null(first) else first
    moments = [kind for kind in (first, second) if pa.types.is_date(kind) or pa.types.is_timestamp(kind)]
    wide: pa.DataType | None = None
    if {first, second} == {pa.int64(), pa.float64()}:
        wide = pa.float64()
    elif len(moments) == 2 and len({getattr(kind, "tz", None) for kind in moments}) == 1:
        stamps = [kind for kind in moments if pa.types.is_timestamp(kind)]
        wide = max(stamps, key=lambda kind: ("s", "ms", "us", "ns").index(kind.unit))
    elif isinstance(first, pa.ListType) and isinstance(second, pa.ListType):
        wide = pa.list_(widen(first.value_type, second.value_type, is_text=is_text))
    elif isinstance(first, pa.StructType) and isinstance(second, pa.StructType):
        wide = pa.struct(widen_fields([first.fields, second.fields], is_text=is_text))
    elif is_text or all(pa.types.is_string(kind) or kind in moments for kind in (first, second)):
        wide = pa.string()
    if wide is None:
        raise NoCommonTypeError(f"{first} and {second}")
    return wide


def widen_fields(groups: Sequence[Sequence[Field]], *, is_text: bool) -> list[Field]:
    """Return one field for each name, in order of first appearance. Raises NoCommonTypeError."""
    found: dict[str, pa.DataType] = {}
    for field in (field for group in groups for field in group):
        try:
            found[field.name] = widen(found.get(field.name, pa.null()), field.type, is_text=is_text)
        except NoCommonTypeError as error:
            raise NoCommonTypeError(f"{field.name}: {error}") from None
    return [pa.field(name, kind) for name, kind in found.items()]
