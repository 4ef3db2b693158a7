"""A stage's model files: a local folder as it is; anything else fetched once, unpacked safely, and cached by content.

All workers of a machine share the cache of the user: the first fetches, the others wait and use the same files. What
its store tells no version of (a web server without ETag and Last-Modified) each worker fetches for itself.
"""

import fcntl
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from batchpipe.errors import DISK_FULL, BatchpipeError, StageStartError
from batchpipe.redact import clean_uri
from batchpipe.stages import StageContext
from batchpipe.stages.unpack import UnpackError, inside, iter_files, unpack
from batchpipe.storage import Found, Store, open_store, relative, resolve

if TYPE_CHECKING:
    from batchpipe.job import StageSpec

MAX_CACHE_BYTES = 20 << 30
"""The models used longest ago go first; those in use stay."""
MODEL, FILES, VERIFIED = "model", "files.json", "verified"
"""What lies in the folder of one cached model: itself, the checksums of its files, the run that compared them last."""
_CHUNK = 1 << 20


@contextmanager
def open_model_data(
    stage: "StageSpec", uri: str, context: StageContext, cancelled: threading.Event | None = None
) -> Iterator[Path]:
    """Yield the folder of the stage's model, which stays until this ends. Raises StageStartError."""
    with ExitStack() as held:
        try:
            folder = held.enter_context(_open(uri, stage, context, cancelled))
        except (BatchpipeError, UnpackError, OSError) as exc:
            why = exc.message if isinstance(exc, BatchpipeError) else str(exc)
            msg = f"stage {stage.name!r} did not start: its model_data {clean_uri(uri)!r} cannot be used: {why}"
            advice = (exc.next if isinstance(exc, BatchpipeError) else "") or _advice(stage, exc)
            raise StageStartError(msg, next=advice) from exc
        yield folder


def _advice(stage: "StageSpec", error: Exception) -> str:
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        return "make room where models are unpacked, ~/.cache/batchpipe, or name a larger disk in XDG_CACHE_HOME"
    key = f"stages.{stage.name}.{stage.kind}.model_data"
    return f"put a folder, a tar.gz or a zip there, or correct {key}: a path is relative to the job file's folder"


def model_version(stage: "StageSpec", uri: str) -> str | None:
    """What tells one content of the model from another; None where it cannot be looked at."""
    try:
        uri = resolve(uri)
        found = _find(open_store(uri, stage.storage_options), uri)
    except (BatchpipeError, OSError):
        return None
    # A signature changes with each job file, its object does not.
    return _key([replace(one, uri=clean_uri(one.uri)) for one in found]) if found else None


@contextmanager
def _open(uri: str, stage: "StageSpec", context: StageContext, cancelled: threading.Event | None) -> Iterator[Path]:
    uri = resolve(uri)
    if "://" not in uri and Path(uri).is_dir():
        yield Path(uri)
        return
    store = open_store(uri, stage.storage_options)
    found = _find(store, uri)
    if not found:
        place = clean_uri(uri) if "://" in uri else f"file://{uri}"  # in full, also where the error shortens paths
        raise StageStartError(f"there is nothing at {place}")
    has_versions = all(one.version for one in found)
    entry = (_cache_folder(context) if has_versions else _scratch_folder(context)) / _key(found)
    with _locked(entry.with_suffix(".used"), fcntl.LOCK_SH, cancelled):
        with _locked(entry.with_suffix(".fetched"), fcntl.LOCK_EX, cancelled):
            if not _is_sound(entry, context.run_id):
                _fetch(store, uri, found, entry)
                (entry / VERIFIED).write_text(context.run_id)
            os.utime(entry)
        _evict(entry, MAX_CACHE_BYTES)
        yield entry / MODEL


def _cache_folder(context: StageContext) -> Path:
    """The user's cache, or the worker's scratch where that cannot be written."""
    root = os.environ.get("XDG_CACHE_HOME") or str(Path("~/.cache").expanduser())
    folder = Path(root) / "batchpipe" / "models"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        trial = folder / f".{os.getpid()}-{threading.get_ident()}"
        trial.touch()
        trial.unlink()
    except (OSError, RuntimeError):  # the second: no home at all
        folder = _scratch_folder(context)
    return folder


