"""A stage that needs 50 ms a request, 64 in flight, beside the least time that allows: in one split and across 80."""

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
REQUESTS = 12_800
"""Two hundred rounds: of fifty, the run's own begin and end would be two hundredths, more than what splits cost."""
SPLITS = 80
"""Of 160 requests each, which is two and a half rounds."""
ALONE = 40
"""Requests one after the other: what one really takes, the server's timer and the way there included."""
LINE = b"7,0.5\n"


def main() -> None:
    """Print the ideal time over the measured one, for single records and for mini-batches of ten."""
    with open_server(DELAY_S) as url:
        alone_s = asyncio.run(bare_client(url, LINE, ALONE, 1)) / ALONE
        print(f"  {IN_FLIGHT} in flight; a request alone takes {alone_s * 1e3:.1f} ms")
        print(f"  request     splits   took s  of {DELAY_S * 1e3:.0f} ms  of alone   (medians; aim: at least 0.95)")
        bare = [asyncio.run(bare_client(url, LINE, REQUESTS, IN_FLIGHT)) for _ in range(RUNS)]
        _row("bare client", 1, statistics.median(bare), alone_s)
        for records in (1, 10):
            for splits in (1, SPLITS):
                name = f"{records} record{'s' if records > 1 else ''}"
                _row(name, splits, _measure(url, records, splits), alone_s)


def _measure(url: str, records: int, splits: int) -> float:
    size = len(LINE) * records * REQUESTS
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
    return statistics.median(seconds)


def _row(name: str, splits: int, took: float, alone_s: float) -> None:
    stated, real = (REQUESTS * each / IN_FLIGHT / took for each in (DELAY_S, alone_s))
    print(f"  {name:11} {splits:6} {took:8.2f} {stated:9.3f} {real:9.3f}", flush=True)
