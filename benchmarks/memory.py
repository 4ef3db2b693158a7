"""Peak memory on 3 GB beside 0.3 GB, as CSV and as Parquet with large row groups: it should be the same."""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.job_files import WORKERS, run_command, write_job
from benchmarks.measure import watch
from benchmarks.scratch import SCRATCH, emptied, flights_csv

NEEDED_GB = 8
GROUPS = 16
COLUMNS = 8


def main() -> None:
    """Make each dataset, run a stage that keeps two columns, print peaks, delete it again."""
    if shutil.disk_usage(SCRATCH).free < NEEDED_GB * 2**30:
        raise SystemExit(f"{SCRATCH} has less than {NEEDED_GB} GB free")
    print("  dataset                                     MB   driver MB   worker MB, each      wall s")
    for copies in (10, 100):
        _measure("csv", f"csv, {copies} x the flights", partial(write_csv, copies=copies))
    for rows in (300_000, 3_000_000):
        name = f"parquet, {GROUPS} row groups of {rows * COLUMNS * 8 / 1e6:.0f} MB"
        _measure("parquet", name, partial(write_parquet, rows=rows))


def write_csv(path: Path, copies: int) -> None:
    """One CSV file of many copies of the flights."""
    with flights_csv().open("rb") as source, path.open("wb") as target:
        target.write(source.readline())
        start = source.tell()
        for _ in range(copies):
            source.seek(start)
            shutil.copyfileobj(source, target, 1 << 20)


def write_parquet(path: Path, rows: int) -> None:
    """One Parquet file of row groups that do not compress, written one at a time."""
    names = [f"c{number}" for number in range(COLUMNS)]
    random = np.random.default_rng(0)
    with pq.ParquetWriter(path, pa.schema([(name, pa.float64()) for name in names]), compression="none") as writer:
        for _ in range(GROUPS):
            table = pa.table([pa.array(random.random(rows)) for _ in names], names=names)
            writer.write_table(table, row_group_size=rows)


def _measure(format_: str, name: str, write: Callable[[Path], None]) -> None:
    path = SCRATCH / f"large.{format_}"
    types = {"null_values": ["", "NA"]} if format_ == "csv" else {}
    job = write_job(
        "memory",
        input={"uri": path.name, "format": format_, **types},
        stages=[{"name": "first", "callable": "benchmarks.trivial_stages:first_columns"}],
        output={"uri": "output", "format": "parquet"},
        compute={"workers": WORKERS},
    )
    try:
        write(path)
        size = path.stat().st_size / 1e6
        with emptied("output") as output:
            done = watch(run_command(job, output__uri=output))
    finally:
        path.unlink(missing_ok=True)
    workers = "  ".join(f"{worker.peak_mb:6.0f}" for worker in done.workers())
    print(f"  {name:40} {size:6.0f} {done.driver.peak_mb:11.0f}   {workers:18} {done.seconds:9.1f}", flush=True)
