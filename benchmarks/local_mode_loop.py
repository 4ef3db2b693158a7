"""CSV lines beside our own copy of the loop of SageMaker's local mode: one request at a time, buffers joined whole."""

import http.client
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from benchmarks.job_files import write_job
from benchmarks.scratch import SCRATCH, emptied
from benchmarks.stage_server import open_server
from benchmarks.worker_side import transform_here

RUNS = 3
LINE = b"7,0.5," + b"x" * 90 + b"\n"
CASES = ((0, 10_000), (1, 100_000), (6, 100_000))
"""MB of a request, 0 for a single record, and how many lines there are."""


def main() -> None:
    """Print the seconds of both and how many times faster the worker is, pair by pair."""
    path = SCRATCH / "local_mode.csv"
    print("  request       lines    local mode s    worker s    times faster   (medians)")
    with open_server() as url:
        for megabytes, lines in CASES:
            path.write_bytes(LINE * lines)
            job = write_job(
                "local_mode",
                input={"uri": path.name, "format": "csv", "header": False},
                batch={"max_payload_mb": megabytes} if megabytes else {"max_records": 1},
                stages=[{"name": "stage", "endpoint": {"url": url}, "content_type": "text/csv"}],
                output={"uri": "output", "format": "raw"},
            )
            pairs = [(local_mode(url, path, megabytes), _worker(job)) for _ in range(RUNS)]
            theirs, ours = (statistics.median(pair[i] for pair in pairs) for i in (0, 1))
            ratio = statistics.median(first / second for first, second in pairs)
            name = f"{megabytes} MB" if megabytes else "one record"
            print(f"  {name:10} {lines:8,} {theirs:15.2f} {ours:11.2f} {ratio:15.1f}", flush=True)


def local_mode(url: str, path: Path, megabytes: int) -> float:
    """Seconds of the loop: text lines, sizes by `sys.getsizeof`, the next request when the last answer is written."""
    parts = urlsplit(url)
    assert parts.hostname
    connection = http.client.HTTPConnection(parts.hostname, parts.port)
    started = time.perf_counter()
    with path.open() as lines, (SCRATCH / "local_mode.out").open("wb") as output:
        for payload in _filled(lines, megabytes * 2**20) if megabytes else lines:
            connection.request("POST", parts.path, payload.encode(), {"Content-Type": "text/csv", "Accept": "text/csv"})
            output.write(connection.getresponse().read())
    connection.close()
    return time.perf_counter() - started


def _filled(lines: Iterator[str], limit: int) -> Iterator[str]:
    """Text up to the limit, as local mode counts and joins it: all of the buffer is copied to measure one line more."""
    buffer = ""
    for line in lines:
        if sys.getsizeof(buffer + line) < limit:
            buffer = buffer + line
        else:
            yield buffer
            buffer = line
    yield buffer


def _worker(job: Path) -> float:
    with emptied("stage_output") as output:
        return transform_here(job, output)
