"""The `input` block: what is read, and how its bytes become records."""

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag, model_validator

from batchpipe.specs.arrow_types import ArrowType
from batchpipe.specs.spec import MB, AnyText, Columns, Flag, Positive, Spec, StorageOptions, Text, expect, refuse

_FORMATS_WITH = {
    **dict.fromkeys(("header", "delimiter", "quote", "null_values", "newlines_in_values"), ("csv",)),
    "types": ("csv", "jsonl"),
    "columns": ("csv", "jsonl", "parquet"),
    "encoding": ("csv", "jsonl", "lines"),
    "compression": ("csv", "jsonl", "lines", "object"),
}


def _listed(uri: Any) -> Any:
    return [uri] if isinstance(uri, str) else uri


def _check_header(header: Any) -> Any:
    if not isinstance(header, bool | list | tuple):
        raise expect("true, false or a list of column names")
    return header


def _check_one_character(text: str) -> str:
    if len(text) > 1 or (text and text in "\r\n") or not text.isascii():
        raise expect("one ASCII character")
    return text


def _check_encoding(encoding: str) -> str:
    try:
        "\n".encode(encoding)
    except LookupError:
        raise refuse("", f"unknown encoding {encoding!r}") from None
    return encoding


Header = Annotated[
    Annotated[Flag, Tag("<flag>")] | Annotated[Columns, Tag("<names>")],
    # Picked by the type written, so that a misfit is one error and not one for each of the two.
    Discriminator(lambda header: "<flag>" if isinstance(header, bool) else "<names>"),
    BeforeValidator(_check_header),
]


class InputSpec(Spec):
    """What is read, and how its bytes become records."""

    uri: Annotated[
        tuple[Text, ...], Field(min_length=1), BeforeValidator(_listed, json_schema_input_type=str | list[str])
    ] = Field(description="Path or URL of an object, a folder or a glob, or a list of them.")
    format: Literal["csv", "jsonl", "parquet", "lines", "object"] = Field(
        default="csv", description="How an object is cut into records; with `object` it is one record."
    )
    columns: Columns | None = Field(default=None, description="Columns to read, in this order; all by default.")
    header: Header = Field(
        default=True,
        description="Whether each CSV object begins with column names, or the names of a CSV without them.",
    )
    types: dict[Text, ArrowType] = Field(
        default={},
        description="Arrow type of columns by name; what is not stated is inferred once for the whole dataset.",
    )
    delimiter: Annotated[Text, AfterValidator(_check_one_character)] = Field(
        default=",", description="Character between CSV fields."
    )
    quote: Annotated[str, AfterValidator(_check_one_character)] = Field(
        default='"', description="Character around quoted CSV fields; empty if nothing is quoted."
    )
    null_values: tuple[AnyText, ...] = Field(default=("",), description="Texts of a CSV field that mean null.")
    encoding: Annotated[Text, AfterValidator(_check_encoding)] = Field(default="utf-8", description="Encoding of text.")
    newlines_in_values: Flag = Field(
        default=True, description="Whether quoted CSV fields may hold newlines; `false` cuts at every newline."
    )
    max_record_mb: Positive = Field(default=64.0, description="Most MB of one record.")
    compression: Literal["auto", "none", "gzip", "zstd"] = Field(
        default="auto", description="Compression of the objects; `auto` goes by the ending of their name."
    )
    allow_empty: Flag = Field(default=False, description="Whether an input that matches nothing is an empty dataset.")
    storage_options: StorageOptions = Field(
        default={}, description="Options by protocol for the input, over the job's; the values are secrets."
    )

    @property
    def max_record_bytes(self) -> int:
        """Most bytes of one record."""
        return max(1, int(self.max_record_mb * MB))

    @model_validator(mode="after")
    def _keys_fit_the_format(self) -> Self:
        for key, formats in _FORMATS_WITH.items():
            if key in self.model_fields_set and self.format not in formats:
                raise refuse(key, f"is for format {' or '.join(formats)}, and the format is {self.format}")
        if self.delimiter == self.quote:
            raise refuse("quote", f"is the delimiter too: {self.quote!r}")
        return self
