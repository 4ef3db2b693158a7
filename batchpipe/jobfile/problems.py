"""What is wrong with a job file, as lines a person can act on: where it stands, its dotted path, plain words.

Values at secret places are never repeated.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from pydantic import ValidationError

from batchpipe.errors import JobError
from batchpipe.job import MAX_STAGES, Job
from batchpipe.jobfile.yaml_text import Place, read_scalar
from batchpipe.redact import SECRET_KEYS, clean_uri
from batchpipe.specs.spec import Spec, did_you_mean
from batchpipe.specs.stage import STAGE_KINDS, stage_names

MAX_PROBLEMS = 10
"""As many as are listed at once; the rest are counted."""

_EXPECTED = {
    "string_type": "text",
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "dict_type": "a mapping of key: value",
    "model_type": "a mapping of key: value",
    "list_type": "a list",
    "tuple_type": "a list",
}
_BOUNDS = {
    "greater_than": "must be more than {gt:g}",
    "greater_than_equal": "must be at least {ge:g}",
    "less_than_equal": "must be at most {le:g}",
}


@dataclass
class Problems:
    """What is wrong, collected over all steps of loading, so that a person sees it all at once."""

    file: str
    lines: Mapping[Place, int] = field(default_factory=dict)
    from_command_line: set[Place] = field(default_factory=set)
    found: list[tuple[Place, str]] = field(default_factory=list)

    def add(self, place: Place, text: str) -> None:
        """Note *text* about *place*, unless it only follows from a problem there or above that is known already."""
        if not any(place[: len(known)] == known for known, _ in self.found):
            self.found.append((place, text))

    def add_all(self, error: ValidationError) -> None:
        """Note everything that pydantic found, in our words."""
        for place, text in list(_translate(error)):
            self.add(place, text)

    def error(self, document: Any) -> JobError:
        """Return the error that lists what was found in *document*, in the order of its lines."""
        ordered = sorted(self.found, key=lambda problem: self._line(problem[0]))
        texts = [
            ": ".join(filter(None, (self._position(place), dotted(place, document), text))) for place, text in ordered
        ]
        rest = [f"... and {len(texts) - MAX_PROBLEMS} more"] if len(texts) > MAX_PROBLEMS else []
        return JobError("\n".join(texts[:MAX_PROBLEMS] + rest))

    def _position(self, place: Place) -> str:
        if self.is_set(place):
            return "--set"
        line = self._line(place)
        return f"{self.file}:{line}" if line else self.file

    def is_set(self, place: Place) -> bool:
        """Tell whether the value at *place* comes from the command line."""
        return any(place[:length] in self.from_command_line for length in range(1, len(place) + 1))

    def _line(self, place: Place) -> int:
        """Return the line of *place*, or of the nearest block around it that has one."""
        return next((self.lines[place[:end]] for end in range(len(place), -1, -1) if place[:end] in self.lines), 0)


def dotted(place: Place, document: Any) -> str:
    """Return a place as people write it, with stages by name: `stages.model.container.image`."""
    steps = [str(step) for step in place]
    if len(place) > 1 and place[0] == "stages" and isinstance(place[1], int):
        steps[1] = stage_labels(document)[place[1]]
    return ".".join(steps)


def stage_labels(document: Any) -> list[str]:
    """Return how each stage of *document* is addressed, whatever state it is in: by its name, else by its index."""
    written = document.get("stages") if isinstance(document, Mapping) else None
    stages = [stage if isinstance(stage, Mapping) else {} for stage in written] if isinstance(written, list) else []
    has_name = [any(stage.get(key) for key in ("name", *STAGE_KINDS)) for stage in stages]
    return [
        name if named else str(index)
        for index, (name, named) in enumerate(zip(stage_names(stages), has_name, strict=True))
    ]


def show(value: Any) -> str:
    """Return *value* as an error text may repeat it: short, without a URL's secrets."""
    match value:
        case None:
            return "nothing"
        case bool():
            return str(value).lower()
        case str():
            cleaned = clean_uri(value)
            return repr(cleaned if len(cleaned) <= 60 else cleaned[:60] + "...")
        case int() | float():
            return str(value) if len(str(value)) <= 60 else "a long number"
        case Mapping():
            return "a mapping"
    return "a list"


def _translate(error: ValidationError) -> Iterator[tuple[Place, str]]:
    for found in error.errors(include_url=False):
        if found["type"] == "too_short" and len(found["input"]) >= found["ctx"]["min_length"]:
            continue  # long enough, only that some items are wrong, and those are reported themselves
        # What stands in <> names a union's member, "[key]" says that the key itself is meant: neither is written.
        place = tuple(
            step for step in found["loc"] if not (isinstance(step, str) and re.fullmatch(r"<\w+>|\[key\]", step))
        )
        context = found.get("ctx", {})
        if found["type"] == "refused" and context["key"]:
            place += tuple(int(step) if step.isdigit() else step for step in context["key"].split("."))
        yield place, _text(found["type"], place, context, found["input"])


def _text(kind: str, place: Place, context: Mapping[str, Any], value: Any) -> str:
    got = "" if SECRET_KEYS & set(place) else f", got {show(value)}"
    match kind:
        case "refused":
            text = str(context["text"])
        case "missing":
            text = "missing, and it has no default"
        case "extra_forbidden":
            keys = _keys_at(place[:-1])
            text = "unknown key" + (did_you_mean(place[-1], keys) or f"; the keys here are {', '.join(keys)}")
        case "literal_error":
            choices = re.findall(r"'([^']*)'", context["expected"])
            text = f"expected {_either(choices)}{got}{did_you_mean(value, choices)}"
        case "too_short" | "too_long" if place == ("stages",):
            text = f"a job has 1 to {MAX_STAGES} stages, and this one has {len(value)}"
        case "too_short" | "string_too_short":
            text = "must not be empty"
        case _ if kind in _BOUNDS:
            text = _BOUNDS[kind].format(**context) + got
        case _:
            # A model that begins to use another constraint of pydantic fails here, and its test says so.
            text = f"expected {_EXPECTED.get(kind) or context['text']}{got}{_quoting(kind, value)}"
    return text


def _quoting(kind: str, value: Any) -> str:
    if kind == "string_type" and isinstance(value, bool | int | float):
        return "; quote it"
    if isinstance(value, str) and isinstance(read_scalar(value), bool | int | float):
        return "; write it without quotes"
    return ""


def _either(choices: Sequence[str]) -> str:
    return " or ".join(filter(None, (", ".join(choices[:-1]), choices[-1])))


def _keys_at(place: Place) -> list[str]:
    """Return the keys that the block at *place* may have."""
    blocks: list[type[Spec]] = [Job]
    for step in (step for step in place if isinstance(step, str)):
        fields = [
            field for block in blocks for name, field in block.model_fields.items() if (field.alias or name) == step
        ]
        blocks = [block for field in fields for block in _blocks_in(field.annotation)]
    return [field.alias or name for block in blocks for name, field in block.model_fields.items()]


def _blocks_in(annotation: Any) -> list[type[Spec]]:
    if isinstance(annotation, type) and issubclass(annotation, Spec):
        return [annotation]
    return [block for part in get_args(annotation) for block in _blocks_in(part)]
