"""Text -> Job: read the YAML, apply `--set`, fill in `${variables}`, resolve paths, check.

All that is wrong goes into one JobError.
"""

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from batchpipe.errors import JobError
from batchpipe.job import Job, is_uri
from batchpipe.jobfile.problems import Problems, show
from batchpipe.jobfile.settings import Settings, apply_settings, setting_options
from batchpipe.jobfile.variables import RUN_ID, fill_variables, variable_values
from batchpipe.jobfile.yaml_text import Place, YamlTextError, read_yaml

MAX_FILE_BYTES = 1_048_576
"""Far above any job file, far below what a wrong path (a dataset, a device) may hold."""


def load_job(
    path: str | os.PathLike[str],
    *,
    set: Settings = (),
    vars: Mapping[str, str] | None = None,
    run_id: str | None = None,
) -> Job:
    """Read the job file at *path* (YAML or JSON). Raises JobError that lists all that is wrong, with lines and paths.

    *set* changes single values, as `--set` does: `["stages.model.params.threads=2"]`, or a mapping whose values are
    taken as they are if they are no text. Paths in the file are relative to its folder, paths in *set* to the working
    directory; both come back absolute. *vars* are the values of `--var`.

    Without a *run_id* every `${run_id}` stays in the job as it is, to be filled by `fill_run_id`: the default run id
    is made from the job's fingerprint, and that from the job with the variable still in it.
    """
    if "run_id" in (vars or {}):
        raise JobError("--var run_id: the run id is given by --run-id")
    file = os.fspath(path)
    problems = Problems(file)
    try:
        document = read_yaml(_read_text(file))
    except YamlTextError as error:
        position = f"{file}:{error.line}" if error.line else file
        raise JobError(f"{position}: {error.message}") from None
    written = document.value
    if not isinstance(written, dict):
        found = "is empty" if written is None else f"holds {show(written)}"
        raise JobError(f"{file}: {found}; a job file is a mapping with the keys input, stages and output")
    problems.lines = document.lines
    for place, text in document.problems:
        problems.add(place, text)
    problems.from_command_line = apply_settings(written, set)
    filled = fill_variables(written, variable_values(vars or {}, run_id), problems.add)
    absolute = Path(os.path.normpath(Path(file).absolute()))
    _resolve_paths(filled, absolute.parent, problems)
    job = _check(written, filled, absolute, problems)
    return job.with_options(
        *setting_options(set), *(("--var", f"{name}={value}") for name, value in (vars or {}).items())
    )


def fill_run_id(job: Job, run_id: str) -> Job:
    """Return *job* with every `${run_id}` in it replaced by *run_id*."""
    filled = Job.model_validate(_with_run_id(job.model_dump(by_alias=True, exclude_unset=True), run_id))
    filled._path, filled._written = job._path, job._written
    return filled.with_options(*job._given)


def _with_run_id(value: Any, run_id: str) -> Any:
    match value:
        case dict():
            return {key: _with_run_id(item, run_id) for key, item in value.items()}
        case list() | tuple():
            return [_with_run_id(item, run_id) for item in value]
        case str():
            return value.replace(RUN_ID, run_id)
    return value


def _check(written: dict[str, Any], filled: dict[str, Any], path: Path, problems: Problems) -> Job:
    if filled.get("name") is None:
        filled["name"] = _name_of(path)
    try:
        job = Job.model_validate(filled)
    except ValidationError as error:
        problems.add_all(error)
        raise problems.error(filled) from error
    if problems.found:
        raise problems.error(filled)
    job._path, job._written = path, written
    return job


def _name_of(path: Path) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "-", path.stem).lstrip(".-")[:63] or "job"


def _read_text(file: str) -> str:
    try:
        with Path(file).open("rb") as stream:
            content = stream.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        raise JobError(f"{file}: there is no such job file") from None
    except IsADirectoryError:
        raise JobError(f"{file}: is a folder; name a job file in it") from None
    except OSError as error:
        raise JobError(f"{file}: the job file cannot be read: {error.strerror}") from error
    if len(content) > MAX_FILE_BYTES:
        raise JobError(f"{file}: is larger than a job file may be ({MAX_FILE_BYTES:,} bytes)")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise JobError(f"{file}:{line}: byte {error.start} is not UTF-8; a job file is UTF-8 text") from None


def _resolve_paths(document: dict[str, Any], folder: Path, problems: Problems) -> None:
    """Make local paths absolute: those of the file from its folder, those of `--set` from the working directory."""
    for place in _iter_path_places(document):
        path = _value_at(document, *place)
        if isinstance(path, str) and path and not is_uri(path):
            start = Path.cwd() if problems.is_set(place) else folder
            home = os.path.expanduser(path)  # noqa: PTH111 - leaves the ~ of an unknown user as it is, pathlib raises
            _value_at(document, *place[:-1])[place[-1]] = os.path.normpath(start / home)


def _iter_path_places(document: Mapping[str, Any]) -> Iterator[Place]:
    uri = _value_at(document, "input", "uri")
    yield from [("input", "uri")] if isinstance(uri, str) else (("input", "uri", index) for index in _indices(uri))
    yield ("output", "uri")
    yield from (("python_path", index) for index in _indices(document.get("python_path")))
    for index in _indices(document.get("stages")):
        yield from (("stages", index, kind, "model_data") for kind in ("container", "process"))


def _indices(value: Any) -> range:
    return range(len(value) if isinstance(value, list) else 0)


def _value_at(document: Any, *place: str | int) -> Any:
    """Return what stands at *place*, or None where there is no such place: the document is not checked yet."""
    try:
        for step in place:
            document = document[step]
    except (KeyError, TypeError):
        return None
    return document
