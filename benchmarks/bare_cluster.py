"""What a job of any size needs anyway: the libraries that its stages import, and a Dask cluster's start and close.

`python -m benchmarks.bare_cluster WORKERS`.
"""

import sys

import onnxruntime  # noqa: F401 - imported for its time
import pandas as pd  # noqa: F401
import pyarrow.csv
import pyarrow.parquet  # noqa: F401
from distributed import LocalCluster


def main(workers: int) -> None:
    """Start a cluster of processes as Dask does by itself, but for its dashboard, and close it."""
    with LocalCluster(n_workers=workers, threads_per_worker=2, processes=True, dashboard_address=None):
        pass


if __name__ == "__main__":
    main(int(sys.argv[1]))
