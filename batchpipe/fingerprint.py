"""What decides a run's answers, as one document: the run id follows from it, and a resume says what of it changed.

Beside the job and the listing of its inputs that is what the job only names: the source of callables, the images of
containers, model files.
"""

import hashlib
import importlib.machinery
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batchpipe.job import Job, StageSpec, fingerprint_document
from batchpipe.plan import Inputs
from batchpipe.stages.engine import EngineError, find_engine
from batchpipe.stages.model_data import model_version

HASHED_WHOLE_BELOW = 16 * 1024 * 1024
SHOWN = 12
"""So much of a digest is shown, as engines do."""
LISTING = "inputs.listing_sha256"


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What decides a run's answers. `document` is kept, so that a later start can say what changed."""

    document: dict[str, Any]

    @property
    def sha256(self) -> str:
        """Digest of the document."""
        return hashlib.sha256(json.dumps(self.document, sort_keys=True).encode()).hexdigest()

    @property
    def run_id(self) -> str:
        """The run id where nobody chose one."""
        return self.sha256[:8]

    def differences(self, other: dict[str, Any]) -> list[str]:
        """What differs from another run's document: a stage's image, or one dotted key each."""
        mine, theirs = dict(_flat(self.document)), dict(_flat(other))
        keys = sorted(key for key in {*mine, *theirs} if mine.get(key) != theirs.get(key))
        return [_difference(key, theirs.get(key), mine.get(key)) for key in keys]


def make_fingerprint(job: Job, inputs: Inputs, *, pulls: bool = True) -> Fingerprint:
    """Put together what shapes the output: the job's answers-deciding keys, its inputs, and the versions of its stages.

    An image that is not there is pulled, unless told otherwise: a run would, and its id must not change by that.
    """
    listed = {"objects": inputs.count, "bytes": inputs.bytes, "listing_sha256": inputs.sha256}
    images = {stage.container.image for stage in job.stages if stage.container and _is_local(job)}
    ids = {image: _image_id(image, pulls=pulls) for image in images}
    versions = {stage.name: _versions(stage, job, ids) for stage in job.stages}
    document = {"name": job.name, "job": fingerprint_document(job), "versions": versions, "inputs": listed}
    return Fingerprint(document)


def _versions(stage: StageSpec, job: Job, images: Mapping[str, str | None]) -> dict[str, str]:
    """What a stage is made of that the job file only names, where the driver can tell what workers have."""
    spec = stage.container or stage.process
    versions = {
        "source": _source_sha256(stage.callable, job) if stage.callable else None,
        "image": images.get(stage.container.image) if stage.container else None,
        "model_data": model_version(stage, spec.model_data) if spec and spec.model_data and _is_local(job) else None,
    }
    return {what: version for what, version in versions.items() if version}


def _is_local(job: Job) -> bool:
    """Whether workers have the driver's own images and files. Of a cluster, two drivers might tell different things."""
    return job.compute.cluster == "local"


def _image_id(image: str, *, pulls: bool) -> str | None:
    """The id of what a tag stands for; None where no engine answers, or it cannot get the image."""
    try:
        return find_engine().image_id(image, pulls=pulls)
    except EngineError:
        return None


def _source_sha256(reference: str, job: Job) -> str | None:
    """Digest of a callable's source: its whole package where it lies on the job's path, model files beside it included.

    An installed library is known by its one module; None for what has no file.
    """
    module = reference.partition(":")[0]
    top = module.partition(".")[0]
    spec = importlib.machinery.PathFinder.find_spec(top, list(job.import_folders))
    if spec is None:
        return None
    folder = Path(next(iter(spec.submodule_search_locations))) if spec.submodule_search_locations else None
    files = sorted(folder.rglob("*")) if folder else [Path(str(spec.origin))]
    digest = hashlib.sha256()
    for file in files:
        if file.is_file() and "__pycache__" not in file.parts:
            digest.update(f"{file.relative_to(folder) if folder else file.name}\0{_file_digest(file)}\n".encode())
    return digest.hexdigest()


def _file_digest(file: Path) -> str:
    stat = file.stat()
    if stat.st_size >= HASHED_WHOLE_BELOW:  # a model of gigabytes is known by its size and time
        return f"{stat.st_size} {stat.st_mtime_ns}"
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _difference(key: str, theirs: Any, mine: Any) -> str:
    if key == LISTING:
        was, now = (str(value)[:SHOWN] for value in (theirs, mine))
        return f"input: an object came, went or was written again (listing was {was}, is {now})"
    block, _, rest = key.partition(".")
    if block != "versions":
        was, now = ("not set" if value is None else value for value in (theirs, mine))
        return f"{key} was {was!r}, is {now!r}"
    stage, _, what = rest.partition(".")
    was, now = ("unknown" if value is None else value[:SHOWN] for value in (theirs, mine))
    return f"stage {stage!r}: {what} was {was}, is {now}"


def _flat(document: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(document, dict) and document:
        for key, value in document.items():
            yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(document, list) and document and isinstance(document[0], dict):
        for place, value in enumerate(document):
            yield from _flat(value, f"{prefix}.{value.get('name') or place}")
    else:
        yield prefix, document
