"""3.37 million flights through three stages to Parquet on 2 workers, beside a handwritten loop. Aim: at most 1.15x."""

import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq

from benchmarks.job_files import WORKERS, run_command
from benchmarks.measure import Finished, in_turn, print_pairs, time_command
from benchmarks.scratch import ROOT, emptied, flights_folder

RUNS = 5


def main() -> None:
    """Check once that both give the same answers, then measure and print."""
    folder = flights_folder()
    with emptied("ours") as ours, emptied("theirs") as theirs:
        time_command(ours_command(folder, ours))
        time_command(theirs_command(folder, theirs))
        same_or_raise(ours, theirs)
    pairs = in_turn(lambda: _run(ours_command, folder), lambda: _run(theirs_command, folder), RUNS)
    print_pairs("batchpipe run", "handwritten loop", pairs, aim=1.15)


def ours_command(folder: Path, output: Path, workers: int = WORKERS) -> list[str]:
    """The command that runs the flight delay job on another dataset."""
    job = ROOT / "jobs" / "flight_delays.yaml"
    return run_command(job, input__uri=f"{folder}/*.csv", output__uri=output, compute__workers=workers)


def theirs_command(folder: Path, output: Path) -> list[str]:
    """The command that does the same without a framework."""
    return [sys.executable, "-m", "benchmarks.handwritten_loop", str(folder), str(output)]


def same_or_raise(ours: Path, theirs: Path) -> None:
    """Compare two outputs row by row, in order. A ratio between different answers would mean nothing."""
    first, second = (pq.read_table(sorted(path.glob("part-*.parquet"))[0].parent) for path in (ours, theirs))
    if not first.equals(second.cast(first.schema)):
        raise SystemExit(f"the two outputs differ: {first.num_rows:,} and {second.num_rows:,} rows")


def _run(command: Callable[[Path, Path], list[str]], folder: Path) -> Finished:
    with emptied("output") as output:
        return time_command(command(folder, output))
