"""onnxruntime as a worker wants it: on the threads it is given, silent, and reporting to nobody."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnxruntime


def open_session(model: Path, threads: int) -> "onnxruntime.InferenceSession":
    """Load *model*, an ONNX file, on the CPU; each call computes with *threads* threads."""
    # Read while onnxruntime is imported. Without it, it reports to its makers and keeps files under ~/.cache.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    with muted_stderr():  # it looks for GPUs while it is imported, and warns of those of many virtual machines
        import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # a thread that waits leaves its core
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


@contextmanager
def muted_stderr() -> Iterator[None]:
    """Drop what native code writes to stderr meanwhile; exceptions pass."""
    stderr = os.dup(2)
    try:
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
