"""What is known of the columns of an input: names, Arrow types, and which types were stated rather than inferred."""

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa


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
    if isinstance(kind, pa.BaseExtensionType):
        return plain_type(kind.storage_type)
    if pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
        return plain_type(kind.value_type)
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return pa.string()
    if pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind):
        return pa.binary()
    if pa.types.is_struct(kind):
        return pa.struct([plain_field(kind.field(i)) for i in range(kind.num_fields)])
    if pa.types.is_map(kind):
        return pa.map_(plain_type(kind.key_type), plain_type(kind.item_type))
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(plain_field(kind.value_field), kind.list_size)
    if (
        pa.types.is_list(kind)
        or pa.types.is_large_list(kind)
        or pa.types.is_list_view(kind)
        or pa.types.is_large_list_view(kind)
    ):
        return pa.list_(plain_field(kind.value_field))
    return kind


def plain_field(field: pa.Field) -> pa.Field:
    """Return the field without metadata, with its plain type."""
    return pa.field(field.name, plain_type(field.type), field.nullable)


def plain_schema(schema: pa.Schema) -> pa.Schema:
    """Return the schema without metadata, with plain types."""
    return pa.schema([plain_field(field) for field in schema])


def widen(first: pa.DataType, second: pa.DataType, *, is_text: bool) -> pa.DataType:
    """Return the type that holds what was inferred as either; in ``is_text`` (CSV) a string holds anything.

    Raises NoCommonTypeError.
    """
    if first.equals(second) or pa.types.is_null(second):
        return first
    if pa.types.is_null(first):
        return second
    numbers = {pa.int64(), pa.float64()}
    if {first, second} == numbers:
        return pa.float64()
    moments = [kind for kind in (first, second) if pa.types.is_date(kind) or pa.types.is_timestamp(kind)]
    if len(moments) == 2 and len({getattr(kind, "tz", None) for kind in moments}) == 1:
        stamps = [kind for kind in moments if pa.types.is_timestamp(kind)]
        return max(stamps, key=lambda kind: ("s", "ms", "us", "ns").index(kind.unit))
    if pa.types.is_list(first) and pa.types.is_list(second):
        return pa.list_(widen(first.value_type, second.value_type, is_text=is_text))
    if pa.types.is_struct(first) and pa.types.is_struct(second):
        return pa.struct(widen_fields([list(first), list(second)], is_text=is_text))
    if is_text or all(pa.types.is_string(kind) or kind in moments for kind in (first, second)):
        return pa.string()
    raise NoCommonTypeError(f"{first} and {second}")


def widen_fields(groups: Sequence[Sequence[pa.Field]], *, is_text: bool) -> list[pa.Field]:
    """Return one field for each name, in order of first appearance. Raises NoCommonTypeError."""
    found: dict[str, pa.DataType] = {}
    for field in (field for group in groups for field in group):
        try:
            found[field.name] = widen(found.get(field.name, pa.null()), field.type, is_text=is_text)
        except NoCommonTypeError as error:
            raise NoCommonTypeError(f"{field.name}: {error}") from None
    return [pa.field(name, kind) for name, kind in found.items()]
