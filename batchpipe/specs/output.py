"""The `output` block: where answers go, and as what."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from batchpipe.specs.arrow_types import ArrowType
from batchpipe.specs.spec import Flag, Spec, StorageOptions, Text, expect, refuse

OutputCompression = Literal["none", "gzip", "zstd", "snappy"]

_TABLES = ("parquet", "csv", "jsonl")
_FORMATS_WITH = {"assemble_with": ("raw",), "columns": _TABLES, "add_source": _TABLES}


def _typed(columns: Any) -> Any:
    # A list of names is the short form of names whose types are as found.
    is_list = isinstance(columns, list | tuple) and all(isinstance(name, str) for name in columns)
    if not is_list and not isinstance(columns, Mapping):
        raise expect("a list of column names, or name: Arrow type")
    if not columns:
        raise refuse("", "names no column")
    if is_list and len(set(columns)) < len(columns):
        raise refuse("", "names a column twice")
    return dict.fromkeys(columns) if is_list else columns


class OutputSpec(Spec):
    """Where answers go, and as what."""

    uri: Text = Field(description="Path or URL of the folder that the run fills.")
    format: Literal["parquet", "csv", "jsonl", "raw"] = Field(
        default="parquet", description="Format of the parts; `raw` writes the bytes that the last stage answers."
    )
    layout: Literal["parts", "mirror"] = Field(
        default="parts", description="`parts` in input order, or one `<name>.out` per input object (`mirror`)."
    )
    columns: (
        Annotated[
            dict[Text, ArrowType | None],
            BeforeValidator(_typed, json_schema_input_type=dict[str, str | None] | list[str]),
        ]
        | None
    ) = Field(
        default=None,
        description="Columns of the output in order, as names or as name: Arrow type; by default those of the first "
        "mini-batch's answer, and a type left empty is taken from there.",
    )
    compression: OutputCompression | None = Field(
        default=None, description="Compression of the parts; by default snappy for parquet, none otherwise."
    )
    assemble_with: Literal["line", "none"] = Field(
        default="line", description="For raw: `line` adds a newline where an answer lacks one, `none` adds nothing."
    )
    add_source: Flag = Field(default=False, description="Whether to add the columns _object and _record.")
    if_exists: Literal["error", "replace"] = Field(
        default="error", description="What to do with an earlier finished output in the same place."
    )
    storage_options: StorageOptions = Field(
        default={}, description="Options by protocol for the output, over the job's; the values are secrets."
    )

    @property
    def codec(self) -> OutputCompression:
        """The compression in force: as stated, else the format's own default."""
        return self.compression or ("snappy" if self.format == "parquet" else "none")

    @model_validator(mode="after")
    def _keys_fit_the_format(self) -> Self:
        for key, formats in _FORMATS_WITH.items():
            if key in self.model_fields_set and self.format not in formats:
                raise refuse(key, f"is for format {' or '.join(formats)}, and the format is {self.format}")
        if self.layout == "mirror" and self.format == "parquet":
            raise refuse(
                "layout",
                "mirror joins pieces end to end, which Parquet files cannot be; use csv, jsonl or raw, or parts",
            )
        if self.compression == "snappy" and self.format != "parquet":
            raise refuse(
                "compression", f"snappy is for format parquet, and the format is {self.format}; use gzip or zstd"
            )
        return self
