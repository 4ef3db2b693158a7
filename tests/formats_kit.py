"""What the tests of the formats share: input and output blocks from keys, and what batches hold."""

from collections.abc import Iterable
from typing import Any

import pyarrow as pa

from batchpipe.batch import ByteRecords, MiniBatch
from batchpipe.job import InputSpec, OutputSpec
from batchpipe.split import WHOLE, InputObject, Range


def input_spec(format_: str = "csv", **keys: Any) -> InputSpec:
    return InputSpec.model_validate({"uri": "x", "format": format_, **keys})


def output_spec(**keys: Any) -> OutputSpec:
    return OutputSpec.model_validate({"uri": "x", **keys})


def range_of(data: bytes, uri: str = "x", start: int = 0, stop: int = WHOLE) -> Range:
    return Range(InputObject(0, uri, len(data), ""), start, stop)


def bytes_in(batches: Iterable[MiniBatch]) -> list[bytes]:
    return [record for batch in batches if isinstance(batch.records, ByteRecords) for record in batch.records.to_list()]


def rows_in(batches: Iterable[MiniBatch]) -> list[dict[str, Any]]:
    return [row for batch in batches if isinstance(batch.records, pa.Table) for row in batch.records.to_pylist()]


def schema_of(**kinds: pa.DataType) -> pa.Schema:
    return pa.schema(list(kinds.items()))
