"""What `child` starts as `python -m batchpipe.stages.child_process FOLDER`: one callable, called as it is told to.

It listens on a socket in the folder once the callable is constructed, and ends when its worker hangs up.
"""

import os
import pickle
import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchpipe.batch import Records
from batchpipe.stages import Answer, InvocationFailed, Remedy
from batchpipe.stages.callable import CallableStage, open_callable

if TYPE_CHECKING:
    from batchpipe.job import Job, StageSpec


@dataclass(frozen=True, slots=True)
class Birth:
    """What a child is told at its start. A description."""

    stage: "StageSpec"
    job: "Job"
    hands_on_frames: bool
    memory_bytes: int | None
    """What it may use; None: no limit is known."""


@contextmanager
def socket_path(folder: Path) -> Iterator[str]:
    """A name for the socket in a folder; on Linux one of a few characters, since only about a hundred are allowed."""
    if sys.platform != "linux":
        yield str(folder / "socket")
        return
    descriptor = os.open(folder, os.O_PATH)
    try:
        yield f"/proc/self/fd/{descriptor}/socket"
    finally:
        os.close(descriptor)


def main() -> None:
    """Construct the callable that the folder tells of, then answer until the worker hangs up."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    folder = Path(sys.argv[1])
    birth: Birth = pickle.loads((folder / "birth.pickle").read_bytes())
    take_memory_last(birth.memory_bytes)
    stage = open_callable(birth.stage, birth.job)
    stage.hands_on_frames = birth.hands_on_frames
    with socket_path(folder) as path, Listener(path, "AF_UNIX") as listener, listener.accept() as worker:
        serve(stage, worker)
    os._exit(0)  # whatever threads the user's code has left


def serve(stage: CallableStage, worker: "Connection[Answer | InvocationFailed, Records]") -> None:
    """Answer one request after the other, until the worker hangs up."""
    with suppress(EOFError, ConnectionError):
        while True:
            reply = answer(stage, worker.recv())
            try:
                send(worker, reply, f"stage {stage.name!r}")
            except InvocationFailed as failure:
                worker.send(failure)


def send(to: "Connection[Any, Any]", value: object, who: str) -> None:
    """Send to the other process what `who` answered.

    Raises OSError where that process is gone, and InvocationFailed where the value does not go from one process to
    another: that is the end of the run, and no record's failure.
    """
    try:
        to.send(value)
    except OSError:
        raise
    except Exception as error:
        message = (
            f"{who} answers what cannot be pickled ({type(error).__name__}: {error}), so that the split cannot be tried"
            " again in processes of its own after its worker was lost"
        )
        raise InvocationFailed("CannotBeSent", message, Remedy.NONE) from error


def answer(stage: CallableStage, records: Records) -> Answer | InvocationFailed:
    """What the callable makes of records, or how it failed."""
    try:
        return stage.call(records)
    except InvocationFailed as failure:
        return failure


def take_memory_last(limit: int | None) -> None:
    """A record that asks for more memory than there is gets an error; if the system must kill, it is this process."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    if limit is not None:
        with suppress(OSError, ValueError):  # a lower one may be set already
            resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.getrlimit(resource.RLIMIT_DATA)[1]))


if __name__ == "__main__":
    main()
