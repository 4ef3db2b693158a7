"""The fixed sample that types are inferred from, and the types that a job states."""

from collections.abc import Callable, Iterable
from typing import IO, TypeAlias

import pyarrow as pa

from batchpipe.errors import InputError
from batchpipe.job import InputSpec
from batchpipe.specs.arrow_types import arrow_type
from batchpipe.split import InputObject

SAMPLE_BYTES = 1 << 20
"""Of each sampled object, the complete records within its first MB (at least one) are looked at."""

SAMPLE_OBJECTS = 3
"""Objects that are sampled: the first of the dataset that hold records ..."""

SAMPLE_TRIES = 100
"""... among this many."""

Samples: TypeAlias = Iterable[tuple[InputObject, IO[bytes]]]


def stated_types(spec: InputSpec, can_hold: Callable[[pa.DataType], bool]) -> dict[str, pa.DataType]:
    """Return the types of ``input.types``. Raises InputError for one that the format cannot be read as."""
    stated = {name: arrow_type(kind) for name, kind in spec.types.items()}
    for name, kind in stated.items():
        if not can_hold(kind):
            raise InputError(
                f"{spec.format} cannot be read as {spec.types[name]} (input.types.{name})",
                next=f"state another type, such as input.types.{name}: string, and convert it in a stage",
            )
    return stated
