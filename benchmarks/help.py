"""`batchpipe --help` beside `python -c "import click"`, whole processes. Aim: at most 2x."""

import sys
from pathlib import Path

from benchmarks.measure import in_turn, print_pairs, time_command

RUNS = 11


def main() -> None:
    """Measure and print."""
    batchpipe = str(Path(sys.executable).with_name("batchpipe"))
    pairs = in_turn(
        lambda: time_command([batchpipe, "--help"]), lambda: time_command([sys.executable, "-c", "import click"]), RUNS
    )
    print_pairs("batchpipe --help", "import click", pairs, aim=2.0)
