"""batchpipe: a batch transform job runner. One command reads, transforms, writes, proves and releases."""

from typing import Any

__version__ = "0.1.0"
__all__ = ["Job", "Manifest", "__version__", "load_job", "redrive_job", "run_chain", "run_job"]

_HOMES = {
    "Job": "job",
    "Manifest": "manifest",
    "load_job": "jobfile",
    "redrive_job": "runner",
    "run_chain": "transform",
    "run_job": "runner",
}


def __getattr__(name: str) -> Any:
    # Imported when first used: `batchpipe --help` and a worker's first second need none of them.
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(f"batchpipe.{_HOMES[name]}"), name)
    msg = f"module 'batchpipe' has no attribute {name!r}"
    raise AttributeError(msg)
