"""Byte records -> Arrow tables -> what a callable's annotation asks for, and back. Pure: no I/O, no Dask, no clock.

`csv`, `jsonl` and `parsed` turn byte records into tables, `arguments` and `answers` speak to callables, `cast` holds
answers to a schema. Bodies of HTTP requests are `content`'s.
"""

from batchpipe.convert.answers import from_answer, index_was_reordered
from batchpipe.convert.arguments import Kind, to_argument, to_dataframe, wanted
from batchpipe.convert.cast import CastError, cast_table, output_schema
from batchpipe.convert.csv import CsvDialect, csv_can_hold, csv_to_table, infer_csv
from batchpipe.convert.frames import FrameRecords
from batchpipe.convert.jsonl import infer_jsonl, jsonl_can_hold, jsonl_to_table
from batchpipe.convert.parsed import BadRecord, Parsed
from batchpipe.convert.schema import Column, Field, InputSchema, NoCommonTypeError, plain_schema, widen_fields

__all__ = [
    "BadRecord",
    "CastError",
    "Column",
    "CsvDialect",
    "Field",
    "FrameRecords",
    "InputSchema",
    "Kind",
    "NoCommonTypeError",
    "Parsed",
    "cast_table",
    "csv_can_hold",
    "csv_to_table",
    "from_answer",
    "index_was_reordered",
    "infer_csv",
    "infer_jsonl",
    "jsonl_can_hold",
    "jsonl_to_table",
    "output_schema",
    "plain_schema",
    "to_argument",
    "to_dataframe",
    "wanted",
    "widen_fields",
]
