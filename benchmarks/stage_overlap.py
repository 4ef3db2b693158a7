"""A stage that needs 50 ms a request, 64 in flight, beside the least time that allows: in one split and across 20."""

import asyncio
import statistics

from benchmarks.job_files import write_job
from benchmarks.scratch import SCRATCH, emptied
from benchmarks.stage_server import open_server
from benchmarks.stage_speed import bare_client
from benchmarks.worker_side import transform_here

RUNS = 3
DELAY_S = 0.05
IN_FLIGHT = 64
REQUESTS = 3_200
LINE = b"7,0.5\n"


def main() -> None:
    """Print the ideal time over the measured one, for single records and for mini-batches of ten."""
    SCRATCH.mkdir(parents=True, exist_ok=True)
    print("  request      splits    ideal s   worker s   overlap   (medians; aim: at least 0.95)")
    with open_server(DELAY_S) as url:
        bare = [asyncio.run(bare_client(url, LINE, REQUESTS, IN_FLIGHT)) for _ in range(RUNS)]
        _row("bare client", 1, statistics.median(bare))
        for records in (1, 10):
            size = len(LINE) * records * REQUESTS
            for splits in (1, 20):
                _measure(url, records, splits, size)


def _measure(url: str, records: int, splits: int, size: int) -> None:
    path = SCRATCH / "stage_overlap.csv"
    path.write_bytes(LINE * (size // len(LINE)))
    job = write_job(
        "stage_overlap",
        input={"uri": path.name, "format": "csv", "header": False},
        batch={
            "max_concurrent_transforms": IN_FLIGHT,
            "max_records": records,
            "split_mb": size / splits / 2**20,
        },
        stages=[{"name": "stage", "endpoint": {"url": url}, "content_type": "text/csv"}],
        output={"uri": "output", "format": "raw"},
    )
    seconds = []
    for _ in range(RUNS):
        with emptied("stage_output") as output:
            seconds.append(transform_here(job, output))
    _row(f"{records} record{'s' if records > 1 else ''}", splits, statistics.median(seconds))


def _row(name: str, splits: int, took: float) -> None:
    ideal = REQUESTS * DELAY_S / IN_FLIGHT
    print(f"  {name:11} {splits:7} {ideal:10.2f} {took:10.2f} {ideal / took:9.3f}", flush=True)
