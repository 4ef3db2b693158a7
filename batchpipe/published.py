"""A finished output as its readers see it: the manifest, the parts that it names, and those as a dataset."""

from collections.abc import Iterator, Mapping
from typing import Any

from batchpipe.manifest import Manifest, Part
from batchpipe.orders import HIDDEN
from batchpipe.storage import ObjectMissingError, Store, join
from batchpipe.storage.arrow import arrow_path, arrow_system


def read_manifest(store: Store, root: str, options: Mapping[str, Any] | None = None) -> Manifest | None:
    """The output's current manifest, None where no run has finished."""
    try:
        data = store.read(join(root, HIDDEN, "manifest.json"))
    except ObjectMissingError:
        return None
    return with_dataset(Manifest.model_validate_json(data), store, root, options)


def iter_parts(store: Store, root: str, manifest: Manifest) -> Iterator[Part]:
    """The parts that a manifest names, in order."""
    for line in store.read(join(root, manifest.parts.uri)).splitlines():
        yield Part.model_validate_json(line)


def with_dataset(manifest: Manifest, store: Store, root: str, options: Mapping[str, Any] | None) -> Manifest:
    """The manifest, knowing how to open its parts. ``options`` is the job's ``storage_options``, by protocol."""

    def open_dataset() -> Any:
        import pyarrow.dataset as pads  # half a second of imports that only readers should cost

        paths = [arrow_path(join(root, part.uri)) for part in iter_parts(store, root, manifest)]
        form: Any = {"jsonl": "json"}.get(manifest.output_format, manifest.output_format)
        return pads.dataset(paths, format=form, filesystem=arrow_system(root, options))

    return manifest.read_from(open_dataset)
