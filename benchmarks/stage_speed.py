"""One `endpoint` stage beside a bare client of the same connections, and what its server reaches under wrk."""

import asyncio
import json
import shutil
import statistics
import subprocess
import time
from collections import deque
from collections.abc import Sequence
from itertools import repeat
from pathlib import Path

import numpy as np

from batchpipe.batch import ByteRecords, MiniBatch, Origins, concat_records
from batchpipe.chain import open_chain
from batchpipe.jobfile import load_job
from batchpipe.orders import SINGLE_RECORDS_TOGETHER
from batchpipe.outcome import FailureLimit, new_stats
from batchpipe.stages import StageContext
from batchpipe.stages.connections import Connections
from benchmarks.job_files import write_job
from benchmarks.scratch import SCRATCH, emptied
from benchmarks.stage_server import open_server
from benchmarks.worker_side import transform_here

RUNS = 5
LINE = b"7,0.5," + b"x" * 90 + b"\n"
IN_FLIGHT = 8
HEADERS = {"Content-Type": "text/csv", "Accept": "text/csv"}
PAYLOADS = ((1, 200), (6, 40), (0, 8_000))
"""MB of a request and how many requests; 0 is a single record."""


def main() -> None:
    """Print what the server can do, then the chain beside the bare client, pair by pair."""
    with open_server() as url:
        print("  a second         wrk      bare     chain  ratio    worker  ratio   (medians; aims 0.9, 8,000)")
        for megabytes, requests in PAYLOADS:
            body = LINE * (megabytes * 2**20 // len(LINE)) or LINE
            path = SCRATCH / "stage_speed.csv"
            path.write_bytes(body * requests)
            batch = {"max_payload_mb": len(body) / 2**20} if megabytes else {"max_records": 1}
            job = write_job(
                "stage_speed",
                input={"uri": path.name, "format": "csv", "header": False},
                batch={"max_concurrent_transforms": IN_FLIGHT, **batch},
                stages=[{"name": "stage", "endpoint": {"url": url}, "content_type": "text/csv"}],
                output={"uri": "output", "format": "raw"},
            )
            limit = under_wrk(url, body)
            runs = [
                (asyncio.run(bare_client(url, body, requests)), chain_alone(job, body, requests), _worker(job))
                for _ in range(RUNS + 1)
            ]
            _row(f"{megabytes} MB" if megabytes else "one record", limit, requests, runs[1:])


async def bare_client(url: str, body: bytes, requests: int, in_flight: int = IN_FLIGHT) -> float:
    """Seconds that the client alone needs, with the body at hand and the answers thrown away."""
    connections = Connections(url, {})
    left = iter(range(requests))

    async def post() -> None:
        for _ in left:
            await connections.post(body, HEADERS, 60)

    started = time.perf_counter()
    await asyncio.gather(*(post() for _ in range(in_flight)))
    seconds = time.perf_counter() - started
    await connections.close_idle()
    return seconds


def chain_alone(job_path: Path, body: bytes, requests: int) -> float:
    """Seconds of the chain with mini-batches at hand: nothing is read, cut or written."""
    job = load_job(job_path)
    ends = np.flatnonzero(np.frombuffer(body, np.uint8) == ord("\n")).astype(np.int64) + 1
    starts = np.concatenate([np.zeros(1, np.int64), ends[:-1]])
    together = SINGLE_RECORDS_TOGETHER if len(ends) == 1 else 1
    records = concat_records([ByteRecords(memoryview(body), starts, ends, "text/csv")] * together)
    batch = MiniBatch(records, Origins.of_range(0, 0, np.zeros(len(records), np.int64)))
    with open_chain(job, StageContext("", 0, Path(), Path()), None) as chain:
        started = time.perf_counter()
        deque(chain.stream(repeat(batch, requests // together), FailureLimit(0), new_stats()), maxlen=0)
        return time.perf_counter() - started


def under_wrk(url: str, body: bytes) -> float | None:
    """Requests a second that wrk reaches; None where it is not installed."""
    if not shutil.which("wrk"):
        return None
    (SCRATCH / "body").write_bytes(body)
    script = SCRATCH / "post.lua"
    script.write_text(
        f'local file = io.open({json.dumps(str(SCRATCH / "body"))}, "rb")\n'
        'wrk.method = "POST"\nwrk.body = file:read("*all")\nwrk.headers["Content-Type"] = "text/csv"\n'
    )
    command = ["wrk", "-t1", f"-c{IN_FLIGHT}", "-d2s", "-s", str(script), url]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(next(line.split()[1] for line in printed.splitlines() if line.startswith("Requests/sec")))


def _worker(job: Path) -> float:
    with emptied("stage_output") as output:
        return transform_here(job, output)


def _row(name: str, limit: float | None, requests: int, runs: Sequence[tuple[float, float, float]]) -> None:
    bare, chain, worker = (requests / statistics.median(run[i] for run in runs) for i in range(3))
    of_chain, of_worker = (statistics.median(run[0] / run[i] for run in runs) for i in (1, 2))
    wrk = f"{limit:,.0f}" if limit else "no wrk"
    print(
        f"  {name:10} {wrk:>9} {bare:9,.0f} {chain:9,.0f} {of_chain:6.2f} {worker:9,.0f} {of_worker:6.2f}", flush=True
    )
