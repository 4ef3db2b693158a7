"""`${NAME}` and `${NAME:-default}` in a job file: a `--var` first, then what is built in, then the environment.

Values are filled in after YAML is read, so they cannot change a file's structure, and they are not filled in again.
"""

import os
import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from batchpipe.jobfile.yaml_text import Place, Unquoted, read_scalar

RUN_ID = "${run_id}"
"""Stands for the run id until that is known."""

_VARIABLE = re.compile(
    r"""\$\$\{                                      # an escape: a literal ${
      | \$\{ (?: (?P<name> [A-Za-z_][A-Za-z0-9_]* )
                 (?: :- (?P<default> (?: (?!\$\{) [^}] )* ) )? \} )?
    """,
    re.VERBOSE,
)


def variable_values(given: Mapping[str, str], run_id: str | None) -> dict[str, str]:
    """Return the value of every variable there is; without a *run_id* its variable stands for itself."""
    builtin = {"ds": datetime.now(UTC).date().isoformat()}
    return {**os.environ, **builtin, **given, "run_id": RUN_ID if run_id is None else run_id}


def fill_variables(
    value: Any, values: Mapping[str, str], on_problem: Callable[[Place, str], None], place: Place = ()
) -> Any:
    """Return *value* with the variables in its texts replaced; keys are left as they are.

    A text written without quotes is typed afterwards, as if the value stood there. One that holds the run id stays
    text, whether that is known yet or not. What cannot be replaced is told to *on_problem* and stays.
    """
    match value:
        case dict():
            return {key: fill_variables(item, values, on_problem, (*place, key)) for key, item in value.items()}
        case list():
            return [fill_variables(item, values, on_problem, (*place, index)) for index, item in enumerate(value)]
        case str() if "${" in value:
            names = {match["name"] for match in _VARIABLE.finditer(value)}
            filled = _fill(value, values, lambda text: on_problem(place, text))
            return read_scalar(filled) if isinstance(value, Unquoted) and "run_id" not in names else filled
    return value


def _fill(text: str, values: Mapping[str, str], on_problem: Callable[[str], None]) -> str:
    def replacement(found: re.Match[str]) -> str:
        name, default = found["name"], found["default"]
        if found[0] == "$${":
            return "${"
        if name is None:
            on_problem("expected ${NAME} or ${NAME:-default} after ${; write $${ for a literal ${")
        elif default is not None and not values.get(name):  # unset or empty, as in a shell
            return default
        elif name in values:
            return values[name]
        else:
            on_problem(f"variable {name!r} is not set; set it with --var {name}=... or in the environment")
        return found[0]

    filled = _VARIABLE.sub(replacement, text)
    run_ids = sum(values.get("run_id") == RUN_ID for found in _VARIABLE.finditer(text) if found["name"] == "run_id")
    if filled.count(RUN_ID) > run_ids:
        on_problem(f"a literal {RUN_ID} cannot be written: it always stands for the run id")
    return filled
