"""`--set KEY=VALUE`: changes single values of a job file before its variables are filled in."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from batchpipe.errors import JobError
from batchpipe.jobfile.problems import dotted, stage_labels
from batchpipe.jobfile.yaml_text import Place, Unquoted, YamlTextError, read_scalar, read_yaml
from batchpipe.specs.spec import did_you_mean

Settings = Sequence[str] | Mapping[str, Any]
"""`KEY=VALUE` texts, or values by key; keys are dotted, with stages by name."""


def apply_settings(document: dict[str, Any], settings: Settings) -> set[Place]:
    """Put every setting into *document* and return the places they changed; blocks that are not there yet are made.

    Raises JobError if a setting cannot be read or leads nowhere. Whether its key exists is found when the job is
    checked.
    """
    return {place for key, value in _iter_settings(settings) for place in _put(document, key, value)}


def setting_options(settings: Settings) -> list[tuple[str, str]]:
    """The options of a command line that change the same values."""
    if isinstance(settings, Mapping):
        texts = [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in settings.items()]
    else:
        texts = list(settings)
    return [("--set", text) for text in texts]


def _iter_settings(settings: Settings) -> Iterator[tuple[str, Any]]:
    if isinstance(settings, Mapping):
        yield from ((key, _read(key, value) if isinstance(value, str) else value) for key, value in settings.items())
        return
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not (key and equals):
            raise JobError(f"--set {setting}: expected KEY=VALUE, such as --set on_error.max_failed_records=1")
        yield key, _read(key, text)


def _read(key: str, text: str) -> Any:
    """Read a value of the command line: a YAML scalar, or a "quoted text", a [list] or a {mapping}."""
    if not text.startswith(("[", "{", '"', "'")):
        return Unquoted(text) if "${" in text else read_scalar(text)
    try:
        document = read_yaml(text)
    except YamlTextError as error:
        raise JobError(f"--set {key}: {error.message}") from None
    if document.problems:
        raise JobError(f"--set {key}: {document.problems[0][1]}")
    return document.value


def _put(document: dict[str, Any], key: str, value: Any) -> Iterator[Place]:
    *above, last = key.split(".")
    block: Any = document
    place: Place = ()
    for step in above:
        place = (*place, _step_into(block, step, key, place, document))
        if isinstance(block, dict) and block.get(step) is None:
            block[step] = {}
            yield place
        block = block[place[-1]]
    place = (*place, _step_into(block, last, key, place, document))
    block[place[-1]] = value
    yield place


def _step_into(block: Any, step: str, key: str, place: Place, document: Mapping[str, Any]) -> str | int:
    """Return *step* as a key or index of *block*, which stands at *place*."""
    if isinstance(block, dict):
        return step
    if not isinstance(block, list):
        raise JobError(f"--set {key}: {dotted(place, document)} has no keys below it")
    labels = stage_labels(document) if place == ("stages",) else []
    indices = [str(index) for index in range(len(block))]
    if step in labels:
        return labels.index(step)
    if step in indices:
        return int(step)
    choices = labels or indices
    there = did_you_mean(step, choices) or "; there is " + ", ".join(choices)
    raise JobError(f"--set {key}: no {step!r} in {dotted(place, document)}{there}")
