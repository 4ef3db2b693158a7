"""What one worker does with all splits of a job, in this process: no Dask, nothing published."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from uuid import uuid4

from batchpipe.chain import Chain
from batchpipe.jobfile import load_job
from batchpipe.orders import Orders, Place, Schemas
from batchpipe.plan import list_inputs, make_plan
from batchpipe.probe import probe
from batchpipe.split import SPLITS_AT_A_TIME, Split
from batchpipe.transform import run_split
from batchpipe.worker_chain import close_worker_chain, open_worker_chain


@dataclass
class Opened:
    """A worker that has answered the first mini-batch, and the seconds it took from opening the chain."""

    chain: Chain
    splits: list[Split]
    orders: Orders
    seconds: float


@contextmanager
def open_here(job_path: Path, output: Path) -> Iterator[Opened]:
    """Open the chain of a job and send its first mini-batch through; close it again."""
    job = load_job(job_path, set={"output.uri": str(output)})
    output.mkdir(parents=True)
    splits = list(make_plan(list_inputs(job.input, output), job))
    run = uuid4().hex[:8]
    orders = Orders(Place(job, run, "part-", "1"), Schemas())
    started = time.perf_counter()
    try:
        chain = open_worker_chain(job, run)
        schemas = probe(tuple(splits[:1]), orders, False)
        assert isinstance(schemas, Schemas)
        yield Opened(chain, splits, replace(orders, schemas=schemas), time.perf_counter() - started)
    finally:
        close_worker_chain(run)


def transform_here(job_path: Path, output: Path) -> float:
    """Seconds from reading the first byte to finishing the last piece, as many splits at a time as a worker runs."""
    with open_here(job_path, output) as opened:
        started = time.perf_counter()
        with ThreadPoolExecutor(SPLITS_AT_A_TIME) as threads:
            results = list(threads.map(lambda split: run_split(opened.chain, split, opened.orders), opened.splits))
        seconds = time.perf_counter() - started
    assert not any(result.stopped for result in results)
    return seconds
