"""What the driver pays for each of many tiny splits: its own processor time and memory, at 1,000 and at 100,000."""

from pathlib import Path

from benchmarks.job_files import WORKERS, run_command, write_job
from benchmarks.measure import Finished, watch
from benchmarks.scratch import SCRATCH, emptied

COUNTS = (1_000, 100_000)
LINE = b"a record that is as long as fourscore and four characters, which is what a log may hold\n"
LINES_PER_SPLIT = 8


def main() -> None:
    """Run both and print what each split costs, and what one more costs."""
    job = write_job(
        "splits",
        input={"uri": "lines", "format": "lines"},
        batch={"split_mb": LINES_PER_SPLIT * len(LINE) / 2**20},
        stages=[{"name": "same", "callable": "benchmarks.trivial_stages:same"}],
        output={"uri": "output", "format": "raw"},
        compute={"workers": WORKERS},
    )
    print("    splits    wall s   driver s   driver MB   driver ms a split   worker s")
    runs = [(count, _run(job, count)) for count in COUNTS]
    for count, done in runs:
        worker_s = sum(worker.cpu_s for worker in done.workers())
        _row(f"{count:,}", done.seconds, done.driver.cpu_s, done.driver.peak_mb, count, worker_s)
    (few, small), (many, large) = runs
    _row(
        "each more",
        large.seconds - small.seconds,
        large.driver.cpu_s - small.driver.cpu_s,
        large.driver.peak_mb - small.driver.peak_mb,
        many - few,
        sum(worker.cpu_s for worker in large.workers()) - sum(worker.cpu_s for worker in small.workers()),
    )
    print(
        f"  memory: {(large.driver.peak_mb - small.driver.peak_mb) * 2**20 / (many - few):.0f} bytes a split",
        flush=True,
    )


def _run(job: Path, count: int) -> Finished:
    path = SCRATCH / f"lines-{count}"
    if not path.exists():
        path.write_bytes(LINE * LINES_PER_SPLIT * count)
    with emptied("output") as output:
        return watch(run_command(job, input__uri=path, output__uri=output))


def _row(name: str, wall: float, cpu: float, peak: float, count: int, worker_s: float) -> None:
    print(f"  {name:>9} {wall:9.2f} {cpu:10.2f} {peak:11.0f} {1000 * cpu / count:19.3f} {worker_s:10.2f}", flush=True)
