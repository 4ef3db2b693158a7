"""What every block of a job file has in common: frozen, no unknown keys, null means default, a repr without secrets.

The scalar types below are strict: YAML has typed the values already, so `"3"` is text and no number.
"""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, Strict, model_validator
from pydantic_core import PydanticCustomError

from batchpipe.redact import clean_document, clean_uri

MB = 1_048_576
"""Bytes of one MB, in every key that ends in `_mb`."""


def refuse(key: str, text: str) -> PydanticCustomError:
    """Return the error *text* for *key* of the block being checked (dotted; "" is the block or value itself)."""
    return PydanticCustomError("refused", "{text}", {"key": key, "text": clean_uri(text)})


def expect(text: str) -> PydanticCustomError:
    """Return the error for a value that is not *text* ("true or false", "a list of names")."""
    return PydanticCustomError("expected", "{text}", {"text": text})


def did_you_mean(word: object, choices: list[str]) -> str:
    """Return the tail of an error text that offers the choice nearest to *word*, or nothing."""
    near = get_close_matches(word, choices, n=1) if isinstance(word, str) else []
    return f"; did you mean {near[0]!r}?" if near else ""


def _storable(text: str) -> str:
    # Neither a path, an environment nor UTF-8 can hold these; YAML's "\\0" and "\\ud800" can write them.
    if any(character == "\0" or "\ud800" <= character <= "\udfff" for character in text):
        raise refuse("", "must not contain a NUL character or half of a surrogate pair")
    return text


def _distinct(names: tuple[str, ...]) -> tuple[str, ...]:
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise refuse("", f"names {repeated[0]!r} twice")
    return names


Flag = Annotated[bool, Strict()]
AnyText = Annotated[str, AfterValidator(_storable)]
Text = Annotated[AnyText, Field(min_length=1)]
Texts = tuple[Text, ...]
Columns = Annotated[tuple[Text, ...], Field(min_length=1), AfterValidator(_distinct)]
Count = Annotated[int, Strict(), Field(ge=1)]
Natural = Annotated[int, Strict(), Field(ge=0)]
Positive = Annotated[float, Strict(), Field(gt=0, allow_inf_nan=False)]
StorageOptions = dict[str, dict[str, Any]]


class Spec(BaseModel):
    """A block of the job file as a value: what the user asks for, checked."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True, serialize_by_alias=True)

    @model_validator(mode="before")
    @classmethod
    def _null_means_default(cls, written: Any) -> Any:
        if not isinstance(written, Mapping):
            return written
        known = {field.alias or name for name, field in cls.model_fields.items()}
        return {key: value for key, value in written.items() if value is not None or key not in known}

    def __repr_args__(self) -> Any:
        for name, value in super().__repr_args__():
            yield name, clean_document({name: value})[name] if name else value
