"""What a local pool starts as `python -m batchpipe.worker FOLDER NAME COPY`: one Dask worker with the run's chain.

It imports and opens the chain at once, while the driver still lists inputs and starts its scheduler, and then waits
for the folder to say where the scheduler is.
"""

import asyncio
import contextlib
import json
import logging
import os
import pickle
import signal
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from batchpipe.processes import QUIET_DASK
from batchpipe.split import SPLITS_AT_A_TIME
from batchpipe.stages import stacks

if TYPE_CHECKING:
    from batchpipe.job import Job

WAIT_S = 600.0
PARENT_S = 0.5
CLOSE_S = 7.0


def main() -> None:
    """Join the cluster that FOLDER names and work until the scheduler goes away."""
    stacks.answer_when_asked()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(OSError):  # a worker can be replaced, so the system shall take it before the driver
        Path("/proc/self/oom_score_adj").write_text("500")
    folder, name, copy = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), name="end with parent", daemon=True).start()
    import distributed  # noqa: F401 - the slowest import first, so that the thread below does not contend for it

    threading.Thread(target=_open_chain, args=(folder, copy), name="open chain", daemon=True).start()
    cluster = json.loads(_wait_for(folder / "cluster.json"))
    asyncio.run(_work(cluster["address"], cluster["security"], folder, name))


def _end_with_parent(parent: int) -> None:
    """End when the watcher that started this worker is gone, with what the stages hold, for theirs may be gone as well.

    A stage may be in a call that never returns.
    """
    while os.getppid() == parent:
        time.sleep(PARENT_S)
    if worker_chain := sys.modules.get("batchpipe.worker_chain"):
        closing = threading.Thread(target=worker_chain.close_all, daemon=True)
        closing.start()
        closing.join(CLOSE_S)
    os._exit(1)


def _open_chain(folder: Path, copy: int) -> None:
    from batchpipe import probe  # noqa: F401 - what tasks will need, imported while nobody waits for it
    from batchpipe.errors import BatchpipeError
    from batchpipe.stages.contract import callables_devices
    from batchpipe.worker_chain import be_copy, open_worker_chain

    be_copy(copy, folder)
    job, run_id = pickle.loads(_wait_for(folder / "chain.pickle"))
    os.environ.update(callables_devices(job, copy))  # before any of their modules is imported
    threading.Thread(target=_open_stores, args=(job,), name="open stores", daemon=True).start()
    with contextlib.suppress(BatchpipeError):  # the first task opens it again and brings the error to the driver
        open_worker_chain(job, run_id)


def _open_stores(job: "Job") -> None:
    """Import what the job's stores need, which for S3 takes longer than to read a split."""
    from batchpipe.errors import BatchpipeError
    from batchpipe.storage import open_store

    with contextlib.suppress(BatchpipeError):
        for uri, spec in (job.input.uri[0], job.input), (job.output.uri, job.output):
            open_store(uri, spec.storage_options)


async def _work(address: str, security: dict[str, str], folder: Path, name: str) -> None:
    import dask
    from distributed import Security, Worker

    logging.getLogger("distributed").setLevel(logging.WARNING)  # the log is for what the user's code prints
    settings = {
        **QUIET_DASK,
        "distributed.worker.http.routes": [],
        "distributed.worker.memory.target": False,
        "distributed.worker.memory.spill": False,
        "distributed.worker.memory.pause": False,
        "distributed.worker.memory.terminate": False,
    }
    with dask.config.set(settings):
        worker = Worker(
            address,
            nthreads=SPLITS_AT_A_TIME,
            name=name,
            host="127.0.0.1",
            security=Security(require_encryption=True, **security),
            local_directory=str(folder),
            memory_limit=0,
            dashboard=False,
        )
        async with worker:
            await worker.finished()


def _wait_for(path: Path) -> bytes:
    deadline = time.monotonic() + WAIT_S
    while not path.exists():
        if time.monotonic() > deadline or not path.parent.exists():
            sys.exit(f"the driver never wrote {path.name}")
        time.sleep(0.005)
    return path.read_bytes()


if __name__ == "__main__":
    main()
