"""The Arrow type names a job file may state, checked without importing pyarrow."""

import re
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator

from batchpipe.specs.spec import did_you_mean, refuse

if TYPE_CHECKING:
    import pyarrow as pa

ARROW_TYPES = [
    "string", "int64", "float64", "bool", "date32", "timestamp[us]",
    "int8", "int16", "int32", "uint8", "uint16", "uint32", "uint64", "float16", "float32",
    "large_string", "binary", "large_binary", "date64", "time32[s]", "time32[ms]", "time64[us]", "time64[ns]",
    "timestamp[s]", "timestamp[ms]", "timestamp[ns]", "duration[s]", "duration[ms]", "duration[us]", "duration[ns]",
]  # fmt: skip
"""Every name but those with parameters: `timestamp[us, tz=UTC]` (any unit and zone) and `decimal128(18, 2)`."""

# What people write who think of Python, pandas or SQL. Arrow's own `float` is float32, which nobody expects.
_MEANT = {
    "int": "int64", "integer": "int64", "long": "int64", "float": "float64", "double": "float64", "number": "float64",
    "str": "string", "text": "string", "object": "string", "varchar": "string", "utf8": "string", "boolean": "bool",
    "bytes": "binary", "date": "date32", "datetime": "timestamp[us]", "timestamp": "timestamp[us]",
}  # fmt: skip

_ZONED = re.compile(r"timestamp\[(s|ms|us|ns), ?tz=([^\[\]\s]+)\]")
_DECIMAL = re.compile(r"decimal128\(([1-9]\d?), ?(\d{1,2})\)")
_MAX_DECIMAL_DIGITS = 38


def check_arrow_type(name: str) -> str:
    """Return *name* if it is an Arrow type a job file may state; refuse it with the nearest one otherwise."""
    decimal = _DECIMAL.fullmatch(name)
    if decimal and int(decimal[2]) <= int(decimal[1]) <= _MAX_DECIMAL_DIGITS:
        return name
    if name in ARROW_TYPES or _ZONED.fullmatch(name):
        return name
    meant = f"; did you mean {_MEANT[name.lower()]!r}?" if name.lower() in _MEANT else did_you_mean(name, ARROW_TYPES)
    raise refuse("", f"unknown Arrow type {name!r}{meant or '; for example ' + ', '.join(ARROW_TYPES[:6])}")


def arrow_type(name: str) -> "pa.DataType":
    """Return the pyarrow type of a *name* that `check_arrow_type` let pass; imports pyarrow."""
    import pyarrow as pa

    if zoned := _ZONED.fullmatch(name):
        unit: Any = zoned[1]
        return pa.timestamp(unit, tz=zoned[2])
    if decimal := _DECIMAL.fullmatch(name):
        return pa.decimal128(int(decimal[1]), int(decimal[2]))
    alias: Any = name  # the stubs want the literal names that ARROW_TYPES holds
    found: pa.DataType = pa.type_for_alias(alias)
    return found


ArrowType = Annotated[str, AfterValidator(check_arrow_type)]
