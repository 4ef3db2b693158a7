"""What `child` starts as `python -m batchpipe.stages.child_process FOLDER`: some callables, called as it is told to.

It listens on a socket in the folder once the callables are constructed, and ends when its worker hangs up.
"""

import os
import pickle
import resource
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np

from batchpipe.batch import Records
from batchpipe.convert.frames import FrameRecords
from batchpipe.stages import Answer, InvocationFailed, Remedy, stacks
from batchpipe.stages.callable import CallableStage, open_callable
from batchpipe.stages.kept import JOINED, Rows

if TYPE_CHECKING:
    from batchpipe.job import Job, StageSpec


@dataclass(frozen=True, slots=True)
class Birth:
    """What a child is told at its start. A description."""

    stages: tuple["StageSpec", ...]
    """Each but the last hands the next one DataFrames."""
    job: "Job"
    memory_bytes: int | None
    """What it may use; None: no limit is known."""


@dataclass(frozen=True, slots=True)
class Call:
    """What a child is asked for: what a stage, known by its place among those of the process, makes of records."""

    stage: int
    """JOINED: of no stage, the records are to be kept as they are."""
    records: Records | Rows
    number: int
    """By which a DataFrame that is to be handed on is known afterwards."""
    alive: tuple[int, ...]
    """The frames that may be asked for again."""


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
    """Construct the callables that the folder tells of, then answer until the worker hangs up."""
    stacks.answer_when_asked()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    folder = Path(sys.argv[1])
    birth: Birth = pickle.loads((folder / "birth.pickle").read_bytes())
    take_memory_last(birth.memory_bytes)
    stages = [open_callable(stage, birth.job) for stage in birth.stages]
    for stage in stages[:-1]:
        stage.hands_on_frames = True
    with socket_path(folder) as path, Listener(path, "AF_UNIX") as listener, listener.accept() as worker:
        serve(stages, worker)
    os._exit(0)  # whatever threads the user's code has left


def serve(stages: Sequence[CallableStage], worker: "Connection[Answer | InvocationFailed, Call]") -> None:
    """Answer one call after the other, until the worker hangs up."""
    kept: dict[int, FrameRecords] = {}
    with suppress(EOFError, ConnectionError):
        while True:
            call = worker.recv()
            kept = {number: kept[number] for number in call.alive}
            worker.send(answer(stages, call, kept))


def answer(stages: Sequence[CallableStage], call: Call, kept: dict[int, FrameRecords]) -> Answer | InvocationFailed:
    """What a callable makes of records, or how it failed. Of a DataFrame to be handed on only its rows are told."""
    try:
        made = _made(stages, call, kept)
    except InvocationFailed as failure:
        return failure
    if not isinstance(made.records, FrameRecords):
        return made
    kept[call.number] = made.records
    places = np.arange(len(made.records), dtype=np.int64)
    return Answer(cast("Records", Rows(np.full_like(places, call.number), places)), made.kept)


def _made(stages: Sequence[CallableStage], call: Call, kept: dict[int, FrameRecords]) -> Answer:
    try:
        records = cast("Records", call.records.of(kept) if isinstance(call.records, Rows) else call.records)
    except MemoryError as error:
        raise InvocationFailed(
            "MemoryError", "too little memory to take them out of a frame", Remedy.ISOLATE
        ) from error
    except Exception as error:
        message = f"a callable answers frames that cannot be joined: {error}"
        raise InvocationFailed(type(error).__name__, message, Remedy.NONE) from error
    return Answer(records) if call.stage == JOINED else stages[call.stage].call(records)


def take_memory_last(limit: int | None) -> None:
    """A record that asks for more memory than there is gets an error; if the system must kill, it is this process."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    if limit is not None:
        with suppress(OSError, ValueError):  # a lower one may be set already
            resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.getrlimit(resource.RLIMIT_DATA)[1]))


if __name__ == "__main__":
    main()
