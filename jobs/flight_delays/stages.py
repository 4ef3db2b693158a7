"""Flight rows in, one answer a flight out: make_features -> Model -> decide, the three stages of flight_delays.yaml.

The question is asked when an aircraft leaves the gate: will it arrive more than 15 minutes late? Every answer
depends on its own row alone, never on the rows that happen to share its mini-batch.
"""

import json
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from flight_delays.runtime import open_session

KEY = ["year", "month", "day", "sched_dep_time", "carrier", "flight", "origin", "dest"]
FEATURES = ["dep_delay", "dep_minute", "arr_minute", "elapsed", "weekday", "distance", "carrier_code", "origin_code"]
FOLDER = Path(__file__).parent
UNKNOWN = np.nan  # in the trees, what is missing goes the way of most flights
DECISIONS = ["on_time", "late", "cancelled"]

CODES: dict[str, list[str]] = json.loads((FOLDER / "codes.json").read_text(encoding="utf-8"))


def make_features(flights: pd.DataFrame) -> pd.DataFrame:
    """Return the flight key and what is known at departure: delay in minutes, schedule, weekday, distance, codes.

    A flight without a departure delay never left the gate; its delay stays missing. Any other missing number
    raises ValueError, since the flight could not be told from another.
    """
    dep_minute = minute_of_day(whole_numbers(flights, "sched_dep_time"))
    arr_minute = minute_of_day(whole_numbers(flights, "sched_arr_time"))
    return flights[KEY].assign(
        dep_delay=numbers(flights, "dep_delay"),
        dep_minute=dep_minute,
        arr_minute=arr_minute,
        elapsed=(arr_minute - dep_minute) % 1440,  # by local clocks: the time difference is part of it
        weekday=weekday(*(whole_numbers(flights, name) for name in ("year", "month", "day"))),
        distance=whole_numbers(flights, "distance"),
        carrier_code=category_codes(flights["carrier"], CODES["carrier"]),
        origin_code=category_codes(flights["origin"], CODES["origin"]),
    )


class Model:
    """The ONNX model beside this file: from features to the probability of arriving over 15 minutes late."""

    def __init__(self, threads: int = 1, model: str = "model.onnx") -> None:
        """Load *model*, an ONNX file in this folder; each call computes with *threads* threads."""
        self.session = open_session(FOLDER / model, threads)

    def __call__(self, features: pd.DataFrame) -> pd.DataFrame:
        """Return the flight key and ``probability``, missing where the flight never left the gate."""
        matrix = to_matrix(features)
        [by_class] = self.session.run(["probability"], {"features": matrix})
        probability = by_class[:, 1].astype(np.float64)
        probability[np.isnan(matrix[:, FEATURES.index("dep_delay")])] = np.nan
        return features[KEY].assign(probability=probability)


def to_matrix(features: pd.DataFrame) -> NDArray[np.float32]:
    """Return FEATURES side by side as the model takes them, NaN for missing."""
    matrix = np.empty((len(features), len(FEATURES)), dtype=np.float32)
    for place, name in enumerate(FEATURES):
        matrix[:, place] = numbers(features, name)
    return matrix


def decide(answers: pd.DataFrame, late_from: float = 0.5) -> pd.DataFrame:
    """Add ``decision``: late from a probability of *late_from*, else on_time; cancelled without a probability."""
    probability = numbers(answers, "probability")
    choice = np.where(np.isnan(probability), DECISIONS.index("cancelled"), probability >= late_from)
    return answers.assign(decision=pd.array(DECISIONS, dtype="str").take(choice))


def numbers(table: pd.DataFrame, name: str) -> NDArray[np.float64]:
    """Return a column as float64 with NaN for missing, whether it came as float64, Int64 or an Arrow type."""
    values: NDArray[np.float64] = table[name].to_numpy(dtype=np.float64, na_value=np.nan)
    return values


def whole_numbers(table: pd.DataFrame, name: str) -> NDArray[np.int64]:
    """Return a column as int64; raise ValueError naming the column if a value is missing."""
    column = table[name]
    if column.hasnans:
        raise ValueError(f"column {name!r} is empty in {column.isna().sum()} of {len(column)} flights; each needs it")
    values: NDArray[np.int64] = column.to_numpy(dtype=np.int64)
    return values


def minute_of_day(clock: NDArray[np.int64]) -> NDArray[np.int64]:
    """Turn local clock times written as HHMM (517 is 5:17) into minutes since midnight."""
    return clock // 100 * 60 + clock % 100


def weekday(year: NDArray[np.int64], month: NDArray[np.int64], day: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the day of the week, Monday is 0."""
    first_of_month = ((year - 1970) * 12 + month - 1).astype("datetime64[M]").astype("datetime64[D]")
    return (first_of_month.astype(np.int64) + day + 2) % 7  # 1 January 1970 was a Thursday


def category_codes(values: pd.Series, known: list[str]) -> NDArray[np.float64]:
    """Return each value's place in *known*, UNKNOWN for others and missing ones: the same code in every batch."""
    place = {name: code for code, name in enumerate(known)}
    codes, distinct = pd.factorize(values)
    return np.array([*(place.get(name, UNKNOWN) for name in distinct), UNKNOWN], dtype=np.float64)[codes]
