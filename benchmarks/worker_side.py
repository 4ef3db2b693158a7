"""What one worker does with all splits of a job, in this process: no Dask, nothing published."""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from batchpipe.jobfile import load_job
from batchpipe.orders import Orders, Place, Schemas
from batchpipe.plan import list_inputs, make_plan
from batchpipe.processes import SPLITS_AT_A_TIME
from batchpipe.transform import probe, run_split
from batchpipe.worker_chain import close_worker_chain, open_worker_chain

RUN = "benchmark"


def transform_here(job_path: Path, output: Path) -> float:
    """Seconds from reading the first byte to finishing the last piece, as many splits at a time as a worker runs."""
    job = load_job(job_path, set={"output.uri": str(output)})
    output.mkdir(parents=True)
    inputs = list_inputs(job.input, output)
    splits = list(make_plan(inputs, job))
    orders = Orders(Place(job, RUN, "part-", "1"), Schemas(), 0)
    try:
        chain = open_worker_chain(job, RUN)
        proved = probe(tuple(splits[:1]), orders)
        assert isinstance(proved, Schemas)
        orders = replace(orders, schemas=proved)
        started = time.perf_counter()
        with ThreadPoolExecutor(SPLITS_AT_A_TIME) as threads:
            results = list(threads.map(lambda split: run_split(chain, split, orders), splits))
        seconds = time.perf_counter() - started
    finally:
        close_worker_chain(RUN)
    assert not any(result.stopped for result in results)
    return seconds
