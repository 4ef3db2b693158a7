"""A job of 100 rows, beside the imports it needs and a bare cluster's start and close. Aim: at most 1.1x."""

import sys
from itertools import islice
from pathlib import Path

from benchmarks.flights import ours_command
from benchmarks.measure import Finished, in_turn, print_pairs, time_command
from benchmarks.scratch import SCRATCH, emptied, flights_csv

ROWS = 100
WORKERS = 1
"""What both start: a local pool has no more workers than splits."""
RUNS = 7


def main() -> None:
    """Measure and print."""
    folder = _rows()
    bare = [sys.executable, "-m", "benchmarks.bare_cluster", str(WORKERS)]
    pairs = in_turn(lambda: _run(folder), lambda: time_command(bare), RUNS)
    print_pairs("batchpipe run", "imports and a bare cluster", pairs, aim=1.1)


def _rows() -> Path:
    folder = SCRATCH / "small"
    folder.mkdir(exist_ok=True)
    with flights_csv().open() as source:
        (folder / "flights.csv").write_text("".join(islice(source, 1 + ROWS)))
    return folder


def _run(folder: Path) -> Finished:
    with emptied("output") as output:
        return time_command(ours_command(folder, output, WORKERS))
