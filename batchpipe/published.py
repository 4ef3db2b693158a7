"""A finished output as its readers see it: the manifest, the parts that it names, and those as a dataset."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from batchpipe.manifest import Manifest, Part
from batchpipe.orders import HIDDEN
from batchpipe.storage import Found, ObjectMissingError, Store, join, resolve
from batchpipe.storage.arrow import arrow_path, arrow_system
from batchpipe.storage.listing import sorted_by_uri
from batchpipe.tables import iter_table

DESCRIPTION = "run.json"


def read_manifest(store: Store, root: str, options: Mapping[str, Any] | None = None) -> Manifest | None:
    """The output's current manifest, None where no run has finished."""
    try:
        data = store.read(join(root, HIDDEN, "manifest.json"))
    except ObjectMissingError:
        return None
    return with_dataset(Manifest.model_validate_json(data), store, root, options)


def write_description(store: Store, root: str, run_id: str, document: Mapping[str, Any], schemas: Any) -> None:
    """Keep what a redrive must know of a run: the document of its fingerprint, and the columns that it proved."""
    data = json.dumps({"fingerprint": document, "schemas": schemas}, indent=2).encode() + b"\n"
    store.put(join(root, HIDDEN, run_id, DESCRIPTION), data)


def read_description(store: Store, root: str, manifest: Manifest) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `write_description` wrote of the run that is published."""
    read = json.loads(store.read(join(root, HIDDEN, manifest.run_id, DESCRIPTION)))
    return read["fingerprint"], read["schemas"]


def iter_parts(store: Store, root: str, manifest: Manifest) -> Iterator[Part]:
    """The parts that a manifest names, in order."""
    return map(Part.model_validate_json, iter_table(store, join(root, manifest.parts.uri)))


def iter_parts_left(store: Store, root: str, manifest: Manifest | None) -> Iterator[Part]:
    """The parts that a manifest names; nothing where there is no manifest, or the table of its parts is gone."""
    if manifest is None or not store.exists(join(root, manifest.parts.uri)):
        return iter(())
    return iter_parts(store, root, manifest)


def find_damage(store: Store, root: str, manifest: Manifest) -> str:
    """The first part that is gone or has another size, in words; empty where none is. Lists once and reads no part."""
    folder = resolve(root)
    try:
        parts = sorted_by_uri(
            Found(join(folder, each.uri), each.bytes, "") for each in iter_parts(store, root, manifest)
        )
    except ObjectMissingError:
        return f"{manifest.parts.uri} is missing"
    listed = store.iter_folder(root)
    found = next(listed, None)
    for part in parts:
        while found is not None and found.uri < part.uri:
            found = next(listed, None)
        name = part.uri.removeprefix(join(folder, ""))
        if found is None or found.uri != part.uri:
            return f"{name} is missing"
        if found.size != part.size:
            return f"{name} has {found.size:,} bytes, published were {part.size:,}"
    return ""


def with_dataset(manifest: Manifest, store: Store, root: str, options: Mapping[str, Any] | None) -> Manifest:
    """The manifest, knowing how to open its parts. ``options`` is the job's ``storage_options``, by protocol."""

    def open_dataset() -> Any:
        import pyarrow.dataset as pads  # half a second of imports that only readers should cost

        paths = [arrow_path(join(root, part.uri)) for part in iter_parts(store, root, manifest)]
        form: Any = {"jsonl": "json"}.get(manifest.output_format, manifest.output_format)
        return pads.dataset(paths, format=form, filesystem=arrow_system(root, options))

    return manifest.read_from(open_dataset)
