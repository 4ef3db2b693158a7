"""Which records of a run are poison, and what of them must lie in quarantine afterwards.

Where a record is poison the undisturbed run drops it. A bad row is as long as the good one in its place, so that both
runs are cut alike.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random

from tests.chaos.guard import KEY

FLIGHTS = Path(__file__).parents[2] / "sample_data" / "flights"
ROWS = {"01.csv": 1_200, "02.csv": 1_000, "03.csv": 800}
"""The slice of the flight job's data that every run reads."""
TOTAL = sum(ROWS.values())

REASONS = {
    "exception": "Poisoned",
    "segfault": "Killed",
    "hang": "Timeout",
    "memory": "Killed",
    "bad row": "Unparsable",
}


@dataclass(frozen=True)
class Poison:
    """Kinds by file and number of the record in it, from 0."""

    kinds: Mapping[tuple[str, int], str]

    def __len__(self) -> int:
        return len(self.kinds)

    def write_inputs(self, folder: Path, *, drop: bool) -> None:
        """Write the slice, and what the guard does to the poison records in it."""
        records = {}
        (folder / "in").mkdir(parents=True)
        for name, count in ROWS.items():
            with (FLIGHTS / name).open() as file:
                header, *rows = islice(file, count + 1)
            for (of, number), kind in self.kinds.items():
                if of != name:
                    continue
                if kind != "bad row" or drop:
                    records[_key(header, rows[number])] = kind
                else:
                    rows[number] = rows[number].replace(",", ";", 1)
            (folder / "in" / name).write_text(header + "".join(rows))
        (folder / "orders.json").write_text(json.dumps({"drop": drop, "records": records}))

    def quarantine(self) -> list[tuple[str, int, str]]:
        """Object, record and reason of what must lie in quarantine."""
        return sorted((name, number, REASONS[kind]) for (name, number), kind in self.kinds.items())

    def of_file(self, name: str) -> int:
        """How many records of a file are poison."""
        return sum(of == name for of, _ in self.kinds)


def choose_poison(choose: Random, counts: Mapping[str, int]) -> Poison:
    """So many records of each kind, anywhere in the slice."""
    kinds = [kind for kind, count in counts.items() for _ in range(count)]
    everywhere = [(name, number) for name, count in ROWS.items() for number in range(count)]
    return Poison(dict(zip(choose.sample(everywhere, len(kinds)), kinds, strict=True)))


def _key(header: str, row: str) -> str:
    values = dict(zip(header.strip().split(","), row.strip().split(","), strict=True))
    return "-".join(values[name] for name in KEY)
