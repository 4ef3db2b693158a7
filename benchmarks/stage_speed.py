"""One `endpoint` stage beside a bare client of the same connections, and what its server reaches under wrk."""

import asyncio
import json
import shutil
import statistics
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

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
    SCRATCH.mkdir(parents=True, exist_ok=True)
    with open_server() as url:
        print("  requests/s         wrk      bare client          worker           ratio   (medians)")
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
            pairs = [(asyncio.run(bare_client(url, body, requests)), _worker(job)) for _ in range(RUNS + 1)][1:]
            _row(f"{megabytes} MB" if megabytes else "one record", limit, requests, pairs)


async def bare_client(url: str, body: bytes, requests: int) -> float:
    """Seconds that the client alone needs, with the body at hand and the answers thrown away."""
    connections = Connections(url, {})
    left = iter(range(requests))

    async def post() -> None:
        for _ in left:
            await connections.post(body, HEADERS, 60)

    started = time.perf_counter()
    await asyncio.gather(*(post() for _ in range(IN_FLIGHT)))
    seconds = time.perf_counter() - started
    await connections._close_idle()
    return seconds


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


def _row(name: str, limit: float | None, requests: int, pairs: Sequence[tuple[float, float]]) -> None:
    bare, worker = (requests / statistics.median(pair[i] for pair in pairs) for i in (0, 1))
    ratio = statistics.median(bare_s / worker_s for bare_s, worker_s in pairs)
    wrk = f"{limit:,.0f}" if limit else "no wrk"
    print(f"  {name:12} {wrk:>9} {bare:16,.0f} {worker:15,.0f} {ratio:15.2f}", flush=True)