def _scratch_folder(context: StageContext) -> Path:
    """The worker's own, also for a model that nothing tells from its next version: another run fetches it anew."""
    folder = context.scratch / "models"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _find(store: Store, uri: str) -> list[Found]:
    """The model's archive, or the files of its folder; nothing where there is nothing."""
    if store.exists(uri):
        return [store.stat(uri)]
    return [one for one in store.iter_folder(uri) if one.uri[-1] != "/"]


def _key(found: Sequence[Found]) -> str:
    """Names the content: each object at its size and version."""
    listing = [[one.uri, one.size, one.version] for one in found]
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()[:32]


def _is_sound(entry: Path, run_id: str) -> bool:
    """Whether every file is as it was unpacked. Read in full once a run, told by size for its other workers."""
    try:
        expected: dict[str, list[object]] = json.loads((entry / FILES).read_text())
        is_verified = (entry / VERIFIED).read_text() == run_id
    except (OSError, ValueError):
        return False
    files = {str(file): entry / MODEL / file for file in iter_files(entry / MODEL)}
    if files.keys() != expected.keys():
        return False
    if is_verified:
        return all(path.stat().st_size == expected[name][0] for name, path in files.items())
    if any([path.stat().st_size, _sha256(path)] != expected[name] for name, path in files.items()):
        return False
    (entry / VERIFIED).write_text(run_id)
    return True


def _fetch(store: Store, uri: str, found: Sequence[Found], entry: Path) -> None:
    """Put the model into its place in the cache, whole or not at all."""
    begun = entry.with_suffix(".begun")
    shutil.rmtree(begun, ignore_errors=True)
    try:
        if found[0].uri == uri:
            with store.open(uri, size=found[0].size, version=found[0].version) as archive:
                unpack(archive, found[0].size, begun / MODEL)
        else:
            for one in found:
                _copy(store, one, begun / MODEL / inside(relative(one.uri, uri)))
        _let_images_read(begun / MODEL)
        files = {str(file): begun / MODEL / file for file in iter_files(begun / MODEL)}
        sums = {name: [path.stat().st_size, _sha256(path)] for name, path in files.items()}
        (begun / FILES).write_text(json.dumps(sums))
        shutil.rmtree(entry, ignore_errors=True)
        begun.rename(entry)
    except BaseException:
        shutil.rmtree(begun, ignore_errors=True)
        raise


def _copy(store: Store, found: Found, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with store.open(found.uri, size=found.size, version=found.version) as source, path.open("xb") as file:
        shutil.copyfileobj(source, file, _CHUNK)
    path.chmod(0o444)


def _let_images_read(folder: Path) -> None:
    """Open the folders to an image's own user, whatever our umask says; the cache above them stays the user's."""
    for each in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
        each.chmod(0o755)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _evict(kept: Path, max_bytes: int) -> None:
    """Remove the models used longest ago, and that nobody uses, until the cache is no larger than that."""
    entries = [path for path in kept.parent.iterdir() if path.is_dir() and not path.suffix]
    sizes = {path: sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) for path in entries}
    for entry in sorted(entries, key=lambda path: path.stat().st_mtime):
        if sum(sizes.values()) <= max_bytes:
            return
        with suppress(BlockingIOError), _lock(entry.with_suffix(".used"), fcntl.LOCK_EX):
            shutil.rmtree(entry, ignore_errors=True)
            del sizes[entry]


@contextmanager
def _locked(path: Path, kind: int, cancelled: threading.Event | None) -> Iterator[None]:
    """Wait for a lock, and hold it."""
    with ExitStack() as held:
        while True:
            try:
                held.enter_context(_lock(path, kind))
                break
            except BlockingIOError:
                if (cancelled or threading.Event()).wait(0.05):
                    raise StageStartError("another stage did not start") from None
        yield


@contextmanager
def _lock(path: Path, kind: int) -> Iterator[None]:
    """Hold a lock of the system's, which goes with its process. The file stays, so that all lock the same one."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)
