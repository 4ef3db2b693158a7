"""What a callable answered, as records. Pure.

Everything with columns becomes a table with plain types and no metadata; one value a record becomes the column
`prediction`; a list of bytes stays bytes.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import pyarrow as pa

from batchpipe.batch import ByteRecords, Records
from batchpipe.convert.frames import FrameRecords
from batchpipe.convert.schema import plain_schema

SINGLE = "prediction"
"""The column of answers that are one value each and have no name."""

_UNHELD = (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OverflowError, RecursionError)
"""What Arrow raises for values that it has no column for: of several types, too large, nested too deeply."""

_KINDS = (
    "a pandas DataFrame or Series, a pyarrow Table, a dict of arrays, a numpy array, "
    "or a list of dicts, of bytes or of single values"
)


def from_answer(answer: Any, *, keeps_frame: bool = False) -> Records:
    """Return what a callable answered as records, one for each of the answer's.

    ``keeps_frame`` is for a next callable that takes DataFrames: a DataFrame then stays one (`FrameRecords`).

    Raises TypeError for what is no answer (None, text, a number) and ValueError for one that is broken
    (columns of different lengths, mixed types), both without the stage's name: the caller knows it.
    """
    if isinstance(answer, pa.Table | pa.RecordBatch):
        table = answer if isinstance(answer, pa.Table) else pa.Table.from_batches([answer])
    elif (frame := _as_frame(answer)) is not None:
        if keeps_frame:
            return cast("Records", _as_records(frame))
        table = _from_pandas(frame)
    elif isinstance(answer, ByteRecords):
        return answer
    elif isinstance(answer, Mapping):
        table = _from_columns(answer)
    elif isinstance(answer, np.ndarray):
        table = _from_array(answer)
    elif isinstance(answer, list | tuple):
        if answer and all(isinstance(one, bytes | bytearray | memoryview) for one in answer):
            return ByteRecords.of([bytes(one) for one in answer])
        table = _from_list(answer)
    elif hasattr(answer, "__arrow_c_stream__") or isinstance(answer, pa.Array | pa.ChunkedArray):
        is_column = isinstance(answer, pa.Array | pa.ChunkedArray)
        table = pa.table({SINGLE: answer}) if is_column else pa.table(answer)
    else:
        raise TypeError(f"returned {_described(answer)}; expected {_KINDS}")
    return _plain(table)


def index_was_reordered(answer: Any, count: int) -> bool:
    """Whether a DataFrame or Series came back with the index it was given (0 to count - 1), but in another order.

    Rows left out are not a reordering.
    """
    frame = _as_frame(answer, or_series=True)
    if frame is None or len(frame.index) < 2:
        return False
    index = frame.index
    if getattr(index, "nlevels", 1) > 1 or index.dtype.kind not in "iu" or index.is_monotonic_increasing:
        return False
    return bool(index.is_unique and index.min() >= 0 and index.max() < count)


def _as_frame(answer: Any, *, or_series: bool = False) -> Any:
    """Return a pandas object as a DataFrame (a Series as it is where asked), None for everything else."""
    name = f"{type(answer).__module__}.{type(answer).__qualname__}"
    for kind in type(answer).__mro__:
        name = f"{kind.__module__}.{kind.__qualname__}"
        if name.startswith("pandas.") and name.endswith(".DataFrame"):
            return answer
        if name.startswith("pandas.") and name.endswith(".Series"):
            return answer if or_series else answer.to_frame(SINGLE if answer.name is None else answer.name)
    return None


def _as_records(frame: Any) -> FrameRecords:
    _names_of(frame)
    return FrameRecords.of(frame)


def _names_of(frame: Any) -> list[str]:
    names = [str(name) for name in frame.columns]
    repeated = [name for name in names if names.count(name) > 1]
    if repeated:
        raise ValueError(f"returned a DataFrame with column {repeated[0]!r} twice")
    return names


def _from_pandas(frame: Any) -> pa.Table:
    names = _names_of(frame)
    arrays = []
    for place, name in enumerate(names):
        try:
            arrays.append(pa.array(frame.iloc[:, place], from_pandas=True))
        except _UNHELD as error:
            raise _no_column(name, error) from error
    return pa.table(arrays, names=names) if names else _no_columns(len(frame))


def _from_columns(columns: Mapping[Any, Any]) -> pa.Table:
    arrays: dict[str, Any] = {}
    for name, values in columns.items():
        if isinstance(values, str | bytes) or not hasattr(values, "__len__"):
            raise TypeError(f"returned a dict in which {name!r} is {_described(values)}; expected an array or list")
        arrays[str(name)] = _column(values, str(name))
    lengths = {len(array) for array in arrays.values()}
    if len(lengths) > 1:
        shown = ", ".join(f"{name!r} {len(array):,}" for name, array in arrays.items())
        raise ValueError(f"returned a dict whose columns differ in length: {shown}")
    return pa.table(arrays)


def _column(values: Any, name: str) -> Any:
    try:
        if isinstance(values, np.ndarray) and values.ndim > 1:
            return _fixed_lists(values)
        if isinstance(values, np.ma.MaskedArray):
            return pa.array(values.data, mask=np.ma.getmaskarray(values))
        return pa.array(values) if not isinstance(values, pa.ChunkedArray) else values
    except _UNHELD as error:
        raise _no_column(name, error) from error


def _from_array(array: np.ndarray[Any, Any]) -> pa.Table:
    if array.ndim == 0:
        raise TypeError(f"returned {_described(array)} without a dimension; expected one value a record")
    if array.dtype.names:
        return _from_columns({name: array[name] for name in array.dtype.names})
    return pa.table({SINGLE: _column(array, SINGLE)})


def _fixed_lists(values: np.ndarray[Any, Any]) -> Any:
    """Return an array of two or more dimensions as one fixed-size list a record."""
    inner = pa.array(np.ascontiguousarray(values).reshape(-1))
    for size in reversed(values.shape[1:]):
        inner = pa.FixedSizeListArray.from_arrays(inner, size)
    return inner


def _from_list(answer: Sequence[Any]) -> pa.Table:
    if not answer:
        return _no_columns(0)
    if isinstance(answer[0], Mapping):
        names = list(dict.fromkeys(str(key) for one in answer if isinstance(one, Mapping) for key in one))
        for place, one in enumerate(answer):
            if not isinstance(one, Mapping):
                raise TypeError(f"returned a list whose item {place} is {_described(one)}, and others are dicts")
        rows = [{str(key): value for key, value in one.items()} for one in answer]
        return (
            pa.table({name: _column([row.get(name) for row in rows], name) for name in names})
            if names
            else _no_columns(len(rows))
        )
    for place, one in enumerate(answer):
        if isinstance(one, bytes | Mapping):
            raise TypeError(f"returned a list whose item {place} is {_described(one)}, and others are not")
    return pa.table({SINGLE: _column(answer, SINGLE)})


def _no_columns(count: int) -> pa.Table:
    """Return a table of so many records without columns, which only no records can have."""
    if count:
        raise ValueError(f"returned {count:,} records without a single column")
    return pa.table({})


def _plain(table: pa.Table) -> pa.Table:
    names = table.column_names
    repeated = [name for name in names if names.count(name) > 1]
    if repeated:
        raise ValueError(f"returned a table with column {repeated[0]!r} twice")
    schema = plain_schema(table.schema)
    try:
        return table.replace_schema_metadata(None) if table.schema.equals(schema) else table.cast(schema)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ValueError(f"returned a table that cannot be read: {_short(error)}") from error


def _described(value: Any) -> str:
    if value is None:
        return "None"
    kind = type(value)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _no_column(name: str, error: Exception) -> ValueError:
    return ValueError(f"returned column {name!r} with values that no one type can hold: {_short(error)}")


def _short(error: Exception) -> str:
    return str(error).splitlines()[0][:200]
