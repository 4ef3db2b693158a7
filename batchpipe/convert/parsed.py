"""The outcome of parsing byte records, and the halving that finds exactly which of them cannot be parsed. Pure."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from batchpipe.batch import ByteRecords, Int64s

MAX_SHOWN = 60
"""Characters of a value that an error text shows."""


@dataclass(frozen=True, slots=True)
class BadRecord:
    """A record that could not be parsed: its place among those given, and why.

    ``column`` and ``value`` where a value does not fit its column's type; ``is_guess`` says that this type was
    inferred, not stated: then the guess was wrong and not the record. ``fitting`` is a type that holds the value.
    """

    index: int
    reason: str
    column: str | None = None
    value: str | None = None
    is_guess: bool = False
    fitting: str = "string"


@dataclass(frozen=True, slots=True, eq=False)
class Parsed:
    """``table`` has the records that could be parsed, ``kept`` their places among all, ``failures`` the rest."""

    table: pa.Table
    kept: Int64s
    failures: list[BadRecord] = field(default_factory=list)


class UnparsedError(Exception):
    """Some record of several could not be parsed."""


Attempt = Callable[[ByteRecords], tuple[pa.Table, dict[int, str]]]
"""Parses records at once, or raises UnparsedError. Returns the table without the records that it names as bad."""


def parse_halving(records: ByteRecords, attempt: Attempt, explain: Callable[[ByteRecords], BadRecord]) -> Parsed:
    """Parse records with as few attempts as possible: one if all are well, about bad x log(n) otherwise.

    ``explain`` is given a record that alone could not be parsed, and says why (its index is filled in here).
    """
    tables: list[pa.Table] = []
    failures: list[BadRecord] = []
    waiting = [(0, len(records))] if len(records) else []
    while waiting:
        start, stop = waiting.pop()
        part = records.slice(start, stop)
        try:
            table, bad = attempt(part)
        except UnparsedError:
            if stop - start > 1:
                middle = (start + stop) // 2
                waiting += [(middle, stop), (start, middle)]
            else:
                why = explain(part)
                failures.append(BadRecord(start, why.reason, why.column, why.value, why.is_guess, why.fitting))
            continue
        tables.append(table)
        failures += [BadRecord(start + place, reason) for place, reason in bad.items()]
    kept = np.ones(len(records), np.bool_)
    kept[[bad.index for bad in failures]] = False
    whole = tables[0] if len(tables) == 1 else pa.concat_tables(tables) if tables else attempt_nothing(records, attempt)
    return Parsed(whole, np.flatnonzero(kept), failures)


def attempt_nothing(records: ByteRecords, attempt: Attempt) -> pa.Table:
    """Return the table of no records."""
    return attempt(records.slice(0, 0))[0]


def shown(value: str) -> str:
    """Return a value as an error text shows it."""
    return repr(value if len(value) <= MAX_SHOWN else value[:MAX_SHOWN] + "...")


def fitting_type(value: str, guessed: pa.DataType) -> str:
    """Return the type to state for a column whose values were all ``guessed`` but for this one."""
    for name, number, narrower in (("int64", int, [pa.null()]), ("float64", float, [pa.null(), pa.int64()])):
        try:
            number(value)
        except ValueError:
            continue
        if guessed in narrower and "_" not in value:
            return name
    return "string"
