"""The workers of one start of a run: how many, opened with the chain they need, and given back."""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from batchpipe.errors import PoolError
from batchpipe.gauge import read_gauge
from batchpipe.job import Job
from batchpipe.processes import Host, WorkerProcesses, available_cores
from batchpipe.redact import mask, secrets_at_work
from batchpipe.worker_chain import close_worker_chain, keep_under_logs, renew_lease

if TYPE_CHECKING:
    from batchpipe.pool import Pool


@contextlib.contextmanager
def open_workers(job: Job, run_id: str, splits: int, host: Host) -> Iterator["Pool"]:
    """Open the pool of a job. Local workers open their chains while this process imports Dask."""
    if host.workers is not None:
        host.workers.open_chain(job, run_id)
        host.workers.start(worker_count(job, splits))
    from batchpipe.cluster import Lease  # Dask is the slowest import of all
    from batchpipe.pool import open_pool

    lease = Lease(renew_lease, close_worker_chain, (run_id,), any(stage.is_http for stage in job.stages))
    with open_pool(job.compute, host.workers, lease, read_gauge, host.scratch) as pool:
        try:
            yield pool
        except PoolError:
            if host.workers is not None:
                host.workers.check_watcher()  # its workers took their driver for gone, and may have said so first
            raise
        finally:
            if host.workers is not None:
                _keep_printed(host.workers, job, run_id)


def _keep_printed(workers: WorkerProcesses, job: Job, run_id: str) -> None:
    """Put what callables printed under the run's ``logs/``."""
    secrets = secrets_at_work(job)
    with contextlib.suppress(OSError):
        for name, text in workers.printed():
            keep_under_logs(job, run_id, name, mask(text, secrets).encode())


def worker_count(job: Job, splits: int) -> int:
    """Local workers: as stated, else one for each core but not more than splits; one where every stage is HTTP."""
    stated = job.compute.workers
    if isinstance(stated, int):
        return stated
    most = available_cores() if isinstance(stated, str) else stated.maximum
    if isinstance(stated, str) and all(stage.is_http for stage in job.stages):
        return 1
    return max(1, min(most, splits))
