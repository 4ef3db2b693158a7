"""Hourly weather in, chance of rain out: make_features -> Model, the two stages of rain_soon.yaml.

Both work on plain dicts, one a record, and need nothing but the standard library.
"""

import json
import math
from pathlib import Path
from typing import Any

MODEL = Path(__file__).with_name("model.json")


def make_features(hours: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return each hour's airport and time with what the model looks at; what was not measured stays None."""
    return [
        {
            "origin": hour["origin"],
            "time_hour": hour["time_hour"],
            "wet": None if hour["precip"] is None else float(hour["precip"] > 0),
            "humid": hour["humid"],
            "spread": None if None in (hour["temp"], hour["dewp"]) else hour["temp"] - hour["dewp"],
            "pressure": hour["pressure"],
            "visib": hour["visib"],
            "wind_speed": hour["wind_speed"],
        }
        for hour in hours
    ]


class Model:
    """A logistic regression kept as JSON: for each feature its weight, and its mean, used where it was not measured."""

    def __init__(self, rain_from: float = 0.3) -> None:
        """Load the model; *rain_from* is the probability at which ``rain_next_hour`` is true."""
        model = json.loads(MODEL.read_text(encoding="utf-8"))
        self.intercept: float = model["intercept"]
        self.weights: dict[str, float] = model["weights"]
        self.means: dict[str, float] = model["means"]
        self.rain_from = rain_from

    def __call__(self, hours: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return one answer for each hour."""
        return [self.answer(hour) for hour in hours]

    def answer(self, hour: dict[str, Any]) -> dict[str, Any]:
        """Return airport, time, probability of rain in the next hour, and the yes or no that follows."""
        score = self.intercept
        for name, weight in self.weights.items():
            score += weight * (self.means[name] if hour[name] is None else hour[name])
        probability = 1 / (1 + math.exp(-score))
        return {
            "origin": hour["origin"],
            "time_hour": hour["time_hour"],
            "probability": round(probability, 6),
            "rain_next_hour": probability >= self.rain_from,
        }
