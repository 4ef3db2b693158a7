"""The job file's JSON Schema, for editors that complete and check YAML."""

from collections.abc import Mapping
from typing import Any

from batchpipe.job import Job

_VARIABLE = {"$ref": "#/$defs/Variable"}
_VARIABLE_SCHEMA = {
    "description": "${NAME} or ${NAME:-default}, quoted.",
    "type": "string",
    "pattern": r"\$\{[A-Za-z_]",
}
_NEVER_OR_VARIABLE = (None, "string", "object", "array", "null")


def job_schema() -> dict[str, Any]:
    """Return the JSON Schema of a job file: every key with its description and default.

    Where a number, a flag or one of some words is wanted, a text with a `${variable}` is taken too: its value is
    checked when the job is loaded.
    """
    schema = _tidy(Job.model_json_schema(by_alias=True))
    schema["$defs"]["Variable"] = _VARIABLE_SCHEMA
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "batchpipe job file", **schema}


def _tidy(node: Any) -> Any:
    """Drop what pydantic makes up (titles) or that says nothing, and let variables stand for scalars."""
    if isinstance(node, list):
        return [_tidy(item) for item in node]
    if not isinstance(node, Mapping):
        return node
    tidy: dict[str, Any] = {}
    for key, value in node.items():
        if key in ("properties", "$defs"):
            tidy[key] = {name: _tidy(schema) for name, schema in value.items()}
        elif key in ("anyOf", "oneOf"):
            # A variable may stand for several members of a union, so none is the only one.
            tidy["anyOf"] = _flat([_tidy(member) for member in value])
        elif key == "default":
            # null and "" mean "see the description"; the default of a block is its keys' defaults.
            tidy |= {key: value} if value not in (None, "") and not (value and isinstance(value, dict)) else {}
        elif key != "title":
            tidy[key] = _tidy(value)
    return _or_variable(tidy)


def _or_variable(node: dict[str, Any]) -> dict[str, Any]:
    if "enum" not in node and "const" not in node and node.get("type") in _NEVER_OR_VARIABLE:
        return node
    said: dict[str, Any] = {key: node[key] for key in ("description", "default") if key in node}
    return {**said, "anyOf": [{key: value for key, value in node.items() if key not in said}, _VARIABLE]}


def _flat(members: list[dict[str, Any]]) -> list[dict[str, Any]]:
    flat = [inner for member in members for inner in (member["anyOf"] if [*member] == ["anyOf"] else [member])]
    return [member for index, member in enumerate(flat) if member not in flat[:index]]
