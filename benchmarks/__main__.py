"""`python -m benchmarks [NAME ...]`: run the named benchmarks, or all of them, and print their tables."""

import importlib
import os
import sys

from benchmarks.scratch import SCRATCH

NAMES = (
    *("help", "small", "flights", "splits"),
    *("stage_speed", "stage_overlap", "local_mode_loop", "container_start"),
    "memory",
)
"""Cheapest first. `memory` needs 8 GB of disk and several minutes."""


def main(names: list[str]) -> int:
    """Run benchmarks by name. Return 2 for a name that is none."""
    if unknown := [name for name in names if name not in NAMES]:
        print(f"error: no benchmark {unknown[0]!r}; there are {', '.join(NAMES)}", file=sys.stderr)
        return 2
    print(f"{os.cpu_count()} cores, load average {os.getloadavg()[0]:.2f}; ratios hold, seconds drift", flush=True)
    SCRATCH.mkdir(parents=True, exist_ok=True)
    for name in names or NAMES:
        module = importlib.import_module(f"benchmarks.{name}")
        print(f"\n{name}: {(module.__doc__ or '').splitlines()[0]}", flush=True)
        module.main()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
