"""The flights job without a framework: two processes, byte ranges of the files, the same stages, a Parquet file each.

`python -m benchmarks.handwritten_loop FOLDER OUTPUT`. Written as well as one would by hand for this one job; it knows
that no value holds a newline, gives up at the first bad row, and leaves half an output where it is stopped.
"""

import functools
import multiprocessing
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from benchmarks.scratch import ROOT

sys.path.insert(0, str(ROOT / "jobs"))

from flight_delays.stages import Model, decide, make_features

PROCESSES = 2
RANGE_BYTES = 16 * 1024 * 1024
BATCH_BYTES = 6 * 1024 * 1024
TYPES = {  # the columns and types of jobs/flight_delays.yaml
    "year": pa.int64(),
    "month": pa.int64(),
    "day": pa.int64(),
    "sched_dep_time": pa.int64(),
    "sched_arr_time": pa.int64(),
    "dep_delay": pa.int64(),
    "carrier": pa.string(),
    "flight": pa.int64(),
    "origin": pa.string(),
    "dest": pa.string(),
    "distance": pa.int64(),
}
CONVERT = pacsv.ConvertOptions(
    column_types=TYPES, include_columns=list(TYPES), null_values=["", "NA"], strings_can_be_null=True
)

Range = tuple[Path, int, int]


def iter_ranges(folder: Path) -> Iterator[Range]:
    """Cut every file at line ends into ranges of about RANGE_BYTES, headers left out."""
    for path in sorted(folder.glob("*.csv")):
        with path.open("rb") as file:
            file.readline()
            start, size = file.tell(), path.stat().st_size
            while start < size:
                file.seek(min(start + RANGE_BYTES, size))
                file.readline()
                yield path, start, file.tell()
                start = file.tell()


def iter_batches(found: Range, names: list[str]) -> Iterator[pa.Table]:
    """Read a range BATCH_BYTES at a time, cut at line ends, as tables."""
    path, start, stop = found
    with path.open("rb") as file:
        file.seek(start)
        while (left := stop - file.tell()) > 0:
            lines = file.read(min(BATCH_BYTES, left))
            if not lines.endswith(b"\n"):
                lines += file.readline()
            options = pacsv.ReadOptions(column_names=names, use_threads=False, block_size=len(lines))
            yield pacsv.read_csv(pa.BufferReader(lines), read_options=options, convert_options=CONVERT)


def transform(number: int, found: Range, output: Path) -> None:
    """Send one range through the stages into one Parquet file."""
    with found[0].open("rb") as file:
        names = file.readline().decode().strip().split(",")
    model, writer = open_model(), None
    for table in iter_batches(found, names):
        answers = pa.Table.from_pandas(decide(model(make_features(table.to_pandas()))), preserve_index=False)
        writer = writer or pq.ParquetWriter(output / f"part-{number:08d}.parquet", answers.schema)
        writer.write_table(answers)
    if writer:
        writer.close()


@functools.cache
def open_model() -> Model:
    """Load the model, once in each process."""
    return Model(threads=1)


def main(folder: Path, output: Path) -> None:
    """Transform every file of a folder."""
    output.mkdir(parents=True)
    with multiprocessing.get_context("fork").Pool(PROCESSES, open_model) as pool:
        pool.starmap(transform, ((i, found, output) for i, found in enumerate(iter_ranges(folder))), chunksize=1)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
