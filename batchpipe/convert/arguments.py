"""Records as what a callable's annotation asks for. Pandas is imported only where a DataFrame is asked for. Pure.

The dtype of a column is a function of the schema, never of the batch: integers and booleans that may be null are
pandas' nullable ones, whether a null is there or not.
"""

import enum
import typing
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from batchpipe.batch import ByteRecords, Records
from batchpipe.convert.frames import FrameRecords
from batchpipe.convert.schema import Column

if TYPE_CHECKING:
    import pandas as pd


class Kind(enum.Enum):
    """The shapes in which a callable can take its records; the values are what people write."""

    UNSTATED = "no annotation"
    DATAFRAME = "pandas.DataFrame"
    TABLE = "pyarrow.Table"
    ARRAYS = "dict[str, numpy.ndarray]"
    DICTS = "list[dict]"
    BODY = "bytes"
    LIST = "list[bytes]"

    @property
    def is_tabular(self) -> bool:
        """Whether records that can be parsed must be parsed for it. Unstated means a DataFrame of what has columns."""
        return self not in (Kind.BODY, Kind.LIST)


def wanted(annotation: Any) -> Kind:
    """Return the kind that an annotation asks for; None means that there is none.

    Raises TypeError for an annotation that is none of ours; the caller names the stage.
    """
    if annotation is None or annotation is Any:
        return Kind.UNSTATED
    found = _kind_of_text(annotation) if isinstance(annotation, str) else _kind_of_type(annotation)
    if found is None:
        kinds = ", ".join(kind.value for kind in Kind if kind is not Kind.UNSTATED)
        shown = annotation if isinstance(annotation, str) else getattr(annotation, "__qualname__", None)
        shown = str(annotation) if typing.get_origin(annotation) else shown or str(annotation)
        raise TypeError(f"asks for {shown}, which records cannot be given as; they can as {kinds}")
    return found


def _kind_of_type(annotation: Any) -> Kind | None:
    # By name, so that pandas is not imported to be told from something else.
    name = f"{getattr(annotation, '__module__', '')}.{getattr(annotation, '__qualname__', '')}"
    if name.startswith("pandas.") and name.endswith(".DataFrame"):
        return Kind.DATAFRAME
    plain = {pa.Table: Kind.TABLE, bytes: Kind.BODY}
    return plain[annotation] if annotation in plain else _kind_of_generic(annotation)


def _kind_of_generic(annotation: Any) -> Kind | None:
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if not isinstance(origin, type) or not inner:
        return None
    held = typing.get_origin(inner[-1]) or inner[-1]
    if issubclass(origin, Mapping):
        return Kind.ARRAYS if inner[0] is str and held is np.ndarray else None
    if issubclass(origin, Sequence) and origin is not tuple:
        return {bytes: Kind.LIST, dict: Kind.DICTS}.get(held)
    return None


def _kind_of_text(annotation: str) -> Kind | None:
    text = annotation.replace(" ", "").replace("typing.", "")
    if text.rpartition(".")[2] == "DataFrame":
        return Kind.DATAFRAME
    if text in ("pa.Table", "pyarrow.Table"):
        return Kind.TABLE
    if text.lower().startswith("list[dict"):
        return Kind.DICTS
    if text.startswith(("dict[str,", "Dict[str,", "Mapping[str,")) and "ndarray" in text:
        return Kind.ARRAYS
    return {"bytes": Kind.BODY, "list[bytes]": Kind.LIST, "List[bytes]": Kind.LIST}.get(text)


def to_argument(records: "Records | FrameRecords", kind: Kind) -> Any:
    """Return the records as ``kind``. Raises TypeError where they are of the other sort, tables or bytes."""
    if isinstance(records, FrameRecords):
        # A shallow copy: what the callable changes in it must not be seen by a later attempt with the same records.
        return records.frame.copy(deep=False)
    return _of_bytes(records, kind) if isinstance(records, ByteRecords) else _of_table(records, kind)


def _of_bytes(records: ByteRecords, kind: Kind) -> Any:
    if kind is Kind.BODY:
        return bytes(records.body())
    if kind in (Kind.LIST, Kind.UNSTATED):
        return records.to_list()
    raise TypeError(f"asks for {kind.value}, but the records are bytes ({records.content_type}), without columns")


def _of_table(table: pa.Table, kind: Kind) -> Any:
    match kind:
        case Kind.DATAFRAME | Kind.UNSTATED:
            return to_dataframe(table)
        case Kind.TABLE:
            return table
        case Kind.ARRAYS:
            return {name: _to_array(table.column(name), name) for name in table.column_names}
        case Kind.DICTS:
            return table.to_pylist()
    raise TypeError(f"asks for {kind.value}, but the records are a table of {', '.join(table.column_names)}")


def to_dataframe(table: pa.Table) -> "pd.DataFrame":
    """Return a DataFrame with a fresh RangeIndex.

    Integers and booleans are pandas' nullable ones unless the schema forbids nulls, floats have NaN, text is pandas'
    own ``str``, dates are datetime64.
    """
    import pandas as pd

    if not table.num_columns:
        return pd.DataFrame(index=pd.RangeIndex(len(table)))
    nullable = {
        pa.int8(): pd.Int8Dtype(), pa.int16(): pd.Int16Dtype(), pa.int32(): pd.Int32Dtype(),
        pa.int64(): pd.Int64Dtype(), pa.uint8(): pd.UInt8Dtype(), pa.uint16(): pd.UInt16Dtype(),
        pa.uint32(): pd.UInt32Dtype(), pa.uint64(): pd.UInt64Dtype(), pa.bool_(): pd.BooleanDtype(),
    }  # fmt: skip
    strict = [field.name for field in table.schema if not field.nullable and field.type in nullable]
    frame = table.replace_schema_metadata(None).to_pandas(types_mapper=nullable.get, date_as_object=False)
    return frame.astype({name: table.schema.field(name).type.to_pandas_dtype() for name in strict}) if strict else frame


def _to_array(column: Column, name: str) -> np.ndarray[Any, Any]:
    """Return a column as an array whose dtype depends on its type alone."""
    kind = column.type
    array: Any = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], kind)
    if isinstance(kind, pa.FixedSizeListType) and not array.null_count:
        return np.asarray(array.flatten()).reshape(len(array), kind.list_size)
    if (pa.types.is_integer(kind) or pa.types.is_boolean(kind)) and array.null_count:
        raise ValueError(
            f"column {name!r} holds a null, which an array of {kind} cannot; "
            f"state its type as float64 (null is NaN), or take a pandas.DataFrame"
        )
    if pa.types.is_null(kind):
        return np.full(len(array), None, object)
    return np.asarray(array.to_numpy(zero_copy_only=False))
